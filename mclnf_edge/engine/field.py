"""The fast module: feature planes of several resolutions, one small ReLU MLP, a height map.

For a point with unit-cube coordinates u and height hz above the module's own surface estimate:

    x = [bilinear(plane_p, u) for every plane, u_z, sin/cos(2pi u_z), sin/cos(4pi u_z),
         clip(hz / 1.5 unit), clip(hz / 6 unit), 0]
    o = MLP(x)                                       32 -> 32 -> 32 -> 4, ReLU
    density = exp(o_0) / unit,  colour = sigmoid(o_1..3 + the finest plane's first three channels)

`unit` is the module's edge / 64 in metres, so one set of MLP parameters serves every cell size.
The skip from the finest plane to the colour lets a measured surface colour be written there
directly (`surface.paint`), which no number of steps on a small CPU can replace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import float32, njit

from mclnf_edge.engine.simd import make_gather, make_matvec, make_outer, make_scatter

JIT: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "cache": True}
INNER: dict[str, Any] = {**JIT, "_nrt": False}
"""For what runs inside a kernel and allocates nothing: without it numba counts the references to
every array a function is handed, in atomic operations that two threads then fight over."""
CHANNELS = 4
HIDDEN = 32
INPUTS = 32
OUTPUTS = 8
"""Four are used (density, red, green, blue); eight fill a vector."""

SURFACE = 72
"""Nodes along one edge of a module's height map and seen map."""

# Parameters of one module's MLP, in floats: W1 b1 W2 b2 W3 b3.
B1 = INPUTS * HIDDEN
W2 = B1 + HIDDEN
B2 = W2 + HIDDEN * HIDDEN
W3 = B2 + HIDDEN
B3 = W3 + HIDDEN * OUTPUTS
MLP_SIZE = B3 + OUTPUTS
# Transposed weights for the backward pass: W1T W2T W3T.
T2 = HIDDEN * INPUTS
T3 = T2 + HIDDEN * HIDDEN
TRANSPOSED_SIZE = T3 + OUTPUTS * HIDDEN

_matvec_h, _matvec_o = make_matvec(HIDDEN), make_matvec(OUTPUTS)
_outer_h, outer_o = make_outer(HIDDEN), make_outer(OUTPUTS)
_gather, _scatter = make_gather(CHANNELS), make_scatter(CHANNELS)

F32 = npt.NDArray[np.float32]
_ONE = float32(1)


@dataclass(frozen=True)
class Layout:
    """Sizes of one module's arrays.

    `planes` rows are (first axis, second axis, texels along each, offset in floats); `voxels` are
    the density grid's cells along x, y, z; `weights` the network's parameters and `hidden` the
    inputs of its output layer.
    """

    planes: npt.NDArray[np.int32]
    features: int
    voxels: tuple[int, int, int]
    weights: int = MLP_SIZE
    hidden: int = HIDDEN

    @property
    def output_size(self) -> int:
        """Entries of the output layer's Fisher diagonal that weigh a ray."""
        return (self.hidden + 1) * 4

    @property
    def size(self) -> int:
        """All parameters of a module, texels first."""
        return self.features + self.weights

    @classmethod
    def of(cls, fine: int = 256, vertical: int = 32, voxels: int = 48) -> Layout:
        """Four horizontal planes (`fine`, /2, /4, /8 texels wide) and two vertical ones."""
        sizes = [(0, 1, fine >> i, fine >> i) for i in range(4)]
        sizes += [(axis, 2, fine >> 2, vertical) for axis in (0, 1)]
        rows, offset = [], 0
        for a, b, nu, nv in sizes:
            rows.append((a, b, nu, nv, offset))
            offset += nu * nv * CHANNELS
        return cls(np.array(rows, np.int32), offset, (voxels, voxels, voxels))


def random_mlp(seed: int = 0) -> F32:
    """(MLP_SIZE,) random start: He-scaled, output layer at a tenth, density at 0.4 per unit."""
    random = np.random.default_rng(seed)
    w = np.zeros(MLP_SIZE, np.float32)
    w[:B1] = random.normal(0, math.sqrt(2 / INPUTS), B1)
    w[W2:B2] = random.normal(0, math.sqrt(2 / HIDDEN), HIDDEN * HIDDEN)
    out = w[W3:B3].reshape(HIDDEN, OUTPUTS)
    out[:, :4] = random.normal(0, 0.1 * math.sqrt(1 / HIDDEN), (HIDDEN, 4))
    w[B3] = math.log(0.4)
    return w


def random_features(layout: Layout, seed: int = 0) -> F32:
    """(features,) small uniform start, in [-0.05, 0.05]."""
    random = np.random.default_rng(seed)
    return random.uniform(-0.05, 0.05, layout.features).astype(np.float32)


@njit(**INNER)
def whole(x):
    """The largest whole number that is not above x; numba's own floor is a call."""
    i = int(x)
    return i - 1 if x < i else i


@njit(**INNER)
def texel(planes, p, u, e):
    """(first texel, its upper neighbour, and the four bilinear weights) of plane p at u[e]."""
    nu, nv = planes[p, 2], planes[p, 3]
    fu = min(max(u[e, planes[p, 0]], float32(0)), float32(0.99999)) * float32(nu - 1)
    fv = min(max(u[e, planes[p, 1]], float32(0)), float32(0.99999)) * float32(nv - 1)
    iu, iv = int(fu), int(fv)
    au, av = fu - float32(iu), fv - float32(iv)
    b = planes[p, 4] + (iv * nu + iu) * CHANNELS
    w11 = au * av
    return b, b + nu * CHANNELS, float32(1) - au - av + w11, au - w11, av - w11, w11


@njit(**INNER)
def _sin_cos(turns):
    """sin and cos of 2 pi `turns`, to 1e-6: Taylor series of the half angle, then doubled."""
    a = (turns - float32(whole(turns + float32(0.5)))) * float32(math.pi)
    q = a * a
    s = float32(-1 / 39916800)
    for k in (362880.0, -5040.0, 120.0, -6.0, 1.0):
        s = s * q + float32(1 / k)
    c = float32(-1 / 3628800)
    for k in (40320.0, -720.0, 24.0, -2.0, 1.0):
        c = c * q + float32(1 / k)
    s *= a
    return float32(2) * s * c, _ONE - float32(2) * s * s


@njit(**INNER)
def encode(features, first, planes, u, e, hz, x):
    """Write the INPUTS of sample e into x; `hz` is in units."""
    xo = e * INPUTS
    for p in range(planes.shape[0]):
        b, b2, w00, w10, w01, w11 = texel(planes, p, u, e)
        _gather(x, xo + p * CHANNELS, features, first + b, first + b2, w00, w10, w01, w11)
    encode_heights(u[e, 2], hz, x, xo + planes.shape[0] * CHANNELS)


@njit(forceinline=True, **INNER)
def encode_heights(uz, hz, x, at):
    """Write what follows the planes' features to x[at:]; `hz` is in units."""
    s, c = _sin_cos(uz)
    x[at] = uz
    x[at + 1], x[at + 2] = s, c
    x[at + 3], x[at + 4] = float32(2) * s * c, c * c - s * s
    x[at + 5] = min(max(hz / float32(1.5), float32(-3)), float32(3))
    x[at + 6] = min(max(hz / float32(6), float32(-3)), float32(3))
    for i in range(at + 7, (at // INPUTS + 1) * INPUTS):
        x[i] = float32(0)


@njit(**INNER)
def mlp(w, first, x, h1, h2, o, e):
    """Run the MLP of the module at `first` on sample e; keeps both hidden layers."""
    _matvec_h(h1, e * HIDDEN, w, first + B1, w, first, x, e * INPUTS, INPUTS)
    for j in range(e * HIDDEN, (e + 1) * HIDDEN):
        h1[j] = max(h1[j], float32(0))
    _matvec_h(h2, e * HIDDEN, w, first + B2, w, first + W2, h1, e * HIDDEN, HIDDEN)
    for j in range(e * HIDDEN, (e + 1) * HIDDEN):
        h2[j] = max(h2[j], float32(0))
    _matvec_o(o, e * OUTPUTS, w, first + B3, w, first + W3, h2, e * HIDDEN, HIDDEN)
    for c in range(3):
        o[e * OUTPUTS + 1 + c] += x[e * INPUTS + c]


@njit(**INNER)
def transpose(w, wt, slots):
    """Refresh the transposed weights of the modules in `slots`."""
    for s in slots:
        a, t = s * MLP_SIZE, s * TRANSPOSED_SIZE
        for j in range(HIDDEN):
            for k in range(INPUTS):
                wt[t + j * INPUTS + k] = w[a + k * HIDDEN + j]
            for k in range(HIDDEN):
                wt[t + T2 + j * HIDDEN + k] = w[a + W2 + k * HIDDEN + j]
        for c in range(OUTPUTS):
            for k in range(HIDDEN):
                wt[t + T3 + c * HIDDEN + k] = w[a + W3 + k * OUTPUTS + c]


@njit(**INNER)
def mlp_backward(wt, t, grad, g, x, h1, h2, e, do, dx, d1, d2, zero):
    """Add sample e's parameter gradient to grad[g:], write the input gradient to dx."""
    for c in range(4):
        grad[g + B3 + c] += do[c]
    outer_o(grad, g + W3, h2, e * HIDDEN, do, 0, HIDDEN)
    _matvec_h(d2, 0, zero, 0, wt, t + T3, do, 0, 4)
    for j in range(HIDDEN):
        if h2[e * HIDDEN + j] <= 0:
            d2[j] = float32(0)
        grad[g + B2 + j] += d2[j]
    _outer_h(grad, g + W2, h1, e * HIDDEN, d2, 0, HIDDEN)
    _matvec_h(d1, 0, zero, 0, wt, t + T2, d2, 0, HIDDEN)
    for j in range(HIDDEN):
        if h1[e * HIDDEN + j] <= 0:
            d1[j] = float32(0)
        grad[g + B1 + j] += d1[j]
    _outer_h(grad, g, x, e * INPUTS, d1, 0, INPUTS)
    _matvec_h(dx, 0, zero, 0, wt, t, d1, 0, HIDDEN)
    for c in range(3):
        dx[c] += do[1 + c]


@njit(**INNER)
def encode_backward(grad, first, planes, u, e, dx, touched, queue, n):
    """Scatter dx into the planes' gradient; queues each texel once, returns the queue's length."""
    for p in range(planes.shape[0]):
        b, b2, w00, w10, w01, w11 = texel(planes, p, u, e)
        b, b2 = b + first, b2 + first
        _scatter(grad, b, b2, dx, p * CHANNELS, w00, w10, w01, w11)
        for place in (b, b + CHANNELS, b2, b2 + CHANNELS):
            k = place // CHANNELS
            if touched[k] == 0:
                touched[k] = 1
                queue[n] = k
                n += 1
    return n
