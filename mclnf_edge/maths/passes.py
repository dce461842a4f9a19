"""Forwards and backwards through a network on the CPU without a graph: what `inner_step` needs.

The same as autograd's up to rounding. Autograd holds several arrays of each layer for a whole
batch, new ones in each step, and narrow networks spend most of a step on moving and first touching
them. Here some hundred points go through all layers and back while they are in the cache, products
are written where they are needed, and the memory is kept from step to step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mclnf_edge.maths import kernels
from mclnf_edge.maths.fields import Field, Inputs, Layer, Network, Params, Seen, activate

VALUES_AT_ONCE = 1 << 18
"""Points that go through the layers at once, times the widest layer's values: a megabyte."""
FEW = 8
"""Up to so many columns, a product is taken transposed: BLAS is several times as fast that way."""
KEPT_BYTES = 1 << 27
"""Memory that a thread keeps between steps; that of a larger batch is freed after it."""

Arrays = Mapping[tuple[str, ...], Tensor]
"""What layers read, by `Layer.inputs`; an activated layer under its own name alone."""

_Key = TypeVar("_Key")
_kept = threading.local()


def network(field: Field, params: Params, batch: tuple[Tensor, Tensor]) -> Network | None:
    """The field where `backward` can stand in for autograd, else None.

    It must be a network in float32 on the CPU, with one module axis or none.
    """
    coords, tensors = batch[0], (*batch, *params.values())
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    alike = all(p.ndim == coords.ndim for name, p in params.items() if name.endswith(".w"))
    return field if isinstance(field, Network) and plain and alike and coords.ndim <= 3 else None


@torch.no_grad()
def backward(
    network: Network, params: Params, coords: Tensor, targets: Tensor
) -> tuple[Tensor, list[Seen], list[Tensor]]:
    """Values (..., N, d_out); of each layer its inputs and d(sum |s_hat - s|^2 / 2)/d(output).

    Layers are in the order of the plan. What is not the values lies in memory that the next call in
    this thread writes over.
    """
    plan, lead = network.plan, coords.shape[:-1]
    params = {n: p.detach() if coords.ndim == 3 else p.detach()[None] for n, p in params.items()}
    coords, targets = (x.reshape(-1, *x.shape[-2:]) for x in (coords, targets))
    known: dict[tuple[str, ...], Tensor]
    known = {(n,): x.contiguous() for n, x in network.encode(coords).items()}
    modules, points = coords.shape[:2]
    outs = {layer.name: params[f"{layer.name}.b"].shape[-1] for layer in plan}
    ins = {layer.inputs: params[f"{layer.name}.w"].shape[-2] for layer in plan}
    at_once = min(points, _at_once(*outs.values()))
    new = {key: width for key, width in ins.items() if len(key) > 1}
    new |= {(name,): width for name, width in outs.items()}
    sines = [layer.name for layer in plan if layer.activation == "sine"]
    views = iter(_memory(
        [(modules, points, width) for width in (*new.values(), *outs.values())]
        + [(at_once, outs[name]) for name in sines]
    ))  # fmt: skip
    known |= dict(zip(new, views, strict=False))
    grads = dict(zip(outs, views, strict=False))
    slopes = dict(zip(sines, views, strict=True))
    sizes = _pieces(points, at_once) * modules
    arrays = _split(known, sizes), _split(grads, sizes)
    goals = torch.split(targets.flatten(0, 1), sizes)
    for i, (here, there, goal) in enumerate(zip(*arrays, goals, strict=True)):
        m = i * modules // len(sizes)
        own = {name: p[m] for name, p in params.items()}
        bends = {name: s[: len(goal)] for name, s in slopes.items()}
        _forwards(plan, own, here, bends)
        _errors(network.outputs, here, goal, there)
        _backwards(plan, own, here, bends, there, set(network.outputs))
    values = torch.cat([known[(name,)] for name in network.outputs], dim=-1)
    inputs: list[Seen] = [Inputs(layer.name, known[layer.inputs].view(*lead, -1)) for layer in plan]
    return values.view(*lead, -1), inputs, [grads[n].view(*lead, -1) for n in outs]


@torch.no_grad()
def weighted_gradient(seen: Sequence[Seen], grads: Sequence[Tensor], scale: Tensor) -> Params:
    """sum_i scale_i * (gradient of sample i) of `backward`'s layers; `scale` (..., N).

    The gradients at the outputs are scaled in place.
    """
    found: Params = {}
    scales = scale.reshape(-1, scale.shape[-1], 1)
    for layer, grad in zip(seen, grads, strict=True):
        x, d = (v.reshape(-1, *v.shape[-2:]) for v in (layer.inputs, grad))
        few = d.shape[-1] <= FEW
        ins, outs = x.shape[-1], d.shape[-1]
        weight = x.new_zeros((len(x), outs, ins) if few else (len(x), ins, outs))
        bias = x.new_zeros(len(x), outs)
        parts = (torch.split(v, _at_once(ins, outs), dim=1) for v in (x, d, scales))
        for inputs, scaled, factor in zip(*parts, strict=True):
            scaled.mul_(factor)
            bias += scaled.sum(-2)
            if few:
                weight.baddbmm_(scaled.mT, inputs)
            else:
                weight.baddbmm_(inputs.mT, scaled)
        weight = weight.mT.contiguous() if few else weight
        lead = scale.shape[:-1]
        found[f"{layer.layer}.w"] = weight.view(*lead, ins, outs)
        found[f"{layer.layer}.b"] = bias.view(*lead, outs)
    return found


def _at_once(*widths: int) -> int:
    return max(1, VALUES_AT_ONCE // max(widths))


def _pieces(points: int, at_once: int) -> list[int]:
    """How many points go together."""
    return [min(at_once, points - a) for a in range(0, points, at_once)]


def _split(arrays: Mapping[_Key, Tensor], sizes: list[int]) -> list[dict[_Key, Tensor]]:
    """(modules, N, width) arrays -> the pieces of all of them, one after the other."""
    parts = [torch.split(x.flatten(0, 1), sizes) for x in arrays.values()]
    return [dict(zip(arrays, piece, strict=True)) for piece in zip(*parts, strict=True)]


def _forwards(plan: Sequence[Layer], params: Params, known: Arrays, slopes: Params) -> None:
    """Fill in joined inputs, activated outputs and the sines' slopes, all (points, width)."""
    for layer in plan:
        x, y = known[layer.inputs], known[(layer.name,)]
        if len(layer.inputs) > 1:
            torch.cat([known[(name,)] for name in layer.inputs], dim=-1, out=x)
        weight, bias = params[f"{layer.name}.w"], params[f"{layer.name}.b"]
        if layer.activation == "sine":
            torch.mm(x, weight, out=y)
            slope = slopes[layer.name].numpy()
            kernels.sine(y.numpy(), bias.numpy(), np.float32(layer.omega), slope)
            continue
        if y.shape[-1] > FEW:
            torch.addmm(bias, x, weight, out=y)
        else:
            y.copy_(torch.addmm(bias[:, None], weight.t(), x.t()).t())
        if layer.activation == "relu":
            y.relu_()
        elif layer.activation != "none":
            y.copy_(activate(layer, y))


def _errors(outputs: Sequence[str], known: Arrays, targets: Tensor, grads: Params) -> None:
    """The loss's gradient at the activated outputs."""
    column = 0
    for name in outputs:
        value = known[(name,)]
        width = value.shape[-1]
        torch.sub(value, targets[:, column : column + width], out=grads[name])
        column += width


def _backwards(
    plan: Sequence[Layer],
    params: Params,
    known: Arrays,
    slopes: Params,
    grads: Params,
    reached: set[str],
) -> None:
    """Fill in the gradients at the layers' outputs; those of `reached` hold the activated ones'."""
    for layer in reversed(plan):
        d = grads[layer.name]
        _through(layer, d, known[(layer.name,)], slopes)
        column = 0
        for name in layer.inputs:
            width = known[(name,)].shape[-1]
            weight = params[f"{layer.name}.w"][column : column + width].t()
            if name in reached:
                grads[name].addmm_(d, weight)
            elif name in grads:
                torch.mm(d, weight, out=grads[name])
                reached.add(name)
            column += width


def _through(layer: Layer, d: Tensor, y: Tensor, slopes: Params) -> None:
    """From the gradient at an activated output y to that at the output, in place."""
    if layer.activation == "sine":
        d.mul_(slopes[layer.name])
    elif layer.activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=d)
    elif layer.activation == "sigmoid":
        d.mul_(y * (1 - y))
    elif layer.activation == "density":
        d.mul_(-torch.expm1(-y))


def _memory(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Arrays of these shapes in the thread's memory, each beginning at a cache line."""
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 16) * 16)
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < starts[-1]:
        memory = torch.empty(starts[-1])
        if memory.nbytes <= KEPT_BYTES:
            _kept.memory = memory
    return [
        memory[a : a + n].view(shape)
        for a, n, shape in zip(starts[:-1], sizes, shapes, strict=True)
    ]
