"""Hashes, value noise and patterns that the ground and surface textures are made of.

Everything is a pure function of position (metres) and a seed, so a point has one colour whichever
camera looks at it. `foot` is the width of a sample on the surface in metres: detail finer than that
fades into its mean instead of shimmering.
"""

from __future__ import annotations

import math

from numba import njit

RGB = tuple[float, float, float]


@njit(cache=True)
def hash01(i: int, j: int, seed: int) -> float:
    """A number in [0, 1) that depends on two cell indices and a seed."""
    h = (i * 374761393 + j * 668265263 + seed * 1442695041 + 12345) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 668265261) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFFFF) / 16777216.0


@njit(cache=True)
def value_noise(x: float, y: float, seed: int) -> float:
    """Smooth noise in [-1, 1] with cells of size 1."""
    fx, fy = math.floor(x), math.floor(y)
    i, j = int(fx), int(fy)
    u, v = x - fx, y - fy
    u, v = u * u * (3.0 - 2.0 * u), v * v * (3.0 - 2.0 * v)
    low = hash01(i, j, seed) * (1.0 - u) + hash01(i + 1, j, seed) * u
    high = hash01(i, j + 1, seed) * (1.0 - u) + hash01(i + 1, j + 1, seed) * u
    return 2.0 * (low * (1.0 - v) + high * v) - 1.0


@njit(cache=True)
def seen(width: float, foot: float) -> float:
    """How much of a detail `width` wide survives a sample `foot` wide: 1 fine, 0 averaged out."""
    return min(1.0, max(0.0, width / max(foot, 1e-6) - 0.5))


@njit(cache=True)
def fractal(x: float, y: float, seed: int, size: float, octaves: int, foot: float) -> float:
    """Fractal noise, about [-1, 1], whose largest bumps are `size` metres wide."""
    total, gain = 0.0, 0.6
    for k in range(octaves):
        keep = seen(0.5 * size, foot)
        if keep <= 0.0:
            break
        # Each octave is turned, else the lattices of all octaves coincide and show.
        x, y = 0.8 * x - 0.6 * y + 17.3, 0.6 * x + 0.8 * y - 9.1
        total += gain * keep * value_noise(x / size, y / size, seed + 31 * k)
        size *= 0.47
        gain *= 0.62
    return total


@njit(cache=True)
def step(low: float, high: float, x: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(1.0, max(0.0, (x - low) / (high - low)))
    return t * t * (3.0 - 2.0 * t)


@njit(cache=True)
def line(x: float, period: float, width: float, foot: float) -> float:
    """Coverage of lines `width` wide every `period`, averaged over the sample."""
    d = abs(x - period * math.floor(x / period + 0.5))
    soft = max(0.5 * foot, 1e-4)
    cover = min(1.0, max(0.0, (0.5 * width + soft - d) / (2.0 * soft))) * min(1.0, width / soft)
    keep = seen(0.5 * period, foot)
    return cover * keep + (1.0 - keep) * width / period


@njit(cache=True)
def mix(a: RGB, b: RGB, t: float) -> RGB:
    """Blend of two colours."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


@njit(cache=True)
def scaled(a: RGB, s: float) -> RGB:
    """A colour times a number."""
    return (a[0] * s, a[1] * s, a[2] * s)
