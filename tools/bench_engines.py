"""Samples per second of an optimization step: compiled kernels beside PyTorch, on the same rays.

    python tools/bench_engines.py [CAPTURE] [--frames 24] [--rounds 5] [--steps 10] [--device cpu]

Both engines take the daemon's own steps over the same modules of one map: draw, render, score,
weigh, back, update. They take turns, `--steps` steps each round, so that other load on the machine
meets both. PyTorch runs eagerly, batched over all rays, with as many threads as the kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.engine.torch_field import PlaneNetwork  # noqa: E402
from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.optimizer import SAMPLES, Engine, Optimizer  # noqa: E402
from mclnf_edge.mapping.torch_engine import TorchEngine  # noqa: E402
from mclnf_edge.types import View  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools.measure import ROOT, save  # noqa: E402

GOAL = 4.0
"""The kernels take at least this many times PyTorch's samples in a second of the CPU."""

WIDTH = 480
Seconds = tuple[float, float]
"""Wall and CPU seconds, the latter of all threads."""


def clock() -> Seconds:
    """Now."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """From then to now."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def steps(episode: Episode, engine: Engine[Any], n: int) -> Seconds:
    """n of the daemon's steps."""
    episode.mapper.optimizer = engine
    start = clock()
    episode.steps(n)
    return since(start)


def picture(episode: Episode, engine: Engine[Any]) -> Seconds:
    """A render of the first test view at WIDTH."""
    frame, mapper = episode.test[0], episode.mapper
    height = round(WIDTH * frame.camera.height / frame.camera.width)
    view = View(frame.camera.scaled(WIDTH, height), frame.T_world_camera)
    start = clock()
    Renderer(engine.paint).render(mapper.pool, mapper.origins[0], view, episode.gain(frame))
    return since(start)


def rates(episode: Episode, found: list[Seconds], n: int) -> dict[str, Any]:
    """Samples per second of rounds of n steps; the median round, and all of them per CPU second."""
    samples = n * episode.mapper.adapt.rays_per_step * SAMPLES
    wall, cpu = (np.array(part) for part in zip(*found, strict=True))
    return {
        "samples_per_s": round(samples / float(np.median(wall))),
        "samples_per_cpu_s": round(samples / float(np.median(cpu))),
        "rounds_samples_per_cpu_s": [round(samples / float(c)) for c in cpu],
        "step_wall_ms": round(float(np.median(wall)) / n * 1e3, 1),
        "step_cpu_ms": round(float(np.median(cpu)) / n * 1e3, 1),
    }


def compare(
    episode: Episode, engines: dict[str, Engine[Any]], rounds: int, n: int
) -> dict[str, Any]:
    """What each engine takes for steps and pictures, in turns."""
    stepped: dict[str, list[Seconds]] = {name: [] for name in engines}
    painted: dict[str, list[Seconds]] = {name: [] for name in engines}
    for engine in engines.values():  # compilers, caches
        steps(episode, engine, 2)
        picture(episode, engine)
    for _ in range(rounds):
        for name, engine in engines.items():
            stepped[name].append(steps(episode, engine, n))
            painted[name].append(picture(episode, engine))
    rows = {}
    for name in engines:
        wall, cpu = np.median(np.array(painted[name]), axis=0) * 1e3
        shown = {"picture_wall_ms": round(float(wall), 1), "picture_cpu_ms": round(float(cpu), 1)}
        rows[name] = {**rates(episode, stepped[name], n), **shown}
    return rows


def main() -> None:
    """Build the map, let the engines take turns, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("capture", nargs="?", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="PyTorch's")
    out = ROOT / "tools" / "results" / "bench_engines.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    episode = Episode(args.capture, args.frames, args.threads)
    episode.restart(load_init(None).mlp, seed=0)
    adapt = episode.mapper.adapt
    engines: dict[str, Engine[Any]] = {
        "numba": Optimizer(adapt, args.threads),
        "torch": TorchEngine(adapt, PlaneNetwork(), args.device),
    }
    rows = compare(episode, engines, args.rounds, args.steps)
    per = "samples_per_s" if args.device == "cuda" else "samples_per_cpu_s"
    results = {
        "capture": args.capture.name, "frames": args.frames, "threads": args.threads,
        "device": {"numba": "cpu", "torch": args.device}, "torch": torch.__version__,
        "modules": len(episode.mapper.modules), "rays_per_step": adapt.rays_per_step,
        "samples_per_ray": SAMPLES, "steps_a_round": args.steps, "rounds": args.rounds,
        "picture_width": WIDTH, "rows": rows, "goal_ratio": GOAL,
        "ratio": round(rows["numba"][per] / rows["torch"][per], 2), "ratio_of": per,
    }  # fmt: skip
    save(args.out, results)
    for name, row in rows.items():
        print(f"{name}: {row['samples_per_s']} samples/s, {row['samples_per_cpu_s']} a CPU second, "
              f"picture {row['picture_cpu_ms']} CPU ms")  # fmt: skip
    print(f"numba / torch: {results['ratio']} ({per}; goal {GOAL})")


if __name__ == "__main__":
    main()
