"""What `render --pose` understands: a JSON file, 12 or 16 numbers, or CAPTURE#FRAME."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mclnf_edge.captures.capture import SPLITS, Capture, SplitFilter, exists, is_file
from mclnf_edge.captures.detect import open_capture
from mclnf_edge.captures.intrinsics import INTRINSIC_KEYS, camera_from_keys, load_json, number
from mclnf_edge.captures.transforms import frames_of, read_matrix, read_world
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import check_pose
from mclnf_edge.types import Camera, Frame, Matrix4, View

_FORMS = (
    "expected a JSON file with transform_matrix (or frames), 12 or 16 numbers (3x4 or 4x4, row by "
    "row), or CAPTURE#FRAME"
)


def parse_views(text: str, camera: Camera | None = None) -> list[View]:
    """The views that `text` asks for, camera-to-world with opengl axes, in order.

    A JSON file holds one `transform_matrix` or many under `frames`, with intrinsics as in
    transforms.json at the top or per frame, and optionally `timestamp`, `stream`, `exposure` and
    `crs`.
    CAPTURE#FRAME takes pose, camera, time and stream from a frame (name or number) of a capture, or
    from all frames of a split with CAPTURE#test, #train, #val, #all. `camera` is used where no
    intrinsics are given. Raises CaptureError.
    """
    place, hash_mark, key = text.rpartition("#")
    if hash_mark and exists(Path(place)):
        return _capture_views(Path(place), key)
    if is_file(Path(text)):
        return _file_views(Path(text), camera)
    words = [word for word in re.split(r"[\s,;\[\]]+", text) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise CaptureError(f"pose {text[:120]!r}: {_FORMS}; no such file") from None
    if camera is None:
        raise CaptureError("pose given as numbers: the camera's intrinsics are needed beside it")
    return [View(camera, _matrix_from_numbers(numbers))]


def view_of(frame: Frame, capture: Capture) -> View:
    """The view that a capture's frame was taken from."""
    return View(
        frame.camera,
        frame.T_world_camera,
        frame.timestamp,
        capture.name,
        frame.exposure,
        capture.world,
    )


def _capture_views(path: Path, key: str) -> list[View]:
    capture = open_capture(path)
    if key in SPLITS:
        which: SplitFilter = next(split for split in SPLITS if split == key)
        # One picture at a time: a view keeps none of it.
        views = [view_of(frame, capture) for frame in capture.split(which)]
        if not views:
            raise CaptureError(f"{path}: no frame of split {key!r}")
        return views
    return [view_of(capture.frame(key), capture)]


def _file_views(path: Path, camera: Camera | None) -> list[View]:
    content = load_json(path)
    frames = frames_of(content, str(path)) if "frames" in content else [content]
    if not frames:
        raise CaptureError(f"{path}: holds no pose; {_FORMS}")
    return [_view(content, frame, f"{path}: pose {i}", camera) for i, frame in enumerate(frames)]


def _view(
    content: Mapping[str, Any], frame: Mapping[str, Any], where: str, camera: Camera | None
) -> View:
    keys = {**content, **frame}
    if INTRINSIC_KEYS & keys.keys():
        size = None if camera is None else (camera.width, camera.height)
        camera = camera_from_keys(keys, where, size)
    if camera is None:
        raise CaptureError(f"{where}: no intrinsics (fl_x, w, h, ...) in the file or beside it")
    view = View(camera, _checked(read_matrix(frame, "transform_matrix", where), where))
    if "timestamp" in keys:
        view = replace(view, timestamp=number(keys, "timestamp", where))
    if "exposure" in keys:
        view = replace(view, exposure=number(keys, "exposure", where))
    world = read_world(keys, where) if "crs" in keys else None
    return replace(view, stream=str(keys.get("stream", "")), world=world)


def _matrix_from_numbers(numbers: list[float]) -> Matrix4:
    if len(numbers) not in (12, 16):
        raise CaptureError(f"pose: received {len(numbers)} numbers; {_FORMS}")
    rows = np.reshape(numbers, (-1, 4))
    return _checked(np.vstack([rows, [0.0, 0.0, 0.0, 1.0]])[:4] if len(rows) == 3 else rows, "pose")


def _checked(matrix: Matrix4, where: str) -> Matrix4:
    try:
        return check_pose(matrix, where)
    except FrameRejected as error:
        raise CaptureError(str(error)) from None
