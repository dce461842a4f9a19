"""Height sweep, raster interpolation, visibility, paint and exposure on pictures made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mclnf_edge.engine import surface
from tests import blocks
from tests.blocks import Ground

STEP = 0.5
N = 48
CORNER = -0.5 * N * STEP


def pictures(ground: Ground, n: int = 8) -> dict[str, Any]:
    """Pictures of a flight over the ground with all that the kernels need of them."""
    cam, flight = blocks.camera(192, 128), blocks.poses(n)
    images = np.stack([blocks.picture(ground, cam, T) for T in flight])
    half = cam.scaled(cam.width // 2, cam.height // 2)
    return {
        "images": images,
        "half": np.stack([surface.normalised(i) for i in images]),
        "P": np.stack([blocks.projection(cam, T) for T in flight]).astype(np.float32),
        "half_P": np.stack([blocks.projection(half, T) for T in flight]).astype(np.float32),
        "eyes": np.stack([T[:3, 3] for T in flight]).astype(np.float32),
    }


def swept(ground: Ground, seen: dict[str, Any]) -> tuple[Any, Any]:
    """(heights found, true heights) of the columns around the middle."""
    zs = np.linspace(-4, 8, 49, dtype=np.float32)
    found, _ = surface.heights(CORNER, CORNER, STEP, N, zs, seen["half"], seen["half_P"])
    at = CORNER + (np.arange(N) + 0.5) * STEP
    return found, ground.height(*np.meshgrid(at, at))


@pytest.mark.parametrize("level", [-2.0, 1.5])
def test_sweep_finds_a_plane(level: float) -> None:
    ground = Ground(level)
    found, true = swept(ground, pictures(ground))
    assert np.median(np.abs(found - true)) <= 0.25
    assert np.mean(np.abs(found - true) < 0.75) > 0.97


def test_sweep_finds_a_step() -> None:
    ground = Ground(0.0, ((-6, -7, 5, 4, 4.0),))
    found, true = swept(ground, pictures(ground))
    away = np.ones_like(true, bool)  # within a metre of the walls either height is right
    at = CORNER + (np.arange(N) + 0.5) * STEP
    for edges, axis in (((-6, 5), 1), ((-7, 4), 0)):
        for edge in edges:
            near = np.abs(at - edge) < 1
            away &= ~(near[None] if axis == 1 else near[:, None])
    roof = away & (true > 2)
    assert np.mean(np.abs(found - true)[roof] < 0.6) > 0.9
    assert np.mean(np.abs(found - true)[away & (true < 2)] < 0.6) > 0.85


def robust_variance(values: list[float]) -> float:
    """Of what pictures show of a point, as `sweep` defines it."""
    v = np.array(values)
    mean = v.mean()
    for _ in range(2):
        share = 1 / (surface.DOUBT + (v - mean) ** 2)
        mean = (share * v).sum() / share.sum()
    return float(np.minimum((v - mean) ** 2, surface.OCCLUDED).sum() / (len(v) - 1))


def test_one_picture_that_sees_something_else_counts_little() -> None:
    assert robust_variance([0.4, 0.5, 0.6, 0.5, 4.0]) < 0.2 * np.var([0.4, 0.5, 0.6, 0.5, 4.0])
    same = pictures(Ground(), 5)["half"]
    P = pictures(Ground(), 5)["half_P"]
    at = np.zeros((2, 1, 1, 1), np.float32)
    for cost, spoiled in zip(at, (0.0, 9.0), strict=True):
        pics = same.copy()
        pics[2] += spoiled
        surface.sweep(-0.5, -0.5, 1.0, np.zeros(1, np.float32), pics, P, cost)
    assert at[1] - at[0] <= surface.OCCLUDED / 4 + 0.02


def test_a_cost_is_the_robust_variance_of_the_pictures_that_see_the_point() -> None:
    seen = pictures(Ground(), 5)
    P = seen["half_P"].copy()
    P[3] = -P[3]  # looks away: the same pixels from behind its plane
    pics, (h, w) = seen["half"], seen["half"].shape[1:]
    zs = np.linspace(-6, 60, 23, dtype=np.float32)  # up to above the cameras
    cost = np.zeros((9, 9, len(zs)), np.float32)
    surface.sweep(-18.0, -18.0, 4.0, zs, pics, P, cost)
    counts = set()
    for iy, ix, iz in np.ndindex(cost.shape):
        at = np.array([-18 + (ix + 0.5) * 4, -18 + (iy + 0.5) * 4, zs[iz], 1])
        found, edge = [], False
        for one, picture in zip(P.astype(np.float64), pics, strict=True):
            x, y, q = one @ at
            u, v = x / q - 0.5, y / q - 0.5
            sides = [q - surface.NEAREST, u, v, w - 1 - u, h - 1 - v]
            edge |= min(map(abs, sides)) < 1e-3  # where rounding decides
            if min(sides) > 0:
                i, j, a, b = int(u), int(v), u % 1, v % 1
                top = (1 - a) * picture[j, i] + a * picture[j, i + 1]
                low = (1 - a) * picture[j + 1, i] + a * picture[j + 1, i + 1]
                found.append((1 - b) * top + b * low)
        counts.add(len(found))
        true = min(robust_variance(found), surface.MOST) if len(found) > 1 else surface.NO_VIEWS
        assert edge or cost[iy, ix, iz] == pytest.approx(true, abs=2e-3)
    assert counts >= {0, 1, 2, 3, 4}


def test_costs_are_the_same_bits_wherever_arrays_lie() -> None:
    seen, random = pictures(Ground(), 5), np.random.default_rng(0)
    zs = np.linspace(-4, 8, 17, dtype=np.float32)
    found, kept = set(), []
    for _ in range(12):
        kept.append(np.zeros(random.integers(1, 9000), np.uint8))  # moves what comes after it
        cost = np.empty((9, 9, len(zs)), np.float32)
        surface.sweep(-18.0, -18.0, 4.0, zs, seen["half"], seen["half_P"], cost)
        total = surface.smooth(cost, np.float32(0.1), np.float32(0.5))
        found.add((cost.tobytes(), total.tobytes()))
    assert len(found) == 1


def test_points_that_fewer_than_two_pictures_see_cost_the_most() -> None:
    seen = pictures(Ground())
    cost = np.zeros((2, 2, 3), np.float32)
    zs = np.array([-1, 0, 1], np.float32)
    surface.sweep(500.0, 500.0, 1.0, zs, seen["half"], seen["half_P"], cost)
    assert (cost == surface.NO_VIEWS).all()
    surface.sweep(0.0, 0.0, 1.0, zs, seen["half"][:1], seen["half_P"][:1], cost)
    assert (cost == surface.NO_VIEWS).all()


def test_smoothing_takes_the_cheapest_path() -> None:
    """Against the recursion of semi-global matching, written out in float64."""
    cost = np.random.default_rng(0).uniform(0, 1, (5, 6, 4)).astype(np.float32)
    small, large = 0.1, 0.5
    ny, nx, nz = cost.shape
    want = np.zeros(cost.shape)
    for dy, dx in [(j, i) for j in (-1, 0, 1) for i in (-1, 0, 1) if (j, i) != (0, 0)]:
        path = np.full((ny + 2, nx + 2, nz), np.nan)  # with a border that no path comes from
        for iy in range(ny)[:: -1 if dy < 0 else 1]:
            for ix in range(nx)[:: -1 if dx < 0 else 1]:
                b = path[1 + iy - dy, 1 + ix - dx]
                now = cost[iy, ix].astype(np.float64)
                if not np.isnan(b).any():
                    up, down = np.append(np.inf, b[:-1]) + small, np.append(b[1:], np.inf) + small
                    now += np.minimum.reduce([b, up, down, np.full(nz, b.min() + large)]) - b.min()
                path[1 + iy, 1 + ix] = now
        want += path[1:-1, 1:-1]
    out = surface.smooth(cost, np.float32(small), np.float32(large))
    assert np.allclose(out, want, atol=1e-5)


def test_raster_is_bilinear() -> None:
    random = np.random.default_rng(1)
    raster = random.normal(0, 1, (7, 9)).astype(np.float32)
    slope = np.fromfunction(lambda j, i: 2 * i - 3 * j + 1, (7, 9), dtype=np.float32)
    for x, y in random.uniform((1.25, 3.25), (5.0, 6.0), (50, 2)):
        at = surface.raster_at(slope.astype(np.float32), 1.0, 3.0, 2.0, x, y)
        assert at == pytest.approx(2 * ((x - 1) * 2 - 0.5) - 3 * ((y - 3) * 2 - 0.5) + 1, abs=1e-4)
    nodes = [
        surface.raster_at(raster, 1.0, 3.0, 2.0, 1 + (i + 0.5) / 2, 3 + (j + 0.5) / 2)
        for j in range(6)
        for i in range(8)
    ]
    assert np.allclose(nodes, raster[:6, :8].ravel(), atol=1e-4)
    assert surface.raster_at(raster, 1.0, 3.0, 2.0, -99.0, -99.0) == pytest.approx(raster[0, 0])


def true_raster(ground: Ground) -> tuple[Any, tuple[float, float, float]]:
    """A raster of the ground's own heights and (x0, y0, 1 / step)."""
    at = CORNER + (np.arange(N) + 0.5) * STEP
    raster = ground.height(*np.meshgrid(at, at)).astype(np.float32)
    return raster, (np.float32(CORNER), np.float32(CORNER), np.float32(1 / STEP))


def test_visibility_is_what_rays_meet() -> None:
    ground = Ground(0.0, ((-3, -8, 3, 8, 15.0),))
    seen = pictures(ground, 4)
    slimmer = Ground(0.0, ((-2.3, -7.3, 2.3, 7.3, 14.0),))  # what it hides is hidden for sure
    raster, grid = true_raster(ground)
    xs = ys = np.linspace(-10.1, 9.9, 20).astype(np.float32)
    n = len(seen["images"])
    found = np.zeros((n, 20, 20), np.uint8)
    masks = np.full(seen["images"].shape[:3], 255, np.uint8)
    masks[:, :10] = 0
    lowest = np.float32(-99)  # no place but those that the picture shows
    surface.visibility(xs, ys, raster, *grid, np.float32(STEP), lowest, masks, seen["P"],
                       seen["eyes"], found)  # fmt: skip
    x, y = (v.ravel().astype(np.float64) for v in np.meshgrid(xs, ys))
    wall = (np.abs(np.abs(x) - 3) < 1.7) | (np.abs(np.abs(y) - 8) < 1.7)
    points = np.column_stack([x, y, ground.height(x, y)])
    hidden: list[bool] = []
    for i in range(n):
        eye = seen["eyes"][i].astype(np.float64)
        away = points - eye
        distance = np.linalg.norm(away, axis=1)
        free = ground.cast(eye, away / distance[:, None])[1] > distance - 0.05
        q = np.column_stack([points, np.ones(len(x))]) @ seen["P"][i].astype(np.float64).T
        u, v = q[:, 0] / q[:, 2], q[:, 1] / q[:, 2]
        inside = (u > 1) & (v > 11) & (u < 190) & (v < 126)
        outside = (u < 0) | (v < 9) | (u > 192) | (v > 128)
        hit = found[i].ravel() > 0
        assert not hit[outside].any(), "seen through the mask or beside the picture"
        assert np.mean(hit[inside & ~wall & free]) > 0.95
        behind = slimmer.cast(eye, away / distance[:, None])[1] < distance - 0.05
        hidden += hit[inside & ~wall & behind].tolist()
    assert len(hidden) > 50 and np.mean(hidden) < 0.05


def test_a_place_is_surely_seen_only_if_higher_ground_there_were_inside_too() -> None:
    """Against points projected one by one, at the ground and 3 m above it."""
    seen = pictures(Ground(0.0))
    raster, grid = true_raster(Ground(0.0))
    xs = ys = np.linspace(-10.1, 9.9, 20).astype(np.float32)
    masks = np.full(seen["images"].shape[:3], 255, np.uint8)
    n, h, w = masks.shape
    found = np.zeros((2, n, 20, 20), np.uint8)
    for k, highest in enumerate((-99.0, 3.0)):
        surface.visibility(xs, ys, raster, *grid, np.float32(STEP), np.float32(highest), masks,
                           seen["P"], seen["eyes"], found[k])  # fmt: skip
    x, y = (v.ravel().astype(np.float64) for v in np.meshgrid(xs, ys))
    q = np.stack([x, y, 0 * x + 3, 0 * x + 1]).T @ seen["P"].astype(np.float64).transpose(0, 2, 1)
    u, v = q[..., 0] / q[..., 2] - 0.5, q[..., 1] / q[..., 2] - 0.5
    inside = ((q[..., 2] > 0) & (u >= 0) & (v >= 0) & (u < w - 1) & (v < h - 1)).reshape(n, 20, 20)
    assert ((found[0] > 0) == (found[1] > 0)).all() and (found[0] != 1).all()
    assert ((found[1] == 2) == (found[0] > 0) & inside).mean() > 0.999
    assert 0.02 < np.mean(found[1] == 1) < 0.9


def test_a_place_is_known_to_those_who_see_it_surely_or_to_three_who_agree() -> None:
    seen = np.array([[0, 1, 1, 1, 2], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], np.uint8)[:, None]
    count, which = surface.count_views(seen)
    assert count.tolist() == [[0, 0, 0, 3, 1]]
    assert which[:, 0].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_paint_is_the_exposure_corrected_texture() -> None:
    ground = Ground(0.0)
    seen = pictures(ground)
    gains = np.random.default_rng(2).uniform(0.7, 1.05, (8, 3)).astype(np.float32)
    images = (seen["images"] * gains[:, None, None]).round().clip(0, 255).astype(np.uint8)
    raster, grid = true_raster(ground)
    xs = ys = np.linspace(-8, 8, 33).astype(np.float32)
    color = np.zeros((33, 33, 3), np.float32)
    all_seen = np.ones((8, 5, 5), np.uint8)
    surface.paint(xs, ys, raster, *grid, all_seen, images, seen["P"], gains, color)
    x, y = (v.ravel().astype(np.float64) for v in np.meshgrid(xs, ys))
    down = np.tile([0.0, 0.0, -1.0], (len(x), 1))
    true = np.stack([ground.cast(np.array([a, b, 5.0]), d[None])[0][0]
                     for a, b, d in zip(x, y, down, strict=True)]).reshape(33, 33, 3)  # fmt: skip
    assert np.sqrt(np.mean((color - true) ** 2)) < 0.04
    assert true.std() > 0.1
    surface.paint(xs, ys, raster, *grid, 0 * all_seen, images, seen["P"], gains, color)
    assert np.allclose(color, 0.45), "where nobody looked the colour is neutral"


def test_gains_are_recovered() -> None:
    ground = Ground(0.0)
    seen = pictures(ground)
    truth = np.random.default_rng(3).uniform(-0.3, 0.05, (8, 3))
    truth -= truth.mean(0)
    images = (seen["images"] * 0.8 * np.exp(truth)[:, None, None]).round().clip(0, 255)
    raster, grid = true_raster(ground)
    xy = np.random.default_rng(4).uniform(-10, 10, (2000, 2)).astype(np.float32)
    values = np.full((2000, 8, 3), -1, np.float32)
    surface.observe(xy[:, 0], xy[:, 1], raster, *grid, np.float32(STEP), images.astype(np.uint8),
                    seen["P"], seen["eyes"], values)  # fmt: skip
    none = np.zeros(8, bool)
    start = np.zeros((8, 3), np.float32)
    assert np.abs(surface.fit_gains(values, none, start) - truth).max() < 0.03
    fixed = none.copy()
    fixed[2] = True
    start[2] = 0.1
    anchored = surface.fit_gains(values, fixed, start)
    assert np.array_equal(anchored[2], start[2]), "a fixed picture keeps its gain"
    assert np.abs((anchored - anchored[2]) - (truth - truth[2])).max() < 0.05


def test_density_is_solid_up_to_a_unit_above_the_surface() -> None:
    ground = Ground(0.0, ((-4, -4, 4, 4, 3.0),))
    raster, grid = true_raster(ground)
    voxels, unit = (8, 10, 6), 0.75
    density = np.zeros(8 * 10 * 6, np.float32)
    surface.fill_density(density, voxels, -10.0, -10.0, 20.0, -1.0, 6.0, raster, *grid, unit, 2.0,
                         0.25)  # fmt: skip
    grid3 = density.reshape(10, 8, 6)
    x = -10 + (np.arange(8) + 0.5) / 8 * 20
    y = -10 + (np.arange(10) + 0.5) / 10 * 20
    z = -1 + (np.arange(6) + 0.5)
    top = ground.height(*np.meshgrid(x, y))
    want = np.where(z - top[..., None] < unit, 2.0, 0.25)
    assert np.mean(grid3 == want) > 0.97  # the raster is bilinear, the blocks' walls are not
    assert set(np.unique(density)) == {np.float32(2.0), np.float32(0.25)}


def test_nothing_is_read_beyond_the_last_picture() -> None:
    size, step = 20, np.nextafter(np.float32(1), np.float32(0))
    memory = np.full((3, size, size), np.nan, np.float32)  # the third is what lies beyond
    memory[:2] = np.random.default_rng(0).random((size, size))
    # both rows see x and y as they are; a place just before the last pixel, which float32 rounds up
    P = np.tile(np.array([[1, 0, 0, 0.5], [0, 1, 0, 0.5], [0, 0, 0, 1]], np.float32), (2, 1, 1))
    cost = np.empty((1, 1, 1), np.float32)
    corner = np.float32(size - 1) - np.float32(0.5)
    surface.sweep(np.float32(3), corner, step, np.zeros(1, np.float32), memory[:2], P, cost)
    assert cost[0, 0, 0] == 0
