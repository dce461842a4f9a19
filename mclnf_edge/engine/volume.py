"""Volume rendering over every module a ray crosses, forwards and backwards.

A ray marches a coarse density grid, draws its samples where matter is (inverse transform of the
grid's weights plus a small uniform share), evaluates the one to four modules that know each point,
and blends them by the gate before the usual quadrature:

    sigma = sum_i G_i sigma_i,  c = sum_i G_i sigma_i c_i / sigma,  w_k = T_k (1 - exp(-sigma d_k))

G_i >= 0 sums to one over the modules present at a point (Algorithm 1's inference, with the argmax
softened so that no seam shows). A module answers for the whole of its cell and fades over the
margin beyond it, where frames have shown it the ground, before the modules of a higher rank: closed
ones in the order in which they were closed, then those that learn. What is learned later changes
nothing of what a closed cell knows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import float32, njit, uint64

from mclnf_edge.engine.field import (
    B3,
    CHANNELS,
    HIDDEN,
    INNER,
    INPUTS,
    JIT,
    MLP_SIZE,
    OUTPUTS,
    SURFACE,
    TRANSPOSED_SIZE,
    W3,
    encode,
    encode_backward,
    mlp,
    mlp_backward,
    outer_o,
    whole,
)

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

FAR = 8
"""An outer cell's edge in inner cells."""

MARGIN = 0.06
"""Share of a cell's edge over which a module answers beyond the border of its cell."""

UNSEEN = 0.01
"""How much a module's answer counts that has not seen the place, beside one that has."""

MOST = 4  # modules that can know one point
ALL = 1e9
"""As `most` of `backward`: every sample."""
_OTHER = 1 << 32  # random numbers of a ray that none took for its samples
_ONE = float32(1)


class Scene(NamedTuple):
    """Everything a ray reads; slot s of each array is one module.

    Coordinates are metres in the local float32 frame of `site`. `cells` is an open hash table, rows
    (level + 1, ix, iy, slot), 0 = empty; its length is a power of two. `box[s]` is a module's
    (x, y, edge) with its margins; `band[s]` is (lowest z, 1 / height). `surface`, `seen` are
    (S, SURFACE, SURFACE): surface height and the number of frames that saw it. `owner[s]` is the
    row of a trainable module in the gradient arrays, -1 when it is frozen; `rank[s]` its place in
    the order in which modules answer. What `known_views` frames saw counts as known. A site's
    inner cells are of level 2 * site, its outer ones of the level after it.
    """

    cell: float
    cells: I32
    box: F32
    band: F32
    features: F32
    feature_count: int
    planes: I32
    weights: F32
    density: F32
    voxels: I32
    surface: F32
    seen: U8
    owner: I32
    rank: I32
    known_views: int
    site: int


class Tape(NamedTuple):
    """What the forward pass leaves for the backward pass: evaluations, samples, rays."""

    slot: I32
    x: F32
    h1: F32
    h2: F32
    o: F32
    u: F32
    t: F32
    width: F32
    sigma: F32
    color: F32
    weight: F32
    first: I32
    last: I32
    used: I32
    rgb: F32
    left: F32
    depth: F32
    known: F32


def make_tape(rays: int, samples: int) -> Tape:
    """Room for `rays` x `samples`; a sample near a corner of cells has up to four evaluations."""
    evals = rays * samples * MOST

    def floats(*shape: int) -> F32:
        return np.zeros(shape, np.float32)

    n = rays * samples
    return Tape(
        slot=np.zeros(evals, np.int32),
        x=floats(evals * INPUTS),
        h1=floats(evals * HIDDEN),
        h2=floats(evals * HIDDEN),
        o=floats(evals * OUTPUTS),
        u=floats(evals, 3),
        t=floats(n),
        width=floats(n),
        sigma=floats(n),
        color=floats(n, 3),
        weight=floats(n),
        first=np.zeros(n, np.int32),
        last=np.zeros(n, np.int32),
        used=np.zeros(rays, np.int32),
        rgb=floats(rays, 3),
        left=floats(rays),
        depth=floats(rays),
        known=floats(rays),
    )


@njit(**INNER)
def _next(state):
    """xorshift64."""
    state ^= state << uint64(13)
    state ^= state >> uint64(7)
    state ^= state << uint64(17)
    return state


@njit(**INNER)
def _seed(seed, ray):
    z = uint64(seed) * uint64(0x9E3779B97F4A7C15) + uint64(ray + 1) * uint64(0xBF58476D1CE4E5B9)
    z ^= z >> uint64(30)
    z *= uint64(0x94D049BB133111EB)
    return _next((z ^ (z >> uint64(31))) | uint64(1))


@njit(**INNER)
def _unit(state):
    return float32((state >> uint64(40)) * (1.0 / 16777216.0))


@njit(**INNER)
def cell_hash(level, ix, iy):
    """Where a cell's search in the table begins, before the table's mask."""
    return (ix * 73856093) ^ (iy * 19349663) ^ (level * 83492791)


@njit(**INNER)
def _cell_slot(cells, level, ix, iy):
    mask = cells.shape[0] - 1
    at = cell_hash(level, ix, iy) & mask
    while cells[at, 0] != 0:
        if cells[at, 0] == level + 1 and cells[at, 1] == ix and cells[at, 2] == iy:
            return cells[at, 3]
        at = (at + 1) & mask
    return -1


@njit(forceinline=True, **INNER)
def gate(scene, x, y, slots, share):
    """Fill `slots` and `share` (sums to 1) with the modules that know (x, y); returns how many.

    The largest share comes first. Outer cells answer only where no inner one does. Where there is
    only one it is not asked what it has seen. `radiance.gates` is the definition.
    """
    for outer in range(2):
        level = 2 * scene.site + outer
        inverse = _ONE / (float32(scene.cell) * float32(1 if outer == 0 else FAR))
        fx, fy = x * inverse, y * inverse
        ix, iy = whole(fx), whole(fy)
        ax, ay = float32(fx - ix), float32(fy - iy)
        nx, wx = 0, _ONE  # the neighbour along x, if near, and its hat here
        if ax < MARGIN:
            nx, wx = -1, _ONE - ax / float32(MARGIN)
        elif ax > 1 - MARGIN:
            nx, wx = 1, _ONE - (1 - ax) / float32(MARGIN)
        ny, wy = 0, _ONE
        if ay < MARGIN:
            ny, wy = -1, _ONE - ay / float32(MARGIN)
        elif ay > 1 - MARGIN:
            ny, wy = 1, _ONE - (1 - ay) / float32(MARGIN)
        if nx == 0 and ny == 0:
            slots[0], share[0] = _cell_slot(scene.cells, level, ix, iy), _ONE
            if slots[0] >= 0:
                return 1
            continue
        n = 0
        for a in range(2 if nx != 0 else 1):
            for b in range(2 if ny != 0 else 1):
                s = _cell_slot(scene.cells, level, ix + a * nx, iy + b * ny)
                if s < 0:
                    continue
                at = n
                while at > 0 and scene.rank[slots[at - 1]] > scene.rank[s]:
                    slots[at], share[at] = slots[at - 1], share[at - 1]
                    at -= 1
                slots[at] = s
                share[at] = (wx if a == 1 else _ONE) * (wy if b == 1 else _ONE)
                share[at] *= _ONE - float32(1 - UNSEEN) * (_ONE - _seen_around(scene, s, x, y))
                n += 1
        n = _blend(slots, share, n)
        if n > 0:
            return n
    return 0


@njit(forceinline=True, **INNER)
def _seen_around(scene, s, x, y):
    """How much of what is around (x, y) frames have shown to module s: bilinear, 0 to 1."""
    i, j, a, b = _node(scene, s, x, y)
    seen = scene.seen[s]
    low = (_ONE - a) * min(seen[j, i], 1) + a * min(seen[j, i + 1], 1)
    high = (_ONE - a) * min(seen[j + 1, i], 1) + a * min(seen[j + 1, i + 1], 1)
    return (_ONE - b) * low + b * high


@njit(forceinline=True, **INNER)
def _node(scene, s, x, y):
    """Column and row of module s's surface before (x, y), and the fractions of a node beyond."""
    scale = float32(SURFACE - 1) / scene.box[s, 2]
    fx = min(max((x - scene.box[s, 0]) * scale, float32(0)), float32(SURFACE - 1.001))
    fy = min(max((y - scene.box[s, 1]) * scale, float32(0)), float32(SURFACE - 1.001))
    i, j = int(fx), int(fy)
    return i, j, fx - float32(i), fy - float32(j)


@njit(forceinline=True, **INNER)
def _blend(slots, share, n):
    """Turn the hats of `n` modules in order of rank into shares; how many are left, 0 for none."""
    left, total, most = _ONE, float32(0), 0
    for i in range(n):
        share[i] *= left
        left -= share[i]
        total += share[i]
        most = i if share[i] > share[most] else most
        if left <= 0:
            n = i + 1
            break
    if total <= 0:
        return 0
    slots[0], slots[most] = slots[most], slots[0]
    share[0], share[most] = share[most], share[0]
    for i in range(n):
        share[i] /= total
    return n


@njit(**INNER)
def alone(scene, x, y, room):
    """The one module that knows (x, y) and `room` (x0, x1, y0, y1) where it stays so.

    -1 and no room where the gate blends or nobody knows the place.
    """
    room[0], room[1] = _ONE, float32(0)
    for outer in range(2):
        edge = float32(scene.cell) * float32(1 if outer == 0 else FAR)
        ix, iy = whole(x / edge), whole(y / edge)
        margin, far = float32(MARGIN) * edge, edge * float32(1 - MARGIN)
        x0, y0 = float32(ix) * edge, float32(iy) * edge
        inside = x > x0 + margin and x < x0 + far and y > y0 + margin and y < y0 + far
        if not inside:
            return -1
        s = _cell_slot(scene.cells, 2 * scene.site + outer, ix, iy)
        if outer == 0:
            ax, bx, ay, by = x0 + margin, x0 + far, y0 + margin, y0 + far
        else:
            ax, bx = max(ax, x0 + margin), min(bx, x0 + far)
            ay, by = max(ay, y0 + margin), min(by, y0 + far)
        if s >= 0:
            room[0], room[1], room[2], room[3] = ax, bx, ay, by
            return s
    return -1


@njit(**INNER)
def _cell_at(scene, ix, iy):
    """(slot, its lowest corner x and y, 1 / its edge, in inner cells) that cell ix, iy is in.

    The slot is -1 where no module is.
    """
    s = _cell_slot(scene.cells, 2 * scene.site, ix, iy)
    if s >= 0:
        return s, float32(ix), float32(iy), _ONE
    jx, jy = ix // FAR, iy // FAR
    s = _cell_slot(scene.cells, 2 * scene.site + 1, jx, jy)
    return s, float32(jx * FAR), float32(jy * FAR), float32(1 / FAR)


@njit(**INNER)
def _voxel(scene, s, ax, ay, z):
    """The density grid of module s at (ax, ay) in 0..1 of its cell, -1 outside its height band."""
    uz = (z - scene.band[s, 0]) * scene.band[s, 1]
    if uz < 0 or uz >= 1:
        return float32(-1)
    na, nb, nc = scene.voxels[0], scene.voxels[1], scene.voxels[2]
    a, b = min(int(ax * float32(na)), na - 1), min(int(ay * float32(nb)), nb - 1)
    return scene.density[s, (b * na + a) * nc + min(int(uz * float32(nc)), nc - 1)]


@njit(**INNER)
def surface_at(scene, s, x, y):
    """(height, whether enough frames saw it) of module s's surface at local (x, y)."""
    i, j, a, b = _node(scene, s, x, y)
    h = scene.surface[s]
    low = (_ONE - a) * h[j, i] + a * h[j, i + 1]
    high = (_ONE - a) * h[j + 1, i] + a * h[j + 1, i + 1]
    near_i, near_j = i + int(a + float32(0.5)), j + int(b + float32(0.5))
    return (_ONE - b) * low + b * high, scene.seen[s, near_j, near_i] >= scene.known_views


@njit(**INNER)
def span(bands, r, oz, dz, reach):
    """Where ray r is inside its height band: (t0, t1), empty when t1 <= t0."""
    t0, t1 = float32(0.5), reach
    if abs(dz) > 1e-6:
        a, b = (bands[r, 0] - oz) / dz, (bands[r, 1] - oz) / dz
        t0, t1 = max(t0, min(a, b)), min(t1, max(a, b))
    elif oz < bands[r, 0] or oz > bands[r, 1]:
        t1 = float32(0)
    return t0, t1


@njit(**INNER)
def draw(scene, ro, rd, r, t0, dt, steps, uniform, state, jitter, cdf, t, base, samples):
    """Draw sorted sample distances into t[base:]; False when the ray meets no module."""
    through, total = _ONE, float32(0)
    cdf[0] = 0
    offset = _unit(state) if jitter else float32(0.5)
    share, used = uniform / float32(steps), 0
    inverse, ix, iy = _ONE / float32(scene.cell), 0, 0
    s, cx, cy, scale = _cell_at(scene, ix, iy)
    while used < steps and through > 1e-3:
        at = t0 + (float32(used) + offset) * dt
        fx, fy = (ro[r, 0] + at * rd[r, 0]) * inverse, (ro[r, 1] + at * rd[r, 1]) * inverse
        jx, jy = whole(fx), whole(fy)
        if jx != ix or jy != iy:
            ix, iy = jx, jy
            s, cx, cy, scale = _cell_at(scene, ix, iy)
        density = float32(-1)
        if s >= 0:
            z = ro[r, 2] + at * rd[r, 2]
            density = _voxel(scene, s, (fx - cx) * scale, (fy - cy) * scale, z)
        if density >= 0:
            thick = density * dt
            # Most voxels are air: there the exponential is its first two terms.
            if thick < 0.05:
                alpha = thick - float32(0.5) * thick * thick
            else:
                alpha = _ONE - math.exp(-thick)
            total += through * alpha + share
            through *= _ONE - alpha
        used += 1
        cdf[used] = total
    if total <= 0:
        return False
    k = 0
    for i in range(samples):
        state = _next(state)
        q = (float32(i) + (_unit(state) if jitter else float32(0.5))) / float32(samples) * total
        while k < used - 1 and cdf[k + 1] < q:
            k += 1
        mass = cdf[k + 1] - cdf[k]
        f = (q - cdf[k]) / mass if mass > 0 else float32(0.5)
        t[base + i] = t0 + (float32(k) + min(max(f, float32(0)), _ONE)) * dt
    return True


@njit(**INNER)
def _evaluate(scene, tape, x, y, z, n, slots, share, e):
    """Evaluate n modules at a point into the tape from e on: (density, r, g, b, seen share)."""
    sigma, red, green, blue, known = float32(0), float32(0), float32(0), float32(0), float32(0)
    for j in range(n):
        s = slots[j]
        inverse = _ONE / scene.box[s, 2]
        unit = scene.box[s, 2] * float32(1 / (64 * (1 + 2 * MARGIN)))
        height, seen = surface_at(scene, s, x, y)
        tape.slot[e] = s
        tape.u[e, 0] = (x - scene.box[s, 0]) * inverse
        tape.u[e, 1] = (y - scene.box[s, 1]) * inverse
        tape.u[e, 2] = (z - scene.band[s, 0]) * scene.band[s, 1]
        encode(
            scene.features,
            s * scene.feature_count,
            scene.planes,
            tape.u,
            e,
            (z - height) / unit,
            tape.x,
        )
        mlp(scene.weights, s * MLP_SIZE, tape.x, tape.h1, tape.h2, tape.o, e)
        o = tape.o[e * OUTPUTS : (e + 1) * OUTPUTS]
        own = math.exp(min(max(o[0], float32(-10)), float32(6))) / unit * share[j]
        o[0] = own
        for c in range(1, 4):
            o[c] = _ONE / (_ONE + math.exp(-o[c]))
        sigma += own
        red += own * o[1]
        green += own * o[2]
        blue += own * o[3]
        if seen:
            known += own
        e += 1
    if sigma > 0:
        return sigma, red / sigma, green / sigma, blue / sigma, known / sigma
    return sigma, red, green, blue, known


@njit(**JIT)
def forward(scene, tape, ro, rd, bands, r0, r1, samples, steps, uniform, seed, jitter, reach, e):
    """Render rays r0..r1 (origins ro, unit directions rd, (R, 3)) into the tape.

    `bands` (R, 2) are the lowest and highest z at which each ray may meet a module.

    `samples` per ray after `steps` coarse steps, `uniform` in [0, 1) of them spread evenly,
    `reach` in metres; `e` is the first evaluation row this call may write.
    """
    slots, share = np.empty(MOST, np.int32), np.empty(MOST, np.float32)
    cdf = np.empty(steps + 1, np.float32)
    for r in range(r0, r1):
        tape.used[r] = 0
        tape.left[r] = _ONE
        tape.depth[r] = 0
        tape.known[r] = 0
        for c in range(3):
            tape.rgb[r, c] = 0
        t0, t1 = span(bands, r, ro[r, 2], rd[r, 2], reach)
        if t1 <= t0:
            continue
        dt = (t1 - t0) / float32(steps)
        base = r * samples
        if not draw(
            scene,
            ro,
            rd,
            r,
            t0,
            dt,
            steps,
            uniform,
            _seed(seed, r),
            jitter,
            cdf,
            tape.t,
            base,
            samples,
        ):
            continue
        e = _compose(scene, tape, ro, rd, r, base, samples, t0, dt, slots, share, e)
    return e


@njit(**INNER)
def _compose(scene, tape, ro, rd, r, base, samples, t0, dt, slots, share, e):
    """Evaluate ray r's samples front to back and add them up, until 0.2 % of the light is left."""
    left, red, green, blue = _ONE, float32(0), float32(0), float32(0)
    depth, known = float32(0), float32(0)
    n = 0
    for i in range(base, base + samples):
        t = tape.t[i]
        low = float32(0.5) * (tape.t[i - 1] + t) if i > base else max(t0, t - float32(0.5) * dt)
        last = i + 1 == base + samples
        high = t + float32(0.5) * dt if last else float32(0.5) * (tape.t[i + 1] + t)
        x, y, z = ro[r, 0] + t * rd[r, 0], ro[r, 1] + t * rd[r, 1], ro[r, 2] + t * rd[r, 2]
        m = gate(scene, x, y, slots, share)
        tape.first[i] = e
        sigma, c0, c1, c2, seen = _evaluate(scene, tape, x, y, z, m, slots, share, e)
        e += m
        tape.last[i] = e
        width = max(high - low, float32(1e-3))
        alpha = _ONE - math.exp(-sigma * width)
        w = left * alpha
        tape.width[i], tape.sigma[i], tape.weight[i] = width, sigma, w
        tape.color[i, 0], tape.color[i, 1], tape.color[i, 2] = c0, c1, c2
        red += w * c0
        green += w * c1
        blue += w * c2
        depth += w * t
        known += w * seen
        left *= _ONE - alpha
        n += 1
        if left < 0.002:
            break
    tape.used[r], tape.left[r], tape.depth[r], tape.known[r] = n, left, depth, known
    tape.rgb[r, 0], tape.rgb[r, 1], tape.rgb[r, 2] = red, green, blue
    return e


@njit(**INNER)
def _sample_gradient(tape, i, g0, g1, g2, after, behind):
    """dL/dsigma of sample i: d (T_after c . g - light from behind), and w c . g."""
    along = g0 * tape.color[i, 0] + g1 * tape.color[i, 1] + g2 * tape.color[i, 2]
    return tape.width[i] * (after * along - behind), tape.weight[i] * along


@njit(**INNER)
def _output_gradient(tape, i, e, d_sigma, g0, g1, g2, do):
    """dL/d(MLP outputs) of evaluation e of sample i, through the gate's blend."""
    o = tape.o[e * OUTPUTS : (e + 1) * OUTPUTS]
    share = tape.weight[i] / tape.sigma[i] if tape.sigma[i] > 0 else float32(0)
    d_own = d_sigma + share * (
        g0 * (o[1] - tape.color[i, 0])
        + g1 * (o[2] - tape.color[i, 1])
        + g2 * (o[3] - tape.color[i, 2])
    )
    k = share * o[0]
    do[0] = d_own * o[0]
    do[1] = k * g0 * o[1] * (_ONE - o[1])
    do[2] = k * g1 * o[2] * (_ONE - o[2])
    do[3] = k * g2 * o[3] * (_ONE - o[3])


@njit(**JIT)
def backward(
    scene, tape, transposed, d_rgb, r0, r1, samples, most, seed, grad, d_weights, touched, queue
):  # fmt: skip
    """Add the parameter gradients of rays r0..r1 for dL/drgb `d_rgb` (R, 3).

    Frozen modules (owner -1) get none, and rays whose gradient is zero cost nothing: their texels
    are not queued. A sample of weight w is taken with the chance min(1, `most` w), at most `most`
    of a ray on average, and counts the inverse of its chance: the gradient's mean stays what it
    is (Russian roulette, drawn from `seed`). Returns the number of texels queued.
    """
    do = np.zeros(OUTPUTS, np.float32)
    dx = np.empty(INPUTS, np.float32)
    d1, d2 = np.empty(HIDDEN, np.float32), np.empty(HIDDEN, np.float32)
    zero = np.zeros(HIDDEN, np.float32)
    n = 0
    for r in range(r0, r1):
        g0, g1, g2 = d_rgb[r, 0], d_rgb[r, 1], d_rgb[r, 2]
        if g0 == 0 and g1 == 0 and g2 == 0:
            continue
        after, behind = tape.left[r], float32(0)
        state = _seed(seed, r + _OTHER)
        for back in range(tape.used[r]):
            i = r * samples + tape.used[r] - 1 - back
            d_sigma, lit = _sample_gradient(tape, i, g0, g1, g2, after, behind)
            behind += lit
            after += tape.weight[i]
            if tape.weight[i] < 1e-5 and abs(d_sigma) * tape.sigma[i] < 1e-9:
                continue
            times, chance = _ONE, most * tape.weight[i]
            if chance < 1:
                state = _next(state)
                if _unit(state) >= chance:
                    continue
                times = _ONE / chance
            for e in range(tape.first[i], tape.last[i]):
                row = scene.owner[tape.slot[e]]
                if row < 0:
                    continue
                _output_gradient(
                    tape, i, e, times * d_sigma, times * g0, times * g1, times * g2, do
                )
                mlp_backward(
                    transposed, row * TRANSPOSED_SIZE, d_weights, row * MLP_SIZE,
                    tape.x, tape.h1, tape.h2, e, do, dx, d1, d2, zero,
                )  # fmt: skip
                n = encode_backward(
                    grad, row * scene.feature_count, scene.planes, tape.u, e, dx, touched, queue, n
                )
    return n


@njit(**JIT)
def scores(scene, tape, d_rgb, r0, r1, samples, fisher, sums, q):
    """Per-ray information q_r = g' F^-1 g on the output layer of the module the ray mostly meets.

    g (HIDDEN x 4 and 4 biases) is the ray's gradient summed over its samples before squaring;
    `fisher` (owners, (HIDDEN + 1) * 4) is the damped running diagonal, `sums` gathers g^2 and, in
    its last column, the number of rays. Rays that train nothing get q = 0.
    """
    do = np.zeros(OUTPUTS, np.float32)
    g = np.empty((HIDDEN + 1) * OUTPUTS, np.float32)
    for r in range(r0, r1):
        q[r] = 0
        row, most = -1, float32(0)
        for i in range(r * samples, r * samples + tape.used[r]):
            if tape.weight[i] > most and tape.last[i] > tape.first[i]:
                most, row = tape.weight[i], scene.owner[tape.slot[tape.first[i]]]
        if row < 0:
            continue
        g[:] = 0
        g0, g1, g2 = d_rgb[r, 0], d_rgb[r, 1], d_rgb[r, 2]
        after, behind = tape.left[r], float32(0)
        for back in range(tape.used[r]):
            i = r * samples + tape.used[r] - 1 - back
            d_sigma, lit = _sample_gradient(tape, i, g0, g1, g2, after, behind)
            behind += lit
            after += tape.weight[i]
            for e in range(tape.first[i], tape.last[i]):
                if scene.owner[tape.slot[e]] == row:
                    _output_gradient(tape, i, e, d_sigma, g0, g1, g2, do)
                    outer_o(g, 0, tape.h2, e * HIDDEN, do, 0, HIDDEN)
                    for c in range(4):
                        g[HIDDEN * OUTPUTS + c] += do[c]
        total = float32(0)
        for j in range(HIDDEN + 1):
            for c in range(4):
                square = g[j * OUTPUTS + c] * g[j * OUTPUTS + c]
                total += square / fisher[row, j * 4 + c]
                sums[row, j * 4 + c] += square
        sums[row, (HIDDEN + 1) * 4] += 1
        q[r] = total


@njit(**JIT)
def exact_scores(
    scene, tape, transposed, d_rgb, r0, r1, samples, inverse, sums, rays, met,
    grad, d_weights, touched, queue, q,
):  # fmt: skip
    """Per-ray information q_r = g' F^-1 g over every parameter of the modules that a ray meets.

    g is the ray's whole gradient, summed over its samples before squaring, texels included: that of
    `backward` for the ray alone. `inverse` (owners, features + MLP_SIZE) is 1 / the damped running
    diagonal, `sums` gathers g^2 and `rays` (owners,) how many rays met a module; `met` (owners,)
    tells whether this one did. `grad`, `d_weights`, `touched`, `queue` as in `backward`, zero
    before and after.
    """
    count = scene.feature_count
    for r in range(r0, r1):
        n = backward(
            scene, tape, transposed, d_rgb, r, r + 1, samples, float32(ALL), 0,
            grad, d_weights, touched, queue,
        )  # fmt: skip
        total = float32(0)
        for i in range(n):
            k = queue[i]
            touched[k] = 0
            row = (k * CHANNELS) // count
            at = k * CHANNELS - row * count
            for c in range(CHANNELS):
                square = grad[k * CHANNELS + c] * grad[k * CHANNELS + c]
                grad[k * CHANNELS + c] = float32(0)
                total += square * inverse[row, at + c]
                sums[row, at + c] += square
        for i in range(r * samples, r * samples + tape.used[r]):
            for e in range(tape.first[i], tape.last[i]):
                row = scene.owner[tape.slot[e]]
                if row < 0 or met[row] == r + 1:
                    continue
                met[row] = r + 1
                rays[row] += 1
                for j in range(MLP_SIZE):
                    square = d_weights[row * MLP_SIZE + j] * d_weights[row * MLP_SIZE + j]
                    d_weights[row * MLP_SIZE + j] = float32(0)
                    total += square * inverse[row, count + j]
                    sums[row, count + j] += square
        q[r] = total


__all__ = [
    "ALL",
    "B3",
    "FAR",
    "MARGIN",
    "UNSEEN",
    "W3",
    "Scene",
    "Tape",
    "backward",
    "cell_hash",
    "draw",
    "exact_scores",
    "forward",
    "gate",
    "make_tape",
    "scores",
    "span",
    "surface_at",
]
