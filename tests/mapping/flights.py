"""A small generated flight and the mapper over it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mclnf_edge.config import AdaptConfig, FieldConfig, MapConfig, ServeConfig
from mclnf_edge.daemon.worker import Worker
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.engines import KERNELS, Compute
from mclnf_edge.mapping.initialization import load_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.store import MapStore
from mclnf_edge.types import Frame, Render, View
from tests import blocks

CELL_M = 20.0
STREAM = "session/front"
FIELD = FieldConfig(plane_texels=64, plane_vertical=8, voxels=16)
ADAPT = AdaptConfig(rays_per_step=1024, min_rays_per_frame=256, budget_s_per_frame=1e6)
"""Seconds never end a budget, so that a slow machine learns the same."""

INIT = load_init(None).mlp


@dataclass(frozen=True)
class Flight:
    """Frames to map and views that were kept back, with their true pictures."""

    frames: list[Frame]
    views: list[View]
    truth: list[Any]

    def shifted(self, offset: tuple[float, float, float]) -> Flight:
        """The same flight elsewhere in the world."""

        def moved(T: Any) -> Any:
            T = T.copy()
            T[:3, 3] += offset
            return T

        return Flight(
            [replace(f, T_world_camera=moved(f.T_world_camera)) for f in self.frames],
            [replace(v, T_world_camera=moved(v.T_world_camera)) for v in self.views],
            self.truth,
        )

    def mean_psnr(self) -> float:
        """PSNR of every view's own mean colour: what knowing nothing but the average gives."""
        flat = [np.broadcast_to(t.mean((0, 1)), t.shape).astype(np.uint8) for t in self.truth]
        return float(np.mean([psnr(a, b) for a, b in zip(flat, self.truth, strict=True)]))


@cache
def flight(n: int = 8, width: int = 128, height: int = 96) -> Flight:
    """Pictures of ground with two blocks, from 30 m."""
    ground = blocks.Ground(0.0, ((-6, -7, 5, 4, 4.0), (9, 2, 14, 8, 2.5)))
    cam = blocks.camera(width, height)
    frames = [
        blocks.frame(cam, T, blocks.picture(ground, cam, T), i, height_m=30.0)
        for i, T in enumerate(blocks.poses(n))
    ]
    kept = [blocks.pose(1.3, -2.0, 30.0, 0.05, 0.1), blocks.pose(-4.0, 3.0, 30.0, -0.08, 0.2)]
    truth = [blocks.picture(ground, cam, T) for T in kept]
    return Flight(frames, [View(cam, T) for T in kept], truth)


def mapper(
    frames: list[Frame], threads: int = 1, compute: Compute = KERNELS, **adapt: Any
) -> Mapper:
    """A mapper that holds the frames and has its modules seeded; `adapt` changes ADAPT."""
    settings = MapConfig(cell_size_m=CELL_M)
    made = Mapper(settings, FIELD, replace(ADAPT, **adapt), INIT, threads, compute=compute)
    for i, frame in enumerate(frames):
        made.add(i, STREAM, frame)
    made.draining = True
    assert made.settle()
    return made


def learn(m: Mapper, most: int = 1000) -> int:
    """Steps until there is nothing left to learn; how many were taken."""
    for i in range(most):
        if m.step() is None:
            return i
    return most


def render(m: Mapper, view: View, site: int = 0) -> Render:
    """A view of a site at exposure 0."""
    origin = m.origins.get(site)
    return Renderer(m.optimizer.paint).render(
        m.pool, origin, view, np.zeros(3, np.float32), site=site
    )


def score(m: Mapper, over: Flight) -> float:
    """Mean PSNR in dB of the views that were kept back, unknown pixels grey."""
    return score_at(m, over, 0)


def score_at(m: Mapper, over: Flight, site: int) -> float:
    """The same for the views of one site."""
    pairs = zip(over.views, over.truth, strict=True)
    return float(np.mean([psnr(render(m, view, site).rgb, true) for view, true in pairs]))


def mapper_of_nothing(compute: Compute = KERNELS) -> Mapper:
    """A mapper that holds no frames."""
    return Mapper(MapConfig(cell_size_m=CELL_M), FIELD, ADAPT, INIT, 1, compute=compute)


def worker(store: MapStore) -> Worker:
    """A compute thread over a map, not started; what it sends goes nowhere."""
    config = ServeConfig(map=MapConfig(cell_size_m=CELL_M), field=FIELD, adapt=ADAPT)
    return Worker(config, store, load_init(None), lambda peer, message: None, 1)
