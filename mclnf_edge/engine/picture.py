"""Renders whole pictures: the field and the quadrature of `volume.forward`, without its tape.

A tile of pixels goes front to back, one sample of every ray at a time. The points of a sample are
sorted by module and go through its network eight at a time; a ray that is dark leaves the tile.
Nothing is kept for a backward pass, so a tile's work stays in the cache, and so do the texels that
neighbouring rays share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import float32, njit

from mclnf_edge.engine.field import (
    B1,
    B2,
    B3,
    CHANNELS,
    HIDDEN,
    INNER,
    INPUTS,
    JIT,
    MLP_SIZE,
    OUTPUTS,
    W2,
    W3,
    encode_heights,
)
from mclnf_edge.engine.simd import exp_lanes, make_layer, make_lookup
from mclnf_edge.engine.volume import MARGIN, MOST, alone, draw, gate, span, surface_at

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

TILE = 8
"""Edge of a tile in pixels."""

UNKNOWN = 0.5
"""What stands where no module knows anything: mid-grey."""

DARK = 0.01
"""A ray ends where less than this share of its light is left; the rest counts as stopped too."""

_EVEN = 0.5  # coarse steps between neighbouring squares of rays that share their distances
_RAYS = TILE * TILE
_BLOCK = 8  # points that go through a network together
_ONE = float32(1)
_layer_h, _layer_o = make_layer(HIDDEN, _BLOCK), make_layer(OUTPUTS, _BLOCK)
_lookup = make_lookup(CHANNELS, INPUTS)


class Shot(NamedTuple):
    """What a picture is taken with: a pinhole camera in the frame of a site, and its quadrature.

    `eye` (3,) in metres, `turn` (3, 3) from camera axes to the site's, `pinhole` (fx, fy, cx, cy)
    in pixels, `size` (height, width), `band` (lowest, highest z of matter), `reach` in metres,
    `exposure` (3,) a factor of each colour; `samples`, `steps` and `uniform` as in
    `volume.forward`.
    """

    eye: F32
    turn: F32
    pinhole: F32
    size: tuple[int, int]
    band: F32
    reach: np.float32
    exposure: F32
    samples: int
    steps: int
    uniform: np.float32


class Painted(NamedTuple):
    """A picture (height, width, 3) uint8, its depth and known share (height, width), see `paint`.

    `points` is how many places were looked at.
    """

    rgb: npt.NDArray[np.uint8]
    depth: F32
    known: F32
    points: int


class Tile(NamedTuple):
    """Scratch of a tile: its rays, the points of one sample, and a block in the network."""

    centre: F32
    cdf: F32
    direction: F32
    axial: F32
    span: F32
    t: F32
    met: npt.NDArray[np.bool_]
    source: I32
    light: F32
    alive: I32
    place: F32
    matter: F32
    thick: F32
    slot: I32
    ray: I32
    share: F32
    room: F32
    near: I32
    near_share: F32
    u: F32
    seen: npt.NDArray[np.bool_]
    x: F32
    h1: F32
    h2: F32
    o: F32


@njit(**JIT)
def _make_tile(samples, steps):
    return Tile(
        np.empty((1, 3), np.float32),
        np.empty(steps + 1, np.float32),
        np.empty((_RAYS, 3), np.float32),
        np.empty(_RAYS, np.float32),
        np.empty((2 * _RAYS, 2), np.float32),
        np.empty(2 * _RAYS * samples, np.float32),
        np.zeros(_RAYS, np.bool_),
        np.empty(_RAYS, np.int32),
        np.empty((_RAYS, 6), np.float32),
        np.empty(_RAYS, np.int32),
        np.empty((_RAYS, 3), np.float32),
        np.empty((_RAYS, 5), np.float32),
        np.zeros(_RAYS, np.float32),
        np.empty(_RAYS * MOST, np.int32),
        np.empty(_RAYS * MOST, np.int32),
        np.empty(_RAYS * MOST, np.float32),
        np.zeros(4, np.float32),
        np.empty(MOST, np.int32),
        np.empty(MOST, np.float32),
        np.empty(3 * _BLOCK, np.float32),
        np.empty(_BLOCK, np.bool_),
        np.zeros(_BLOCK * INPUTS, np.float32),
        np.empty(_BLOCK * HIDDEN, np.float32),
        np.empty(_BLOCK * HIDDEN, np.float32),
        np.empty(_BLOCK * OUTPUTS, np.float32),
    )


@njit(**JIT)
def paint(scene, shot, first, last, rgb, depth, known):
    """Render the rows of tiles first..last of a picture.

    `rgb` (height, width, 3) uint8 is mid-grey where nothing is known, `known` (height, width) the
    share of the light that ends in seen matter, `depth` (height, width) the mean z-depth in metres
    of what stops it, 0 where nothing does. Returns the number of points looked at.
    """
    height, width = shot.size
    tile = _make_tile(shot.samples, shot.steps)
    points = 0
    for row in range(first * TILE, min(last * TILE, height), TILE):
        for column in range(0, width, TILE):
            alive = _aim(scene, shot, row, column, tile)
            for i in range(shot.samples):
                if alive > 0:
                    points += alive
                    _look(scene, shot, i, alive, tile)
                    alive = _compose(shot.samples, i, alive, tile)
            _keep(shot, row, column, tile, rgb, depth, known)
    return points


@njit(**INNER)
def _pixel(r):
    """(row, column) within a tile of its ray r; four in a row are a square."""
    q, k = r // 4, r % 4
    return q // (TILE // 2) * 2 + k // 2, q % (TILE // 2) * 2 + k % 2


@njit(**INNER)
def _point(shot, y, x, direction, at):
    """Write the unit direction through image point (y, x) to direction[at]; its z-depth a metre."""
    x = (x - shot.pinhole[2]) / shot.pinhole[0]
    y = (shot.pinhole[3] - y) / shot.pinhole[1]
    inverse = _ONE / math.sqrt(x * x + y * y + _ONE)
    for c in range(3):
        d = x * shot.turn[c, 0] + y * shot.turn[c, 1] - shot.turn[c, 2]
        direction[at, c] = d * inverse
    return inverse


@njit(**INNER)
def _march(scene, shot, direction, at, row, tile):
    """Sample distances of the ray direction[at] into a row of tile.t; whether it meets a module."""
    origin, bands = shot.eye.reshape(1, 3), shot.band.reshape(1, 2)
    t0, t1 = span(bands, 0, shot.eye[2], direction[at, 2], shot.reach)
    dt = (t1 - t0) / float32(shot.steps)
    tile.span[row, 0], tile.span[row, 1] = t0, dt
    return t1 > t0 and draw(
        scene, origin, direction[at : at + 1], 0, t0, dt, shot.steps, shot.uniform, np.uint64(1),
        False, tile.cdf, tile.t, row * shot.samples, shot.samples,
    )  # fmt: skip


@njit(**INNER)
def _aim(scene, shot, row, column, tile):
    """Directions of a tile's rays and their sample distances; the number that meet a module.

    Four rays share the distances of the line between them, unless matter is much nearer or further
    on the lines beside it: there each ray has its own.
    """
    height, width = shot.size
    half, alive = float32(0.5), 0
    for q in range(_RAYS // 4):
        i, j = _pixel(4 * q)
        _point(shot, float32(row + i + 1), float32(column + j + 1), tile.centre, 0)
        tile.met[4 * q] = _march(scene, shot, tile.centre, 0, 4 * q, tile)
    for q in range(_RAYS // 4):
        shared = _even(shot, q, tile)
        for r in range(4 * q, 4 * q + 4):
            i, j = _pixel(r)
            tile.light[r, 0] = _ONE
            tile.light[r, 1:] = 0
            if row + i >= height or column + j >= width:
                continue
            y, x = float32(row + i) + half, float32(column + j) + half
            tile.axial[r] = _point(shot, y, x, tile.direction, r)
            tile.source[r] = 4 * q if shared else _RAYS + r
            met = tile.met[4 * q]
            if not shared:
                met = _march(scene, shot, tile.direction, r, _RAYS + r, tile)
            if met:
                tile.alive[alive] = r
                alive += 1
    return alive


@njit(**INNER)
def _even(shot, q, tile):
    """Whether the squares beside square q meet matter at much the same distance."""
    across, middle = TILE // 2, shot.samples // 2
    t, limit = tile.t[4 * q * shot.samples + middle], _EVEN * tile.span[4 * q, 1]
    for side in range(4):
        i, j = q // across + (side == 0) - (side == 1), q % across + (side == 2) - (side == 3)
        if i >= 0 and j >= 0 and i < across and j < across:
            n = 4 * (i * across + j)
            if tile.met[n] != tile.met[4 * q]:
                return False
            if tile.met[n] and abs(tile.t[n * shot.samples + middle] - t) > limit:
                return False
    return True


@njit(**INNER)
def _look(scene, shot, i, alive, tile):
    """Density and colour of sample i of the rays alive, each module's points together."""
    slot, ray, share, room = tile.slot, tile.ray, tile.share, tile.room
    room[0], room[1] = _ONE, float32(0)
    n, only = 0, -1
    for a in range(alive):
        r = tile.alive[a]
        t = tile.t[tile.source[r] * shot.samples + i]
        x = shot.eye[0] + t * tile.direction[r, 0]
        y = shot.eye[1] + t * tile.direction[r, 1]
        tile.place[r, 0], tile.place[r, 1] = x, y
        tile.place[r, 2] = shot.eye[2] + t * tile.direction[r, 2]
        tile.matter[r] = 0
        if x <= room[0] or x >= room[1] or y <= room[2] or y >= room[3]:
            only = alone(scene, x, y, room)
        if only >= 0:
            slot[n], ray[n], share[n] = only, r, _ONE
            n += 1
        else:
            for k in range(gate(scene, x, y, tile.near, tile.near_share)):
                slot[n], ray[n], share[n] = tile.near[k], r, tile.near_share[k]
                n += 1
    begin = 0
    while begin < n:
        s, end = slot[begin], begin
        for e in range(begin, n):
            if slot[e] == s:
                slot[e], slot[end] = slot[end], slot[e]
                ray[e], ray[end] = ray[end], ray[e]
                share[e], share[end] = share[end], share[e]
                end += 1
        for e in range(begin, end, _BLOCK):
            _evaluate(scene, s, e, min(end - e, _BLOCK), tile)
        begin = end


@njit(forceinline=True, **INNER)
def _evaluate(scene, s, at, count, tile):
    """Add module s's share at the `count` <= 8 points from `at` on to their matter."""
    inverse = _ONE / scene.box[s, 2]
    unit = scene.box[s, 2] * float32(1 / (64 * (1 + 2 * MARGIN)))
    u, x, o = tile.u, tile.x, tile.o
    planes = scene.planes
    after = planes.shape[0] * CHANNELS
    for k in range(_BLOCK):
        r = tile.ray[at + min(k, count - 1)]
        px, py, pz = tile.place[r, 0], tile.place[r, 1], tile.place[r, 2]
        ground, tile.seen[k] = surface_at(scene, s, px, py)
        u[k] = (px - scene.box[s, 0]) * inverse
        u[_BLOCK + k] = (py - scene.box[s, 1]) * inverse
        u[2 * _BLOCK + k] = (pz - scene.band[s, 0]) * scene.band[s, 1]
        encode_heights(u[2 * _BLOCK + k], (pz - ground) / unit, x, k * INPUTS + after)
    first = s * scene.feature_count
    for p in range(planes.shape[0]):
        _lookup(
            x, p * CHANNELS, scene.features, first + planes[p, 4], planes[p, 2], planes[p, 3],
            u, planes[p, 0] * _BLOCK, planes[p, 1] * _BLOCK,
        )  # fmt: skip
    w, first = scene.weights, s * MLP_SIZE
    _layer_h(tile.h1, w, first + B1, w, first, x, INPUTS, float32(0))
    _layer_h(tile.h2, w, first + B2, w, first + W2, tile.h1, HIDDEN, float32(0))
    _layer_o(o, w, first + B3, w, first + W3, tile.h2, HIDDEN, float32(-1e30))
    for k in range(_BLOCK):
        a = k * OUTPUTS
        o[a] = min(max(o[a], float32(-10)), float32(6))
        for c in range(3):
            o[a + 1 + c] = -(o[a + 1 + c] + x[k * INPUTS + c])
    exp_lanes(o, 0, _BLOCK * OUTPUTS // 8)
    for k in range(count):
        r, a = tile.ray[at + k], k * OUTPUTS
        own = o[a] / unit * tile.share[at + k]
        tile.matter[r, 0] += own
        for c in range(1, 4):
            tile.matter[r, c] += own / (_ONE + o[a + c])
        if tile.seen[k]:
            tile.matter[r, 4] += own


@njit(**INNER)
def _compose(samples, i, alive, tile):
    """Add sample i to the light of the rays alive; the number that stay alive."""
    half = float32(0.5)
    for a in range(alive):
        r = tile.alive[a]
        q = tile.source[r]
        t, dt = tile.t[q * samples : (q + 1) * samples], tile.span[q, 1]
        low = half * (t[i - 1] + t[i]) if i > 0 else max(tile.span[q, 0], t[0] - half * dt)
        high = half * (t[i] + t[i + 1]) if i + 1 < samples else t[i] + half * dt
        tile.thick[a] = -tile.matter[r, 0] * max(high - low, float32(1e-3))
    exp_lanes(tile.thick, 0, (alive + 7) // 8)
    stay = 0
    for a in range(alive):
        r = tile.alive[a]
        light, matter = tile.light[r], tile.matter[r]
        w = light[0] * (_ONE - tile.thick[a])
        light[0] *= tile.thick[a]
        light[4] += w * tile.t[tile.source[r] * samples + i] * tile.axial[r]
        if matter[0] > 0:
            w /= matter[0]
            for c in range(1, 4):
                light[c] += w * matter[c]
            light[5] += w * matter[4]
        if light[0] >= DARK:
            tile.alive[stay] = r
            stay += 1
    return stay


@njit(**INNER)
def _keep(shot, row, column, tile, rgb, depth, known):
    """Write a tile's rays to the picture."""
    height, width = shot.size
    for r in range(_RAYS):
        i, j = _pixel(r)
        i, j = row + i, column + j
        if i >= height or j >= width:
            continue
        light = tile.light[r]
        stopped = _ONE - light[0]
        inverse = _ONE / max(stopped, float32(1e-3))
        share = light[5]
        if light[0] < DARK:
            share *= inverse
        elif stopped <= 1e-3:
            share = float32(0)
        known[i, j], depth[i, j] = share, light[4] * inverse
        for c in range(3):
            value = share * light[1 + c] * inverse * shot.exposure[c]
            value += (_ONE - share) * float32(UNKNOWN)
            rgb[i, j, c] = int(min(max(value, float32(0)), _ONE) * float32(255) + float32(0.5))
