"""A field in PyTorch (the paper's 10-layer ReLU MLP) as one network on the same stream of rays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mclnf_edge.geometry import pixel_rays
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell, Workspace, trace
from mclnf_edge.mapping.optimizer import COARSE_STEPS, SAMPLES, UNIFORM
from mclnf_edge.maths.fields import Field, NerfMlp, Params
from mclnf_edge.types import Camera, Matrix4
from tools.streams import StreamMapper, Targets

F32 = npt.NDArray[np.float32]
RAYS = 256
RATE = 5e-4
_CHUNK = 2048
_PAPERS = NerfMlp()


def compose(values: Tensor, width: Tensor) -> Tensor:
    """(R, S, 4) colour and density, (R, S) widths -> (R, 3) colour by the usual quadrature."""
    through = torch.exp(-torch.cumsum(values[..., 3] * width, dim=1))
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=1)
    return ((before - through).unsqueeze(-1) * values[..., :3]).sum(1)


def box_of(mapper: Mapper, cells: Sequence[Cell]) -> tuple[F32, float]:
    """Centre (3,) and half edge, local metres, of a cube around some cells."""
    assert mapper.pool is not None
    corners = np.array([mapper.pool.bounds(cell)[:2] for cell in cells])
    low, high = corners.min(0), corners.max(0) + mapper.pool.cell_m
    bottom, top = mapper.pool.height_band(cells)
    centre = np.array([*(0.5 * (low + high)), 0.5 * (bottom + top)], np.float32)
    return centre, float(0.5 * max(*(high - low), top - bottom))


class FieldStream:
    """One field over all tasks: same frames, tiles, exposures and sample places as the modules.

    A ray's samples are drawn where the swept surfaces say that matter is, as for the fast field.
    Coordinates are scaled to [-1, 1] over `box` (centre x, y, z and half edge, local metres).
    """

    def __init__(
        self,
        mapper: StreamMapper,
        box: tuple[F32, float],
        seed: int,
        field: Field = _PAPERS,
        rays: int = RAYS,
        rate: float = RATE,
    ) -> None:
        """A random start; Adam's steps of `rate` on `rays` rays each.

        The field takes positions in the box and unit directions, (N, 6), to colour and density.
        """
        self.mapper, self.box = mapper, box
        self.field, self.rays, self.rate = field, rays, rate
        start = self.field.init(torch.Generator().manual_seed(seed))
        self.params: Params = {name: p.requires_grad_() for name, p in start.items()}
        self.adam = torch.optim.Adam(self.params.values(), lr=rate)
        self.random = np.random.default_rng(seed)
        self.seed, self.taken = seed, 0
        self._work = Workspace(_CHUNK, SAMPLES)

    def learn(self, drawn: Targets, replay: Targets | None, steps: int) -> None:
        """`steps` steps of Adam, its rate falling tenfold, half of each batch from `replay`."""
        for i in range(steps):
            for group in self.adam.param_groups:
                group["lr"] = self.rate * 0.1 ** (i / steps)
            self.step(drawn, replay)

    def step(self, drawn: Targets, replay: Targets | None = None) -> float:
        """One step; the mean squared error of its rays before it."""
        mine = self.rays if replay is None else self.rays // 2
        parts = [self._pick(drawn, mine)]
        if replay is not None:
            parts.append(self._pick(replay, self.rays - mine))
        frame, tile = np.concatenate(parts, axis=1)
        frames = list(self.mapper.frames.values())
        rays, gains, bands = self.mapper.batch(frames, frame, tile, self.random)
        ro, rd, truth, use = rays
        self.taken += 1
        shown, met = self.render(ro, rd, bands, jitter=True)
        error = shown * torch.from_numpy(gains) - torch.from_numpy(truth)
        loss = (error.square().mean(1) * torch.from_numpy(use) * met).mean()
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        return float(loss.detach())

    def _pick(self, drawn: Targets, n: int) -> npt.NDArray[np.int32]:
        at = self.random.integers(0, len(drawn[0]), n)
        return np.stack([drawn[0][at], drawn[1][at]])

    def render(self, ro: F32, rd: F32, bands: F32, *, jitter: bool) -> tuple[Tensor, Tensor]:
        """(R, 3) colour and (R,) whether each ray meets any cell."""
        mapper, n = self.mapper, len(ro)
        assert mapper.pool is not None
        reach = 60.0 * float((ro[:, 2] - bands[:, 0]).max())
        trace(mapper.pool, self._work, ro, rd, bands, steps=COARSE_STEPS, uniform=UNIFORM,
              seed=self.taken + self.seed * 1_000_003, jitter=jitter, reach=reach,
              site=0)  # fmt: skip
        t = self._work.tape.t[: n * SAMPLES].reshape(n, SAMPLES).copy()
        met = self._work.tape.used[:n] > 0
        t[~met] = np.arange(1, SAMPLES + 1)
        centre, half = self.box
        where = (ro[:, None] + rd[:, None] * t[..., None] - centre) / half
        away = np.broadcast_to(rd[:, None], where.shape)
        coords = np.concatenate([where.clip(-1, 1), away], axis=-1).astype(np.float32)
        edges = np.concatenate([1.5 * t[:, :1] - 0.5 * t[:, 1:2], 0.5 * (t[:, 1:] + t[:, :-1]),
                                1.5 * t[:, -1:] - 0.5 * t[:, -2:-1]], axis=1)  # fmt: skip
        width = torch.from_numpy((np.diff(edges, axis=1) * (64 / half)).astype(np.float32))
        values = self.field(self.params, torch.from_numpy(coords.reshape(-1, 6)))
        return compose(values.reshape(n, SAMPLES, 4), width), torch.from_numpy(met)

    def pixels(
        self, camera: Camera, T_world_camera: Matrix4, gain: F32, chosen: npt.NDArray[np.int64]
    ) -> F32:
        """(n, 3) colours in [0, 1] of pixels (n, 2) given as (column, row)."""
        mapper = self.mapper
        assert mapper.pool is not None
        _, directions = pixel_rays(camera, T_world_camera, chosen)
        rd = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)
        eye = (T_world_camera[:3, 3] - mapper.origins[0]).astype(np.float32)
        band = mapper.pool.height_band(mapper.pool.in_sight(eye, 0))
        out = np.empty((len(rd), 3), np.float32)
        for a in range(0, len(rd), _CHUNK):
            part = rd[a : a + _CHUNK]
            ro, bands = (
                np.tile(eye, (len(part), 1)),
                np.tile(np.array(band, np.float32), (len(part), 1)),
            )
            with torch.no_grad():
                out[a : a + len(part)] = self.render(ro, part, bands, jitter=False)[0].numpy()
        return (out * np.exp(gain)).clip(0, 1)


def learn_in_turn(
    stream: FieldStream,
    tasks: Iterable[Targets],
    steps: Sequence[int],
    after: Callable[[int], None],
    keep: Callable[[Sequence[Targets]], Targets | None] = lambda seen: None,
) -> None:
    """Task after task; `keep` says what a replay buffer holds of the tasks before."""
    seen: list[Targets] = []
    for k, drawn in enumerate(tasks):
        stream.learn(drawn, keep(seen), steps[k])
        seen.append(drawn)
        after(k)
