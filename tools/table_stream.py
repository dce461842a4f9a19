"""Print the README's tables of `tools/results/bench_stream.json`, or of another such file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """PSNR beside the peer's, what it cost, and the mean over folds with its interval."""
    named = Path(__file__).parent / "results" / "bench_stream.json"
    data = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else named).read_text())
    own = [run for run in data["runs"] if run["fold"] is None]
    tables = [quality(own, data["peers"]), costs(own), folds(data["summary"])]
    print("\n\n".join("\n".join(lines) for lines in tables))


def quality(runs: list[dict[str, Any]], peers: dict[str, dict[str, float]]) -> list[str]:
    """One row per capture, one column per mark: ours, in brackets the difference to the peer."""
    marks = [int(row["mark_s"]) for row in runs[0]["rows"]]
    lines = row_of(["capture", *(f"{mark} s" for mark in marks), "SSIM", "peak memory"], head=True)
    for run in runs:
        peer, cells = peers.get(run["capture"], {}), []
        for row in run["rows"]:
            other = peer.get(str(int(row["mark_s"])))
            gain = "" if other is None else f" ({row['psnr'] - other:+.2f})"
            cells.append(f"{row['psnr']:.2f}{gain}")
        tail = [f"{run['rows'][-1]['ssim']:.2f}", f"{run['peak_memory_mb']:.0f} MB"]
        lines += row_of([run["capture"], *cells, *tail])
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
            low, high = found["interval"]
            since = found.get("gain_since_mark_before", {}).get("verdict", "")
            shown = f"{found['psnr']:.2f} [{low:.2f}, {high:.2f}]"
            lines += row_of([name, f"{mark} s", str(found["views"]), shown, since])
    return lines


def row_of(cells: list[str], *, head: bool = False) -> list[str]:
    """A Markdown table's row, with the line below it for a head."""
    line = "| " + " | ".join(cells) + " |"
    return [line, "|---" * len(cells) + "|"] if head else [line]


if __name__ == "__main__":
    main()
