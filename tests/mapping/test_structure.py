"""Points, ground, cells of rays and height rasters from the stream alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mclnf_edge.config import MapConfig
from mclnf_edge.engine.volume import FAR
from mclnf_edge.images import encode_image
from mclnf_edge.mapping.frames import TILE, HeldFrame, depth_points, hold, triangulate
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.structure import RASTER, Structure, auto_cell
from tests import blocks
from tests.blocks import Ground
from tests.mapping import flights

HEIGHT = 30.0


def held(ground: Ground, T: Any, i: int, width: int = 320, height: int = 240) -> HeldFrame:
    """A picture of the ground as the mapper holds it; the local origin is the world's."""
    cam = blocks.camera(width, height)
    image = blocks.picture(ground, cam, T)
    return HeldFrame(
        i, "s", i, float(i), image, np.full(image.shape[:2], 255, np.uint8),
        (cam.fx, cam.fy, cam.cx, cam.cy), T[:3, :3].astype(np.float32),
        T[:3, 3].astype(np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def ground() -> Ground:
    """Ground with one block, far from zero height."""
    return Ground(-155.0, ((-6, -7, 5, 4, 4.0),))


@pytest.fixture(scope="module")
def frames(ground: Ground) -> list[HeldFrame]:
    return [held(ground, T, i) for i, T in enumerate(blocks.poses(4, HEIGHT - 155.0, step=4.0))]


@pytest.fixture(scope="module")
def structure(frames: list[HeldFrame]) -> Structure:
    """Points of all frames, nothing else given."""
    out = Structure(20.0)
    for i, f in enumerate(frames):
        out.add_frame(f, frames[:i], None)
    return out


# -- frames -----------------------------------------------------------------------------------


def test_projection_is_the_cameras(frames: list[HeldFrame]) -> None:
    cam = blocks.camera(320, 240)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = frames[1].rotation, frames[1].eye
    wanted = blocks.projection(cam, T)
    assert np.allclose(frames[1].projection(), wanted, rtol=1e-3, atol=1e-2)
    half = blocks.projection(cam.scaled(160, 120), T)
    assert np.allclose(frames[1].projection(0.5), half, rtol=1e-3, atol=1e-2)


def test_directions_go_through_their_pixels(frames: list[HeldFrame]) -> None:
    f = frames[2]
    pixels = np.random.default_rng(0).uniform((0, 0), (320, 240), (50, 2)).astype(np.float32)
    d = f.directions(pixels[:, 0], pixels[:, 1])
    assert np.allclose(np.linalg.norm(d, axis=1), 1, atol=1e-5)
    q = np.column_stack([f.eye + 20 * d, np.ones(50)]) @ f.projection().T
    assert np.all(q[:, 2] > 0) and np.allclose(q[:, :2] / q[:, 2:], pixels, atol=0.02)


def test_tile_directions_are_those_of_the_tiles_centres(frames: list[HeldFrame]) -> None:
    d, (across, down) = frames[0].tile_directions()
    assert (across, down) == (320 // TILE, 240 // TILE) and len(d) == across * down
    q = np.column_stack([frames[0].eye + d, np.ones(len(d))]) @ frames[0].projection().T
    uv = (q[:, :2] / q[:, 2:]).reshape(down, across, 2)
    assert np.allclose(uv[3, 5], (5.5 * TILE, 3.5 * TILE), atol=0.02)


# -- points -----------------------------------------------------------------------------------


def test_triangulated_points_lie_on_the_ground(ground: Ground, frames: list[HeldFrame]) -> None:
    points = triangulate(frames[0], frames[1]).astype(np.float64)
    assert len(points) > 40
    error = points[:, 2] - ground.height(points[:, 0], points[:, 1])
    # One pixel of disparity is 0.7 m of height here: 30 m away, 4 m apart.
    assert abs(np.median(error)) < 0.15 and np.median(np.abs(error)) < 0.4
    assert np.mean(np.abs(error) < 1.2) > 0.85
    roof = (np.abs(points[:, 0] + 0.5) < 5) & (np.abs(points[:, 1] + 1.5) < 5)
    assert np.median(points[roof, 2]) == pytest.approx(-151, abs=0.2)


def test_no_points_without_parallax(ground: Ground, frames: list[HeldFrame]) -> None:
    assert len(triangulate(frames[0], frames[0])) == 0
    hover = replace(frames[0], eye=frames[0].eye + np.float32([0.01, 0, 0]))
    s = Structure(20.0)
    s.add_frame(hover, [frames[0]], None)
    assert len(s.points) == 0


def test_ground_and_band_hold_the_surface(structure: Structure, frames: list[HeldFrame]) -> None:
    for f in frames:
        assert structure.ground(f) == pytest.approx(-155, abs=4.1)
    low, high = structure.band((0, 0, 0), HEIGHT)
    assert -160 < low < -155 and -151 < high < -145


def test_height_above_ground_stands_in_for_parallax(frames: list[HeldFrame]) -> None:
    s = Structure(20.0)
    s.add_frame(frames[0], [], 30.0)
    assert s.ground(frames[0]) == pytest.approx(-155, abs=0.1)
    low, high = s.band((0, 0, 0), HEIGHT)
    assert low < -155 < high


def test_depth_pictures_stand_in_for_parallax(ground: Ground) -> None:
    """Also of large pictures, which are held smaller, and of cameras that bend rays."""
    for cam in (
        blocks.camera(320, 240),
        blocks.camera(1920, 1440),
        replace(blocks.camera(320, 240), model="OPENCV", distortion=(0.02, 0.0, 0.0, 0.0)),
    ):
        T = blocks.pose(40.0, 30.0, HEIGHT - 155.0)
        units = np.full((cam.height, cam.width), 3000, np.uint16)  # 30 m in centimetres
        units[: cam.height // 4] = 0  # unknown
        pixels = np.full((cam.height, cam.width, 3), 90, np.uint8)
        frame = replace(
            blocks.frame(cam, T, pixels, 0), depth=encode_image(units, "png"), depth_scale_m=0.01
        )
        one = hold(0, "s", frame, 0, np.zeros(3), "")
        points = depth_points(frame, one)
        assert 150 < len(points) <= 192 and np.allclose(points[:, 2], HEIGHT - 185.0, atol=0.01)
        q = np.column_stack([points, np.ones(len(points))]) @ one.projection().T
        inside = q[:, :2] / q[:, 2:] / one.size
        assert inside.min() > 0 and inside.max() < 1 and (inside[:, 1] > 0.22).all()
        s = Structure(20.0)
        s.add_frame(one, [], None, points)
        assert s.ground(one) == pytest.approx(HEIGHT - 185.0, abs=0.1)
    assert len(depth_points(replace(frame, depth=None), one)) == 0


# -- cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [15.0, 60.0])
def test_auto_cell_is_three_quarters_of_a_footprint(height: float) -> None:
    ground = Ground(-20.0)
    flight = [
        held(ground, T, i) for i, T in enumerate(blocks.poses(3, height - 20, step=0.2 * height))
    ]
    s = Structure(1.0)
    for i, f in enumerate(flight):
        s.add_frame(f, flight[:i], None)
    footprint = height * 1.1 * np.sqrt(240 / 320)
    assert auto_cell(s, flight) == pytest.approx(0.75 * footprint, rel=0.05)


def test_tiles_belong_to_the_cell_their_ray_meets(
    ground: Ground, frames: list[HeldFrame], structure: Structure
) -> None:
    worth = structure.assign(frames, set())
    checked = 0
    for f in frames:
        d, _ = f.tile_directions()
        t = ground.cast(f.eye.astype(np.float64), d.astype(np.float64))[1]
        met = f.eye[:2] + t[:, None] * d[:, :2]
        owners: list[int] = []
        for (level, ix, iy), tiles in f.tiles.items():
            assert (level, ix, iy) in worth
            owners += tiles.tolist()
            edge = structure.cell_m * (FAR if level else 1)
            low = np.array([ix, iy]) * edge
            inside = (met[tiles] > low - 3) & (met[tiles] < low + edge + 3)
            assert inside.all()
            checked += len(tiles)
        assert len(owners) == len(set(owners)), "a tile belongs to one cell"
    assert checked > 0.9 * len(frames) * 300
    assert len({c for c in worth if c[0] == 0}) >= 4


def test_closed_cells_keep_their_tiles_and_rare_ones_get_no_module(
    frames: list[HeldFrame], structure: Structure
) -> None:
    first = structure.assign(frames[:1], set())
    few = min(first, key=lambda c: len(frames[0].tiles[c]))
    assert all(len(frames[0].tiles.get(c, ())) >= 12 for c in first)
    again = structure.assign(frames[:1], {few, (0, 50, 50)})
    assert few in again and (0, 50, 50) in again
    structure.assign(frames, set())


def test_only_frames_whose_ground_changed_are_assigned_anew(
    frames: list[HeldFrame], structure: Structure
) -> None:
    """What is kept between calls changes nothing: a fresh structure gives every frame the same."""
    structure.assign(frames[:-1], set())
    before = dict(structure.footprints)
    met = Counter(cell for known in before.values() for cell in known.met)
    cell, views = met.most_common()[-1]
    assert 0 < views < len(before)
    structure.rasters[cell] = np.full((RASTER, RASTER), -151, np.float32)
    structure.assign(frames, set())
    kept = {i for i, known in before.items() if structure.footprints[i] is known}
    assert kept == {i for i, known in before.items() if cell not in known.met}
    fresh = Structure(structure.cell_m, points=structure.points, rasters=structure.rasters)
    found = [f.tiles for f in frames]
    fresh.assign(frames, set())
    for old, f in zip(found, frames, strict=True):
        assert old.keys() == f.tiles.keys()
        assert all(np.array_equal(old[c], f.tiles[c]) for c in f.tiles)
    del structure.rasters[cell]


def test_ground_is_the_median_of_the_nearest_points_however_they_are_found(
    frames: list[HeldFrame],
) -> None:
    random = np.random.default_rng(3)
    s = Structure(20.0)
    for n in (40, 900, 30, 400, 5000, 10):
        cloud = random.normal(size=(n, 3)) * (40, 40, 3) + (0, 0, -155)
        s.points = np.concatenate([s.points, cloud.astype(np.float32)])
        away = np.linalg.norm(s.points[:, :2] - frames[0].eye[:2], axis=1)
        nearest = s.points[np.argsort(away)[:200], 2]
        assert s.ground(frames[0]) == pytest.approx(float(np.median(nearest)), abs=1e-5)


def test_rays_above_the_horizon_belong_to_no_cell(ground: Ground, structure: Structure) -> None:
    up = held(ground, blocks.pose(0, 0, HEIGHT - 155), 0)
    up = replace(up, rotation=(up.rotation @ np.diag([1, -1, -1])).astype(np.float32))
    structure.assign([up], set())
    assert up.tiles == {}


def test_sweep_finds_the_cells_surface(
    ground: Ground, frames: list[HeldFrame], structure: Structure
) -> None:
    structure.assign(frames, set())
    cell = (0, 0, 0)
    low, high = structure.sweep(cell, [f for f in frames if cell in f.tiles], -158, -148)
    raster = structure.rasters[cell]
    step = structure.cell_m / len(raster)
    at = (np.arange(len(raster)) + 0.5) * step
    true = ground.height(*np.meshgrid(at, at))
    seen = np.s_[:32, :32]  # the part that most frames see
    assert np.mean(np.abs(raster - true)[seen] < 1) > 0.8
    assert low < raster.min() and raster.max() < high
    assert np.mean(np.abs(structure.height_at(np.float32([[1, 1], [2, 3]]), np.zeros(2)) + 151)) < 1
    del structure.rasters[cell]


# -- nothing but the stream -------------------------------------------------------------------


def test_frames_alone_are_enough() -> None:
    """Neither height above ground nor bounds: cell size, band and surface come from pictures."""
    flight = flights.flight(6, 240, 180)
    alone = [replace(f, height_m=None) for f in flight.frames]
    m = Mapper(MapConfig(), flights.FIELD, flights.ADAPT, flights.INIT, 1)
    for i, f in enumerate(alone):
        m.add(i, flights.STREAM, f)
    m.settle()
    assert m.pool is not None
    assert m.pool.cell_m == pytest.approx(0.75 * 30 * 1.1 * np.sqrt(180 / 240), rel=0.12)
    origin = float(m.origins[0][2])
    for module in m.modules.values():
        low, inverse = m.pool.band[module.slot]
        assert origin + low < 0 and origin + low + 1 / inverse < 15
    assert flights.score(m, flight) > flight.mean_psnr() + 5


def test_cells_that_were_not_swept_say_nothing_of_how_high_the_ground_is() -> None:
    slope = np.linspace(0, 30, RASTER**2, dtype=np.float32).reshape(RASTER, RASTER)
    alone = Structure(10.0, rasters={(0, 0, 0): slope, (0, 2, 0): slope + 500})
    assert alone._high_ground((0, 0, 0)) == pytest.approx(29.7, abs=0.01)
    beside = Structure(10.0, rasters={(0, 0, 0): slope, (0, 1, -1): slope + 100})
    assert beside._high_ground((0, 0, 0)) > 129
