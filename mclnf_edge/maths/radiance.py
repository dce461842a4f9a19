"""The fast module by definition: feature planes, gate and quadrature as functions of parameters.

The compiled kernels of `mclnf_edge.engine` compute the same values and gradients in float32 and are
tested against this in float64. Everything works under torch.func, in any dtype, on any device.

A module's parameters are "plane.<i>" (rows, columns, CHANNELS) and the three linear layers "<j>.w"
(d_in, d_out), "<j>.b" (d_out,). Of the last layer's outputs four are used: density, then RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mclnf_edge.maths.fields import Params, Tap, linear

UNITS = 64
"""Units of length along a cell's edge: one unit is the edge / UNITS metres."""

MARGIN = 0.06
"""Share of a cell's edge over which a module answers beyond the border of its cell."""

UNSEEN = 0.01
"""How much a module's answer counts that has not seen the place, beside one that has."""

DARK = 0.002
"""A ray ends where less than this share of its light is left."""


def bilinear(plane: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values (N, C) of a plane (rows, columns, C) whose corner nodes lie at 0 and 1, at x, y (N,).

    Points outside take the value of the nearest border.
    """
    rows, columns = plane.shape[0], plane.shape[1]
    fx, fy = x.clamp(0, 1) * (columns - 1), y.clamp(0, 1) * (rows - 1)
    i, j = fx.long().clamp(max=columns - 2), fy.long().clamp(max=rows - 2)
    a, b = (fx - i).unsqueeze(-1), (fy - j).unsqueeze(-1)
    low = (1 - a) * plane[j, i] + a * plane[j, i + 1]
    return (1 - b) * low + b * ((1 - a) * plane[j + 1, i] + a * plane[j + 1, i + 1])


def clip_through(x: Tensor, low: float, high: float) -> Tensor:
    """x held in low..high; the gradient passes, so that a value beyond can come back."""
    return x + (x.clamp(low, high) - x).detach()


@dataclass(frozen=True)
class PlaneField:
    """The field of one module: (params, coords, dirs) -> values. `axes` are each plane's two."""

    axes: tuple[tuple[int, int], ...] = ((0, 1), (0, 1), (0, 1), (0, 1), (0, 2), (1, 2))

    def __call__(
        self,
        params: Params,
        coords: Tensor,
        dirs: Tensor | None = None,
        taps: list[Tap] | None = None,
    ) -> Tensor:
        """RGB in 0..1 and density per unit (N, 4) at coords (N, 4).

        `coords` are the place in the module's unit cube and the height above its surface in units.
        `dirs` (N, 3) changes nothing: the fast module's colour is the same from everywhere.
        """
        features = [
            bilinear(params[f"plane.{i}"], coords[:, a], coords[:, b])
            for i, (a, b) in enumerate(self.axes)
        ]
        x = torch.cat([*features, _heights(coords[:, 2], coords[:, 3])], dim=1)
        x = torch.nn.functional.pad(x, (0, params["0.w"].shape[0] - x.shape[1]))
        h = torch.relu(linear(params, "0", x, taps))
        h = torch.relu(linear(params, "1", h, taps))
        o = linear(params, "2", h, taps)
        color = torch.sigmoid(o[:, 1:4] + features[0][:, :3])
        return torch.cat([color, clip_through(o[:, :1], -10, 6).exp()], dim=1)


def _heights(z: Tensor, above: Tensor) -> Tensor:
    """(N, 7) encoding of the height in the unit cube and of the height above the surface."""
    angle = 2 * math.pi * z
    waves = (angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos())
    near, far = (above / 1.5).clamp(-3, 3), (above / 6).clamp(-3, 3)
    return torch.stack([z, *waves, near, far], dim=1)


class Placed(NamedTuple):
    """A module where it stands, in local metres.

    `x`, `y` is the lowest corner and `edge` the edge of its cell, without margins; it knows the
    heights `low`..`low + height`. `surface` and `seen` (n, n) are its surface height and how many
    frames saw it, on nodes that span the cell with its margins. `rank` is its place in the
    order in which modules answer: all differ.
    """

    params: Params
    outer: bool
    x: float
    y: float
    edge: float
    low: float
    height: float
    surface: Tensor
    seen: Tensor
    rank: int


def gates(modules: Sequence[Placed], xy: Tensor) -> Tensor:
    """G (M, N) >= 0: each module's share at points (N, 2), summing to 1 where any knows the point.

    G_i = h_i prod_{j before i} (1 - h_j), divided by the sum over i. h_i is a hat of 1 inside a
    cell that falls to 0 over the margin beyond it, times 1 where frames have shown the module the
    ground around and UNSEEN where not (bilinear over its nodes). Modules come in the order of their
    ranks: whatever has a higher one changes nothing of what a cell has seen. Outer modules answer
    only where no inner one does.
    """
    hats = torch.stack([_hat(m, xy) for m in modules])
    outer = torch.tensor([m.outer for m in modules], device=xy.device).unsqueeze(1)
    inside = (hats * ~outer).sum(0) > 0
    hats = torch.where(outer != inside, hats, torch.zeros_like(hats))
    hats = hats * torch.stack([1 - (1 - UNSEEN) * (1 - _seen_around(m, xy)) for m in modules])
    left, shares = torch.ones_like(hats[0]), torch.zeros_like(hats)
    for i in sorted(range(len(modules)), key=lambda i: modules[i].rank):
        shares[i] = left * hats[i]
        left = left - shares[i]
    return shares / shares.sum(0).clamp(min=torch.finfo(hats.dtype).tiny)


def _hat(m: Placed, xy: Tensor) -> Tensor:
    start = torch.tensor([m.x, m.y], dtype=xy.dtype, device=xy.device)
    within = torch.minimum(xy - start, start + m.edge - xy) / (MARGIN * m.edge)
    return (1 + within).clamp(0, 1).prod(dim=1)


def _seen_around(m: Placed, xy: Tensor) -> Tensor:
    u, v = _in_box(m, xy)
    return bilinear((m.seen > 0).to(xy.dtype).unsqueeze(-1), u, v)[:, 0]


def _in_box(m: Placed, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, 2) in a cell with its margins, 0 to 1 along each axis."""
    margin, extent = MARGIN * m.edge, m.edge * (1 + 2 * MARGIN)
    return (xy[:, 0] - m.x + margin) / extent, (xy[:, 1] - m.y + margin) / extent


def unit_coords(m: Placed, xyz: Tensor) -> Tensor:
    """`PlaneField` coordinates (N, 4) in module m of points (N, 3)."""
    u, v = _in_box(m, xyz[:, :2])
    above = xyz[:, 2] - bilinear(m.surface.unsqueeze(-1), u, v)[:, 0]
    return torch.stack([u, v, (xyz[:, 2] - m.low) / m.height, above * UNITS / m.edge], dim=1)


class Radiance(NamedTuple):
    """At N points: density per metre (N,), colour (N, 3), share of the density in seen columns."""

    density: Tensor
    color: Tensor
    seen: Tensor


def radiance(modules: Sequence[Placed], xyz: Tensor, known_views: int = 1) -> Radiance:
    """sigma = sum_i G_i sigma_i, c = sum_i G_i sigma_i c_i / sigma at points (N, 3).

    A column is seen when `known_views` frames saw it.
    """
    field = PlaneField()
    shares = gates(modules, xyz[:, :2])
    own, colors, known = [], [], []
    for m, share in zip(modules, shares, strict=True):
        coords = unit_coords(m, xyz)
        values = field(m.params, coords)
        own.append(share * values[:, 3] * UNITS / m.edge)
        colors.append(values[:, :3])
        last = len(m.seen) - 1
        i, j = ((coords[:, k].clamp(0, 1) * last + 0.5).long().clamp(max=last) for k in (0, 1))
        known.append(m.seen[j, i] >= known_views)
    each = torch.stack(own)
    density = each.sum(0)
    safe = density.clamp(min=torch.finfo(density.dtype).tiny)
    color = (each.unsqueeze(-1) * torch.stack(colors)).sum(0) / safe.unsqueeze(-1)
    return Radiance(density, color, (each * torch.stack(known)).sum(0) / safe)


class Picture(NamedTuple):
    """Of R rays: colour (R, 3), light left over, weighted distance, weight in seen matter (R,)."""

    rgb: Tensor
    left: Tensor
    depth: Tensor
    known: Tensor


def render(
    modules: Sequence[Placed],
    origins: Tensor,
    directions: Tensor,
    t: Tensor,
    width: Tensor,
    known_views: int = 1,
) -> Picture:
    """Volume rendering of rays (R, 3), unit directions, at distances t (R, S) of given widths.

    w_k = T_k (1 - exp(-sigma_k d_k)), T_k the light that the samples before k let through.
    """
    points = origins.unsqueeze(1) + t.unsqueeze(-1) * directions.unsqueeze(1)
    at = radiance(modules, points.flatten(0, 1), known_views)
    through = torch.exp(-at.density.reshape(t.shape) * width)
    before = torch.cat([torch.ones_like(t[:, :1]), through.cumprod(1)[:, :-1]], dim=1)
    lit = before.detach() >= DARK
    weight = torch.where(lit, before * (1 - through), torch.zeros_like(t))
    return Picture(
        rgb=(weight.unsqueeze(-1) * at.color.reshape(*t.shape, 3)).sum(1),
        left=1 - weight.sum(1),
        depth=(weight * t).sum(1),
        known=(weight * at.seen.reshape(t.shape)).sum(1),
    )
