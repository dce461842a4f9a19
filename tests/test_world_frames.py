"""World frames: known places, and poses that go from one frame to another and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyproj
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import check_pose, nearest_rotation, pose_from, project
from mclnf_edge.types import Camera, Matrix4, WorldFrame
from mclnf_edge.world_frames import (
    anchor,
    beginning_at,
    check_world,
    conversion,
    ecef_from_enu,
    ecef_from_geodetic,
    founding,
    parse_world,
)


def motion(source: WorldFrame, target: WorldFrame) -> Matrix4:
    """`T_target_source` of two frames that a rigid motion turns into each other."""
    return conversion(source, target)(np.eye(4))


def test_ecef_of_known_places() -> None:
    """Equator and pole: the two half axes a and b = a(1 − f) of WGS84."""
    assert np.allclose(ecef_from_geodetic(0, 0, 10), [6_378_147.0, 0, 0])
    assert np.allclose(ecef_from_geodetic(0, 90, 0), [0, 6_378_137.0, 0], atol=1e-6)
    assert np.allclose(ecef_from_geodetic(90, 0, 0), [0, 0, 6_356_752.314245], atol=1e-5)


def test_enu_axes_at_the_equator() -> None:
    """At latitude 0, longitude 0: east is +y, north +z, up +x of ECEF."""
    rotation = ecef_from_enu(0, 0, 0)[:3, :3]
    assert np.allclose(rotation, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def test_origin_moved_north_by_a_known_arc() -> None:
    """At the equator one arc second of latitude is M·π/648000 with M = a(1 − e²): 30.715 m."""
    source, target = WorldFrame(origin=(1 / 3600, 20.0, 50.0)), WorldFrame(origin=(0.0, 20.0, 50.0))
    shift = motion(source, target)[:3, 3]
    meridian_radius = 6_378_137.0 * (1 - 0.00669437999014)
    assert shift[1] == pytest.approx((meridian_radius + 50) * np.pi / 648_000, abs=1e-4)
    assert shift[0] == pytest.approx(0.0, abs=1e-8)
    assert shift[2] == pytest.approx(-(shift[1] ** 2) / (2 * 6.37e6), abs=1e-4)


def test_origin_moved_up_only() -> None:
    low, high = WorldFrame(origin=(52.2, 20.97, 100.0)), WorldFrame(origin=(52.2, 20.97, 130.0))
    assert np.allclose(motion(high, low), pose_from(np.eye(3), [0, 0, 30]), atol=1e-8)


ORIGINS = st.tuples(st.floats(-89, 89), st.floats(-180, 180), st.floats(-400, 9000))


@given(ORIGINS, ORIGINS, ORIGINS)
def test_local_frames_convert_consistently(a: tuple, b: tuple, c: tuple) -> None:
    """Over a third frame and back again nothing moves, within a micrometre."""
    fa, fb, fc = WorldFrame(origin=a), WorldFrame(origin=b), WorldFrame(origin=c)
    over = motion(fb, fc) @ motion(fa, fb)
    assert np.allclose(over, motion(fa, fc), atol=1e-6)
    there_and_back = motion(fb, fa) @ motion(fa, fb)
    assert np.allclose(there_and_back, np.eye(4), atol=1e-6)


def test_epsg_origins_differ_by_subtraction() -> None:
    source = WorldFrame("EPSG:2180", (500_000.0, 490_000.0, 100.0))
    target = WorldFrame("EPSG:2180", (499_900.0, 490_050.0, 90.0))
    shift = motion(source, target)
    assert np.array_equal(shift, pose_from(np.eye(3), [100.0, -50.0, 10.0]))
    full = motion(WorldFrame("EPSG:2180"), target)
    assert full[:3, 3].tolist() == [-499_900.0, -490_050.0, -90.0]


def test_anonymous_frames_are_one() -> None:
    assert np.array_equal(motion(WorldFrame(), WorldFrame()), np.eye(4))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (WorldFrame(), WorldFrame(origin=(52.0, 21.0, 0.0))),
        (WorldFrame(origin=(52.0, 21.0, 0.0)), WorldFrame()),
        (WorldFrame("EPSG:2180"), WorldFrame()),
        (WorldFrame(), WorldFrame("EPSG:32633", (5e5, 5.8e6, 0.0))),
        (WorldFrame("EPSG:4979"), WorldFrame()),
    ],
)
def test_unconvertible_frames_are_refused(source: WorldFrame, target: WorldFrame) -> None:
    with pytest.raises(FrameRejected, match="cannot convert"):
        motion(source, target)


@pytest.mark.parametrize(
    "world",
    [
        WorldFrame("utm"),
        WorldFrame("EPSG:"),
        WorldFrame("EPSG:2180; x"),
        WorldFrame("EPSG:4326", (91.0, 0.0, 0.0)),
        WorldFrame(origin=(91.0, 0.0, 0.0)),
        WorldFrame(origin=(0.0, float("nan"), 0.0)),
        WorldFrame("EPSG:2180", (float("inf"), 0.0, 0.0)),
        WorldFrame("EPSG:2180", (1.0, 2.0)),  # type: ignore[arg-type]
    ],
)
def test_unknown_frames_are_refused(world: WorldFrame) -> None:
    with pytest.raises(FrameRejected, match="world frame"):
        check_world(world)


# --- frames of different kind ------------------------------------------------------------------

ORIGIN = (52.2, 15.9, 120.0)
MAP = WorldFrame("local-enu", ORIGIN)
UTM = WorldFrame("EPSG:32633")
UTM_CENTRAL_DEG = 15.0
CAMERA = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
DOWN = np.eye(3)  # opengl axes: looks along -z


def turned(rng: np.random.Generator) -> np.ndarray:
    """A camera looking down, tilted by up to some degrees, at any heading."""
    yaw, (a, b) = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.1, 2)
    heading = [[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]]
    return np.array(heading) @ nearest_rotation(np.array([[1, 0, a], [0, 1, b], [-a, -b, 1.0]]))


def flight(seed: int, count: int = 8) -> list[Matrix4]:
    """Poses in MAP, within 1 km of its origin, 80 to 140 m above it."""
    rng = np.random.default_rng(seed)
    return [
        pose_from(turned(rng), [*rng.uniform(-1000, 1000, 2), rng.uniform(80, 140)])
        for _ in range(count)
    ]


def as_geographic(pose: Matrix4) -> Matrix4:
    """The pose in EPSG:4979, without `conversion`: geodetic position, ENU axes there."""
    T_ecef_map = ecef_from_enu(*ORIGIN)
    to_geodetic = pyproj.Transformer.from_crs("EPSG:4978", "EPSG:4979")
    place = to_geodetic.transform(*(T_ecef_map @ pose)[:3, 3])
    r_enu_ecef = ecef_from_enu(*place)[:3, :3].T
    return pose_from(r_enu_ecef @ (T_ecef_map @ pose)[:3, :3], place)


def as_utm(pose: Matrix4) -> Matrix4:
    """The pose in UTM, without `conversion`: turned by the meridian convergence of the grid.

    tan γ = tan(λ − λ0) sin φ is exact on a sphere, here to 1e-8 rad; grid north lies γ east of
    north (Snyder, Map Projections, 1987, eq. 8-9 to second order).
    """
    geographic = as_geographic(pose)
    latitude, longitude, height = geographic[:3, 3]
    lean = math.tan(math.radians(longitude - UTM_CENTRAL_DEG)) * math.sin(math.radians(latitude))
    c, s = math.cos(math.atan(lean)), math.sin(math.atan(lean))
    r_grid_enu = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    east, north = pyproj.Proj("EPSG:32633")(longitude, latitude)
    return pose_from(r_grid_enu @ geographic[:3, :3], [east, north, height])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (UTM, as_utm),
        (WorldFrame("EPSG:4979"), as_geographic),
        (WorldFrame("EPSG:4326"), as_geographic),
        (WorldFrame("EPSG:4978"), lambda pose: ecef_from_enu(*ORIGIN) @ pose),
    ],
    ids=lambda value: value.crs if isinstance(value, WorldFrame) else "",
)
def test_poses_told_in_another_frame_arrive_where_they_were(
    source: WorldFrame, told: Callable[[Matrix4], Matrix4]
) -> None:
    convert = conversion(source, MAP)
    for pose in flight(1):
        there = check_pose(convert(told(pose)))
        assert np.abs(there[:3, 3] - pose[:3, 3]).max() < 1e-4, "0.1 mm"
        assert np.abs(there[:3, :3] - pose[:3, :3]).max() < 1e-7, "0.1 microradian"


def test_the_grid_turns_a_camera_by_its_convergence() -> None:
    """0.9 degrees east of the central meridian at 52.2 degrees: 0.711 degrees."""
    north_up = conversion(MAP, UTM)(np.eye(4))
    turn = math.degrees(math.atan2(north_up[1, 0], north_up[0, 0]))
    assert turn == pytest.approx(0.9 * math.sin(math.radians(52.2)), abs=2e-4)
    assert conversion(UTM, MAP)(north_up)[:3, :3] == pytest.approx(np.eye(3), abs=1e-9)


def test_the_axes_of_distant_places_are_tilted_by_the_earths_curvature() -> None:
    """2 km east of the origin "up" leans east by 2000 / (N + h) = 0.313 mrad."""
    place = conversion(MAP, UTM)(pose_from(np.eye(3), [2000.0, 0.0, 0.0]))
    level = pose_from(as_utm(np.eye(4))[:3, :3], place[:3, 3])
    lean = conversion(UTM, MAP)(level)[0, 2]
    n = 6_378_137.0 / math.sqrt(1 - 0.00669437999014 * math.sin(math.radians(52.2)) ** 2)
    assert lean == pytest.approx(2000.0 / (n + 120.0), rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        UTM,
        WorldFrame("EPSG:32633", (560_000.0, 5_780_000.0, 100.0)),
        WorldFrame("EPSG:2180"),
        WorldFrame("EPSG:3035"),
        WorldFrame("EPSG:31468"),
        WorldFrame("EPSG:4978"),
        WorldFrame(origin=(52.21, 15.92, 60.0)),
    ],
    ids=lambda world: world.crs,
)
def test_there_and_back_nothing_moves(other: WorldFrame) -> None:
    away, back = conversion(MAP, other), conversion(other, MAP)
    for pose in [pose_from(DOWN, [0, 0, 50]), pose_from(DOWN, [2000, 0, 50]), *flight(2)]:
        again = back(check_pose(away(pose)))
        assert np.linalg.norm(again[:3, 3] - pose[:3, 3]) < 1e-3, "1 mm over 2 km"
        assert np.abs(again[:3, :3] - pose[:3, :3]).max() < 1e-6


def test_the_grids_scale_is_in_positions() -> None:
    """2 km in the middle of a UTM zone measure 1999.2 m in the grid."""
    middle = WorldFrame("local-enu", (52.2, 15.0, 0.0))
    ends = [conversion(middle, UTM)(pose_from(DOWN, [x, 0, 0]))[:3, 3] for x in (-1000, 1000)]
    assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(1999.2, abs=0.01)


def test_frames_of_the_same_place_agree_over_a_third() -> None:
    """UTM zones 33 and 34 and the Polish grid tell the same pose."""
    zone34, poland = WorldFrame("EPSG:32634"), WorldFrame("EPSG:2180", (2e5, 4.9e5, 0.0))
    for pose in flight(3):
        direct = conversion(MAP, poland)(pose)
        over = conversion(zone34, poland)(conversion(UTM, zone34)(as_utm(pose)))
        assert np.abs(direct[:3, 3] - over[:3, 3]).max() < 1e-3
        assert np.abs(direct[:3, :3] - over[:3, :3]).max() < 2e-5, "grids stretch unevenly"


def triangulated(poses: list[Matrix4], pixels: list[np.ndarray]) -> np.ndarray:
    """The point (3,) nearest to the rays through one pixel of each camera."""
    normal, right = np.zeros((3, 3)), np.zeros(3)
    for pose, (column, row) in zip(poses, pixels, strict=True):
        ray = [(column - 320.0) / 500.0, (240.0 - row) / 500.0, -1.0]
        d = pose[:3, :3] @ ray / np.linalg.norm(ray)
        across = np.eye(3) - np.outer(d, d)
        normal, right = normal + across, right + across @ pose[:3, 3]
    return np.linalg.solve(normal, right)


@pytest.mark.parametrize(
    ("target", "allowed_m"), [(MAP, 1e-4), (WorldFrame("EPSG:32633", (561e3, 5.78e6, 0.0)), 0.06)]
)
def test_two_streams_in_two_frames_see_one_scene(target: WorldFrame, allowed_m: float) -> None:
    """Points near 2 km of flight, seen by a UTM and a geographic stream, meet in the map's frame.

    In a map that is itself in UTM rays miss by what the grid stretches: 4e-4 of the distance.
    """
    into = [conversion(UTM, target), conversion(WorldFrame("EPSG:4979"), target)]
    rng = np.random.default_rng(4)
    for x in np.linspace(-1000, 1000, 9):
        point = np.array([x, -0.7 * x, rng.uniform(-5, 30)])
        eyes = [
            pose_from(DOWN, point + [*rng.uniform(-40, 40, 2), rng.uniform(80, 120)])
            for _ in range(2)
        ]
        pixels = [project(CAMERA, eye, point)[0][0] for eye in eyes]
        told = [into[0](as_utm(eyes[0])), into[1](as_geographic(eyes[1]))]
        truth = conversion(MAP, target)(pose_from(DOWN, point))[:3, 3]
        assert np.linalg.norm(triangulated(told, pixels) - truth) < allowed_m


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (WorldFrame("EPSG:99999"), MAP, "no coordinate system 99999"),
        (WorldFrame("EPSG:5773"), MAP, "EGM96 height"),
        (WorldFrame("EPSG:2263"), MAP, "US survey foot"),
        (WorldFrame("EPSG:9518"), MAP, "without a grid of its datum or geoid"),
    ],
)
def test_codes_that_are_no_frames_are_named(
    source: WorldFrame, target: WorldFrame, message: str
) -> None:
    with pytest.raises(FrameRejected, match=message):
        conversion(source, target)


def test_poses_that_cannot_be_placed_are_refused() -> None:
    with pytest.raises(FrameRejected, match="expected latitude, longitude"):
        conversion(WorldFrame("EPSG:4979"), MAP)(pose_from(DOWN, [561_000.0, 5.78e6, 100.0]))
    with pytest.raises(FrameRejected, match="not defined"):
        conversion(UTM, MAP)(pose_from(DOWN, [9e7, 9e7, 0.0]))
    with pytest.raises(FrameRejected, match="1.6.* m here|0.6.* m here"):
        conversion(MAP, WorldFrame("EPSG:3857"))(np.eye(4))


def test_what_a_map_may_begin_in() -> None:
    assert founding(UTM) == UTM and founding(WorldFrame()) == WorldFrame()
    assert founding(WorldFrame("EPSG:4979", ORIGIN)) == MAP
    for world in (WorldFrame("EPSG:4979"), WorldFrame("EPSG:4978")):
        with pytest.raises(FrameRejected, match="no map is in"):
            founding(world)


def test_geographic_poses_name_their_own_beginning() -> None:
    pose = pose_from(DOWN, ORIGIN)
    assert beginning_at(WorldFrame("EPSG:4979"), pose) == WorldFrame("EPSG:4979", ORIGIN)
    assert beginning_at(UTM, pose) == UTM
    assert anchor(UTM) is None
    assert np.array_equal(anchor(WorldFrame("EPSG:4979", ORIGIN)), pose)


def test_frames_in_words() -> None:
    assert parse_world("EPSG:32633") == UTM
    assert parse_world("EPSG:2180@5e5,4e5,0") == WorldFrame("EPSG:2180", (5e5, 4e5, 0.0))
    assert parse_world("ENU@52.2,15.9,120") == MAP
    for text in ("ENU", "utm", "EPSG:32633@1,2", "EPSG:32633@a,b,c", "ENU@95,0,0"):
        with pytest.raises(FrameRejected, match="world frame"):
            parse_world(text)
