"""Factored Fisher information of samples on the CPU, compiled: `fisher.factored_information`.

In PyTorch each square and each sum is a pass over memory of its own, ten of them a layer, and a
weighted step takes 1.25 times a plain one. Here a sample's two vectors are read once, and those of
one sample in `every` once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

Floats = npt.NDArray[np.floating]

_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_JIT["fastmath"] = {"reassoc", "contract"}  # what is not a number must stay so


def factors(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's factors (..., d_in + 1), (..., d_out) of x (..., N, d_in) and d (..., N, d_out)."""
    inputs, grads = _modules(x), _modules(d)
    row = np.zeros((len(inputs), inputs.shape[2] + 1), inputs.dtype)
    column = np.zeros((len(inputs), grads.shape[2]), inputs.dtype)
    for m in range(len(inputs)):
        _count(inputs[m], grads[m], 1, row[m], column[m])
    lead = x.shape[:-2]
    return torch.from_numpy(row).view(*lead, -1), torch.from_numpy(column).view(*lead, -1)


def information(pairs: Sequence[tuple[Tensor, Tensor]], damping: float, every: int) -> Tensor:
    """q (..., N) of layers' inputs (..., N, d_in) and gradients (..., N, d_out).

    F's factors are those of one sample in `every`.
    """
    inputs, grads = ([_modules(pair[i]) for pair in pairs] for i in (0, 1))
    q = np.empty(inputs[0].shape[:2], inputs[0].dtype)
    for m in range(len(q)):
        xs, ds = tuple(x[m] for x in inputs), tuple(d[m] for d in grads)
        _inform(xs, ds, damping, every, q[m])
    return torch.from_numpy(q).view(pairs[0][0].shape[:-1])


def _modules(x: Tensor) -> Floats:
    """(..., N, n) -> (modules, N, n); NumPy's views take a fraction of PyTorch's time."""
    array: Floats = x.detach().numpy()
    return np.ascontiguousarray(array).reshape(-1, *array.shape[-2:])


@njit(**_JIT)
def _count(x, d, every, row, column):
    """Add a layer's squared scores, by row (d_in + 1), the bias last, and by column (d_out).

    Four samples at a time, of which those beyond the last count 0 times: the sums are then read and
    written once for four.
    """
    n, last, outs = x.shape[0], x.shape[1], d.shape[1]
    f = x.dtype.type
    for i in range(0, n, 4 * every):
        i1, i2, i3 = i + every, i + 2 * every, i + 3 * every
        k1, k2, k3 = f(i1 < n), f(i2 < n), f(i3 < n)
        i1, i2, i3 = min(i1, n - 1), min(i2, n - 1), min(i3, n - 1)
        x0, x1, x2, x3 = x[i], x[i1], x[i2], x[i3]
        d0, d1, d2, d3 = d[i], d[i1], d[i2], d[i3]
        a0, a1, a2, a3 = f(1), f(1), f(1), f(1)
        for j in range(last):
            a0 += x0[j] * x0[j]
            a1 += x1[j] * x1[j]
            a2 += x2[j] * x2[j]
            a3 += x3[j] * x3[j]
        a1, a2, a3 = k1 * a1, k2 * a2, k3 * a3
        b0, b1, b2, b3 = f(0), f(0), f(0), f(0)
        for k in range(outs):
            s0, s1, s2, s3 = d0[k] * d0[k], d1[k] * d1[k], d2[k] * d2[k], d3[k] * d3[k]
            b0 += s0
            b1 += s1
            b2 += s2
            b3 += s3
            column[k] += (s0 * a0 + s1 * a1) + (s2 * a2 + s3 * a3)
        b1, b2, b3 = k1 * b1, k2 * b2, k3 * b3
        for j in range(last):
            low = x0[j] * x0[j] * b0 + x1[j] * x1[j] * b1
            row[j] += low + (x2[j] * x2[j] * b2 + x3[j] * x3[j] * b3)
        row[last] += (b0 + b1) + (b2 + b3)


@njit(**_JIT)
def _inform(xs, ds, damping, every, q):
    """A module's information q (N,) from its layers' inputs and gradients."""
    f = q.dtype.type
    tiny = f(np.finfo(np.float32).tiny)
    ins, outs, size = 0, 0, 0
    for layer in range(len(xs)):
        ins += xs[layer].shape[1] + 1
        outs += ds[layer].shape[1]
        size += (xs[layer].shape[1] + 1) * ds[layer].shape[1]
    rows, columns = np.zeros(ins, q.dtype), np.zeros(outs, q.dtype)
    i, k = 0, 0
    for layer in range(len(xs)):
        x, d = xs[layer], ds[layer]
        _count(x, d, every, rows[i : i + x.shape[1] + 1], columns[k : k + d.shape[1]])
        i, k = i + x.shape[1] + 1, k + d.shape[1]
    ridge = f(damping * columns.sum() / size)
    counted = (q.size + every - 1) // every
    q[:] = f(0)
    i, k = 0, 0
    for layer in range(len(xs)):
        x, d = xs[layer], ds[layer]
        last, out = x.shape[1], d.shape[1]
        row, column = rows[i : i + last + 1], columns[k : k + out]
        scale = f((column.sum() + ridge * row.size * out) * counted)
        for j in range(last + 1):
            row[j] = 1 / max(row[j] + f(ridge * out), tiny)
        for j in range(out):
            column[j] = scale / max(column[j] + f(ridge * (last + 1)), tiny)
        for n in range(x.shape[0]):
            xn, dn = x[n], d[n]
            a = row[last]
            for j in range(last):
                a += xn[j] * xn[j] * row[j]
            b = f(0)
            for j in range(out):
                b += dn[j] * dn[j] * column[j]
            q[n] += a * b
        i, k = i + last + 1, k + out
