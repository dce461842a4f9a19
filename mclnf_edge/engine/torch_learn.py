"""Gradients, ray scores and parameter updates in PyTorch: `engine.learn` and `volume.backward`.

A step has one backward pass in two parts. The light's graph gives the gradient of every raw output;
rays are scored on it, and since it is linear in each ray's dL/drgb, it only has to be multiplied by
the weights before it goes on through the networks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mclnf_edge.engine.field import CHANNELS
from mclnf_edge.engine.torch_volume import TensorScene, Traced


class Slopes(NamedTuple):
    """dL/d(raw outputs) (E, 4) and dL/dsigma (R', S) of a traced batch."""

    raw: Tensor
    sigma: Tensor


class Step(NamedTuple):
    """What one step moves: the learning slots of the batch and their networks' gradients (n, P).

    `texel`, `gradient` (U,), (U, CHANNELS) are the texels that were read and theirs.
    """

    slots: Tensor
    weights: Tensor
    texel: Tensor
    gradient: Tensor


def slopes(traced: Traced, d_rgb: Tensor) -> Slopes:
    """Through the light, for dL/drgb `d_rgb` (R, 3)."""
    light = traced.light
    raw, sigma = torch.autograd.grad(
        light.rgb, (traced.raw, light.sigma), d_rgb[traced.samples.ray]
    )
    return Slopes(raw, sigma)


def ray_rows(scene: TensorScene, traced: Traced) -> Tensor:
    """(R',) the row of the module that each ray mostly meets, -1 where that one is frozen."""
    heaviest = traced.light.weight.detach().max(1)
    first = traced.known.first.view(traced.samples.t.shape)
    slot = first.gather(1, heaviest.indices[:, None])[:, 0]
    return torch.where((slot >= 0) & (heaviest.values > 0), scene.owner[slot].long(), -1)


def ray_gradients(scene: TensorScene, traced: Traced, d_raw: Tensor, rows: Tensor) -> Tensor:
    """(R', 4 (hidden + 1)) of each ray on the output layer of the module of its row.

    A ray's gradient is the sum over its samples. Entries are (feature, output), biases last.
    """
    rays, n = traced.samples.t.shape
    ray = traced.known.point // n
    mine = (scene.owner[traced.known.slot] == rows[ray]) & (rows[ray] >= 0)
    at = traced.known.point[mine]
    d = d_raw.new_zeros((rays * n, 4)).index_copy(0, at, d_raw[mine]).view(rays, n, 4)

    def placed(which: int) -> Tensor:
        h = torch.cat([part.output.features[which].detach() for part in traced.parts])
        empty = h.new_zeros((rays * n, h.shape[1]))
        return empty.index_copy(0, at, h[mine]).view(rays, n, -1)

    h = placed(0)
    g = h.mT @ d
    density, color = traced.parts[0].output.features
    if density is not color:
        g = torch.cat([g[..., :1], placed(1).mT @ d[..., 1:]], dim=-1)
    return torch.cat([g, d.sum(1, keepdim=True)], dim=1).flatten(1)


def information(gradients: Tensor, rows: Tensor, running: Tensor, damping: float) -> Tensor:
    """q = g' F^-1 g (R',) with the damped running diagonals `running` (rows, P), then updates them.

    A row's first batch sets its diagonal, later ones move it by a twentieth.
    """
    live = rows >= 0
    row, square = rows[live], gradients[live].square()
    damped = running + damping * running.mean(1, keepdim=True) + 1e-20
    q = gradients.new_zeros(len(rows))
    q[live] = (square / damped[row]).sum(1)
    sums = torch.zeros_like(running).index_add_(0, row, square)
    count = torch.zeros_like(running[:, 0]).index_add_(0, row, torch.ones_like(square[:, 0]))
    fresh = sums / count.clamp(min=1)[:, None]
    first = ~running.any(1, keepdim=True)
    moved = torch.where(first, fresh, 0.95 * running + 0.05 * fresh)
    running.copy_(torch.where(count[:, None] > 0, moved, running))
    return q


def gradncp_score(traced: Traced, d_rgb: Tensor) -> Tensor:
    """(R,) `learn.gradncp_score`: squared error times that of the ray's composed last feature."""
    score = d_rgb.new_zeros(len(d_rgb))
    if not traced.parts:
        return score
    point, n = traced.known.point, traced.samples.t.shape[1]
    mine = traced.known.slot == traced.known.first[point]
    h = torch.cat([part.output.features[1].detach() for part in traced.parts])[mine]
    lit = traced.light.weight.detach().view(-1)[point[mine]][:, None] * h
    composed = h.new_zeros((len(traced.samples.ray), h.shape[1]))
    composed.index_add_(0, point[mine] // n, lit)
    error = d_rgb[traced.samples.ray].square().sum(1)
    score[traced.samples.ray] = error * (composed.square().sum(1) + 1)
    return score


def gradients(traced: Traced, slopes: Slopes, weights: Tensor) -> Step:
    """Of all that learns, with ray weights (R,); through the networks and into the texels.

    What hardly counts, and rays without gradient or weight, are left out, as in `volume.backward`,
    so that no texel is taken for seen. Every other sample is learned from: that kernel's draw
    would save nothing where all samples of a batch are computed at once.
    """
    n = traced.samples.t.shape[1]
    w = weights[traced.samples.ray]
    faint = traced.light.weight < 1e-5
    faint &= (slopes.sigma * w[:, None]).abs() * traced.light.sigma < 1e-9
    point = traced.known.point
    d_raw = slopes.raw * w[point // n][:, None]
    kept = ~faint.view(-1)[point] & d_raw.any(1)
    d_raw *= kept[:, None]
    learning = [part for part in traced.parts if part.weights.requires_grad]
    d_weights, index, share, d_read = [], [], [], []
    for part in learning:
        wanted = (part.weights, part.inputs)
        of_weights, of_inputs = torch.autograd.grad(part.output.raw, wanted, d_raw[part.rows])
        d_weights.append(of_weights)
        if traced.texels is not None:
            here = kept[part.rows]
            index.append(traced.texels.at[part.rows][here])
            share.append(traced.texels.share[part.rows][here])
            d_read.append(of_inputs[here])
    slots = torch.tensor([part.slot for part in learning], dtype=torch.long, device=w.device)
    none = d_raw.new_zeros((0, traced.parts[0].weights.numel() if traced.parts else 0))
    stacked = torch.stack(d_weights) if d_weights else none
    if not index:
        return Step(slots, stacked, slots[:0], d_raw.new_zeros((0, CHANNELS)))
    return Step(slots, stacked, *_scatter(torch.cat(index), torch.cat(share), torch.cat(d_read)))


def _scatter(index: Tensor, share: Tensor, d_inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct texels (U,) of index (E, P, 4) and their gradients (U, CHANNELS)."""
    planes = index.shape[1]
    d = d_inputs[:, : planes * CHANNELS].reshape(-1, planes, 1, CHANNELS) * share.unsqueeze(-1)
    texel, at = index.flatten().unique(return_inverse=True)
    sums = d.new_zeros((len(texel), CHANNELS)).index_add_(0, at, d.reshape(-1, CHANNELS))
    return texel, sums


def plane_moments(planes: Tensor, per_slot: int, step: Step) -> Tensor:
    """(planes,) mean square of the texels' gradients, 0 where none was read."""
    plane = _planes_of(planes, per_slot, step.texel)
    square = step.gradient.square().mean(1)
    sums = square.new_zeros(len(planes)).index_add_(0, plane, square)
    count = square.new_zeros(len(planes)).index_add_(0, plane, torch.ones_like(square))
    return sums / count.clamp(min=1)


def _planes_of(planes: Tensor, per_slot: int, texel: Tensor) -> Tensor:
    begins = planes[:, 4].contiguous() // CHANNELS
    return torch.searchsorted(begins, texel % per_slot, right=True) - 1


def step_texels(
    features: Tensor, fisher: Tensor, scene: TensorScene, step: Step, rate: float, damping: Tensor
) -> None:
    """theta -= rate g / sqrt(F + damping), F += g^2 first: `learn.step_texels`, in place.

    `features` (slots, n) and `fisher` (rows, n); `damping` (planes,).
    """
    per_slot = features.shape[1] // CHANNELS
    slot = step.texel // per_slot
    at = scene.owner[slot].long() * per_slot + step.texel % per_slot
    f, theta = fisher.view(-1, CHANNELS), features.view(-1, CHANNELS)
    information = f[at] + step.gradient.square()
    f[at] = information
    damped = information + damping[_planes_of(scene.planes, per_slot, step.texel)][:, None]
    theta[step.texel] -= rate * step.gradient / damped.sqrt()


def adam(
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    at: tuple[Tensor, Tensor],
    gradient: Tensor,
    rate: float,
    decay: tuple[float, float] = (0.9, 0.99),
) -> None:
    """Adam in place on (weights, moment, square, steps), at (slots, rows): `learn.adam`.

    A module without gradient (n, P) stays where it is.
    """
    weights, moment, square, steps = state
    a, b = decay
    live = gradient.any(1)
    (slots, rows), g = (each[live] for each in at), gradient[live]
    steps[rows] += 1
    t = steps[rows][:, None]
    moment[rows] += (1 - a) * (g - moment[rows])
    square[rows] += (1 - b) * (g.square() - square[rows])
    root = (square[rows] / (1 - b**t)).sqrt() + 1e-12
    weights[slots] -= rate * (moment[rows] / (1 - a**t)) / root
