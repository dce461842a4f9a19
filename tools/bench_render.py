"""Time of a preview and of a full render of an adapted map, and what the pictures are worth.

    python tools/bench_render.py [CAPTURE] [--cell-m 420] [--seconds 60] [--threads 2]

The map is built in this process: every train frame at once, then `--seconds` CPU seconds of steps.
Nothing else runs while the test views are rendered, each `--repeats` times at both widths.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.types import View  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools.measure import ROOT, save  # noqa: E402

WIDTHS = {"preview": 160, "full": 480}
GOAL_MS = {"preview": 80.0, "full": 500.0}
"""Wall time on two idle CPU cores: a preview at most, a full render in the median."""


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and 95th percentile, in milliseconds, of seconds."""
    marks = {"p25": 25, "median": 50, "p75": 75, "p95": 95}
    return {k: round(float(np.percentile(values, p)) * 1e3, 1) for k, p in marks.items()}


def build(path: Path, cell_m: float, seconds: float, threads: int) -> Episode:
    """A map of a capture after `seconds` CPU seconds of steps."""
    episode = Episode(path, None, threads, cell_m=cell_m)
    episode.restart(load_init(None).mlp, seed=0)
    start = time.process_time()
    while time.process_time() - start < seconds:
        episode.steps(10)
    return episode


def measure(episode: Episode, width: int, repeats: int) -> dict[str, Any]:
    """Wall and CPU milliseconds and points per ray of the test views at a width."""
    renderer, mapper = Renderer(), episode.mapper
    wall, cpu, points = [], [], []
    for repeat in range(repeats + 1):
        for frame in episode.test:
            height = max(round(width * frame.camera.height / frame.camera.width), 1)
            view = View(frame.camera.scaled(width, height), frame.T_world_camera)
            before = time.perf_counter(), time.process_time()
            renderer.render(mapper.pool, mapper.origins[0], view, episode.gain(frame))
            if repeat:  # the first round warms the caches
                wall.append(time.perf_counter() - before[0])
                cpu.append(time.process_time() - before[1])
                points.append(renderer.points / (width * height))
    return {
        "width": width, "renders": len(wall), "wall_ms": spread(wall), "cpu_ms": spread(cpu),
        "points_per_ray": round(float(np.mean(points)), 2), "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    """Build the map, measure both widths, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("capture", nargs="?", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--cell-m", type=float, default=420.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tools" / "results" / "bench_render.json"
    )
    args = parser.parse_args()
    episode = build(args.capture, args.cell_m, args.seconds, args.threads)
    rows = {name: measure(episode, w, args.repeats) for name, w in WIDTHS.items()}
    psnr = episode.score(1)
    results = {
        "capture": args.capture.name, "cell_m": args.cell_m, "threads": args.threads,
        "adapt_cpu_s": args.seconds, "steps": episode.mapper.steps,
        "modules": sorted(m.id for m in episode.mapper.modules.values()),
        "psnr": round(float(np.mean(psnr)), 3), "views": len(psnr), "goal_wall_ms": GOAL_MS, **rows,
    }  # fmt: skip
    save(args.out, results)
    for name, row in rows.items():
        print(f"{name}: wall {row['wall_ms']} ms, cpu {row['cpu_ms']} ms, "
              f"{row['points_per_ray']} points a ray")  # fmt: skip
    print(f"{len(results['modules'])} modules, {results['psnr']} dB on {len(psnr)} views")


if __name__ == "__main__":
    main()
