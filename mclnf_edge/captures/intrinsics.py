"""Camera intrinsics written as transforms.json keys, in one place for every file that uses them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import check_camera
from mclnf_edge.types import Camera, CameraModel

INTRINSIC_KEYS: Final = frozenset(
    ("camera_model", "is_fisheye", "fl_x", "fl_y", "camera_angle_x", "camera_angle_y", "cx", "cy")
    + ("w", "h", "k1", "k2", "k3", "k4", "p1", "p2", "distortion_params")
)
_UNSUPPORTED_FLAGS: Final = ("latlong", "equirectangular", "orthographic", "ftheta_p0")
_PINHOLE_NAMES: Final = ("PINHOLE", "SIMPLE_PINHOLE")
_DISTORTED_NAMES: Final = ("OPENCV", "SIMPLE_RADIAL", "RADIAL")


def load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CaptureError when it cannot be read or is not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CaptureError(f"{path}: cannot read JSON ({error})") from None
    if not isinstance(content, dict):
        raise CaptureError(f"{path}: expected a JSON object, received {type(content).__name__}")
    return content


def number(keys: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A finite number under `key`; CaptureError when it is missing or something else."""
    value = keys.get(key, default)
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise CaptureError(f"{where}: expected a number for {key!r}, received {value!r:.80}")


def camera_from_keys(
    keys: Mapping[str, Any], where: str, size: tuple[int, int] | None = None
) -> Camera:
    """The camera that these transforms.json keys describe.

    `size` (width, height) stands in for missing `w`, `h`. Focal length from `fl_x`, `fl_y` or from
    `camera_angle_x`, `camera_angle_y` (radians); a missing vertical one equals the horizontal. The
    principal point defaults to the centre. `k1 k2 p1 p2 [k3]`, or `distortion_params` in the order
    k1 k2 k3 k4 p1 p2, are OpenCV's; an OPENCV model whose values are all zero becomes PINHOLE.
    Raises CaptureError naming the key, or the model when it has no exact counterpart here.
    """
    width, height = _size(keys, where, size)
    fx = _focal(keys, "x", width, where)
    fy = fx
    if "fl_y" in keys or ("camera_angle_y" in keys and "fl_x" not in keys):
        fy = _focal(keys, "y", height, where)
    model, distortion = _model(keys, where)
    camera = Camera(
        width=width,
        height=height,
        fx=fx,
        fy=fy,
        cx=number(keys, "cx", where, width / 2),
        cy=number(keys, "cy", where, height / 2),
        model=model,
        distortion=distortion,
    )
    try:
        return check_camera(camera, where)
    except FrameRejected as error:
        raise CaptureError(str(error)) from None


def load_camera(path: Path) -> Camera:
    """A camera file: a JSON object with the keys of `camera_from_keys`, `w` and `h` included."""
    return camera_from_keys(load_json(path), str(path))


def _size(keys: Mapping[str, Any], where: str, size: tuple[int, int] | None) -> tuple[int, int]:
    if "w" not in keys and "h" not in keys and size is not None:
        return size
    width, height = number(keys, "w", where), number(keys, "h", where)
    if width != int(width) or height != int(height):
        raise CaptureError(f"{where}: expected whole pixels for w and h, received {width}x{height}")
    return int(width), int(height)


def _focal(keys: Mapping[str, Any], axis: str, side: int, where: str) -> float:
    if f"fl_{axis}" in keys:
        return number(keys, f"fl_{axis}", where)
    if f"camera_angle_{axis}" not in keys:
        raise CaptureError(f"{where}: expected 'fl_{axis}' or 'camera_angle_{axis}'")
    angle = number(keys, f"camera_angle_{axis}", where)
    if not 0.0 < angle < math.pi:
        raise CaptureError(f"{where}: camera_angle_{axis} = {angle} is not in (0, pi) radians")
    return 0.5 * side / math.tan(0.5 * angle)


def _model(keys: Mapping[str, Any], where: str) -> tuple[CameraModel, tuple[float, ...]]:
    for flag in _UNSUPPORTED_FLAGS:
        if keys.get(flag):
            raise CaptureError(f"{where}: the camera model {flag!r} is not supported")
    k1, k2, k3, k4, p1, p2 = _distortion(keys, where)
    fallback = "OPENCV_FISHEYE" if keys.get("is_fisheye") else "OPENCV"
    name = keys.get("camera_model", fallback)
    if name == "OPENCV_FISHEYE":
        if p1 or p2:
            raise CaptureError(f"{where}: OPENCV_FISHEYE has no tangential distortion p1, p2")
        return "OPENCV_FISHEYE", (k1, k2, k3, k4)
    if name in _PINHOLE_NAMES:
        if any((k1, k2, k3, k4, p1, p2)):
            raise CaptureError(f"{where}: {name} with distortion values; expected OPENCV or none")
        return "PINHOLE", ()
    if name not in _DISTORTED_NAMES:
        raise CaptureError(f"{where}: the camera model {name!r} is not supported")
    if k4:
        # k4 r^8 follows k3 r^6 in this file format; OpenCV's own k4 divides.
        raise CaptureError(f"{where}: {name} with k4 = {k4} has no counterpart in OpenCV")
    if not any((k1, k2, k3, p1, p2)):
        return "PINHOLE", ()
    return "OPENCV", (k1, k2, p1, p2, k3) if k3 else (k1, k2, p1, p2)


def _distortion(keys: Mapping[str, Any], where: str) -> tuple[float, ...]:
    names = ("k1", "k2", "k3", "k4", "p1", "p2")
    listed = keys.get("distortion_params")
    if listed is None:
        return tuple(number(keys, name, where, 0.0) for name in names)
    if not isinstance(listed, list) or len(listed) != 6:
        raise CaptureError(
            f"{where}: expected distortion_params as [k1, k2, k3, k4, p1, p2], received {listed!r}"
        )
    return tuple(number(dict(zip(names, listed, strict=True)), n, where) for n in names)
