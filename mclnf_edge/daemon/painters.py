"""Which engine paints pictures fastest here: `render.engine: auto`.

It is measured once, on a small map that is made up for it, in a process of its own: what an engine
imports and may break stays out of the daemon, which paints with the engine that learns meanwhile.
What was found is kept in the user's cache for this device, kind of field and these versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from mclnf_edge.config import ComputeConfig, FieldConfig, RenderConfig, ServeConfig
from mclnf_edge.daemon.start import cache_dir
from mclnf_edge.errors import DeviceError
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.types import Camera, View

if TYPE_CHECKING:
    from mclnf_edge.mapping.modules import ModulePool

Times = dict[str, float]
"""Milliseconds a picture by engine: those of `render.engine` that paint here."""

LEARNING = "learning"
_PACKAGES = ("mclnf-edge", "numba", "torch", "onnxruntime", "onnxruntime-gpu")
_CELL_M, _HEIGHT_M = 20.0, 25.0
_CAMERA = Camera(80, 60, 66.0, 66.0, 40.0, 30.0)
_ROUNDS = 3
_LIMIT_S = 120.0
log = logging.getLogger(__name__)


def fastest(times: Times | None) -> str:
    """The engine with the shortest time; what learns when nothing was measured."""
    return min(times, key=times.__getitem__) if times else LEARNING


def renderer(config: ServeConfig, mapper: Mapper, asked: str) -> tuple[Renderer, str]:
    """What makes pictures with an engine, and its name; the one that learns if that cannot here."""
    engine = mapper.optimizer
    if asked != LEARNING:
        from mclnf_edge.inference.onnx_painter import OnnxPainter  # with PyTorch

        try:
            painter = OnnxPainter(config.field, engine, mapper.threads, config.render, asked)
            return Renderer(painter.paint, mapper.residency), painter.name
        except DeviceError as error:
            log.error("render.engine %s: %s; %s paints instead", asked, error, engine.name)
    return Renderer(engine.paint, mapper.residency), engine.name


def remembered(config: ServeConfig) -> Times | None:
    """What was measured here before; None when nothing was, or it cannot be read."""
    try:
        found = json.loads(_entry(config).read_text())
        times = {str(name): float(ms) for name, ms in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return times if LEARNING in times else None


def remember(config: ServeConfig, times: Times) -> None:
    """Keep what was measured; a cache that cannot be written is said, and does without."""
    entry = _entry(config)
    part = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(times))
        part.replace(entry)
    except OSError as error:
        log.info("what paints fastest is not remembered: %s", error)


class Trial:
    """A measurement in a process of its own."""

    def __init__(self, config: ServeConfig) -> None:
        self.config, self._until = config, time.monotonic() + _LIMIT_S
        words = [sys.executable, "-m", __name__, json.dumps(_asked(config))]
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def result(self) -> Times | None:
        """None while it runs; empty when it failed. Good ones are remembered."""
        if self._process.poll() is None:
            if time.monotonic() < self._until:
                return None
            self.stop()
        told, _ = self._process.communicate()
        try:
            times: Times = json.loads(told)
        except ValueError:
            log.warning("no engine was measured: the one that learns paints")
            return {}
        remember(self.config, times)
        return times

    def stop(self) -> None:
        """End it without a result."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def compare(config: ServeConfig) -> Times:
    """Median milliseconds of a picture of a made-up map of four modules, by each engine in turn.

    An engine that cannot paint here is left out.
    """
    from mclnf_edge.inference.onnx_painter import OnnxPainter  # with PyTorch

    compute = choose(config.compute.engine, config.compute.device, config.field.kind)
    settings = replace(config.map, cell_size_m=_CELL_M)
    mapper = Mapper(settings, config.field, config.adapt, None, os.cpu_count() or 1, None, compute)
    engine, painters = mapper.optimizer, {LEARNING: Renderer(mapper.optimizer.paint)}
    for name in ("onnx", "tensorrt"):
        with contextlib.suppress(DeviceError):
            painter = OnnxPainter(config.field, engine, mapper.threads, config.render, name)
            painters[name] = Renderer(painter.paint)
    pool = _ground(mapper)
    found: dict[str, list[float]] = {name: [] for name in painters}
    for _ in range(_ROUNDS):
        for name, renderer in list(painters.items()):
            try:
                found[name].append(_picture_ms(renderer, pool))
            except DeviceError:
                del painters[name]
    return {name: median(found[name][1:]) for name in painters}  # the first one compiles


def _ground(mapper: Mapper) -> ModulePool:
    """Four modules of flat, seen ground with random fields."""
    pool = mapper.pool_of(_CELL_M)
    for x in range(2):
        for y in range(2):
            module = pool.spawn((0, x, y), -2.0, 2.0)
            pool.surface[module.slot], pool.seen[module.slot] = 0.0, 9
            below = pool.density[module.slot].reshape(-1, mapper.field.voxels)
            below[:, : mapper.field.voxels // 2] = 20.0
            pool.freeze(module)
    return pool


def _picture_ms(renderer: Renderer, pool: ModulePool) -> float:
    pose = np.eye(4)
    pose[:3, 3] = _CELL_M, _CELL_M, _HEIGHT_M
    before = time.perf_counter()
    renderer.render(pool, np.zeros(3), View(_CAMERA, pose), np.zeros(3, np.float32))
    return (time.perf_counter() - before) * 1e3


def _asked(config: ServeConfig) -> dict[str, dict[str, object]]:
    return {name: asdict(getattr(config, name)) for name in ("field", "compute", "render")}


def _entry(config: ServeConfig) -> Path:
    """The cache's file for all that the result depends on."""
    compute = choose(config.compute.engine, config.compute.device, config.field.kind)
    facts = [*compute, config.render.precision, platform.machine(), os.cpu_count()]
    field = config.field
    facts += [field.kind, field.mlp_width, field.mlp_hidden] if field.kind == "mlp" else ["planes"]
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts.append(f"{name} {version(name)}")
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return cache_dir() / f"painters-{digest[:32]}"


def main() -> None:
    """Measure for the settings in the first argument, print the times as JSON."""
    os.nice(10)
    asked = json.loads(sys.argv[1])
    config = ServeConfig(
        field=FieldConfig(**asked["field"]),
        compute=ComputeConfig(**asked["compute"]),
        render=RenderConfig(**asked["render"]),
    )
    print(json.dumps(compare(config)))


if __name__ == "__main__":
    main()
