"""What `tools/bench.py` measures of whole steps: on rays, at the roofline, in meta-training."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from mclnf_edge.mapping.initialization import load_init, load_signal_init
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.maths import fisher as fi
from mclnf_edge.maths.adaptation import Rule
from mclnf_edge.maths.fields import Field, NerfMlp, Params, Siren, count, stack
from meta_trainer.city_init import Episode as Flight
from meta_trainer.episodes import Episode, grid, image_episode
from meta_trainer.meta_gradient import meta_gradient
from meta_trainer.methods.base import Batch, Learning, pick
from meta_trainer.methods.modular import Modular, stages
from tools.measure import ROOT
from tools.speed_torch import Timed, adapting, compare, interleaved, spearman, spread

Row = dict[str, Any]
F32 = npt.NDArray[np.float32]
POINTS, STEPS_IN_A_ROW = 4096, 8
Cheap = Literal["output-layer", "gradncp", "residual"]
CHEAP: tuple[Cheap, ...] = ("output-layer", "gradncp", "residual")
RANKED_STEPS = 40
INNER_STEPS, BATCH, QUERY, RATE = 2, 256, 512, 0.01
"""As the shipped picture initialization was trained."""

_EPISODES, _SHORT_AND_LONG = 4, (2, 22)  # a step's, and the steps of two runs


# -- rays ---------------------------------------------------------------------------------------


def rays(data: Path) -> Row:
    """A daemon's step on rays with each weighting against the plain step, on one thread."""
    flight = Flight(data / "drone" / "brighton", None, 1)
    flight.restart(load_init(None).mlp, seed=0)
    optimizer = flight.mapper.optimizer

    def steps(weighting: Any) -> Callable[[], None]:
        def run() -> None:
            optimizer.adapt = replace(optimizer.adapt, weighting=weighting)
            flight.steps(10)

        return run

    runs = {"plain": steps("none"), "output-layer": steps("output-layer")}
    runs |= {name: steps(name) for name in ("diagonal", "drawn", "gradncp", "residual")}
    rows = compare(interleaved(runs, 12), "plain", 10)
    flight.restart(load_init(None).mlp, seed=0)
    return {
        "goal_ratio": 1.1, "rays": optimizer.rays, "modules": len(flight.mapper.modules),
        "spearman": ray_rankings(flight), "quartiles": [25, 50, 75], **rows,
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def ray_rankings(flight: Flight) -> Row:
    """Spearman correlation of each cheap information of rays with the exact one, batch by batch.

    Along one adaptation without weights; each form of F goes on in an array of its own.
    """
    optimizer = flight.mapper.optimizer
    found: dict[Cheap, list[float]] = {n: [] for n in CHEAP}
    diagonals: dict[str, Any] = {}

    def weigh(pool: ModulePool, traced: Any, d_rgb: F32) -> F32:
        q = {}
        names: tuple[Literal["diagonal"] | Cheap, ...] = ("diagonal", *CHEAP)
        for name in names:
            optimizer.adapt = replace(optimizer.adapt, weighting=name)
            if name in ("diagonal", "output-layer"):
                pool.score(pool.layout.size if name == "diagonal" else pool.layout.output_size)
                pool.ray_fisher = diagonals.get(name, pool.ray_fisher)
            q[name] = optimizer.scored(pool, traced, d_rgb)
            diagonals[name] = pool.ray_fisher
        met = q["diagonal"] > 0
        exact = torch.from_numpy(q["diagonal"][met])
        for name in CHEAP:
            found[name].append(spearman(torch.from_numpy(q[name][met]), exact))
        return np.ones(len(d_rgb), np.float32)

    with mock.patch.object(optimizer, "weigh", weigh):
        flight.steps(RANKED_STEPS)
    return {name: spread(values) for name, values in found.items()}


# -- roofline -----------------------------------------------------------------------------------


def roofline(data: Path) -> Row:
    """Share of the ceilings that whole steps of networks reach, with one thread and with two.

    On a machine with other load two threads wait for each other at each operation.
    """
    return {
        "goal_share": 0.6, "points": POINTS, "steps_in_a_row": STEPS_IN_A_ROW,
        "one_thread": limits(1), "two_threads": limits(2), "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def limits(threads: int) -> Row:
    """The ceilings and the networks' shares of them, measured in the same rounds."""
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    siren, small, mlp = Siren(2, 3, 256), Siren(2, 3, 128), NerfMlp()
    cases: dict[str, tuple[Field, Params, int]] = {
        "mlp 10x256": (mlp, mlp.init(g), 6),
        "siren 5x256": (siren, siren.init(g), 2),
        "four sirens 5x128": (small, stack([small.init(g) for _ in range(4)]), 2),
    }
    runs = {}
    for name, (field, params, d_in) in cases.items():
        shape = (4, POINTS // 4) if name.startswith("four") else (POINTS,)
        channels = 4 if d_in == 6 else 3
        batch = torch.rand(*shape, d_in, generator=g), torch.rand(*shape, channels, generator=g)
        runs[name] = adapting(field, params, [batch] * STEPS_IN_A_ROW, Rule("factored", "adam"))
    runs |= {f"matmul {n}": _product(n) for n in (512, 1024, 2048)} | {"copy": _copy}
    timed = interleaved(runs, 5)
    work = {name: _work(params) for name, (_, params, _) in cases.items()}
    shares = {name: _share(timed, name, flops, moved) for name, (flops, moved) in work.items()}
    return _ceilings(timed) | shares


COPIED = 1 << 26
_source, _target = torch.zeros(COPIED // 4), torch.zeros(COPIED // 4)


def _copy() -> None:
    _target.copy_(_source)


def _product(n: int) -> Callable[[], None]:
    a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)

    def run() -> None:
        for _ in range((2048 // n) ** 2):
            torch.mm(a, b, out=out)

    return run


def _work(params: Params) -> tuple[float, float]:
    """Floating point operations and bytes that a step cannot avoid.

    Three products per weight and point (forward, to the inputs, to the weights; not to the inputs
    of the first layer). Bytes: inputs and gradients of each layer written and read once, each
    parameter, its gradient and both moments read and written once.
    """
    weights = {n: w for n, w in params.items() if n.endswith(".w")}
    modules = next(iter(weights.values())).shape[0] if weights["0.w"].ndim == 3 else 1
    points = POINTS // modules
    flops = 6.0 * points * sum(w.numel() for w in weights.values())
    flops -= 2.0 * points * weights["0.w"].numel()
    widths = sum(modules * (w.shape[-2] + w.shape[-1]) for w in weights.values())
    return flops, 4.0 * (2 * points * widths + 8 * count(params))


def _products(timed: Timed, clock: int) -> dict[int, list[float]]:
    """Operations per second of each size and round."""
    return {
        n: [2.0 * n**3 * (2048 // n) ** 2 / t[clock] for t in timed[f"matmul {n}"]]
        for n in (512, 1024, 2048)
    }


def _ceilings(timed: Timed) -> Row:
    best = {n: spread(v, 1e-9) for n, v in _products(timed, 1).items()}
    per_cpu = {n: spread(v, 1e-9) for n, v in _products(timed, 0).items()}
    copied = spread([2 * COPIED / wall for _, wall in timed["copy"]], 1e-9)
    return {"matmul_gflops": best, "matmul_gflops_a_cpu_s": per_cpu, "copy_gb_s": copied}


def _share(timed: Timed, name: str, flops: float, moved: float) -> Row:
    """Time at the ceiling over time taken, by wall and by CPU seconds of the same round."""
    shares: list[list[float]] = []
    for clock in (0, 1):
        rates = [max(r) for r in zip(*_products(timed, clock).values(), strict=True)]
        bands = [2 * COPIED / t[clock] for t in timed["copy"]]
        shares.append([
            STEPS_IN_A_ROW * max(flops / rate, moved / band) / t[clock]
            for t, rate, band in zip(timed[name], rates, bands, strict=True)
        ])  # fmt: skip
    return {
        "gflop": round(flops / 1e9, 2), "megabytes": round(moved / 1e6, 1),
        "cpu_ms": spread([c for c, _ in timed[name]], 1e3 / STEPS_IN_A_ROW),
        "wall_ms": spread([w for _, w in timed[name]], 1e3 / STEPS_IN_A_ROW),
        "share_cpu": spread(shares[0]), "share_wall": spread(shares[1]),
    }  # fmt: skip


# -- meta-training ------------------------------------------------------------------------------


def meta(data: Path) -> Row:
    """Second-order episodes/s of the trainer and of a plain loop over modules and samples."""
    torch.set_num_threads(1)
    init = load_signal_init(Path("image"))
    picture = grid((180, 180)).mul(6).sin().sum(-1).reshape(180, 180, 1).expand(180, 180, 3)
    episode = image_episode("waves", (picture.numpy() + 2) / 4)
    how = Learning(init.field, RATE, Rule("diagonal"), BATCH)
    held: dict[str, Params] = {}

    def ours() -> None:
        g = torch.Generator().manual_seed(1)
        found = meta_gradient(
            Modular("mim", "mim"), init.params, RATE, episode, how, INNER_STEPS, QUERY, "second", g
        )
        held["trainer"] = found.start

    def plain() -> None:
        held["plain"] = plain_gradient(init.field, init.params, episode, how.rule)

    timed = interleaved({"plain": plain, "trainer": ours}, 5)
    rows = compare(timed, "plain", 1)
    for name, pairs in timed.items():
        rows[name]["episodes_a_cpu_s"] = spread([1 / c for c, _ in pairs])
        rows[name]["episodes_a_wall_s"] = spread([1 / w for _, w in pairs])
    a, b = (torch.cat([p.flatten() for p in held[n].values()]) for n in ("trainer", "plain"))
    different = float((a - b).norm() / b.norm())
    return {
        "relative_difference": different, "inner_steps": INNER_STEPS, "batch": BATCH,
        "query": QUERY, "modules": 4, **rows, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def processes(data: Path) -> Row:
    """Episodes a wall second of `meta_trainer train` in one process and under torchrun in two.

    One thread each; the difference of a long and a short run leaves out what starting takes.
    """
    rates = {str(n): spread([_episodes_a_second(data, n) for _ in range(3)]) for n in (1, 2)}
    return {
        "episodes_a_step": _EPISODES, "quartiles": [25, 50, 75], "episodes_a_wall_s": rates,
        "speed_up": round(rates["2"][1] / rates["1"][1], 2),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def _episodes_a_second(data: Path, count: int) -> float:
    spent = []
    for steps in _SHORT_AND_LONG:
        with tempfile.TemporaryDirectory() as folder:
            settings = yaml.safe_load((ROOT / "configs/meta/faces-mim.yaml").read_text())
            settings |= {"out": folder, "outer_steps": steps, "episodes": _EPISODES}
            config = Path(folder) / "faces-mim.yaml"
            config.write_text(yaml.safe_dump(settings))
            words = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
            words += ["-m", "meta_trainer", "train", "--config", str(config)]
            words += ["--root", str(data.resolve())]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *words], cwd=ROOT, check=True, capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            spent.append(time.perf_counter() - start)
    short, long = _SHORT_AND_LONG
    return _EPISODES * (long - short) / (spent[1] - spent[0])


def plain_gradient(field: Field, start: Params, episode: Episode, rule: Rule) -> Params:
    """The same meta-gradient the straightforward way: module by module, per-sample gradients."""
    g = torch.Generator().manual_seed(1)
    leaves = {n: p.detach().requires_grad_() for n, p in start.items()}
    coords, values = (stages(x, 4)[0] for x in (episode.coords, episode.values))
    batches = [pick(coords, values, BATCH, g) for _ in range(INNER_STEPS)]
    query = pick(coords, values, QUERY, g)
    losses = []
    for m in range(4):
        params, running = leaves, torch.zeros(())
        for step, (x, s) in enumerate(batches):
            scores = fi.scores(field, _detached(params), x[m], s[m])
            running = running + (scores.square().mean(0) - running) / (step + 1)
            loss = _loss(field, params, (x[m], s[m]), scores, running, rule)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moved = zip(params.items(), grads, strict=True)
            params = {n: p - RATE * d for (n, p), d in moved}
        batch = query[0][m], query[1][m]
        scores = fi.scores(field, _detached(params), *batch)
        losses.append(_loss(field, params, batch, scores, scores.square().mean(0), rule))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def _loss(
    field: Field, params: Params, batch: Batch, scores: Tensor, fisher: Tensor, rule: Rule
) -> Tensor:
    """Eq. 3 of one module with the weights of its scores (N, P) under the diagonal F (P,)."""
    q = (scores.square() / (fisher + rule.damping * fisher.mean())).sum(1)
    weights = fi.sample_weights(q, rule.lam, rule.cap)
    return (weights * ((field(params, batch[0]) - batch[1]) ** 2).sum(-1)).mean()


def _detached(params: Params) -> Params:
    return {n: p.detach() for n, p in params.items()}
