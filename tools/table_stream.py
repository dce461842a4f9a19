"""Print the README's tables of `bench_stream.json` and `bench_live.json` in `tools/results/`.

`python tools/table_stream.py [STREAM [LIVE]]` takes others. Peers stand below each capture, the
best of them at a mark in bold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Levels = Mapping[Any, float]
"""A mark in seconds, as a number or as JSON writes it, -> dB."""


def main() -> None:
    """What `tables` and `live` make of the two files."""
    results = Path(__file__).parent / "results"
    named = [results / "bench_stream.json", results / "bench_live.json"]
    given = [Path(word) for word in sys.argv[1:]]
    stream, flown = (
        json.loads(path.read_text(encoding="utf-8")) for path in given + named[len(given) :]
    )
    print("\n\n".join("\n".join(lines) for lines in [*tables(stream), live(flown["rows"])]))


def tables(data: dict[str, Any]) -> list[list[str]]:
    """PSNR beside the peers', what it cost, and the mean over folds with its interval."""
    if not data["runs"]:
        return []
    own = [run for run in data["runs"] if run["fold"] is None]
    return [quality(own, data["peers"]), costs(own), folds(data["summary"])]


def level(levels: Levels, mark: float) -> float | None:
    """A peer's dB at a mark."""
    found: float | None = levels.get(int(mark), levels.get(str(int(mark))))
    return found


def best_peer(peers: Mapping[str, Levels], mark: float) -> tuple[str, float] | None:
    """The name and dB of the best of a capture's peers at a mark."""
    found = [(name, level(levels, mark)) for name, levels in peers.items()]
    known = [(name, value) for name, value in found if value is not None]
    return max(known, key=lambda pair: pair[1]) if known else None


def quality(runs: list[dict[str, Any]], peers: Mapping[str, Mapping[str, Levels]]) -> list[str]:
    """One row per capture and peer, one column per mark; in brackets ours minus the best peer."""
    marks = sorted({row["mark_s"] for run in runs for row in run["rows"]})
    heads = [f"{mark:.0f} s" for mark in marks]
    lines = row_of(["capture", *heads, "SSIM", "peak memory"], head=True)
    for run in runs:
        others = peers.get(run["capture"], {})
        best = {mark: best_peer(others, mark) for mark in marks}
        own, cells = {row["mark_s"]: row["psnr"] for row in run["rows"]}, []
        for mark in marks:
            peer = best[mark]
            gain = "" if peer is None or mark not in own else f" ({own[mark] - peer[1]:+.2f})"
            cells.append(f"{own[mark]:.2f}{gain}" if mark in own else "")
        tail = [f"{run['rows'][-1]['ssim']:.2f}", f"{run['peak_memory_mb']:.0f} MB"]
        lines += row_of([run["capture"], *cells, *tail])
        for name, levels in others.items():
            cells = [_peer_cell(level(levels, mark), best[mark]) for mark in marks]
            lines += row_of([f"{run['capture']}, {name}", *cells, "", ""])
    return lines


def _peer_cell(value: float | None, best: tuple[str, float] | None) -> str:
    if value is None or best is None:
        return ""
    return f"**{value:.2f}**" if value == best[1] else f"{value:.2f}"


def live(rows: list[dict[str, Any]]) -> list[str]:
    """What flights showed while they were flown: their end, and when blocks became useful."""
    heads = ["capture", "frames/s", "at the end", "blocks useful", "after (median)", "slowest"]
    lines = row_of(heads, head=True)
    for row in (row for row in rows if "summary" in row):
        found, of = row["summary"], f", first {row['first_frames']}" if row["first_frames"] else ""
        seconds = [found["wall_s"][key] for key in ("median", "slowest")]
        told = ["never" if s is None else f"{s:.1f} s" for s in seconds]
        cells = [f"{row['rate_hz']:g}", f"{row['end']['psnr']:.2f} dB"]
        cells += [f"{found['useful']} of {found['blocks_in_views']}", *told]
        lines += row_of([row["capture"] + of, *cells])
    return lines


def costs(runs: list[dict[str, Any]]) -> list[str]:
    """Speeds, and how far the surface is from the sparse points, at the last mark."""
    heads = ["capture", "frames accepted/s", "steps per CPU s", "CPU s per render", "depth error"]
    lines = row_of(heads, head=True)
    for run in runs:
        last, sparse = run["rows"][-1], run["shape"].get("sparse_points", {})
        cells = [f"{run['accepted_per_s']:.0f}", f"{last['steps_per_cpu_s']:.1f}"]
        cells += [f"{last['render_cpu_s']:.2f}"]
        lines += row_of([run["capture"], *cells, f"{sparse.get('median_m', float('nan')):.2f} m"])
    return lines


def folds(summary: dict[str, Any]) -> list[str]:
    """Mean PSNR over all held-out views of all folds at each mark, with its 95 % interval."""
    lines = row_of(["capture", "mark", "views", "PSNR", "since the mark before"], head=True)
    for name, marks in summary.items():
        for mark, found in marks.items():
            since = found.get("gain_since_mark_before", {}).get("verdict", "")
            shown = f"{found['psnr']:.2f}"
            if found["interval"] is not None:
                shown += " [{:.2f}, {:.2f}]".format(*found["interval"])
            lines += row_of([name, f"{mark} s", str(found["views"]), shown, since])
    return lines


def row_of(cells: list[str], *, head: bool = False) -> list[str]:
    """A Markdown table's row, with the line below it for a head."""
    line = "| " + " | ".join(cells) + " |"
    return [line, "|---" * len(cells) + "|"] if head else [line]


if __name__ == "__main__":
    main()
