"""Surface height and colour straight from posed pictures: what a new module starts from.

`sweep` compares pictures along vertical columns (a plane sweep in world space, robust variance of
locally normalised brightness over the views that may see a point), `smooth` regularises the costs
along eight directions (semi-global matching), `paint` writes the exposure-corrected mean colour of
the views that see a surface point. None of it uses bounds, sparse points or poses from elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from numba import float32, njit

from mclnf_edge.engine.field import JIT

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_SAME: dict[str, Any] = {**JIT, "fastmath": False}
"""For what must round alike in every run: with it, where arrays happen to lie decides which of two
roundings a loop gets, and the least of nearly equal costs turns on that."""

MOST = 1.0
"""The largest cost: pictures that have nothing in common."""

DOUBT, OCCLUDED = 0.2, 0.5
"""Squared distances from the mean at which a picture counts half in it, and above which it counts
as one that sees something else."""

_SMALL, _LARGE = 0.06, 0.75
"""Costs of a step of one level between neighbouring columns, and of any other step."""

WAYS = 8
"""Directions along which costs are smoothed: both ways along rows, columns and diagonals."""

_STEPS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)])

NEAREST = 0.1
"""Metres before a camera's plane from which on a point can be seen."""

NO_VIEWS = 0.3
"""Cost of a point that fewer than two pictures see: less than that of pictures that differ, else
ground at the edge of what was seen sinks to where a second picture would see it."""

AGREEING = 3
"""Pictures that together tell how high a place is, though it lies at the edge of each."""


def normalised(image: U8) -> F32:
    """(H/2, W/2) brightness minus its local mean over its local spread, of a picture (H, W, 3)."""
    full = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    gray = cv2.resize(full, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    mean = cv2.GaussianBlur(gray, (0, 0), 6)
    spread = np.sqrt(np.maximum(cv2.GaussianBlur(gray * gray, (0, 0), 6) - mean * mean, 0))
    out: F32 = ((gray - mean) / (spread + 6)).astype(np.float32)
    return out


@njit(**JIT)
def _pixel(P, i, x, y, z):
    """(column, row, depth) of a point in picture i; depth <= 0 behind the camera."""
    q = P[i, 2, 0] * x + P[i, 2, 1] * y + P[i, 2, 2] * z + P[i, 2, 3]
    if q <= NEAREST:
        return float32(-1), float32(-1), float32(-1)
    u = (P[i, 0, 0] * x + P[i, 0, 1] * y + P[i, 0, 2] * z + P[i, 0, 3]) / q - float32(0.5)
    v = (P[i, 1, 0] * x + P[i, 1, 1] * y + P[i, 1, 2] * z + P[i, 1, 3]) / q - float32(0.5)
    return float32(u), float32(v), float32(q)


@njit(**JIT)
def _inside(u, v, q, w, h):
    """Whether a point at `_pixel` (u, v, q) can be read from a picture of w by h pixels."""
    return q > 0 and u >= 0 and v >= 0 and u < w - 1 and v < h - 1


@njit(**_SAME)
def sweep(x0, y0, step, zs, pictures, P, cost):
    """Fill cost (ny, nx, nz): how little the normalised pictures (N, h, w) agree at each point.

    Columns stand at (x0 + (i + 0.5) step, ...); `P` (N, 3, 4) projects to half-size pixels. Which
    pictures see a point and which something before it is not known yet: those far from the others
    hardly move the mean (two rounds of weights 1 / (1 + d^2 / DOUBT)), and their squared distance
    d^2 from it counts no more than OCCLUDED.
    """
    count, h, w = pictures.shape
    ny, nx, nz = cost.shape
    flat = pictures.reshape(count, h * w)
    us, vs = np.empty(nz, np.float32), np.empty(nz, np.float32)
    values, sees = np.empty((count, nz), np.float32), np.empty((count, nz), np.float32)
    n, mean = np.empty(nz, np.float32), np.empty(nz, np.float32)
    total, weight = np.empty(nz, np.float32), np.empty(nz, np.float32)
    for iy in range(ny):
        y = y0 + (iy + float32(0.5)) * step
        for ix in range(nx):
            x = x0 + (ix + float32(0.5)) * step
            n[:], total[:] = 0, 0
            for i in range(count):
                # `_pixel`, linear in z along a column: all its points at once, for the compiler
                u0 = P[i, 0, 0] * x + P[i, 0, 1] * y + P[i, 0, 3]
                v0 = P[i, 1, 0] * x + P[i, 1, 1] * y + P[i, 1, 3]
                q0 = P[i, 2, 0] * x + P[i, 2, 1] * y + P[i, 2, 3]
                for iz in range(nz):
                    q = max(q0 + P[i, 2, 2] * zs[iz], float32(NEAREST))
                    u = (u0 + P[i, 0, 2] * zs[iz]) / q - float32(0.5)
                    v = (v0 + P[i, 1, 2] * zs[iz]) / q - float32(0.5)
                    inside = (u >= 0) & (v >= 0) & (u < w - 1) & (v < h - 1)
                    us[iz] = u if inside & (q > float32(NEAREST)) else float32(-1)
                    vs[iz] = v
                for iz in range(nz):
                    values[i, iz], sees[i, iz] = 0, 0
                    if us[iz] < 0:
                        continue
                    # what was compared above may be rounded otherwise than what is read here
                    iu, iv = min(int(us[iz]), w - 2), min(int(vs[iz]), h - 2)
                    a, b, at = us[iz] - float32(iu), vs[iz] - float32(iv), iv * w + iu
                    f = (1 - b) * ((1 - a) * flat[i, at] + a * flat[i, at + 1])
                    f += b * ((1 - a) * flat[i, at + w] + a * flat[i, at + w + 1])
                    values[i, iz], sees[i, iz] = f, 1
                    n[iz] += 1
                    total[iz] += f
            for iz in range(nz):
                mean[iz] = total[iz] / max(n[iz], float32(1))
            for _ in range(2):
                total[:], weight[:] = 0, float32(1e-9)
                for i in range(count):
                    for iz in range(nz):
                        d = values[i, iz] - mean[iz]
                        share = sees[i, iz] / (float32(DOUBT) + d * d)
                        total[iz] += share * values[i, iz]
                        weight[iz] += share
                for iz in range(nz):
                    mean[iz] = total[iz] / weight[iz]
            total[:] = 0
            for i in range(count):
                for iz in range(nz):
                    d = values[i, iz] - mean[iz]
                    total[iz] += sees[i, iz] * min(d * d, float32(OCCLUDED))
            for iz in range(nz):
                spread = total[iz] / max(n[iz] - 1, float32(1))
                few = n[iz] < 2
                cost[iy, ix, iz] = float32(NO_VIEWS) if few else min(spread, float32(MOST))


@njit(**_SAME)
def smooth(cost, small, large):
    """Semi-global matching of (ny, nx, nz) costs along WAYS directions."""
    ny, nx, nz = cost.shape
    out = np.zeros_like(cost)
    line, before = np.zeros((nx, nz), np.float32), np.zeros((nx, nz), np.float32)
    least, least_before = np.zeros(nx, np.float32), np.zeros(nx, np.float32)
    for way in range(WAYS):
        dy, dx = _STEPS[way]
        for j in range(ny):
            iy = j if dy >= 0 else ny - 1 - j
            for i in range(nx):
                ix = i if dx >= 0 else nx - 1 - i
                from_x = ix - dx
                begins = from_x < 0 or from_x >= nx or (dy != 0 and j == 0)
                path = line if dy == 0 else before
                cheapest = float32(0)
                if not begins:
                    cheapest = least[from_x] if dy == 0 else least_before[from_x]
                m = float32(1e9)
                for z in range(nz):
                    c = cost[iy, ix, z]
                    if not begins:
                        best = min(path[from_x, z], cheapest + large)
                        if z > 0:
                            best = min(best, path[from_x, z - 1] + small)
                        if z < nz - 1:
                            best = min(best, path[from_x, z + 1] + small)
                        c += best - cheapest
                    line[ix, z] = c
                    m = min(m, c)
                    out[iy, ix, z] += c
                least[ix] = m
            line, before = before, line
            least, least_before = least_before, least
    return out


def heights(
    x0: float, y0: float, step: float, n: int, zs: F32, pictures: F32, P: F32
) -> tuple[F32, F32]:
    """(n, n) surface height in metres and its matching cost, for columns `step` apart.

    `pictures` (N, h, w) from `normalised`, `P` (N, 3, 4) for their (half) size.
    """
    cost = np.empty((n, n, len(zs)), np.float32)
    sweep(np.float32(x0), np.float32(y0), np.float32(step), zs, pictures, P, cost)
    for i in range(len(zs)):
        cost[..., i] = cv2.GaussianBlur(np.ascontiguousarray(cost[..., i]), (0, 0), 1.0)
    total = smooth(cost, np.float32(_SMALL), np.float32(_LARGE))
    best = total.argmin(-1)[..., None]
    sure = np.take_along_axis(cost, best, -1)[..., 0]
    # the vertex of the parabola through the best level and its neighbours
    inner = best.clip(1, len(zs) - 2)
    below, at, above = (np.take_along_axis(total, inner + k, -1) for k in (-1, 0, 1))
    off = 0.5 * (below - above) / np.maximum(below - 2 * at + above, 1e-6)
    h = zs[best] + np.where(best == inner, off.clip(-0.5, 0.5), 0) * (zs[1] - zs[0])
    return cv2.medianBlur(h[..., 0].astype(np.float32), 5), sure


@njit(**JIT)
def raster_at(raster, x0, y0, inverse, x, y):
    """Bilinear height of a raster whose nodes are 1 / inverse apart."""
    fx = min(max((x - x0) * inverse - float32(0.5), float32(0)), float32(raster.shape[1] - 1.001))
    fy = min(max((y - y0) * inverse - float32(0.5), float32(0)), float32(raster.shape[0] - 1.001))
    i, j = int(fx), int(fy)
    a, b = fx - i, fy - j
    low = (1 - a) * raster[j, i] + a * raster[j, i + 1]
    return (1 - b) * low + b * ((1 - a) * raster[j + 1, i] + a * raster[j + 1, i + 1])


@njit(**JIT)
def _visible(x, y, z, eye, raster, x0, y0, inverse, top, slack):
    """Whether the height raster leaves the line from a point to the camera free."""
    dx, dy, dz = eye[0] - x, eye[1] - y, eye[2] - z
    if dz <= 0:
        return False
    steps = math.sqrt(dx * dx + dy * dy) * inverse
    k = 1.0
    while k < steps:
        height = z + k / steps * dz
        if height > top:
            return True
        at = raster_at(raster, x0, y0, inverse, x + k / steps * dx, y + k / steps * dy)
        if at > height + slack:
            return False
        k += 1.0
    return True


@njit(**JIT)
def visibility(xs, ys, raster, x0, y0, inverse, slack, highest, masks, P, eyes, seen):
    """seen (N, ny, nx): how surely picture i sees the surface at (xs, ys), unmasked and unhidden.

    0 not, 1 if the surface is where the raster has it, 2 if it would be inside the picture at the
    `highest` ground around, too: what stands at a picture's edge hides what lies behind it, and how
    high it is no single picture tells. `masks` (N, H, W) uint8, 0 = ignore; `slack` metres of
    height are forgiven.
    """
    count, h, w = masks.shape
    top = raster.max()
    for jy in range(len(ys)):
        for jx in range(len(xs)):
            z = raster_at(raster, x0, y0, inverse, xs[jx], ys[jy])
            for i in range(count):
                u, v, q = _pixel(P, i, xs[jx], ys[jy], z)
                seen[i, jy, jx] = 0
                if not _inside(u, v, q, w, h) or masks[i, int(v), int(u)] == 0:
                    continue
                if _visible(xs[jx], ys[jy], z, eyes[i], raster, x0, y0, inverse, top, slack):
                    above = max(highest, z)
                    sure = _inside(*_pixel(P, i, xs[jx], ys[jy], above), w, h)
                    seen[i, jy, jx] = 2 if sure else 1


def count_views(seen: U8) -> tuple[U8, U8]:
    """How many pictures know a place (ny, nx), and which do (N, ny, nx), of `visibility`'s `seen`.

    Those that surely see it, or all that see it if AGREEING of them do: then they tell its height.
    """
    agreed = (seen > 0).sum(0) >= AGREEING
    which = ((seen == 2) | (agreed & (seen > 0))).astype(np.uint8)
    return which.sum(0).astype(np.uint8), which


@njit(**JIT)
def paint(xs, ys, raster, x0, y0, inverse, seen, images, P, gains, color):
    """Mean exposure-corrected colour (ny, nx, 3) in [0, 1] of the surface at (xs, ys).

    `seen` (N, m, m) from `count_views` over the same square, `images` (N, H, W, 3) uint8, `gains`
    (N, 3). Near views count more, with 1 / depth^2: a low pass keeps its detail when a high one
    joins it. Where nobody saw the surface the colour is 0.45.
    """
    count, h, w, _ = images.shape
    m = seen.shape[1]
    total = np.zeros(3, np.float32)
    for jy in range(len(ys)):
        sy = int(jy * (m - 1) / (len(ys) - 1) + 0.5)
        for jx in range(len(xs)):
            sx = int(jx * (m - 1) / (len(xs) - 1) + 0.5)
            z = raster_at(raster, x0, y0, inverse, xs[jx], ys[jy])
            weight = float32(0)
            total[:] = 0
            for i in range(count):
                if seen[i, sy, sx] == 0:
                    continue
                u, v, q = _pixel(P, i, xs[jx], ys[jy], z)
                if not _inside(u, v, q, w, h):
                    continue
                iu, iv = int(u), int(v)
                a, b = u - float32(iu), v - float32(iv)
                near = (float32(100) / q) ** 2
                weight += near
                for c in range(3):
                    low = (1 - a) * images[i, iv, iu, c] + a * images[i, iv, iu + 1, c]
                    high = (1 - a) * images[i, iv + 1, iu, c] + a * images[i, iv + 1, iu + 1, c]
                    total[c] += near * ((1 - b) * low + b * high) / gains[i, c]
            for c in range(3):
                color[jy, jx, c] = (
                    total[c] / (weight * float32(255)) if weight > 0 else float32(0.45)
                )


@njit(**JIT)
def observe(xs, ys, raster, x0, y0, inverse, slack, images, P, eyes, values):
    """values (len(xs), N, 3): each picture's 8-bit colour of each point, -1 where unseen."""
    count, h, w, _ = images.shape
    top = raster.max()
    for p in range(len(xs)):
        z = raster_at(raster, x0, y0, inverse, xs[p], ys[p])
        for i in range(count):
            values[p, i, :] = -1
            u, v, q = _pixel(P, i, xs[p], ys[p], z)
            if q <= 0 or u < 1 or v < 1 or u >= w - 2 or v >= h - 2:
                continue
            if _visible(xs[p], ys[p], z, eyes[i], raster, x0, y0, inverse, top, slack):
                for c in range(3):
                    s = float32(0)
                    for dv in range(-1, 2):
                        for du in range(-1, 2):
                            s += images[i, int(v + 0.5) + dv, int(u + 0.5) + du, c]
                    values[p, i, c] = s / 9


def fit_gains(values: F32, fixed: npt.NDArray[np.bool_], gains: F32, rounds: int = 20) -> F32:
    """Log exposure gains (N, 3) that make the pictures agree where they see the same points.

    Alternating medians over points seen by two pictures or more and neither dark nor saturated.
    Pictures marked `fixed` keep their `gains`; without any, the mean gain is held at zero.
    """
    good = (values.min(-1) > 8) & (values.max(-1) < 250)
    good &= (good.sum(1) > 1)[:, None]
    logs = np.log(np.maximum(values, 4) / 255)
    out: F32 = gains.copy()
    seen = np.maximum(good.sum(1), 1)[:, None]
    shown = np.where(good[:, fixed, None], logs[:, fixed] - out[fixed], 0).sum(1)
    moved = np.flatnonzero(~fixed)
    for _ in range(rounds):
        level = np.where(good[:, moved, None], logs[:, moved] - out[moved], 0).sum(1)
        level = (level + shown) / seen
        for i in moved[good[:, moved].sum(0) > 20]:
            out[i] = np.median((logs[:, i] - level)[good[:, i]], axis=0)
        if not fixed.any():
            out -= out.mean(0)
    return out


@njit(**JIT)
def fill_density(
    density, voxels, x0, y0, edge, low, height, raster, rx, ry, inverse, unit, solid, empty
):
    """Set a density grid (y, x, z flat) from a height raster: `solid` up to one unit above it."""
    nx, ny, nz = voxels
    for c in range(nz):
        z = low + (c + 0.5) / nz * height
        for b in range(ny):
            y = y0 + (b + 0.5) / ny * edge
            for a in range(nx):
                x = x0 + (a + 0.5) / nx * edge
                above = z - raster_at(raster, rx, ry, inverse, x, y)
                density[(b * nx + a) * nz + c] = solid if above < unit else empty
