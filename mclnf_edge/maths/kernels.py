"""Elementwise parts of a step on the CPU, compiled: each reads and writes its arrays once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_JIT["fastmath"] = {"contract"}  # the reduction of the angle depends on the order of its terms

_F = np.float32
_ROUND = _F(1.5 * 2**23)
"""A number so large that adding and subtracting it leaves the nearest integer."""
_TURNS = _F(1 / np.pi)
_PI = (_F(3.140625), _F(9.67502593994140625e-4), _F(1.509957990978376432e-7))
"""Pi in three parts; k times either of the first two is exact for |k| < 2^16."""
_SIN = (_F(-1.66666571e-1), _F(8.33301635e-3), _F(-1.98065468e-4), _F(2.59990261e-6))
_COS = (
    _F(-4.99999995e-1), _F(4.16666406e-2), _F(-1.38884021e-3), _F(2.47618079e-5),
    _F(-2.60756577e-7),
)  # fmt: skip
"""sin r = r + r^3 P(r^2), cos r = 1 + r^2 Q(r^2) on |r| <= pi/2: smallest largest error, 5e-9."""
_HALF, _ONE, _TWO = _F(0.5), _F(1), _F(2)


@njit(**_JIT)
def sine(y, bias, omega, slope):
    """y (N, n) becomes sin(omega (y + bias)), `slope` omega cos(omega (y + bias)); float32.

    Within 2e-7 (times omega for the slope) for angles below 2e5; beyond, single precision holds
    no angle. Not finite values give NaN.
    """
    for n in range(y.shape[0]):
        yn, sn = y[n], slope[n]
        for j in range(yn.size):
            z = omega * (yn[j] + bias[j])
            k = (z * _TURNS + _ROUND) - _ROUND
            r = ((z - k * _PI[0]) - k * _PI[1]) - k * _PI[2]
            odd = k - _TWO * ((k * _HALF + _ROUND) - _ROUND)  # -1, 0 or 1
            sign = _ONE - _TWO * odd * odd
            u = r * r
            p = _SIN[0] + u * (_SIN[1] + u * (_SIN[2] + u * _SIN[3]))
            q = _COS[0] + u * (_COS[1] + u * (_COS[2] + u * (_COS[3] + u * _COS[4])))
            yn[j] = sign * (r + r * u * p)
            sn[j] = omega * sign * (_ONE + u * q)


@njit(**_JIT)
def weights(q, lam, cap):
    """`fisher.sample_weights` of each row of q (rows, N)."""
    f = q.dtype.type
    tiny = np.finfo(np.float32).tiny
    found = np.empty_like(q)
    for row in range(q.shape[0]):
        of, w = q[row], found[row]
        total, finite = 0.0, 0
        for n in range(of.size):
            if np.isfinite(of[n]):
                total += of[n]
                finite += 1
        scale = lam / max(total / max(finite, 1), tiny)
        mean = 0.0
        for n in range(of.size):
            w[n] = f(1 + min(of[n] * scale, lam * cap)) if np.isfinite(of[n]) else f(1)
            mean += w[n]
        mean /= of.size
        for n in range(of.size):
            w[n] = f(w[n] / mean)
    return found


@njit(**_JIT)
def adam(gradient, first, second, betas, scales, epsilon):
    """Move Adam's moments (P,) of the last step on by this step's gradient.

    The gradient becomes the direction scales[0] first / (sqrt(scales[1] second) + epsilon).
    """
    f = gradient.dtype.type
    b1, a1, b2, a2 = f(betas[0]), f(1 - betas[0]), f(betas[1]), f(1 - betas[1])
    s1, s2, tiny = f(scales[0]), f(scales[1]), f(epsilon)
    for i in range(gradient.size):
        g = gradient[i]
        m = b1 * first[i] + a1 * g
        v = b2 * second[i] + a2 * g * g
        first[i] = m
        second[i] = v
        gradient[i] = s1 * m / (np.sqrt(s2 * v) + tiny)
