"""Factored Fisher information of samples on the CPU, compiled: `fisher.factored_information`.

In PyTorch each square and each sum is a pass over memory of its own, ten of them a layer, and a
weighted step takes 1.25 times a plain one. Here a sample's two vectors are read twice in all.
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
Factors = tuple[Floats, Floats]
"""Squared scores of a layer, summed over samples: by row (modules, d_in + 1), the bias last, and by
column (modules, d_out)."""

_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_JIT["fastmath"] = {"reassoc", "contract"}  # what is not a number must stay so


def no_factors(modules: int, d_in: int, d_out: int, dtype: npt.DTypeLike = np.float32) -> Factors:
    """Of no samples yet."""
    return np.zeros((modules, d_in + 1), dtype), np.zeros((modules, d_out), dtype)


def count(
    factors: Sequence[Factors], module: int, inputs: Sequence[Floats], grads: Sequence[Floats]
) -> None:
    """Add a module's samples with inputs (N, d_in) and gradients (N, d_out) of each layer."""
    rows, columns = _of(factors, module)
    _count(tuple(inputs), tuple(grads), rows, columns)


def factors(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's factors (..., d_in + 1), (..., d_out) of x (..., N, d_in) and d (..., N, d_out)."""
    inputs, grads = _modules(x), _modules(d)
    found = no_factors(len(inputs), inputs.shape[2], grads.shape[2], inputs.dtype)
    for m in range(len(inputs)):
        count([found], m, [inputs[m]], [grads[m]])
    row, column = (torch.from_numpy(f).view(*x.shape[:-2], -1) for f in found)
    return row, column


def information(
    pairs: Sequence[tuple[Tensor, Tensor]], damping: float, counted: Sequence[Factors] | None
) -> Tensor:
    """q (..., N) of layers' inputs (..., N, d_in) and gradients (..., N, d_out).

    `counted` are the layers' factors where these samples were counted before.
    """
    inputs, grads = ([_modules(pair[i]) for pair in pairs] for i in (0, 1))
    q = np.zeros(inputs[0].shape[:2], inputs[0].dtype)
    factors = counted or [
        no_factors(len(q), x.shape[2], d.shape[2], q.dtype)
        for x, d in zip(inputs, grads, strict=True)
    ]
    for m in range(len(q)):
        xs, ds = tuple(x[m] for x in inputs), tuple(d[m] for d in grads)
        if counted is None:
            count(factors, m, xs, ds)
        _inform(xs, ds, *_of(factors, m), q.dtype.type(damping), q[m])
    return torch.from_numpy(q).view(pairs[0][0].shape[:-1])


def _of(factors: Sequence[Factors], module: int) -> tuple[tuple[Floats, ...], tuple[Floats, ...]]:
    return tuple(r[module] for r, _ in factors), tuple(c[module] for _, c in factors)


def _modules(x: Tensor) -> Floats:
    """(..., N, n) -> (modules, N, n); NumPy's views take a fraction of PyTorch's time."""
    array: Floats = x.detach().numpy()
    return np.ascontiguousarray(array).reshape(-1, *array.shape[-2:])


@njit(**_JIT)
def _count(xs, ds, rows, columns):
    """All layers' `count`.

    Four samples at a time, of which those beyond the last count 0 times: the sums are then read and
    written once for four.
    """
    n = xs[0].shape[0]
    f = xs[0].dtype.type
    for layer in range(len(xs)):
        x, d, row, column = xs[layer], ds[layer], rows[layer], columns[layer]
        last, outs = x.shape[1], d.shape[1]
        for i in range(0, n, 4):
            i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
            k1, k2, k3 = f(i + 1 < n), f(i + 2 < n), f(i + 3 < n)
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
def _inform(xs, ds, rows, columns, damping, q):
    """Add the layers' parts to a module's information; `rows` and `columns` are used up."""
    tiny = q.dtype.type(np.finfo(np.float32).tiny)
    total, size = q.dtype.type(0), 0
    for layer in range(len(xs)):
        total += columns[layer].sum()
        size += rows[layer].size * columns[layer].size
    ridge = q.dtype.type(damping * total / size)
    for layer in range(len(xs)):
        x, d, row, column = xs[layer], ds[layer], rows[layer], columns[layer]
        last, outs = x.shape[1], d.shape[1]
        scale = q.dtype.type((column.sum() + ridge * row.size * outs) * x.shape[0])
        for j in range(last + 1):
            row[j] = 1 / max(row[j] + q.dtype.type(ridge * outs), tiny)
        for k in range(outs):
            column[k] = scale / max(column[k] + q.dtype.type(ridge * (last + 1)), tiny)
        for n in range(x.shape[0]):
            xn, dn = x[n], d[n]
            a = row[last]
            for j in range(last):
                a += xn[j] * xn[j] * row[j]
            b = q.dtype.type(0)
            for k in range(outs):
                b += dn[k] * dn[k] * column[k]
            q[n] += a * b
