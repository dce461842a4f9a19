"""Rigid poses, axis conventions and pinhole rays. numpy only, float64 throughout.

Transforms are named `T_target_source`; rotations `R_target_source`. Quaternions are (x, y, z, w).

| camera axes | x     | y    | z        |   | world axes | x     | y     | z        |
|-------------|-------|------|----------|---|------------|-------|-------|----------|
| opengl      | right | up   | backward |   | ENU        | east  | north | up       |
| opencv      | right | down | forward  |   | NED        | north | east  | down     |
|             |       |      |          |   | DRB        | down  | right | backward |

Everything is turned into opengl camera axes in an ENU-like world (z up). For DRB, which names no
compass direction, "right" becomes x and "forward" becomes y.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import FrameRejected
from mclnf_edge.types import Camera, Matrix4

FloatArray = npt.NDArray[np.float64]

RIGID_TOLERANCE: Final = 1e-3
"""Largest allowed entry of |RᵀR − I|: text with four decimals passes, a scaled matrix does not."""
LAST_ROW_TOLERANCE: Final = 1e-6
MAX_COORDINATE_M: Final = 1e8
"""Positions beyond this are refused; map projections and ECEF stay below 5e7."""
MAX_SIDE_PX: Final = 32_766
"""OpenCV resamples pictures whose sides are below 2^15 − 1."""
MAX_VIEW_PIXELS: Final = 4_000_000
"""Larger views take tens of seconds, and a compute thread counts as hung after 60."""
MAX_PIXELS: Final = 2**26
"""Largest picture, in pixels (67 million), whatever its header claims."""

R_OPENGL_CAMERA: Final[dict[str, FloatArray]] = {
    "opengl": np.eye(3),
    "opencv": np.diag([1.0, -1.0, -1.0]),
}
R_ENU_WORLD: Final[dict[str, FloatArray]] = {
    "ENU": np.eye(3),
    "NED": np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]),
    "DRB": np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]]),
}
DISTORTION_LENGTHS: Final[dict[str, tuple[int, ...]]] = {
    "PINHOLE": (0,),
    "OPENCV": (4, 5, 8),
    "OPENCV_FISHEYE": (4,),
}


def check_pose(pose: Any, where: str = "pose") -> Matrix4:
    """Return `pose` as a (4, 4) float64 rigid transform, values unchanged.

    Raises FrameRejected when it is not 4x4 and finite, when the last row differs from 0 0 0 1 by
    more than LAST_ROW_TOLERANCE, when its 3x3 part is not a rotation within RIGID_TOLERANCE, or
    when a position exceeds MAX_COORDINATE_M.
    """
    try:
        matrix = np.array(pose, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FrameRejected(f"{where}: expected a 4x4 matrix of numbers ({error})") from None
    if matrix.shape != (4, 4):
        raise FrameRejected(f"{where}: expected a 4x4 matrix, received shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise FrameRejected(f"{where}: the matrix holds NaN or infinite values")
    if np.abs(matrix[3] - (0.0, 0.0, 0.0, 1.0)).max() > LAST_ROW_TOLERANCE:
        raise FrameRejected(f"{where}: expected last row 0 0 0 1, received {matrix[3].tolist()}")
    _check_rotation(matrix[:3, :3], where)
    if np.abs(matrix[:3, 3]).max() > MAX_COORDINATE_M:
        raise FrameRejected(
            f"{where}: position {matrix[:3, 3].tolist()} is beyond {MAX_COORDINATE_M:g} m"
        )
    return matrix


def _check_rotation(rotation: FloatArray, where: str) -> None:
    error = float(np.abs(rotation.T @ rotation - np.eye(3)).max())
    if error > RIGID_TOLERANCE:
        scale = float(np.cbrt(abs(np.linalg.det(rotation))))
        raise FrameRejected(
            f"{where}: the 3x3 part is not a rotation: |RᵀR − I| is {error:.3g}, allowed "
            f"{RIGID_TOLERANCE:g} (its scale is {scale:.4g})"
        )
    if np.linalg.det(rotation) < 0.0:
        raise FrameRejected(f"{where}: the 3x3 part mirrors space (determinant −1)")


def pose_from(rotation: npt.ArrayLike, position: npt.ArrayLike) -> Matrix4:
    """The (4, 4) transform with this (3, 3) rotation and (3,) position; nothing is checked."""
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = position
    return pose


def invert_pose(pose: Matrix4) -> Matrix4:
    """The inverse of a rigid transform."""
    rotation = pose[:3, :3].T
    return pose_from(rotation, -rotation @ pose[:3, 3])


def nearest_rotation(matrix: FloatArray) -> FloatArray:
    """The rotation closest to a (3, 3) matrix in the Frobenius norm (polar decomposition)."""
    u, _, vt = np.linalg.svd(matrix)
    sign = np.sign(np.linalg.det(u @ vt))
    rotation: FloatArray = u @ np.diag([1.0, 1.0, sign]) @ vt
    return rotation


def convert_axes(pose: Matrix4, camera_axes: str = "opengl", world_axes: str = "ENU") -> Matrix4:
    """Turn a camera-to-world pose given in named axes into opengl camera axes in an ENU world.

    Raises FrameRejected for a name that is in neither table of this module.
    """
    r_opengl_camera = _named(R_OPENGL_CAMERA, camera_axes, "camera axes")
    r_enu_world = _named(R_ENU_WORLD, world_axes, "world axes")
    rotation = r_enu_world @ pose[:3, :3] @ r_opengl_camera.T
    return pose_from(rotation, r_enu_world @ pose[:3, 3])


def _named(table: dict[str, FloatArray], name: str, what: str) -> FloatArray:
    if name not in table:
        raise FrameRejected(f"{what}: expected one of {', '.join(table)}, received {name!r}")
    return table[name]


def quaternion_to_matrix(quaternion: npt.ArrayLike) -> FloatArray:
    """The (3, 3) rotation of a quaternion (x, y, z, w), which is normalised first.

    Raises FrameRejected when its length differs from 1 by more than 1 %, or is not finite.
    """
    q = np.array(quaternion, dtype=np.float64)
    length = float(np.linalg.norm(q))
    if q.shape != (4,) or not abs(length - 1.0) <= 1e-2:
        raise FrameRejected(f"expected a unit quaternion (x, y, z, w), received {q.tolist()}")
    x, y, z, w = q / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def matrix_to_quaternion(rotation: FloatArray) -> FloatArray:
    """The unit quaternion (x, y, z, w), w >= 0, of a (3, 3) rotation.

    The outer product of the quaternion with itself is linear in the rotation; its largest diagonal
    entry picks the row that is safe to divide by (Shepperd, 1978).
    """
    r = rotation
    four_qq = np.array(
        [
            [
                1 + r[0, 0] - r[1, 1] - r[2, 2],
                r[0, 1] + r[1, 0],
                r[0, 2] + r[2, 0],
                r[2, 1] - r[1, 2],
            ],
            [0, 1 - r[0, 0] + r[1, 1] - r[2, 2], r[1, 2] + r[2, 1], r[0, 2] - r[2, 0]],
            [0, 0, 1 - r[0, 0] - r[1, 1] + r[2, 2], r[1, 0] - r[0, 1]],
            [0, 0, 0, 1 + r[0, 0] + r[1, 1] + r[2, 2]],
        ]
    )
    four_qq += np.triu(four_qq, 1).T
    row = four_qq[np.argmax(np.diag(four_qq))]
    q: FloatArray = row / np.linalg.norm(row)
    return -q if q[3] < 0 else q


def slerp(q0: FloatArray, q1: FloatArray, u: float) -> FloatArray:
    """The quaternion a share `u` in [0, 1] of the shorter way from `q0` to `q1`."""
    if q0 @ q1 < 0:
        q1 = -q1
    # atan2 of half-chord lengths keeps its precision for tiny angles, where arccos loses it.
    angle = 2.0 * math.atan2(float(np.linalg.norm(q1 - q0)), float(np.linalg.norm(q1 + q0)))
    if angle < 1e-9:
        mixed = (1.0 - u) * q0 + u * q1
    else:
        mixed = math.sin((1.0 - u) * angle) * q0 + math.sin(u * angle) * q1
    return np.asarray(mixed / np.linalg.norm(mixed), dtype=np.float64)


def interpolate_pose(pose0: Matrix4, pose1: Matrix4, u: float) -> Matrix4:
    """The pose a share `u` in [0, 1] of the way: position linearly, rotation by slerp."""
    q = slerp(matrix_to_quaternion(pose0[:3, :3]), matrix_to_quaternion(pose1[:3, :3]), u)
    return pose_from(quaternion_to_matrix(q), (1.0 - u) * pose0[:3, 3] + u * pose1[:3, 3])


def check_camera(camera: Camera, where: str = "camera") -> Camera:
    """Return `camera` when every value is usable; FrameRejected names the first that is not.

    Sides are 1 to MAX_SIDE_PX and the picture at most MAX_PIXELS; focal lengths between 1/100 and
    1000 of the longer side; the principal point within one picture of the picture's edge.
    """
    _check_size(camera, where)
    side = max(camera.width, camera.height)
    for name, value in (("fx", camera.fx), ("fy", camera.fy)):
        if not side / 100 <= value <= side * 1000:
            raise FrameRejected(
                f"{where}: {name} = {value} px is absurd for {camera.width}x{camera.height}"
            )
    for name, value, size in (("cx", camera.cx, camera.width), ("cy", camera.cy, camera.height)):
        if not -size <= value <= 2 * size:
            raise FrameRejected(f"{where}: {name} = {value} px is absurd for a side of {size} px")
    _check_distortion(camera, where)
    return camera


def _check_size(camera: Camera, where: str) -> None:
    for name, value in (("width", camera.width), ("height", camera.height)):
        if not isinstance(value, int) or not 1 <= value <= MAX_SIDE_PX:
            raise FrameRejected(
                f"{where}: expected {name} in pixels, 1 to {MAX_SIDE_PX}, received {value}"
            )
    if camera.width * camera.height > MAX_PIXELS:
        raise FrameRejected(
            f"{where}: {camera.width}x{camera.height} is more than {MAX_PIXELS} pixels"
        )


def _check_distortion(camera: Camera, where: str) -> None:
    if camera.model not in DISTORTION_LENGTHS:
        raise FrameRejected(
            f"{where}: expected model {', '.join(DISTORTION_LENGTHS)}, received {camera.model!r}"
        )
    lengths = DISTORTION_LENGTHS[camera.model]
    if len(camera.distortion) not in lengths:
        raise FrameRejected(
            f"{where}: {camera.model} takes {' or '.join(map(str, lengths))} distortion values, "
            f"received {len(camera.distortion)}"
        )
    if not all(abs(value) <= 1000.0 for value in camera.distortion):
        raise FrameRejected(f"{where}: absurd distortion {camera.distortion}")


def require_pinhole(camera: Camera) -> None:
    """Raise FrameRejected unless pixels map to rays without distortion."""
    if camera.model != "PINHOLE":
        raise FrameRejected(f"expected a PINHOLE camera (undistort first), received {camera.model}")


def pixel_rays(
    camera: Camera, T_world_camera: Matrix4, pixels: npt.ArrayLike
) -> tuple[FloatArray, npt.NDArray[np.float32]]:
    """World rays through the centres of integer `pixels` (N, 2), given as (column, row).

    Returns `rays_o` (N, 3) float64 in world metres and `rays_d` (N, 3) float32. The directions have
    length 1 along the camera's viewing axis, so that `rays_o + t * rays_d` lies at z-depth t.

    >>> camera = Camera(4, 2, 2.0, 2.0, 2.0, 1.0)
    >>> pixel_rays(camera, np.eye(4), [[3, 0]])[1].tolist()
    [[0.75, 0.25, -1.0]]
    """
    require_pinhole(camera)
    columns_rows = np.asarray(pixels, dtype=np.float64).reshape(-1, 2) + 0.5
    x = (columns_rows[:, 0] - camera.cx) / camera.fx
    y = (camera.cy - columns_rows[:, 1]) / camera.fy
    in_camera = np.stack([x, y, np.full_like(x, -1.0)], axis=1)
    rays_d = (in_camera @ T_world_camera[:3, :3].T).astype(np.float32)
    return np.tile(T_world_camera[:3, 3], (len(x), 1)), rays_d


def project(
    camera: Camera, T_world_camera: Matrix4, points: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Continuous pixel coordinates (N, 2) and z-depth (N,) in metres of world points (N, 3).

    A point belongs to pixel floor(column), floor(row). Behind the camera the depth is negative and
    the coordinates are NaN.
    """
    require_pinhole(camera)
    offsets = np.asarray(points, dtype=np.float64).reshape(-1, 3) - T_world_camera[:3, 3]
    x, y, backward = (offsets @ T_world_camera[:3, :3]).T
    depth = -backward
    safe = np.where(depth > 0, depth, np.nan)
    columns = camera.fx * x / safe + camera.cx
    rows = camera.cy - camera.fy * y / safe
    return np.stack([columns, rows], axis=1), depth
