"""The engine in PyTorch: every kind of field, on the CPU or on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mclnf_edge.config import AdaptConfig
from mclnf_edge.engine import torch_learn, torch_volume
from mclnf_edge.engine.picture import Painted, Shot
from mclnf_edge.engine.torch_field import Network, PlaneNetwork
from mclnf_edge.engine.torch_picture import paint
from mclnf_edge.engine.torch_volume import Course, TensorScene, Traced
from mclnf_edge.mapping.device import DeviceArrays, Lent, share
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.mapping.optimizer import (
    COARSE_STEPS,
    SAMPLES,
    UNIFORM,
    Engine,
    Fit,
    log,
    whole_site,
)
from mclnf_edge.mapping.rays import Rays

F32 = npt.NDArray[np.float32]
T = TypeVar("T")

_CHUNK = 8192
"""Rays that are shown at once."""


@dataclass
class Batch:
    """A rendered batch, the arrays it was rendered from, and its gradients once they are known."""

    lent: Lent
    scene: TensorScene
    traced: Traced
    _slopes: torch_learn.Slopes | None = None

    def slopes(self, d_rgb: Tensor) -> torch_learn.Slopes:
        """See `torch_learn.slopes`; a step has one `d_rgb`, whoever asks first."""
        if self._slopes is None:
            self._slopes = torch_learn.slopes(self.traced, d_rgb)
        return self._slopes


class TorchEngine(Engine[Batch]):
    """Works on the pool's own memory, or with `copied` on copies of it on its device.

    A step that finds no room on the device takes half the rays from then on; pictures that find
    none are computed on the CPU.
    """

    name = "torch"

    def __init__(
        self, adapt: AdaptConfig, network: Network, device: str, *, copied: bool | None = None
    ) -> None:
        """`device` is cpu or cuda; `copied` None: unless it is the CPU."""
        self.device, self._on = device, torch.device(device)
        self._network = network
        copies = device != "cpu" if copied is None else copied
        self._arrays = DeviceArrays(self._on) if copies else None
        self._random = torch.Generator(self._on)
        if device == "cpu" and isinstance(network, PlaneNetwork):
            # Its products are small: beside other load two threads mostly wait for each other.
            torch.set_num_threads(1)
        super().__init__(adapt)

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
    ) -> Fit | None:
        """See `Engine`."""
        try:
            return super().step(pool, rays, gains, bands, site=site, reach=reach, decay=decay)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error)
        torch.cuda.empty_cache()  # only here, where the error no longer holds the step's tensors
        self._shrink(reason)
        return None

    def lend(self, pool: ModulePool, *, learn: bool = False) -> Lent:
        """The pool's arrays where this engine computes; see `device.DeviceArrays.lend`."""
        return share(pool) if self._arrays is None else self._arrays.lend(pool, learn=learn)

    def _put(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._on)

    def _trace(
        self, pool: ModulePool, rays: Rays, bands: F32, reach: float, site: int
    ) -> tuple[Batch, F32]:
        lent = self.lend(pool, learn=True)
        scene = lent.scene(site)
        course = Course(SAMPLES, COARSE_STEPS, UNIFORM, reach, self._random.manual_seed(self._seed))
        where = (self._put(rays.origins), self._put(rays.directions), self._put(bands))
        traced = torch_volume.trace(scene, self._network, where, course, learn=True)
        return Batch(lent, scene, traced), traced.rgb.cpu().numpy()

    def information(self, pool: ModulePool, traced: Batch, d_rgb: F32) -> F32:
        """See `Engine`."""
        scene, batch = traced.scene, traced.traced
        q = torch.zeros(len(d_rgb), device=self._on)
        if batch.parts:
            d_raw = traced.slopes(self._put(d_rgb)).raw
            rows = torch_learn.ray_rows(scene, batch)
            g = torch_learn.ray_gradients(scene, batch, d_raw, rows)
            running, damping = traced.lent["ray_fisher"], self.adapt.fisher_damping
            q[batch.samples.ray] = torch_learn.information(g, rows, running, damping)
        scores: F32 = q.cpu().numpy()
        return scores

    def _gradncp(self, traced: Batch, d_rgb: F32) -> F32:
        scores: F32 = torch_learn.gradncp_score(traced.traced, self._put(d_rgb)).cpu().numpy()
        return scores

    def _update(
        self, pool: ModulePool, traced: Batch, d_rgb: F32, weights: F32, decay: float
    ) -> None:
        lent, scene, batch = traced.lent, traced.scene, traced.traced
        if not batch.parts:
            return
        slopes = traced.slopes(self._put(d_rgb))
        step = torch_learn.gradients(batch, slopes, self._put(weights))
        if len(scene.planes):
            self._step_texels(lent, scene, step)
        rows = lent["owner"][step.slots].long()
        gradient = torch.where(lent["guarded"][rows][:, None], 0.0, step.weights)
        state = (lent["weights"], lent["moment"], lent["square"], lent["adam_steps"])
        rate = self.adapt.lr_mlp * self._network.rate * 0.1**decay
        torch_learn.adam(state, (step.slots, rows), gradient, rate)

    def _step_texels(self, lent: Lent, scene: TensorScene, step: torch_learn.Step) -> None:
        """Damped by the running mean of the planes' squares, which follows afterwards."""
        per_slot = lent.pool.layout.features // 4
        fresh = torch_learn.plane_moments(scene.planes, per_slot, step).cpu().numpy()
        scale = fresh if self.plane_scale is None else self.plane_scale
        damping = self._put(np.maximum(scale, np.float32(1e-20)))
        torch_learn.step_texels(
            lent["features"], lent["fisher"], scene, step, self.adapt.lr, damping
        )
        self.plane_scale = scale + np.float32(0.02) * (fresh - scale)

    def show(self, pool: ModulePool, site: int, ro: F32, rd: F32) -> F32:
        """See `Engine`."""
        band, reach = whole_site(pool, site, ro)
        course = Course(SAMPLES, COARSE_STEPS, UNIFORM, reach)

        @torch.no_grad()
        def shown(lent: Lent) -> F32:
            scene, out = lent.scene(site), np.empty((len(ro), 3), np.float32)
            on = scene.box.device
            for a in range(0, len(ro), _CHUNK):
                o, d = (torch.from_numpy(x[a : a + _CHUNK]).to(on) for x in (ro, rd))
                bands = torch.from_numpy(band).to(on).expand(len(o), 2)
                traced = torch_volume.trace(scene, self._network, (o, d, bands), course)
                out[a : a + _CHUNK] = traced.rgb.clamp(0, 1).cpu().numpy()
                self.alive()
            return out

        return self._somewhere(pool, shown)

    def paint(self, pool: ModulePool, shot: Shot, site: int) -> Painted:
        """See `Engine`."""

        def painted(lent: Lent) -> Painted:
            look = partial(torch_volume.look, self._network)
            return paint(lent.scene(site), look, shot, self.alive)

        return self._somewhere(pool, painted)

    def _somewhere(self, pool: ModulePool, run: Callable[[Lent], T]) -> T:
        """`run` on the device, or on the CPU when the device has no room."""
        try:
            return run(self.lend(pool))
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error)
        torch.cuda.empty_cache()
        log.warning("%s is out of memory: rendered on the CPU (%s)", self.device, reason)
        return run(share(pool))


def lender(engine: Engine[Any]) -> Callable[[ModulePool], Lent]:
    """What gives the arrays where an engine computes: the pool's own for the kernels."""
    return engine.lend if isinstance(engine, TorchEngine) else share
