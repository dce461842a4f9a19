"""The ground's colour: streets and their markings, pavements, lawns, yards, fields and ponds.

A ground plan is a set of arrays (see `plan.GroundPlan`); a point's surface follows from them in
closed form, so that the ground is as sharp at a height of 2 m as at 200 m.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from meta_trainer.city.noise import RGB, fractal, hash01, line, mix, scaled, seen, step

GRASS, ASPHALT, PAVING, SOIL, CROP, WATER, PARKING, PITCH, GRAVEL, CONCRETE, TARTAN = range(11)
MEADOW, FOREST_FLOOR, STREET, SIDEWALK = 11, 12, 13, 14

Array = np.ndarray


@njit(cache=True)
def nearest_street(x: float, centres: Array, halves: Array) -> tuple[float, int]:
    """Distance beyond the nearest kerb (negative on the road) and that street's index."""
    best, index = 1e9, 0
    for i in range(len(centres)):
        d = abs(x - centres[i]) - halves[i]
        if d < best:
            best, index = d, i
    return best, index


@njit(cache=True)
def shape_at(x: float, y: float, shapes: Array, first: int, last: int) -> int:
    """The topmost ground shape over a point (see `Plan.add_shape`), or -1."""
    for k in range(last - 1, first - 1, -1):
        dx, dy = x - shapes[k, 0], y - shapes[k, 1]
        if dx * dx + dy * dy > shapes[k, 8]:
            continue
        u = dx * shapes[k, 2] + dy * shapes[k, 3]
        v = dy * shapes[k, 2] - dx * shapes[k, 3]
        kind, seed = int(shapes[k, 6]), int(shapes[k, 7])
        if abs(u) > 1.3 * shapes[k, 4] + 1.0 or abs(v) > 1.3 * shapes[k, 5] + 1.0:
            continue
        ragged = 0.0
        if kind in (SOIL, GRAVEL, WATER, MEADOW):
            ragged = fractal(x, y, seed, 3.0, 3, 0.1)
        if kind in (WATER, MEADOW):
            radius = math.hypot(u / shapes[k, 4], v / shapes[k, 5])
            bumpy = 0.25 * fractal(x, y, seed, 16.0, 2, 0.1)
            if radius < 1.0 + bumpy + 0.03 * ragged:
                return k
        elif abs(u) < shapes[k, 4] + 0.4 * ragged and abs(v) < shapes[k, 5] + 0.4 * ragged:
            return k
    return -1


@njit(cache=True)
def block_at(x: float, edges: Array) -> int:
    """Index of the interval of sorted `edges` that holds x, or -1."""
    if x < edges[0] or x >= edges[len(edges) - 1]:
        return -1
    return int(np.searchsorted(edges, x, side="right")) - 1


@njit(cache=True)
def grass(x: float, y: float, foot: float, dry: float) -> RGB:
    """Lawn: green to straw, in patches from tens of metres down to tufts."""
    broad = fractal(x, y, 11, 30.0, 2, foot)
    middle = fractal(x, y, 29, 7.0, 2, foot)
    fine = fractal(x, y, 23, 1.5, 4, foot)
    t = step(-0.75, 0.95, 0.8 * broad + 0.5 * middle + 0.4 * fine + 1.6 * dry - 0.8)
    colour = mix((0.048, 0.092, 0.016), (0.158, 0.158, 0.058), t)
    return scaled(colour, 1.0 + 0.42 * fine + 0.16 * middle + 0.1 * broad)


@njit(cache=True)
def asphalt(x: float, y: float, foot: float, tone: float) -> RGB:
    """Road surface with stains, repaired patches and cracks."""
    grain = 0.10 * fractal(x, y, 5, 0.5, 3, foot)
    stain = 0.13 * fractal(x, y, 6, 9.0, 4, foot)
    i, j = int(math.floor(x / 6.0)), int(math.floor(y / 6.0))
    patch = 0.0
    if hash01(i, j, 41) < 0.13:
        px, py = x / 6.0 - i, y / 6.0 - j
        w, h = 0.2 + 0.7 * hash01(i, j, 42), 0.15 + 0.6 * hash01(i, j, 43)
        if px < w and py < h:
            patch = -0.22 + 0.3 * hash01(i, j, 44)
    crack = fractal(x, y, 9, 7.0, 4, foot)
    worn = -0.25 * seen(0.1, foot) if abs(crack) < 0.012 else 0.0
    level = tone * (1.0 + grain + stain + patch + worn)
    return (level, level * 0.985, level * 0.96)


@njit(cache=True)
def tiles(x: float, y: float, size: float, foot: float, tone: float) -> RGB:
    """Paving or concrete slabs: each its own shade, dark joints."""
    i, j = int(math.floor(x / size)), int(math.floor(y / size))
    shade = 0.16 * (hash01(i, j, 51) - 0.5) * seen(size, foot)
    joint = max(line(x, size, 0.04 * size**0.5, foot), line(y, size, 0.04 * size**0.5, foot))
    dirt = 0.16 * fractal(x, y, 52, 6.0, 5, foot) - 0.3 * step(
        0.2, 0.7, fractal(x, y, 53, 20.0, 4, foot)
    )
    level = tone * (1.0 + shade + dirt) * (1.0 - 0.4 * joint)
    return (level * 1.02, level, level * 0.94)


@njit(cache=True)
def crop(x: float, y: float, foot: float, seed: int) -> RGB:
    """A field: rows, tractor tracks and broad patches, in one of five colours."""
    angle = 3.1416 * hash01(seed, 1, 61)
    u = x * math.cos(angle) + y * math.sin(angle)
    kind = int(5.0 * hash01(seed, 2, 61))
    colour = (0.062, 0.098, 0.020)
    if kind == 1:
        colour = (0.235, 0.188, 0.088)
    elif kind == 2:
        colour = (0.145, 0.112, 0.078)
    elif kind == 3:
        colour = (0.115, 0.132, 0.040)
    elif kind == 4:
        colour = (0.190, 0.175, 0.085)
    rows = line(u + 0.2 * fractal(x, y, seed, 9.0, 2, foot), 1.4 + hash01(seed, 3, 61), 0.6, foot)
    tracks = line(u, 18.0, 1.1, foot)
    broad = fractal(x, y, seed + 7, 45.0, 5, foot)
    return scaled(colour, (1.0 + 0.2 * broad) * (1.0 - 0.22 * rows + 0.28 * tracks))


@njit(cache=True)
def water(x: float, y: float, foot: float) -> RGB:
    """A pond's dark, slightly mottled surface."""
    return scaled((0.034, 0.036, 0.022), 1.0 + 0.4 * fractal(x, y, 71, 5.0, 4, foot))


@njit(cache=True)
def parking(u: float, v: float, hh: float, x: float, y: float, foot: float, tone: float) -> RGB:
    """A car park: asphalt, bays 2.5 m wide and 5 m deep along both long sides."""
    bays = line(u, 2.5, 0.12, foot) if abs(v) > hh - 5.0 else 0.0
    return mix(asphalt(x, y, foot, tone), (0.45, 0.45, 0.43), 0.8 * bays)


@njit(cache=True)
def pitch(u: float, v: float, hw: float, hh: float, x: float, y: float, foot: float) -> RGB:
    """A playing field: mown stripes, worn goal areas, white lines."""
    base = scaled(grass(x, y, foot, 0.42), 1.0 + 0.10 * math.copysign(1.0, math.sin(u * 0.57)))
    worn = math.exp(-((abs(u) - hw + 6.0) ** 2 / 40.0 + v * v / 30.0))
    base = mix(base, (0.20, 0.16, 0.10), 0.8 * worn)
    edge = min(abs(abs(u) - hw + 1.5), abs(abs(v) - hh + 1.5))
    marks = min(edge, min(abs(u), abs(math.hypot(u, v) - 0.3 * hh)))
    cover = min(1.0, max(0.0, (0.07 + 0.5 * foot - marks) / max(foot, 0.03))) * min(
        1.0, 0.14 / foot
    )
    inside = abs(u) < hw - 1.4 and abs(v) < hh - 1.4
    return mix(base, (0.6, 0.6, 0.58), 0.8 * cover if inside else 0.0)


@njit(cache=True)
def street(d: float, across: float, along: float, half: float, cross: float, foot: float) -> RGB:
    """Road surface with its markings. `cross`: distance beyond the crossing street's kerb."""
    base = asphalt(across, along, foot, 0.105)
    wheel = math.exp(-((abs(abs(across) - 0.5 * half) - 0.8) ** 2) / 0.2)
    base = scaled(base, 1.0 - 0.08 * wheel)
    paint = 0.0
    soft = max(foot, 0.03)
    thin = min(1.0, 0.14 / soft)
    if half < 3.0:
        paint = 0.0
    elif cross > 6.0:
        dashed = half > 5.0 or line(along, 9.0, 4.0, foot) > 0.5
        middle = abs(across) if half < 6.5 else abs(abs(across) - 0.45 * half)
        if dashed:
            paint = min(1.0, max(0.0, (0.07 + 0.5 * soft - middle) / soft)) * thin
        edge = abs(d + 2.3)
        if half > 4.5 and line(along, 5.5, 5.2, foot) > 0.3:
            paint = max(paint, 0.7 * thin * min(1.0, max(0.0, (0.07 + 0.5 * soft - edge) / soft)))
    elif half > 4.0 and 1.5 < cross < 4.5:
        paint = line(across, 1.0, 0.5, foot)
    worn = 0.75 + 0.25 * fractal(across, along, 88, 1.5, 3, foot)
    return mix(base, (0.52, 0.52, 0.49), 0.85 * paint * worn)


@njit(cache=True)
def country(x: float, y: float, foot: float, dry: float, woods: float) -> tuple[int, RGB]:
    """The land beyond the built blocks: irregular fields, woods and tracks between them."""
    wx = x + 14.0 * fractal(x, y, 91, 160.0, 2, 0.1)
    wy = y + 14.0 * fractal(x, y, 92, 160.0, 2, 0.1)
    j = int(math.floor(wy / 130.0))
    shift = 190.0 * hash01(j, 0, 93)
    i = int(math.floor((wx + shift) / 190.0))
    fx, fy = wx + shift - 190.0 * i, wy - 130.0 * j
    seed = int(4000.0 * hash01(i, j, 94))
    border = min(min(fx, 190.0 - fx), min(fy, 130.0 - fy))
    if border < 2.0:
        return SOIL, scaled((0.20, 0.165, 0.115), 1.0 + 0.3 * fractal(x, y, 95, 2.0, 4, foot))
    if hash01(i, j, 96) < woods:
        return FOREST_FLOOR, forest(x, y, foot)
    if border < 4.0 or hash01(i, j, 97) < 0.25:
        return MEADOW, scaled(grass(x, y, foot, dry + 0.15), 1.05)
    return CROP, crop(x, y, foot, seed)


@njit(cache=True)
def forest(x: float, y: float, foot: float) -> RGB:
    """Far woods seen from above: crowns of two sizes, dark gaps."""
    bumps = fractal(x, y, 101, 7.0, 4, foot)
    return scaled((0.026, 0.045, 0.012), 1.0 + 0.75 * bumps)


@njit(cache=True)
def weeds(x: float, y: float, foot: float, seed: int) -> float:
    """How overgrown bare ground is: nothing in most places, green in some."""
    return 0.85 * step(0.18, 0.5, fractal(x, y, seed + 3, 17.0, 6, foot))


@njit(cache=True)
def plain_kind(kind: int, x: float, y: float, foot: float, seed: int, dry: float) -> RGB:
    """Colour of the kinds that need no local coordinates."""
    if kind == PAVING:
        return tiles(x, y, 0.5, foot, 0.27)
    if kind == CONCRETE:
        return tiles(x, y, 3.0, foot, 0.27)
    if kind == SOIL:
        bare = scaled((0.205, 0.165, 0.115), 1.0 + 0.3 * fractal(x, y, seed, 5.0, 5, foot))
        return mix(bare, grass(x, y, foot, dry), weeds(x, y, foot, seed))
    if kind == GRAVEL:
        bare = scaled((0.265, 0.24, 0.195), 1.0 + 0.25 * fractal(x, y, seed, 3.0, 6, foot))
        return mix(bare, grass(x, y, foot, dry), weeds(x, y, foot, seed))
    if kind == CROP:
        return crop(x, y, foot, seed)
    if kind == WATER:
        return water(x, y, foot)
    if kind == TARTAN:
        return scaled((0.26, 0.085, 0.055), 1.0 + 0.12 * fractal(x, y, seed, 4.0, 4, foot))
    if kind == ASPHALT:
        return asphalt(x, y, foot, 0.13)
    if kind == MEADOW:
        return grass(x, y, foot, dry + 0.3)
    if kind == FOREST_FLOOR:
        return scaled((0.07, 0.065, 0.03), 1.0 + 0.4 * fractal(x, y, 103, 3.0, 5, foot))
    return grass(x, y, foot, dry)


@njit(cache=True)
def ground(
    x: float,
    y: float,
    foot: float,
    streets_x: Array,
    streets_y: Array,
    blocks: Array,
    edges_x: Array,
    edges_y: Array,
    shapes: Array,
    style: Array,
) -> tuple[int, RGB]:
    """Surface kind and linear albedo at a point of the ground.

    `streets_*` rows are (centre, half width); `blocks` (rows, columns, 3) holds base kind, first
    and last shape; `style` is (dryness, share of woods, sidewalk width, 6 numbers of the warp).
    Streets and blocks are looked up at the unbent place (see `Plan.frame`, its inverse).
    """
    px = x - style[3] * math.sin(style[4] * y + style[5])
    py = y - style[6] * math.sin(style[7] * px + style[8])
    dx, ix = nearest_street(px, streets_x[:, 0], streets_x[:, 1])
    dy, iy = nearest_street(py, streets_y[:, 0], streets_y[:, 1])
    reach = 700.0
    column, row = block_at(px, edges_x), block_at(py, edges_y)
    inside = column >= 0 and row >= 0
    if dx < 0.0 and (inside or (abs(py) < reach and ix % 2 == 1)) and (dx <= dy or dy > 0.0):
        return STREET, street(dx, px - streets_x[ix, 0], py, streets_x[ix, 1], dy, foot)
    if dy < 0.0 and (inside or (abs(px) < reach and iy % 2 == 1)):
        return STREET, street(dy, py - streets_y[iy, 0], px, streets_y[iy, 1], dx, foot)
    if column < 0 or row < 0:
        return country(x, y, foot, style[0], style[1])
    near = min(dx, dy)
    if near < style[2]:
        if near < 0.16:
            return SIDEWALK, scaled((0.36, 0.355, 0.34), 1.0 + 0.2 * fractal(x, y, 3, 1.0, 3, foot))
        return SIDEWALK, tiles(x, y, 0.5, foot, 0.25)
    k = shape_at(x, y, shapes, blocks[row, column, 1], blocks[row, column, 2])
    if k < 0:
        kind = blocks[row, column, 0]
        return kind, plain_kind(kind, x, y, foot, 7 + 13 * row + column, style[0])
    ddx, ddy = x - shapes[k, 0], y - shapes[k, 1]
    u = ddx * shapes[k, 2] + ddy * shapes[k, 3]
    v = ddy * shapes[k, 2] - ddx * shapes[k, 3]
    kind, seed = int(shapes[k, 6]), int(shapes[k, 7])
    if kind == PARKING:
        return kind, parking(u, v, shapes[k, 5], x, y, foot, 0.11 + 0.05 * hash01(seed, 0, 1))
    if kind == PITCH:
        return kind, pitch(u, v, shapes[k, 4], shapes[k, 5], x, y, foot)
    return kind, plain_kind(kind, x, y, foot, seed, style[0])
