"""Poses, quaternions, world frames, cameras and rays, against hand-worked numbers and laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import (
    MAX_SIDE_PX,
    R_ENU_WORLD,
    R_OPENGL_CAMERA,
    RIGID_TOLERANCE,
    check_camera,
    check_pose,
    convert_axes,
    interpolate_pose,
    invert_pose,
    matrix_to_quaternion,
    nearest_rotation,
    pixel_rays,
    pose_from,
    project,
    quaternion_to_matrix,
    slerp,
)
from mclnf_edge.types import Camera

CAMERA = Camera(480, 359, 386.9, 387.2, 240.0, 179.5)
COORDINATE = st.floats(-1e7, 1e7)
QUATERNIONS = st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.05)


def unit(q: tuple[float, ...]) -> np.ndarray:
    return np.asarray(q) / np.linalg.norm(q)


@st.composite
def poses(draw: st.DrawFn) -> np.ndarray:
    rotation = quaternion_to_matrix(unit(draw(QUATERNIONS)))
    return pose_from(rotation, draw(st.tuples(COORDINATE, COORDINATE, COORDINATE)))


def turn_z(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


# --- pose checks -------------------------------------------------------------------------------


def test_good_pose_comes_back_unchanged() -> None:
    pose = pose_from(turn_z(30), [5e5, 5.8e6, 120.25])
    assert np.array_equal(check_pose(pose.tolist()), pose)
    assert check_pose(pose.astype(np.float32)).dtype == np.float64


def broken(**changes: object) -> np.ndarray:
    pose = pose_from(turn_z(30), [1.0, 2.0, 3.0])
    for where, value in changes.items():
        pose[int(where[1]), int(where[2])] = value
    return pose


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.eye(3), "shape"),
        ([[1, 2], [3]], "numbers"),
        ("hello", "numbers"),
        (broken(_03=np.nan), "NaN"),
        (broken(_00=np.inf), "NaN or infinite"),
        (broken(_30=0.5), "last row"),
        (broken(_33=2.0), "last row"),
        (broken(_03=1e9), "beyond"),
        (pose_from(turn_z(30) * 0.01, [0, 0, 0]), "not a rotation.*scale is 0.01"),
        (pose_from(np.diag([1.0, 1.0, -1.0]), [0, 0, 0]), "mirrors"),
        (np.zeros((4, 4)), "last row"),
    ],
)
def test_bad_poses_are_named(pose: object, message: str) -> None:
    with pytest.raises(FrameRejected, match=f"frame 7: .*{message}"):
        check_pose(pose, "frame 7")


def test_rigid_tolerance_is_as_stated() -> None:
    """A uniform scale 1 + e changes RᵀR by 2e: just under half the tolerance passes."""
    check_pose(pose_from(turn_z(10) * (1 + 0.49 * RIGID_TOLERANCE), [0, 0, 0]))
    with pytest.raises(FrameRejected):
        check_pose(pose_from(turn_z(10) * (1 + 0.51 * RIGID_TOLERANCE), [0, 0, 0]))


@given(poses())
def test_inverse_undoes(pose: np.ndarray) -> None:
    assert np.allclose(invert_pose(pose) @ pose, np.eye(4), atol=1e-8)
    assert np.allclose(invert_pose(invert_pose(pose)), pose, atol=1e-8)


@given(QUATERNIONS, st.floats(0.005, 100.0))
def test_nearest_rotation_removes_scale(q: tuple[float, ...], scale: float) -> None:
    rotation = quaternion_to_matrix(unit(q))
    assert np.allclose(nearest_rotation(rotation * scale), rotation, atol=1e-12)


# --- axes --------------------------------------------------------------------------------------


def test_axis_tables_are_rotations() -> None:
    for rotation in (*R_OPENGL_CAMERA.values(), *R_ENU_WORLD.values()):
        assert np.allclose(rotation @ rotation.T, np.eye(3))
        assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_world_axes_by_name() -> None:
    """10 m north, 20 m east, 30 m down is ENU (20, 10, -30); DRB is down, right, backward."""
    ned = convert_axes(pose_from(np.eye(3), [10, 20, 30]), world_axes="NED")
    assert ned[:3, 3].tolist() == [20.0, 10.0, -30.0]
    drb = convert_axes(pose_from(np.eye(3), [30, 20, -10]), world_axes="DRB")
    assert drb[:3, 3].tolist() == [20.0, 10.0, -30.0]


def test_opencv_camera_looking_down_in_ned() -> None:
    """An opencv camera with its axes along NED looks down with east to its right.

    opencv z (forward) = down. x (right) = north, y (down in the picture) = east: turned so that
    opengl x = north, y = west, z (backward) = up in ENU.
    """
    pose = convert_axes(np.eye(4), camera_axes="opencv", world_axes="NED")
    assert pose[:3, 0].tolist() == [0.0, 1.0, 0.0]
    assert pose[:3, 1].tolist() == [-1.0, 0.0, 0.0]
    assert pose[:3, 2].tolist() == [0.0, 0.0, 1.0]


@given(poses(), st.sampled_from(list(R_OPENGL_CAMERA)), st.sampled_from(list(R_ENU_WORLD)))
def test_axis_conversion_keeps_poses_rigid(pose: np.ndarray, camera: str, world: str) -> None:
    converted = check_pose(convert_axes(pose, camera, world))
    assert np.linalg.norm(converted[:3, 3]) == pytest.approx(np.linalg.norm(pose[:3, 3]))


def test_unknown_axes_are_refused() -> None:
    with pytest.raises(FrameRejected, match="camera axes: expected one of opengl, opencv"):
        convert_axes(np.eye(4), camera_axes="ros")
    with pytest.raises(FrameRejected, match="world axes.*'XYZ'"):
        convert_axes(np.eye(4), world_axes="XYZ")


# --- quaternions -------------------------------------------------------------------------------


def test_quaternion_of_a_quarter_turn() -> None:
    half = np.sqrt(0.5)
    assert np.allclose(quaternion_to_matrix([0, 0, half, half]), turn_z(90))
    assert np.allclose(matrix_to_quaternion(turn_z(90)), [0, 0, half, half])


@given(QUATERNIONS)
def test_quaternion_round_trip(q: tuple[float, ...]) -> None:
    rotation = quaternion_to_matrix(unit(q))
    back = matrix_to_quaternion(rotation)
    assert abs(back @ unit(q)) == pytest.approx(1.0, abs=1e-12)
    assert np.allclose(quaternion_to_matrix(back), rotation, atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_have_a_quaternion(axis: int) -> None:
    diagonal = -np.ones(3)
    diagonal[axis] = 1.0
    back = matrix_to_quaternion(np.diag(diagonal))
    assert abs(back[axis]) == pytest.approx(1.0)


@pytest.mark.parametrize("q", [[0, 0, 0, 0], [0, 0, 0, 2], [np.nan, 0, 0, 1], [0, 0, 1]])
def test_bad_quaternions_are_refused(q: list[float]) -> None:
    with pytest.raises(FrameRejected, match="unit quaternion"):
        quaternion_to_matrix(q)


@given(QUATERNIONS, QUATERNIONS, st.floats(0.0, 1.0))
def test_slerp_divides_the_angle(a: tuple[float, ...], b: tuple[float, ...], u: float) -> None:
    """The way from a to slerp(u) is u times the whole way, measured on the rotations."""
    q0, q1 = unit(a), unit(b)

    def angle(p: np.ndarray, q: np.ndarray) -> float:
        return float(2 * np.arccos(np.clip(abs(p @ q), 0, 1)))

    mixed = slerp(q0, q1, u)
    assert np.linalg.norm(mixed) == pytest.approx(1.0)
    assert angle(q0, mixed) == pytest.approx(u * angle(q0, q1), abs=1e-6)


def test_interpolated_pose_half_way() -> None:
    a, b = pose_from(np.eye(3), [0, 0, 0]), pose_from(turn_z(80), [10, -4, 2])
    middle = interpolate_pose(a, b, 0.25)
    assert np.allclose(middle, pose_from(turn_z(20), [2.5, -1.0, 0.5]))


@given(poses(), poses())
def test_interpolation_meets_its_ends(a: np.ndarray, b: np.ndarray) -> None:
    assert np.allclose(interpolate_pose(a, b, 0.0), a, atol=1e-9)
    assert np.allclose(interpolate_pose(a, b, 1.0), b, atol=1e-9)


# --- cameras and rays --------------------------------------------------------------------------


def test_good_cameras_pass() -> None:
    assert check_camera(CAMERA) is CAMERA
    check_camera(replace(CAMERA, model="OPENCV", distortion=(0.1, -0.2, 0.0, 0.0, 0.01)))
    check_camera(replace(CAMERA, model="OPENCV_FISHEYE", distortion=(0.1, 0.0, 0.0, 0.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width"),
        ({"height": -5}, "height"),
        ({"width": MAX_SIDE_PX + 1}, "width"),
        ({"width": 480.5}, "width"),
        ({"width": 32_000, "height": 32_000}, "pixels"),
        ({"fx": 0.0}, "fx"),
        ({"fy": -387.0}, "fy"),
        ({"fx": float("nan")}, "fx"),
        ({"fy": 1e9}, "fy"),
        ({"cx": float("inf")}, "cx"),
        ({"cy": 5000.0}, "cy"),
        ({"model": "FOV"}, "model"),
        ({"distortion": (0.1,)}, "PINHOLE takes 0"),
        ({"model": "OPENCV", "distortion": (0.1, 0.2)}, "OPENCV takes 4 or 5 or 8"),
        ({"model": "OPENCV", "distortion": (float("nan"), 0, 0, 0)}, "absurd distortion"),
    ],
)
def test_bad_cameras_are_named(change: dict, message: str) -> None:
    with pytest.raises(FrameRejected, match=message):
        check_camera(replace(CAMERA, **change))


def test_rays_of_a_tiny_camera_by_hand() -> None:
    """4x2 pixels, f = 2, centre (2, 1): pixel (3, 0) looks along (1.5/2, 0.5/2, -1)."""
    camera = Camera(4, 2, 2.0, 2.0, 2.0, 1.0)
    pose = pose_from(turn_z(90), [5e5, 5.8e6, 100.0])
    rays_o, rays_d = pixel_rays(camera, pose, [[3, 0], [0, 1]])
    assert rays_o.dtype == np.float64
    assert rays_d.dtype == np.float32
    assert rays_o.tolist() == [[5e5, 5.8e6, 100.0]] * 2
    assert np.allclose(rays_d, [[-0.25, 0.75, -1.0], [0.25, -0.75, -1.0]], atol=1e-7)


@given(poses(), st.integers(0, 479), st.integers(0, 358), st.floats(1.0, 1e3))
def test_projecting_a_point_on_a_ray_returns_the_pixel(
    pose: np.ndarray, column: int, row: int, z_depth: float
) -> None:
    rays_o, rays_d = pixel_rays(CAMERA, pose, [[column, row]])
    pixels, depth = project(CAMERA, pose, rays_o + z_depth * rays_d)
    assert depth[0] == pytest.approx(z_depth, rel=1e-5, abs=1e-5)
    assert np.allclose(pixels[0], [column + 0.5, row + 0.5], atol=1e-2)


def test_points_behind_the_camera_have_no_pixel() -> None:
    pixels, depth = project(CAMERA, np.eye(4), [[0.0, 0.0, 5.0], [0.0, 0.0, -5.0]])
    assert depth.tolist() == [-5.0, 5.0]
    assert np.isnan(pixels[0]).all()
    assert pixels[1].tolist() == [240.0, 179.5]


def test_distorted_cameras_have_no_straight_rays() -> None:
    camera = replace(CAMERA, model="OPENCV", distortion=(0.1, 0.0, 0.0, 0.0))
    with pytest.raises(FrameRejected, match="undistort first"):
        pixel_rays(camera, np.eye(4), [[0, 0]])
