"""Compiles every kernel before the first frame: a tiny flight over noise, mapped and thrown away.

The compiler's results are kept beside the package, so only a machine's first start takes long.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import cv2
import numpy as np

from mclnf_edge.config import ServeConfig
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.types import Camera, Frame, ModuleSnapshot, View

_HEIGHT_M = 20.0
_CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
_VIEWS = 4


def warm_up(config: ServeConfig, threads: int) -> None:
    """Run what the daemon runs on frames, renders, closings and revisits, on this many threads."""
    told = logging.getLogger("mclnf_edge.mapping")
    level = told.level
    told.setLevel(logging.ERROR)  # nothing of this is part of the map
    try:
        _map(config, threads)
    finally:
        told.setLevel(level)


def _map(config: ServeConfig, threads: int) -> None:
    committed: dict[tuple[str, int], ModuleSnapshot] = {}
    settings = replace(config.map, cell_size_m=_HEIGHT_M)
    adapt = replace(config.adapt, passes=0.01, rays_per_step=64, min_rays_per_frame=1)
    field = replace(config.field, plane_texels=64, plane_vertical=8, voxels=8)
    compute = choose(config.compute.engine, config.compute.device, field.kind)
    mapper = Mapper(
        settings, field, adapt, None, threads, lambda i, version: committed[i, version], compute
    )
    for lap in range(2):  # the second sees closed modules again
        for frame in _flight(lap):
            mapper.add(lap * _VIEWS + frame.seq, f"{lap}/warm", frame)
        mapper.draining = True
        mapper.settle()
        while mapper.step() is not None:
            pass
        for module in mapper.finished():
            closing = mapper.close(module)
            if closing.snapshot is not None:
                committed[module.id, module.version] = closing.snapshot
            mapper.forget(closing.let_go)
    pose = _flight(0)[0].T_world_camera
    view = View(_CAMERA, pose)
    Renderer(mapper.optimizer.paint).render(
        mapper.pool, mapper.origins[0], view, np.zeros(3, np.float32)
    )


def _flight(lap: int) -> list[Frame]:
    random = np.random.default_rng(lap)
    picture = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    encoded = cv2.imencode(".png", picture)[1].tobytes()
    frames = []
    for i in range(_VIEWS):
        pose = np.eye(4)
        pose[:3, 3] = (2.0 * i, float(lap), _HEIGHT_M)
        frames.append(Frame(i, float(i), encoded, "png", _CAMERA, pose, height_m=_HEIGHT_M))
    return frames
