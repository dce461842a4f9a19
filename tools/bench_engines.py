"""Samples per second of an optimization step: compiled kernels beside PyTorch, on the same rays.

    python tools/bench_engines.py [CAPTURE] [--frames 24] [--rounds 5] [--steps 10] [--device cpu]

Both engines take the daemon's own steps over the same modules of one map: draw, render, score,
weigh, back, update. `plain` is what PyTorch does with the field as it is written down
(`maths.radiance`): the gate over every module, one backward pass into whole planes, Adam on all of
them; without the ray weights. They take turns, `--steps` steps each round, so that other load on
the machine meets all of them. PyTorch runs eagerly, with one thread and as many as the kernels.
Pictures are made by these and by ONNX Runtime, in single and half precision.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # beside other load PyTorch's threads spin

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.config import FieldConfig, RenderConfig  # noqa: E402
from mclnf_edge.engine.field import B1, B2, B3, CHANNELS, HIDDEN, INPUTS, W2, W3  # noqa: E402
from mclnf_edge.engine.picture import Painted, Shot  # noqa: E402
from mclnf_edge.engine.torch_field import PlaneNetwork  # noqa: E402
from mclnf_edge.engine.torch_volume import Course, place  # noqa: E402
from mclnf_edge.inference.onnx_painter import OnnxPainter  # noqa: E402
from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping.device import share  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.mapping.modules import ModulePool  # noqa: E402
from mclnf_edge.mapping.optimizer import (  # noqa: E402
    COARSE_STEPS,
    SAMPLES,
    UNIFORM,
    Engine,
    Fit,
    Optimizer,
)
from mclnf_edge.mapping.rays import Rays  # noqa: E402
from mclnf_edge.mapping.torch_engine import TorchEngine  # noqa: E402
from mclnf_edge.maths import radiance  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from mclnf_edge.types import Render, View  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools.measure import ROOT, save  # noqa: E402

GOAL = 4.0
"""The kernels take at least this many times PyTorch's samples in a second of the CPU."""

WIDTH = 480
F32 = npt.NDArray[np.float32]
Paint = Callable[[ModulePool, Shot, int], Painted]
Seconds = tuple[float, float]
"""Wall and CPU seconds, the latter of all threads."""


def clock() -> Seconds:
    """Now."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """From then to now."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


class Turn(NamedTuple):
    """An engine and PyTorch's threads for it."""

    engine: Engine[Any]
    threads: int = 1


def steps(episode: Episode, turn: Turn, n: int) -> Seconds:
    """n of the daemon's steps."""
    torch.set_num_threads(turn.threads)
    episode.mapper.optimizer = turn.engine
    start = clock()
    episode.steps(n)
    return since(start)


def placed(pool: ModulePool) -> list[radiance.Placed]:
    """The pool's modules with parameters that can be differentiated."""
    ends = [int(v) for v in pool.layout.planes[1:, 4]]
    modules = []
    for cell, s in pool.slot_of.items():
        x, y, edge = pool.bounds(cell)
        low, inverse = (float(v) for v in pool.band[s])
        parts = torch.tensor(pool.features[s]).tensor_split(ends)
        params = {
            f"plane.{i}": parts[i].view(int(nv), int(nu), CHANNELS)
            for i, (_, _, nu, nv, _) in enumerate(pool.layout.planes)
        }
        w = torch.tensor(pool.weights[s])
        for j, (a, b, c, d) in enumerate(
            ((0, B1, W2, INPUTS), (W2, B2, W3, HIDDEN), (W3, B3, len(w), HIDDEN))
        ):
            params[f"{j}.w"], params[f"{j}.b"] = w[a:b].view(d, -1), w[b:c]
        learned = {name: p.clone().requires_grad_() for name, p in params.items()}
        surface, seen = torch.tensor(pool.surface[s]), torch.tensor(pool.seen[s])
        modules.append(
            radiance.Placed(
                learned, cell[0] % 2 == 1, x, y, edge, low, 1 / inverse, surface, seen,
                pool.rank_of[cell],
            )
        )  # fmt: skip
    return modules


class Plain(TorchEngine):
    """The field as it is written down, with autograd and Adam; samples as in the other engines."""

    modules: list[radiance.Placed] | None = None

    def step(
        self,
        pool: ModulePool,
        rays: Rays,
        gains: F32,
        bands: F32,
        *,
        site: int,
        reach: float,
        decay: float,
    ) -> Fit:
        """A step on its own copy of the modules."""
        if self.modules is None:
            self.modules = placed(pool)
            self.adam = torch.optim.Adam([p for m in self.modules for p in m.params.values()])
        ro, rd, level = (torch.from_numpy(x) for x in (rays.origins, rays.directions, gains))
        course = Course(SAMPLES, COARSE_STEPS, UNIFORM, reach, self._random)
        found = place(share(pool).scene(site), ro, rd, torch.from_numpy(bands), course)
        shown = radiance.render(self.modules, ro[found.ray], rd[found.ray], found.t, found.width)
        error = shown.rgb * level[found.ray] - torch.from_numpy(rays.truth)[found.ray]
        self.adam.zero_grad()
        error.square().mean().backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        residual = np.zeros_like(rays.truth)
        residual[found.ray.numpy()] = error.detach().numpy()
        weights = np.ones(len(residual), np.float32)
        return Fit(residual, residual, rays.truth + residual, weights, float((residual**2).mean()))


def picture(episode: Episode, paint: Paint, threads: int) -> tuple[Seconds, Render]:
    """A render of the first test view at WIDTH, and what it took."""
    torch.set_num_threads(threads)
    frame, mapper = episode.test[0], episode.mapper
    height = round(WIDTH * frame.camera.height / frame.camera.width)
    view = View(frame.camera.scaled(WIDTH, height), frame.T_world_camera)
    start = clock()
    made = Renderer(paint).render(mapper.pool, mapper.origins[0], view, episode.gain(frame))
    return since(start), made


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


def compare(episode: Episode, turns: dict[str, Turn], rounds: int, n: int) -> dict[str, Any]:
    """What each engine takes for steps, in turns."""
    stepped: dict[str, list[Seconds]] = {name: [] for name in turns}
    for turn in turns.values():  # compilers, caches
        steps(episode, turn, 2)
    for _ in range(rounds):
        for name, turn in turns.items():
            stepped[name].append(steps(episode, turn, n))
    return {name: rates(episode, found, n) for name, found in stepped.items()}


def pictures(
    episode: Episode, paints: dict[str, tuple[Paint, int]], rounds: int
) -> dict[str, dict[str, float | None]]:
    """What each engine takes for a picture of the same map, in turns, and how much they differ."""
    painted: dict[str, list[Seconds]] = {name: [] for name in paints}
    shown: dict[str, Render] = {}
    for _ in range(rounds + 1):
        for name, (paint, threads) in paints.items():
            seconds, shown[name] = picture(episode, paint, threads)
            painted[name].append(seconds)
    rows: dict[str, dict[str, float | None]] = {}
    for name, times in painted.items():
        wall, cpu = (np.median(part) for part in zip(*times[1:], strict=True))  # one compiles
        alike = psnr(shown[name].rgb, shown["torch"].rgb)
        rows[name] = {
            "wall_ms": round(float(wall) * 1e3, 1), "cpu_ms": round(float(cpu) * 1e3, 1),
            "psnr_to_torch": round(alike, 1) if np.isfinite(alike) else None,
        }  # fmt: skip
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
    episode = Episode(args.capture, args.frames, args.threads)
    episode.restart(load_init(None).mlp, seed=0)
    adapt = episode.mapper.adapt
    ours = TorchEngine(adapt, PlaneNetwork(), args.device)
    turns = {
        "numba": Turn(Optimizer(adapt, args.threads)),
        "torch": Turn(ours),
        f"torch, {args.threads} threads": Turn(ours, args.threads),
        "plain": Turn(Plain(adapt, PlaneNetwork(), "cpu")),
    }
    rows = compare(episode, turns, args.rounds, args.steps)
    half = RenderConfig(precision="half")
    onnx = {
        "onnx": OnnxPainter(FieldConfig(), ours, args.threads),
        "onnx, half": OnnxPainter(FieldConfig(), ours, args.threads, half),
    }
    paints: dict[str, tuple[Paint, int]] = {
        name: (turn.engine.paint, turn.threads) for name, turn in turns.items() if name != "plain"
    }
    paints |= {name: (painter.paint, args.threads) for name, painter in onnx.items()}
    per = "samples_per_s" if args.device == "cuda" else "samples_per_cpu_s"
    ratios = {name: round(rows["numba"][per] / row[per], 2) for name, row in rows.items()}
    results = {
        "capture": args.capture.name, "frames": args.frames, "threads": args.threads,
        "device": args.device, "torch": torch.__version__,
        "modules": len(episode.mapper.modules), "rays_per_step": adapt.rays_per_step,
        "samples_per_ray": SAMPLES, "steps_a_round": args.steps, "rounds": args.rounds,
        "picture_width": WIDTH, "rows": rows, "goal_ratio": GOAL,
        "pictures": pictures(episode, paints, 3),
        "numba_over": ratios, "ratio_of": per,
    }  # fmt: skip
    save(args.out, results)
    for name, row in rows.items():
        print(f"{name}: {row['samples_per_s']} samples/s, {row['samples_per_cpu_s']} a CPU second, "
              f"numba over it {ratios[name]}")  # fmt: skip
    for name, row in results["pictures"].items():
        print(f"picture by {name}: {row['wall_ms']} ms, {row['cpu_ms']} ms of the CPU")


if __name__ == "__main__":
    main()
