"""Volume rendering in PyTorch: what `engine.volume` does ray by ray, batched over all of them.

Rays march the coarse density grid, draw their samples, and each sample is evaluated by the one to
four modules that know it. Evaluations are sorted by module, so that each network runs once. All
functions are pure and work in the scene's dtype and on its device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mclnf_edge.engine.field import CHANNELS, SURFACE
from mclnf_edge.engine.torch_field import (
    Network,
    Output,
    Texels,
    find_texels,
    mlp_inputs,
    plane_inputs,
)
from mclnf_edge.engine.volume import FAR, MARGIN, UNSEEN

DARK = 0.002
"""A ray ends where less than this share of its light is left."""

_UNITS = 64 * (1 + 2 * MARGIN)  # of length along a module's box
_BITS = 26  # of a cell's number along one axis


class TensorScene(NamedTuple):
    """`volume.Scene` as tensors: arrays by slot, and sorted keys of cells with their slots."""

    cell: float
    site: int
    keys: Tensor
    key_slot: Tensor
    box: Tensor
    band: Tensor
    features: Tensor
    planes: Tensor
    weights: Tensor
    density: Tensor
    voxels: tuple[int, int, int]
    surface: Tensor
    seen: Tensor
    owner: Tensor
    rank: Tensor
    known_views: int


class Course(NamedTuple):
    """How rays are sampled: `samples` of `steps` coarse ones, see `volume.forward`.

    `generator` None: in the middle of each share, without jitter.
    """

    samples: int
    steps: int
    uniform: float
    reach: float
    generator: torch.Generator | None = None


class Known(NamedTuple):
    """E pairs of a point and a module that knows it: indices, slots and shares (E,).

    `first` (N,) is the slot with a point's largest share, -1 for none.
    """

    point: Tensor
    slot: Tensor
    share: Tensor
    first: Tensor


class Samples(NamedTuple):
    """Where the R' of R rays that meet a module (`ray` (R',)) are looked at: t, width (R', S)."""

    ray: Tensor
    t: Tensor
    width: Tensor


class Points(NamedTuple):
    """E evaluations, sorted by slot: which modules look where, as their fields read it.

    `u` (E, 3) is in the module's unit cube, `above` (E,) the height above its surface in units,
    `unit` (E,) metres per unit, `seen` (E,) whether enough frames saw the place, `directions`
    (E, 3).
    """

    known: Known
    u: Tensor
    above: Tensor
    unit: Tensor
    seen: Tensor
    directions: Tensor


Look = Callable[[TensorScene, Points], Tensor]
"""Evaluates fields: (E, 4) density per unit of length, then RGB in 0..1."""


class Part(NamedTuple):
    """The evaluations `rows` of one module: its parameters, what its network read and said."""

    slot: int
    rows: slice
    weights: Tensor
    inputs: Tensor
    output: Output


class Light(NamedTuple):
    """Of R' rays: colour (R', 3), light left over, weighted distance, share in seen matter (R',).

    `sigma` (R', S) is the density per metre and `weight` (R', S) the share of light of a sample.
    """

    rgb: Tensor
    left: Tensor
    depth: Tensor
    known: Tensor
    sigma: Tensor
    weight: Tensor


class Traced(NamedTuple):
    """A rendered batch of R rays: all that the way back needs. `rgb` (R, 3) without a graph.

    `raw` (E, 4) joins the parts' outputs; the light's graph begins there.
    """

    rgb: Tensor
    samples: Samples
    known: Known
    texels: Texels | None
    parts: list[Part]
    raw: Tensor
    light: Light


def cell_keys(level: Tensor, ix: Tensor, iy: Tensor) -> Tensor:
    """One number per cell."""
    half = 1 << (_BITS - 1)
    return (((level << _BITS) + ix + half) << _BITS) + iy + half


def find_slots(scene: TensorScene, outer: int, ix: Tensor, iy: Tensor) -> Tensor:
    """Slots of cells of the scene's inner (0) or outer (1) level, -1 where there is no module."""
    level = torch.full_like(ix, 2 * scene.site + outer)
    key = cell_keys(level, ix, iy)
    at = torch.searchsorted(scene.keys, key).clamp(max=len(scene.keys) - 1)
    return torch.where(scene.keys[at] == key, scene.key_slot[at], -1)


def gate(scene: TensorScene, xy: Tensor) -> Known:
    """The modules that know points (N, 2); outer ones answer only where no inner one does."""
    inner = _candidates(scene, xy, 0)
    unmet = torch.ones(len(xy), dtype=torch.bool, device=xy.device)
    unmet[inner[0]] = False
    rest = unmet.nonzero()[:, 0]
    outer = _candidates(scene, xy[rest], 1)
    found = (inner, (rest[outer[0]], *outer[1:]))
    point, slot, share = (torch.cat(each) for each in zip(*found, strict=True))
    total = torch.zeros_like(xy[:, 0]).index_add_(0, point, share)
    begins = torch.ones_like(point, dtype=torch.bool)
    begins[1:] = point[1:] != point[:-1]
    first = torch.full_like(unmet, -1, dtype=torch.long)
    first[point[begins]] = slot[begins]
    return Known(point, slot, share / total[point], first)


def _candidates(scene: TensorScene, xy: Tensor, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    """(points, slots, shares before they are divided by their sum) of one level, by point, the
    largest share first.
    """
    f = xy / (scene.cell * (FAR if outer else 1))
    i = f.floor()
    a = f - i
    within = (torch.minimum(a, 1 - a) / MARGIN).clamp(max=1)
    cell = torch.stack([i, i + torch.where(a < 0.5, -1, 1)], dim=1).long()  # (N, own or next, axis)
    by_axis = torch.stack([torch.ones_like(within), 1 - within], dim=1)
    hat = (by_axis[:, :, None, 0] * by_axis[:, None, :, 1]).flatten(1)  # (N, 4)
    at, k = (hat > 0).nonzero(as_tuple=True)
    slot = torch.full_like(hat, -1, dtype=torch.long)
    slot[at, k] = find_slots(scene, outer, cell[at, k // 2, 0], cell[at, k % 2, 1])
    share = hat * (slot >= 0)
    near = (within < 1).any(1).nonzero()[:, 0]  # elsewhere a cell is alone
    share[near], slot[near] = _in_order(scene, share[near], slot[near], xy[near])
    point, k = (share > 0).nonzero(as_tuple=True)
    return point, slot[point, k], share[point, k]


def _in_order(scene: TensorScene, hat: Tensor, slot: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """What modules (N, 4) take of the points in order of rank, and which, the largest first."""
    hat = hat * (1 - (1 - UNSEEN) * (1 - _seen_around(scene, slot, xy)))
    order = scene.rank[slot].argsort(dim=1)
    left = (1 - hat).gather(1, order).cumprod(1)
    before = torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], dim=1)
    share = hat * torch.zeros_like(hat).scatter(1, order, before)
    share, by_share = share.sort(dim=1, descending=True, stable=True)
    return share, slot.gather(1, by_share)


def _seen_around(scene: TensorScene, slot: Tensor, xy: Tensor) -> Tensor:
    """How much of what is around points (N, 2) frames have shown to modules (N, 4): 0 to 1."""
    box = scene.box[slot]
    i, j, a, b = _node((xy[:, None] - box[..., :2]) / box[..., 2:])
    at = [scene.seen[slot, j + d, i + c].clamp(max=1) for d in (0, 1) for c in (0, 1)]
    return (1 - b) * ((1 - a) * at[0] + a * at[1]) + b * ((1 - a) * at[2] + a * at[3])


def _node(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Column and row of the surface before u (..., 2) in 0..1, and the fractions beyond."""
    f = (u * (SURFACE - 1)).clamp(0, SURFACE - 1.001)
    (i, j), (a, b) = f.long().unbind(-1), (f - f.floor()).unbind(-1)
    return i, j, a, b


def span(bands: Tensor, oz: Tensor, dz: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Where rays are inside their height bands (R, 2): t0, t1 (R,), empty when t1 <= t0."""
    level = dz.abs() <= 1e-6
    safe = torch.where(level, torch.ones_like(dz), dz)
    ends = (bands - oz[:, None]) / safe[:, None]
    t0 = torch.where(level, 0.5, ends.amin(1).clamp(min=0.5))
    t1 = torch.where(level, reach, ends.amax(1).clamp(max=reach))
    outside = level & ((oz < bands[:, 0]) | (oz > bands[:, 1]))
    return t0, torch.where(outside, 0.0, t1)


def grid_density(scene: TensorScene, at: Tensor) -> Tensor:
    """The density grids (N,) at points (N, 3): of inner modules first, -1 outside every band."""
    f = at[:, :2] / scene.cell
    i = f.floor().long()
    slot = find_slots(scene, 0, i[:, 0], i[:, 1])
    j = i.div(FAR, rounding_mode="floor")
    far = slot < 0
    slot = torch.where(far, find_slots(scene, 1, j[:, 0], j[:, 1]), slot)
    a = torch.where(far[:, None], (f - j * FAR) / FAR, f - i)
    band = scene.band[slot]
    uz = (at[:, 2] - band[:, 0]) * band[:, 1]
    nx, ny, nz = scene.voxels
    vx, vy = (a[:, 0] * nx).long().clamp(0, nx - 1), (a[:, 1] * ny).long().clamp(0, ny - 1)
    vz = (uz * nz).long().clamp(0, nz - 1)
    inside = (slot >= 0) & (uz >= 0) & (uz < 1)
    return torch.where(inside, scene.density[slot, (vy * nx + vx) * nz + vz], -1.0)


def draw(
    scene: TensorScene, ro: Tensor, rd: Tensor, t0: Tensor, dt: Tensor, course: Course
) -> tuple[Tensor, Tensor]:
    """Sorted sample distances (R, S) by the grid's weights; whether each ray meets a module."""
    rays, steps, samples = len(ro), course.steps, course.samples
    offset, within = _unit(ro, (rays, 1), course), _unit(ro, (rays, samples), course)
    at = t0[:, None] + (torch.arange(steps, device=ro.device) + offset) * dt[:, None]
    points = ro[:, None] + at.unsqueeze(-1) * rd[:, None]
    density = grid_density(scene, points.flatten(0, 1)).view(rays, steps)
    thick = density.clamp(min=0) * dt[:, None]
    alpha = torch.where(thick < 0.05, thick - 0.5 * thick * thick, -torch.expm1(-thick))
    through = torch.cumprod(1 - alpha, 1)
    before = torch.cat([torch.ones_like(t0)[:, None], through[:, :-1]], dim=1)
    taken = before > 1e-3
    mass = before * alpha + course.uniform / steps
    mass = torch.where((density >= 0) & taken, mass, torch.zeros_like(mass))
    cdf = mass.cumsum(1)
    total = cdf[:, -1:]
    q = (torch.arange(samples, device=ro.device) + within) / samples * total
    last = taken.sum(1, keepdim=True) - 1
    k = torch.minimum(torch.searchsorted(cdf, q), last)
    high, share = cdf.gather(1, k), mass.gather(1, k)
    f = torch.where(share > 0, (q - high + share) / share, 0.5).clamp(0, 1)
    return t0[:, None] + (k + f) * dt[:, None], total[:, 0] > 0


def _unit(like: Tensor, shape: tuple[int, int], course: Course) -> Tensor:
    if course.generator is None:
        return torch.full(shape, 0.5, dtype=like.dtype, device=like.device)
    return torch.rand(shape, generator=course.generator, dtype=like.dtype, device=like.device)


def place(scene: TensorScene, ro: Tensor, rd: Tensor, bands: Tensor, course: Course) -> Samples:
    """Samples of the rays (R, 3) that meet a module."""
    t0, t1 = span(bands, ro[:, 2], rd[:, 2], course.reach)
    dt = (t1 - t0).clamp(min=0) / course.steps
    t, met = draw(scene, ro, rd, t0, dt, course)
    ray = (met & (t1 > t0)).nonzero()[:, 0]
    t, t0, dt = t[ray], t0[ray, None], dt[ray, None]
    middle = 0.5 * (t[:, 1:] + t[:, :-1])
    low = torch.maximum(t0, t[:, :1] - 0.5 * dt)
    edges = torch.cat([low, middle, t[:, -1:] + 0.5 * dt], dim=1)
    return Samples(ray, t, edges.diff(dim=1).clamp(min=1e-3))


def surface_at(scene: TensorScene, slot: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Surface height and whether enough frames saw it (E,), at u (E, 3) in the unit cube."""
    i, j, a, b = _node(u[:, :2])
    at = (slot * SURFACE + j) * SURFACE + i
    h = scene.surface.view(-1)
    low = (1 - a) * h[at] + a * h[at + 1]
    high = (1 - a) * h[at + SURFACE] + a * h[at + SURFACE + 1]
    seen = scene.seen[slot, j + (b >= 0.5), i + (a >= 0.5)]
    return (1 - b) * low + b * high, seen >= scene.known_views


def trace(
    scene: TensorScene,
    network: Network,
    rays: tuple[Tensor, Tensor, Tensor],
    course: Course,
    dark: float = DARK,
    *,
    learn: bool = False,
) -> Traced:
    """Render rays (origins (R, 3), unit directions (R, 3), bands (R, 2)).

    With `learn`, what belongs to modules with an owner can be differentiated.
    """
    samples = place(scene, *rays, course)
    return evaluate(scene, network, rays[:2], samples, dark, learn=learn)


def evaluate(
    scene: TensorScene,
    network: Network,
    rays: tuple[Tensor, Tensor],
    samples: Samples,
    dark: float = DARK,
    *,
    learn: bool = False,
) -> Traced:
    """Render R rays at given samples; see `trace`."""
    points = locate(scene, rays, samples)
    texels, inputs = _inputs(scene, points)
    parts = _run(scene, network, points.known.slot, inputs, learn)
    raw = torch.cat([inputs.new_zeros((0, 4)), *(part.output.raw.detach() for part in parts)])
    raw.requires_grad_(learn)
    light = compose(activated(network, raw), points, samples, dark)
    rgb = inputs.new_zeros((len(rays[0]), 3))
    rgb[samples.ray] = light.rgb.detach()
    return Traced(rgb, samples, points.known, texels, parts, raw, light)


def locate(scene: TensorScene, rays: tuple[Tensor, Tensor], samples: Samples) -> Points:
    """What knows the samples of R rays, (R, 3) origins and directions."""
    ro, rd = (x[samples.ray] for x in rays)
    xyz = (ro[:, None] + samples.t.unsqueeze(-1) * rd[:, None]).flatten(0, 1)
    known = gate(scene, xyz[:, :2])
    order = known.slot.argsort(stable=True)
    known = Known(known.point[order], known.slot[order], known.share[order], known.first)
    box, band = scene.box[known.slot], scene.band[known.slot]
    p = xyz[known.point]
    uz = (p[:, 2] - band[:, 0]) * band[:, 1]
    u = torch.cat([(p[:, :2] - box[:, :2]) / box[:, 2:], uz[:, None]], dim=1)
    unit = box[:, 2] / _UNITS
    height, seen = surface_at(scene, known.slot, u)
    directions = rd[known.point // samples.t.shape[1]]
    return Points(known, u, (p[:, 2] - height) / unit, unit, seen, directions)


def _inputs(scene: TensorScene, points: Points) -> tuple[Texels | None, Tensor]:
    """What the scene's kind of network reads at points, and the texels it is made of."""
    if not len(scene.planes):
        return None, mlp_inputs(points.u, points.directions)
    per_slot = scene.features.shape[1] // CHANNELS
    texels = find_texels(scene.planes, points.known.slot * per_slot, points.u)
    features = scene.features.view(-1, CHANNELS)
    return texels, plane_inputs(features, texels, points.u[:, 2], points.above)


def activated(network: Network, raw: Tensor) -> Tensor:
    """Density per unit of length and RGB in 0..1 of raw values (E, 4)."""
    return torch.cat([network.density(raw[:, 0])[:, None], torch.sigmoid(raw[:, 1:])], dim=1)


def look(network: Network, scene: TensorScene, points: Points) -> Tensor:
    """See `Look`; by PyTorch."""
    _, inputs = _inputs(scene, points)
    parts = _run(scene, network, points.known.slot, inputs, learn=False)
    raw = torch.cat([inputs.new_zeros((0, 4)), *(part.output.raw for part in parts)])
    return activated(network, raw)


def _run(
    scene: TensorScene, network: Network, slot: Tensor, inputs: Tensor, learn: bool
) -> list[Part]:
    """Each module's network on its rows of `inputs`, which are sorted by slot."""
    parts, owners = [], scene.owner.tolist()
    for s, rows in runs(slot):
        x, weights = inputs[rows], scene.weights[s]
        grad = learn and owners[s] >= 0
        if grad:
            x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        with torch.set_grad_enabled(grad):
            parts.append(Part(s, rows, weights, x, network(weights, x)))
    return parts


def runs(slot: Tensor) -> list[tuple[int, slice]]:
    """Each slot of sorted ones (E,) and where it stands."""
    slots, counts = slot.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    rows = map(slice, (ends - counts).tolist(), ends.tolist())
    return list(zip(slots.tolist(), rows, strict=True))


def compose(values: Tensor, points: Points, samples: Samples, dark: float) -> Light:
    """The gate's blend and the quadrature: sigma, c and w_k of `engine.volume`'s head.

    `values` (E, 4) are the fields' at the points, see `Look`.
    """
    rays, n = samples.t.shape
    known = points.known
    own = (values[:, 0] / points.unit * known.share)[:, None]
    each = torch.cat([own, own * values[:, 1:], own * points.seen[:, None]], dim=1)
    matter = each.new_zeros((rays * n, 5)).index_add(0, known.point, each).view(rays, n, 5)
    sigma = matter[..., 0]
    blend = matter[..., 1:] / sigma.clamp(min=torch.finfo(values.dtype).tiny).unsqueeze(-1)
    thick = sigma * samples.width
    before = torch.exp(thick - thick.cumsum(1))
    lit = before.detach() >= dark
    weight = torch.where(lit, before * -torch.expm1(-thick), torch.zeros_like(thick))
    sums = (weight.unsqueeze(-1) * blend).sum(1)
    return Light(
        rgb=sums[:, :3],
        left=1 - weight.sum(1),
        depth=(weight * samples.t).sum(1),
        known=sums[:, 3],
        sigma=sigma,
        weight=weight,
    )
