"""The daemon's shipped initialization: Reptile over generated flights, with the daemon's own engine.

Each flight is held, swept and seeded once by the same `Mapper` that `serve` runs. An episode starts
every module of one flight from the shared parameters, takes k of the daemon's steps (same update
rule, batch and Fisher weights), and moves the shared parameters towards the mean of what the modules
arrived at: Reptile (Nichol et al. 2018), the first-order member of the paper's outer loop
(Algorithm 1, lines 2-8). The compiled kernels have no second derivative; `meta_trainer.trainer` has
second order for the fields that torch differentiates.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.captures import open_capture
from mclnf_edge.config import ServeConfig
from mclnf_edge.engine.field import random_mlp
from mclnf_edge.errors import InitError
from mclnf_edge.mapping.mapper import Mapper

F32 = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

_SEEDED = ("features", "density")


@dataclass(frozen=True)
class CityInit:
    """Settings of one run.

    `episodes` outer steps over `flights`, each of `inner_steps` daemon steps from frames of the
    train split; the outer rate falls linearly from `outer_rate` to a tenth of it.
    """

    flights: tuple[str, ...]
    episodes: int = 120
    inner_steps: int = 24
    outer_rate: float = 0.3
    frames: int = 24
    seed: int = 0


class Episode:
    """One flight, swept and seeded, that can be adapted again and again from new parameters."""

    def __init__(self, path: str, frames: int, threads: int) -> None:
        """Hold the first `frames` train frames of the flight at `path`."""
        config = ServeConfig()
        self.mapper = Mapper(config.map, config.field, config.adapt, threads=threads)
        capture = open_capture(path).split("train")
        for i, frame in enumerate(capture.frames[:frames]):
            self.mapper.add(i, "flight", frame)
        self.mapper.draining = True
        self.mapper.settle()
        pool = self.mapper.pool
        assert pool is not None
        self.slots = np.array([m.slot for m in self.mapper.modules.values()])
        self.start = {name: getattr(pool, name)[self.slots].copy() for name in _SEEDED}
        self.gains = [f.gain.copy() for f in self.mapper.frames.values()]

    def adapt(self, mlp: F32, steps: int) -> tuple[F32, list[float]]:
        """Adapt from `mlp`; the ray-weighted mean of the modules' parameters, PSNR per step (dB)."""
        mapper, pool = self.mapper, self.mapper.pool
        assert pool is not None
        for name, value in self.start.items():
            getattr(pool, name)[self.slots] = value
        pool.weights[self.slots] = mlp
        for module in mapper.modules.values():
            pool.reset_learning(module.row)
            module.rays = module.steps = 0
        for frame, gain in zip(mapper.frames.values(), self.gains, strict=True):
            frame.gain = gain.copy()
        curve = []
        for _ in range(steps):
            mapper.psnr = None
            report = mapper.step()
            assert report is not None
            curve.append(report.psnr)
        rays = np.array([m.rays for m in mapper.modules.values()], np.float64)
        mean = (pool.weights[self.slots] * (rays / rays.sum())[:, None]).sum(0)
        return mean.astype(np.float32), curve


def train(
    settings: CityInit,
    checkpoint: Path,
    progress: Callable[[int, float, float], None],
    threads: int = 2,
) -> F32:
    """Run or go on with the training; returns the shared parameters (MLP_SIZE,).

    `progress(episode, first_psnr, last_psnr)` after every episode. `checkpoint` (.npz) is replaced
    after each round over the flights; a run with other settings refuses it with InitError.
    """
    mlp, begin = _resume(settings, checkpoint)
    random = np.random.default_rng(settings.seed)
    order = random.permuted(np.tile(np.arange(len(settings.flights)), (settings.episodes, 1)), axis=1)
    order = order.reshape(-1)[: settings.episodes]
    flights: dict[int, Episode] = {}
    for episode in range(begin, settings.episodes):
        which = int(order[episode])
        if which not in flights:
            flights[which] = Episode(settings.flights[which], settings.frames, threads)
        adapted, curve = flights[which].adapt(mlp, settings.inner_steps)
        rate = settings.outer_rate * (1 - 0.9 * episode / settings.episodes)
        mlp = mlp + np.float32(rate) * (adapted - mlp)
        progress(episode, curve[0], curve[-1])
        if (episode + 1) % len(settings.flights) == 0 or episode + 1 == settings.episodes:
            _save(settings, checkpoint, mlp, episode + 1)
    return mlp


def _save(settings: CityInit, path: Path, mlp: F32, done: int) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, mlp=mlp, done=done, settings=json.dumps(asdict(settings)))
    part.replace(path)


def _resume(settings: CityInit, path: Path) -> tuple[F32, int]:
    if not path.exists():
        return random_mlp(settings.seed), 0
    with np.load(path, allow_pickle=False) as kept:
        held: dict[str, Any] = json.loads(str(kept["settings"]))
        wanted = json.loads(json.dumps(asdict(settings)))
        if held != wanted:
            raise InitError(f"{path}: expected a checkpoint of {wanted}, received one of {held}")
        return kept["mlp"].astype(np.float32), int(kept["done"])
