"""The colour of everything that stands on the ground: façades, roofs, cars, leaves.

A surface is a flat patch with its own metres (u along, v up) and size; see `mesh.Mesh`.
"""

from __future__ import annotations

import math

from numba import njit

from meta_trainer.city.noise import RGB, fractal, hash01, line, mix, scaled, seen, step

GROUND, FACADE, FLAT_ROOF, TILE_ROOF, PLAIN, LEAF, GLASS, METAL_ROOF, PAINT, BLANK_WALL = range(10)


@njit(cache=True)
def wall(u: float, v: float, seed: int, foot: float, colour: RGB) -> RGB:
    """Plaster, brick or concrete panels, with rain streaks."""
    kind = int(3.0 * hash01(seed, 0, 201))
    shade = 1.0 + 0.10 * fractal(u, v, seed, 4.0, 5, foot)
    shade *= 1.0 - 0.10 * step(0.1, 0.9, fractal(u * 3.0, v * 0.3, seed + 5, 3.0, 3, foot))
    if kind == 1:
        i = int(math.floor(v / 0.09))
        j = int(math.floor((u + 0.12 * (i & 1)) / 0.25))
        joint = max(line(v, 0.09, 0.015, foot), line(u + 0.12 * (i & 1), 0.25, 0.015, foot))
        shade *= 1.0 + 0.3 * (hash01(i, j, seed) - 0.5) * seen(0.1, foot) - 0.2 * joint
    elif kind == 2:
        shade *= 1.0 - 0.35 * max(line(v, 3.0, 0.06, foot), line(u, 6.0, 0.06, foot))
    return scaled(colour, shade)


@njit(cache=True)
def facade(
    u: float, v: float, w: float, h: float, seed: int, foot: float, colour: RGB, trim: RGB
) -> tuple[RGB, float]:
    """A wall with windows and doors; returns albedo and how much it mirrors the sky."""
    base = wall(u, v, seed, foot, colour)
    bays = max(1.0, math.floor(w / (2.4 + 1.6 * hash01(seed, 1, 202))))
    bay, storey = w / bays, 3.0
    floors = math.floor((h - 0.6) / storey)
    i, j = int(math.floor(u / bay)), int(math.floor(v / storey))
    if j < 0 or j >= floors or w < 2.0:
        band = 1.0 if v > h - 0.35 else 0.0
        return mix(base, trim, 0.7 * band), 0.0
    x, y = u - bay * i, v - storey * j
    hw = (0.24 + 0.14 * hash01(seed, 2, 203)) * bay
    low, high = 0.95 - 0.35 * hash01(seed, 3, 203), 2.35
    if j == 0:
        base = mix(base, scaled(trim, 0.8), 0.35)
        if hash01(i, 7, seed) < 0.25:
            hw, low, high = 0.55, 0.0, 2.15
            if abs(x - 0.5 * bay) < hw and low < y < high:
                return scaled((0.11, 0.07, 0.05), 0.6 + hash01(i, 8, seed)), 0.05
    if hash01(i, 9, seed) < 0.06:
        return base, 0.0
    d = max(abs(x - 0.5 * bay) - hw, max(low - y, y - high))
    if d > 0.0:
        sill = abs(x - 0.5 * bay) < hw + 0.12 and low - 0.14 < y < low
        frame = d < 0.09
        return (scaled(trim, 1.1) if sill or frame else base), 0.0
    if d > -0.07 or abs(x - 0.5 * bay) < 0.04:
        return (0.52, 0.52, 0.5), 0.0
    blind = hash01(i, j, seed + 17)
    if blind < 0.25 and y > high - 1.6 * blind / 0.25:
        return scaled((0.42, 0.39, 0.33), 0.7 + 0.5 * hash01(j, i, seed)), 0.05
    return scaled((0.028, 0.032, 0.038), 0.6 + 1.2 * hash01(i, j, seed + 3)), 0.55


@njit(cache=True)
def flat_roof(u: float, v: float, seed: int, foot: float, colour: RGB) -> RGB:
    """Bitumen felt in 1 m strips, puddle stains, patches."""
    strip = 0.14 * (hash01(int(math.floor(u)), int(math.floor(v / 9.0)), seed) - 0.5)
    seam = 0.22 * max(line(u, 1.0, 0.05, foot), line(v, 9.0, 0.08, foot))
    stain = step(0.15, 0.7, fractal(u, v, seed + 1, 7.0, 5, foot))
    fine = 0.10 * fractal(u, v, seed + 2, 1.2, 4, foot)
    return scaled(colour, (1.0 + strip * seen(0.5, foot) + fine - seam) * (1.0 - 0.3 * stain))


@njit(cache=True)
def tile_roof(u: float, v: float, seed: int, foot: float, colour: RGB) -> RGB:
    """Rows of roof tiles, each tile its own shade, moss in patches."""
    row = int(math.floor(v / 0.35))
    column = int(math.floor((u + 0.12 * (row & 1)) / 0.25))
    shade = 0.35 * (hash01(row, column, seed) - 0.5) * seen(0.3, foot)
    edge = 0.35 * line(v, 0.35, 0.05, foot)
    moss = step(0.2, 0.9, fractal(u, v, seed + 1, 3.0, 5, foot))
    broad = 0.12 * fractal(u, v, seed + 2, 4.0, 3, foot)
    return mix(scaled(colour, 1.0 + shade - edge + broad), (0.07, 0.075, 0.045), 0.4 * moss)


@njit(cache=True)
def metal_roof(u: float, v: float, seed: int, foot: float, colour: RGB) -> RGB:
    """Corrugated sheets with rust and a few skylight strips."""
    sheet = 0.12 * (hash01(int(math.floor(u / 1.0)), int(math.floor(v / 6.0)), seed) - 0.5)
    ridge = 0.25 * line(u, 0.33, 0.1, foot) + 0.12 * line(v, 6.0, 0.12, foot)
    rust = step(0.35, 1.0, fractal(u, v * 0.4, seed + 1, 5.0, 5, foot))
    base = scaled(colour, 1.0 + sheet - ridge + 0.08 * fractal(u, v, seed + 4, 8.0, 3, foot))
    if hash01(int(math.floor(u / 2.0)), 3, seed) < 0.12:
        base = mix(base, (0.42, 0.44, 0.43), 0.6)
    return mix(base, (0.17, 0.085, 0.05), 0.5 * rust)


@njit(cache=True)
def leaf(x: float, y: float, z: float, seed: int, foot: float, colour: RGB) -> RGB:
    """Foliage: every clump its own shade, finer mottling within it."""
    clump = hash01(seed, 5, 205) - 0.5
    fine = fractal(x + 0.7 * z, y - 0.6 * z, seed & 15, 0.5, 3, foot)
    tinted = mix(colour, (colour[0] * 1.5, colour[1] * 1.15, colour[2]), clump + 0.5)
    return scaled(tinted, 1.0 + 0.5 * clump + 0.3 * fine)


@njit(cache=True)
def surface(
    kind: int, u: float, v: float, w: float, h: float, seed: int, foot: float, a: RGB, b: RGB
) -> tuple[RGB, float]:
    """Linear albedo and mirror share of a point of a patch that is neither ground nor leaf."""
    if kind == FACADE:
        return facade(u, v, w, h, seed, foot, a, b)
    if kind == FLAT_ROOF:
        return flat_roof(u, v, seed, foot, a), 0.0
    if kind == TILE_ROOF:
        return tile_roof(u, v, seed, foot, a), 0.0
    if kind == METAL_ROOF:
        return metal_roof(u, v, seed, foot, a), 0.05
    if kind == BLANK_WALL:
        return wall(u, v, seed, foot, a), 0.0
    if kind == GLASS:
        return a, 0.6
    if kind == PAINT:
        return a, 0.12
    return scaled(a, 1.0 + 0.12 * fractal(u, v, seed, 1.5, 4, foot)), 0.0
