"""Held-out PSNR against the daemon's CPU seconds on real captures, beside the peers' levels.

    python tools/bench_stream.py [--capture boruszyn ...] [--marks 15,30,60,120,240]
    python tools/bench_stream.py --folds 1,3,5          # other held-out frames, mark 60 alone

Every capture goes through a daemon of its own over its socket, all train frames at once in capture
order; `test` frames are never sent. The clock is the daemon's CPU time from the first accepted
frame, without the renders that this benchmark asks for. Folds hold out every 8th frame from each
of the numbers on instead of the capture's own split. At the last mark depth is compared with the
capture's sparse points (`points3d.ply`), and where its frames carry exact depth the surface model
with the exact one; both are for measuring only and never sent. Runs are added to the JSON as they
come; a finished one is not run again, those of another protocol or other marks are measured anew.
The README's tables are printed at the end; `--against FILE` pairs every view with that of another
result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mclnf_edge.captures import Capture, open_capture  # noqa: E402
from mclnf_edge.client import Client  # noqa: E402
from mclnf_edge.evaluate import evaluate  # noqa: E402
from mclnf_edge.images import decode_depth  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.report import write_json  # noqa: E402
from mclnf_edge.types import Render, View  # noqa: E402
from meta_trainer.evaluate import bootstrap  # noqa: E402
from tools import daemons, ground, measure  # noqa: E402
from tools.bench_unknown import points  # noqa: E402
from tools.table_stream import best_peer, tables  # noqa: E402

PEERS = {
    "boruszyn": {
        "OpenSplat": {15: 13.96, 30: 15.86, 60: 17.50, 120: 18.95, 240: 19.50},
        "nerfacto": {15: 12.79, 30: 12.85, 60: 12.85, 120: 12.97, 240: 13.77},
        "plane sketch": {15: 15.09, 30: 16.80, 60: 19.47, 120: 19.47, 240: 20.19},
    },
    "ochota_a": {
        "OpenSplat": {15: 14.44, 30: 16.53, 60: 18.63, 120: 20.74, 240: 21.98},
        "nerfacto": {15: 14.24, 30: 14.29, 60: 14.29},
        "plane sketch": {15: 17.29, 30: 18.56, 60: 19.36, 120: 20.60, 240: 21.98},
    },
    "brighton": {
        "OpenSplat": {15: 12.70, 30: 14.99, 60: 16.84, 120: 17.85, 240: 17.64},
    },
}
"""dB at CPU seconds on two cores of another machine. The plane sketch: one network of feature
planes in eager PyTorch from a random start, all frames at once."""

MEASURED = ROOT / "tools/results/peers.json"
"""What `python -m tools.peers` measured."""

MARKS = "15,30,60,120,240"
HORIZON_S = 240.0
"""The budget is that of a run to this mark also when the last mark comes earlier."""
SURFACE_CELL_M = 1.0

Row = dict[str, Any]


def peers() -> dict[str, dict[str, dict[int, float]]]:
    """Capture -> trainer -> dB at CPU seconds: `PEERS`, and those that were measured here."""
    out = {capture: dict(levels) for capture, levels in PEERS.items()}
    if MEASURED.exists():
        for run in json.loads(MEASURED.read_text(encoding="utf-8"))["runs"]:
            levels = {round(row["mark_s"]): round(row["psnr"], 2) for row in run["rows"]}
            out.setdefault(run["capture"], {})[f"{run['peer']} (tools.peers)"] = levels
    return out


def protocol() -> Row:
    """What the runs have in common; runs of another protocol are measured anew."""
    return measure.module_facts(load_init(None)) | {
        "settings": settings(
            "1.5 x the last mark, at least the horizon / frames sent", "the run's"
        ),
        "horizon_s": HORIZON_S,
        "sent": "all train frames at once in capture order, without depth",
        "surface_cell_m": SURFACE_CELL_M,
    }


def settings(budget_s_per_frame: Any, seed: Any) -> Row:
    """The daemon's: modules learn to the end, none is closed for lack of passes or of frames."""
    return {
        "adapt": {"budget_s_per_frame": budget_s_per_frame, "passes": 1000.0, "seed": seed},
        "map": {"inactivity_s": 100000.0},
    }


def run(path: Path, marks: Sequence[float], fold: int | None, seed: int) -> Row:
    """One capture through one daemon; a row per mark."""
    capture = open_capture(path).fold(fold)
    train = list(daemons.published(capture))
    seconds = 1.5 * max(HORIZON_S, marks[-1]) / len(train)
    with (
        daemons.daemon(settings(seconds, seed)) as running,
        Client(running.address, give_up_s=300) as client,
    ):
        client.hello(stream=capture.name, world=capture.world)
        start, began = daemons.busy_s(client.status()), time.monotonic()
        counts = client.publish(train)
        accepting = time.monotonic() - began
        rows: list[Row] = []
        renders: list[Render] = []
        for mark in marks:
            row, renders = at_mark(client, capture, mark, start)
            rows.append(row)
            say(capture.name, fold, row)
        status = client.status()
        shape = shapes(path, capture, renders)
    return {
        **key_of(path, fold, seed), "marks": list(marks), "sent": len(train),
        "budget_s_per_frame": seconds,
        "held_out": [f.name for f in capture.split("test").frames],
        "accepted": counts["accepted"], "accepted_per_s": counts["accepted"] / accepting,
        "rows": rows, "shape": shape, "modules": len(status["modules"]),
        "cell_size_m": status["cell_size_m"], "peak_memory_mb": status["peak_memory_mb"],
        "map_problems": running.problems,
    }  # fmt: skip


def key_of(path: Path, fold: int | None, seed: int) -> Row:
    """What tells a run from the others."""
    return {"capture": path.name, "fold": fold, "seed": seed}


def at_mark(
    client: Client, capture: Capture, mark: float, start: float
) -> tuple[Row, list[Render]]:
    """Wait for a mark, then render the held-out views: the figures and the renders."""
    while (used := daemons.busy_s(status := client.status()) - start) < mark:
        time.sleep(0.2)
    renders: list[Render] = []

    def render(view: View) -> Render:
        renders.append(client.render(view))
        return renders[-1]

    began = time.monotonic()
    figures = evaluate(capture, render, "test")
    waited, after = time.monotonic() - began, client.status()
    count = max(after["renders"] - status["renders"], 1)
    row = {"mark_s": mark, "cpu_s": used, "steps": status["steps"]}
    row |= {k: figures[k] for k in ("psnr", "psnr_known", "psnr_aligned", "ssim", "known")}
    row["render_cpu_s"] = (after["render_cpu_s"] - status["render_cpu_s"]) / count
    row |= {"render_wall_s": waited / count, "steps_per_cpu_s": status["steps"] / used}
    return row | {"views": figures["views"]}, renders


def shapes(path: Path, capture: Capture, renders: Sequence[Render]) -> Row:
    """Depth errors of the held-out renders: at sparse points and of the surface model."""
    found: Row = {}
    frames = list(capture.split("test").frames)
    if (path / "points3d.ply").exists():
        at = ground.read_ply(path / "points3d.ply")
        pairs = zip(frames, renders, strict=True)
        errors = np.concatenate([ground.sparse_errors(f, r.depth, at) for f, r in pairs])
        found["sparse_points"] = {
            "median_m": float(np.median(errors)) if len(errors) else None,
            "within_1_m": float((errors < 1).mean()) if len(errors) else None,
            "points": len(errors),
        }
    exact: list[npt.NDArray[np.float64]] = []
    shown: list[npt.NDArray[np.float64]] = []
    for frame, done in zip(frames, renders, strict=True):
        if frame.depth is not None:
            truth = decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
            exact.append(points(frame, truth))
            shown.append(points(frame, done.depth))
    if exact:
        found["surface_model"] = ground.surface_error(
            np.concatenate(exact), np.concatenate(shown), SURFACE_CELL_M
        )
    return found


def say(name: str, fold: int | None, row: Row) -> None:
    """One mark in words, as it comes."""
    peer = best_peer(peers().get(name, {}), row["mark_s"]) if fold is None else None
    split = "own split" if fold is None else f"fold {fold}"
    print(
        f"{name}, {split}, {row['mark_s']:.0f} s: {row['psnr']:.2f} dB, known {row['known']:.3f}, "
        f"SSIM {row['ssim']:.3f}, best peer {peer}",
        flush=True,
    )


def views_at(runs: Sequence[Row], mark: float) -> dict[str, float]:
    """View -> PSNR in dB at a mark, over captures, folds and seeds."""
    return {
        f"{run['capture']}/{run['fold']}/{run['seed']}/{view['frame']}": view["psnr"]
        for run in runs
        for row in run["rows"]
        if row["mark_s"] == mark
        for view in row["views"]
    }


def summarise(runs: Sequence[Row]) -> Row:
    """Per capture and over all: mean PSNR at each mark with its interval, and each mark against the
    one before in pairs of views.
    """
    out: Row = {}
    marks = sorted({row["mark_s"] for run in runs for row in run["rows"]})
    for name in [*dict.fromkeys(run["capture"] for run in runs), "all"]:
        here = [run for run in runs if name in ("all", run["capture"])]
        out[name] = {}
        for before, mark in zip([None, *marks], marks, strict=False):
            views = views_at(here, mark)
            low, high = bootstrap(list(views.values()))
            found: Row = {"psnr": np.mean(list(views.values())) if views else None}
            found["interval"] = None if np.isnan(low) else [low, high]
            found["views"] = len(views)
            if before is not None:
                found["gain_since_mark_before"] = measure.pair(views, views_at(here, before))
            out[name][f"{mark:.0f}"] = found
    return out


def against(runs: Sequence[Row], other: Sequence[Row]) -> Row:
    """Per capture and over all, at each mark: these runs minus others, view by view."""
    out: Row = {}
    for name in [*dict.fromkeys(run["capture"] for run in runs), "all"]:
        here, there = ([r for r in rs if name in ("all", r["capture"])] for rs in (runs, other))
        for mark in sorted({row["mark_s"] for run in here for row in run["rows"]}):
            out[f"{name}, {mark:.0f} s"] = measure.pair(views_at(here, mark), views_at(there, mark))
    return out


def plot(runs: Sequence[Row], path: Path) -> None:
    """A panel per capture: PSNR against CPU seconds beside the peers'; folds as crosses."""
    from matplotlib.figure import Figure

    names, known = list(dict.fromkeys(run["capture"] for run in runs)), peers()
    every = dict.fromkeys(peer for levels in known.values() for peer in levels)
    colours = dict(zip(every, ("C1", "C4", "C3", "C5", "C6", "C7", "C8", "C9"), strict=False))
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for run in (run for run in runs if run["capture"] == name):
            marks = [row["mark_s"] for row in run["rows"]]
            values = [row["psnr"] for row in run["rows"]]
            if run["fold"] is None:
                axes.plot(marks, values, "o-", color="C0", label="this daemon")
            else:
                axes.plot(marks, values, "x", color="C2", label=f"fold {run['fold']}")
        for peer, levels in known.get(name, {}).items():
            axes.plot(list(levels), list(levels.values()), "s--", color=colours[peer], label=peer)
        axes.set(title=name, xlabel="CPU seconds", ylabel="held-out PSNR (dB)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the arguments, run what is missing, write the JSON and the plot, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--capture", nargs="*", default=["boruszyn", "ochota_a", "brighton"])
    parser.add_argument("--marks", help=f"CPU seconds; default {MARKS}, with --folds 60")
    parser.add_argument("--folds", help="held-out offsets 0 to 7, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_stream.json")
    parser.add_argument("--against", type=Path, help="another result to pair the views with")
    args = parser.parse_args()
    folds = [int(f) for f in args.folds.split(",")] if args.folds else [None]
    marks = [float(m) for m in (args.marks or ("60" if args.folds else MARKS)).split(",")]
    results = measure.open_results(args.out, protocol(), "runs")
    for fold in folds:
        for name in args.capture:
            path = Path(name) if Path(name).is_dir() else data / "drone" / name
            key = key_of(path, fold, args.seed)
            same = [r for r in results["runs"] if key.items() <= r.items()]
            if any(r["marks"] == marks for r in same):
                continue
            load = measure.machine()
            done = run(path, marks, fold, args.seed) | {"machine": load}
            results["runs"] = [r for r in results["runs"] if r not in same] + [done]
            results |= {"peers": peers(), "summary": summarise(results["runs"])}
            write_json(args.out, results)
            plot(results["runs"], args.out.with_suffix(".png"))
    print("\n\n".join("\n".join(lines) for lines in tables(results)))
    if args.against:
        other = json.loads(args.against.read_text(encoding="utf-8"))["runs"]
        for name, found in against(results["runs"], other).items():
            print(f"{name}, against {args.against.name}: {measure.words(found)}")


if __name__ == "__main__":
    main()
