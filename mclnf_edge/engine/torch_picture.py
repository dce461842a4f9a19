"""Renders whole pictures in PyTorch: `engine.picture` without its sharing of distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mclnf_edge.engine.picture import DARK, UNKNOWN, Painted, Shot
from mclnf_edge.engine.torch_volume import Course, Light, Look, TensorScene, compose, locate, place

_CHUNK = 8192
"""Rays at once."""


@torch.no_grad()
def paint(scene: TensorScene, look: Look, shot: Shot, alive: Callable[[], None]) -> Painted:
    """One picture of what `look` evaluates; see `engine.picture.paint`.

    `alive` is called after every part of it.
    """
    height, width = shot.size
    device = scene.box.device
    course = Course(shot.samples, shot.steps, float(shot.uniform), float(shot.reach))
    eye, band = torch.tensor(shot.eye, device=device), torch.tensor(shot.band, device=device)
    exposure = torch.tensor(shot.exposure, device=device)
    rgb = np.empty((height * width, 3), np.uint8)
    depth, known = (np.empty(height * width, np.float32) for _ in range(2))
    points = 0
    for a in range(0, height * width, _CHUNK):
        pixel = torch.arange(a, min(a + _CHUNK, height * width), device=device)
        rd, axial = directions(shot, pixel)
        n = len(pixel)
        rays = (eye.expand(n, 3), rd)
        samples = place(scene, *rays, band.expand(n, 2), course)
        found = locate(scene, rays, samples)
        light = compose(look(scene, found), found, samples, DARK)
        points += samples.t.numel()
        part = slice(a, a + n)
        shown = _shown(light, axial[samples.ray], exposure)
        whole = torch.zeros((n, 5), device=device)
        whole[:, :3] = UNKNOWN
        whole[samples.ray] = shown
        values = whole.cpu().numpy()
        rgb[part] = (values[:, :3].clip(0, 1) * 255 + 0.5).astype(np.uint8)
        depth[part], known[part] = values[:, 3], values[:, 4]
        alive()
    size = (height, width)
    return Painted(rgb.reshape(*size, 3), depth.reshape(size), known.reshape(size), points)


def directions(shot: Shot, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions (n, 3) through pixels (n,), row by row, and the z-depth of a metre (n,)."""
    fx, fy, cx, cy = (float(v) for v in shot.pinhole)
    column, row = pixel % shot.size[1] + 0.5, pixel // shot.size[1] + 0.5
    x, y = (column - cx) / fx, (cy - row) / fy
    turn = torch.tensor(shot.turn, device=pixel.device)
    d = torch.stack([x, y, -torch.ones_like(x)], dim=1) @ turn.T
    axial = 1 / torch.linalg.vector_norm(d, dim=1)
    return d * axial[:, None], axial


def _shown(light: Light, axial: Tensor, exposure: Tensor) -> Tensor:
    """(n, 5) colour, z-depth and known share of rays, with grey for what is not known."""
    stopped = 1 - light.left
    whole = stopped.clamp(min=1e-3)
    share = torch.where(stopped > 1e-3, light.known, torch.zeros_like(stopped))
    share = torch.where(light.left < DARK, light.known / whole, share)[:, None]
    color = share * light.rgb / whole[:, None] * exposure + (1 - share) * UNKNOWN
    return torch.cat([color, (light.depth * axial / whole)[:, None], share], dim=1)
