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
Factors = tuple[Tensor, Tensor]
"""Squared scores of a layer, summed over samples: by row (modules, d_in + 1), the bias last, and by
column (modules, d_out)."""

_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_JIT["fastmath"] = {"reassoc", "contract"}  # what is not a number must stay so


def no_factors(modules: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> Factors:
    """Of no samples yet."""
    return torch.zeros(modules, d_in + 1, dtype=dtype), torch.zeros(modules, d_out, dtype=dtype)


def add(factors: Factors, module: int, x: Tensor, d: Tensor) -> None:
    """Count the module's samples with inputs x (N, d_in) and gradients d (N, d_out)."""
    row, column = factors
    _sum(x.numpy(), d.numpy(), row[module].numpy(), column[module].numpy())


def information(
    pairs: Sequence[tuple[Tensor, Tensor]], damping: float, found: Sequence[Factors | None]
) -> Tensor:
    """q (..., N) of layers' inputs (..., N, d_in) and gradients (..., N, d_out).

    `found` are the layers' factors where something counted them before.
    """
    lead = pairs[0][0].shape[:-1]
    layers = [(_modules(x), _modules(d)) for x, d in pairs]
    counted = [f or _count(x, d) for (x, d), f in zip(layers, found, strict=True)]
    arrays = [
        (x.numpy(), d.numpy(), row.numpy(), column.numpy())
        for (x, d), (row, column) in zip(layers, counted, strict=True)
    ]
    q = np.zeros(arrays[0][0].shape[:2], arrays[0][0].dtype)
    size = sum(row.shape[1] * column.shape[1] for _, _, row, column in arrays)
    for m in range(len(q)):
        ridge = damping * sum(column[m].sum() for _, _, _, column in arrays) / size
        for x, d, row, column in arrays:
            _inform(x[m], d[m], row[m], column[m], q.dtype.type(ridge), q[m])
    return torch.from_numpy(q).view(lead)


def _count(x: Tensor, d: Tensor) -> Factors:
    factors = no_factors(len(x), x.shape[-1], d.shape[-1], x.dtype)
    for m in range(len(x)):
        add(factors, m, x[m], d[m])
    return factors


def _modules(x: Tensor) -> Tensor:
    """(..., N, n) -> (modules, N, n)."""
    return x.detach().reshape(-1, *x.shape[-2:]).contiguous()


@njit(**_JIT)
def _sum(x, d, row, column):
    """Add the samples' squared scores to the sums by row, the bias last, and by column.

    Four samples at a time, of which those beyond the last count 0 times: the sums are then read and
    written once for four.
    """
    last, outs, n = x.shape[1], d.shape[1], x.shape[0]
    f = x.dtype.type
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
def _inform(x, d, row, column, ridge, q):
    """Add a layer's part to the samples' information; `row` and `column` are used up."""
    last, outs = x.shape[1], d.shape[1]
    tiny = x.dtype.type(np.finfo(np.float32).tiny)
    scale = (column.sum() + ridge * row.size * outs) * x.shape[0]
    row[:] = 1 / np.maximum(row + ridge * outs, tiny)
    column[:] = scale / np.maximum(column + ridge * row.size, tiny)
    for n in range(x.shape[0]):
        xn, dn = x[n], d[n]
        a = row[last]
        for j in range(last):
            a += xn[j] * xn[j] * row[j]
        b = x.dtype.type(0)
        for k in range(outs):
            b += dn[k] * dn[k] * column[k]
        q[n] += a * b
