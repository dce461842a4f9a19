"""Reader of COLMAP sparse models, binary (preferred) or text.

COLMAP stores world-to-camera with opencv camera axes; frames carry the inverse with opengl axes.
Origin, scale and directions of the world are COLMAP's own (arbitrary unless the model was
geo-registered) and are left as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from mclnf_edge.captures.capture import Capture, Record, make_capture
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import (
    check_camera,
    check_pose,
    convert_axes,
    invert_pose,
    pose_from,
    quaternion_to_matrix,
)
from mclnf_edge.types import Camera, CameraModel, Matrix4, WorldFrame

MODEL_NAMES: Final = (
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "OPENCV_FISHEYE",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "THIN_PRISM_FISHEYE",
)
"""COLMAP's model numbers 0 to 10."""


class _Mapping(NamedTuple):
    """How a model's parameters fall into ours: focal lengths, then cx, cy, then distortion."""

    focals: int
    extras: int
    model: CameraModel
    distortion: int


_MAPPINGS: Final = {
    "SIMPLE_PINHOLE": _Mapping(1, 0, "PINHOLE", 0),
    "PINHOLE": _Mapping(2, 0, "PINHOLE", 0),
    "SIMPLE_RADIAL": _Mapping(1, 1, "OPENCV", 4),
    "RADIAL": _Mapping(1, 2, "OPENCV", 4),
    "OPENCV": _Mapping(2, 4, "OPENCV", 4),
    "FULL_OPENCV": _Mapping(2, 8, "OPENCV", 8),
    "OPENCV_FISHEYE": _Mapping(2, 4, "OPENCV_FISHEYE", 4),
    "SIMPLE_RADIAL_FISHEYE": _Mapping(1, 1, "OPENCV_FISHEYE", 4),
    "RADIAL_FISHEYE": _Mapping(1, 2, "OPENCV_FISHEYE", 4),
    "SIMPLE_FISHEYE": _Mapping(1, 0, "OPENCV_FISHEYE", 4),
    "FISHEYE": _Mapping(2, 0, "OPENCV_FISHEYE", 4),
}
"""Each is exact: missing distortion terms are zero."""

_MODEL_FOLDERS: Final = (".", "sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse")
_IMAGE_FOLDERS: Final = ("images", "../images", "../../images", "../../../images", ".")


class _Image(NamedTuple):
    name: str
    camera_id: int
    pose: Matrix4


def find_model(path: Path) -> Path | None:
    """The folder at or below `path` that holds `cameras` and `images`, binary or text."""
    for folder in _MODEL_FOLDERS:
        for suffix in (".bin", ".txt"):
            if all((path / folder / (part + suffix)).is_file() for part in ("cameras", "images")):
                return path / folder
    return None


def open_colmap(path: Path) -> Capture:
    """Open the folder that holds a model, or `sparse/0` and `images`.

    Raises CaptureError when the model is damaged, when a camera model has no exact counterpart
    (named), or when a picture is missing.
    """
    model = find_model(path)
    if model is None:
        raise CaptureError(f"{path}: no COLMAP model (cameras and images, .bin or .txt)")
    suffix = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    cameras_file, images_file = model / f"cameras{suffix}", model / f"images{suffix}"
    if suffix == ".bin":
        cameras, images = dict(_binary_cameras(cameras_file)), list(_binary_images(images_file))
    else:
        cameras, images = dict(_text_cameras(cameras_file)), list(_text_images(images_file))
    folder = _image_folder(model, images)
    records = [_record(images_file, folder, image, cameras) for image in images]
    notes = ["COLMAP's own world: metres and z up only if the model was geo-registered"]
    return make_capture(path.resolve().name, "colmap", WorldFrame(), records, notes)


def camera_from_colmap(
    name: str, width: int, height: int, params: list[float], where: str
) -> Camera:
    """The camera of a COLMAP model and its parameters; CaptureError names an unsupported model."""
    if name not in _MAPPINGS:
        raise CaptureError(
            f"{where}: the COLMAP camera model {name} has no exact PINHOLE, OPENCV or "
            f"OPENCV_FISHEYE form; supported: {', '.join(_MAPPINGS)}"
        )
    mapping = _MAPPINGS[name]
    expected = mapping.focals + 2 + mapping.extras
    if len(params) != expected:
        raise CaptureError(f"{where}: {name} takes {expected} parameters, received {len(params)}")
    cx, cy, *extras = params[mapping.focals :]
    distortion = tuple(extras) + (0.0,) * (mapping.distortion - mapping.extras)
    camera = Camera(
        width, height, params[0], params[mapping.focals - 1], cx, cy, mapping.model, distortion
    )
    if mapping.model == "OPENCV" and not any(distortion):
        camera = replace(camera, model="PINHOLE", distortion=())
    try:
        return check_camera(camera, where)
    except FrameRejected as error:
        raise CaptureError(str(error)) from None


def _record(file: Path, folder: Path, image: _Image, cameras: dict[int, Camera]) -> Record:
    if image.camera_id not in cameras:
        raise CaptureError(f"{file}: {image.name!r} refers to the missing camera {image.camera_id}")
    return Record(image.name, folder / image.name, cameras[image.camera_id], image.pose)


def _image_folder(model: Path, images: list[_Image]) -> Path:
    folders = [model / folder for folder in _IMAGE_FOLDERS]
    holding = (f for f in folders if images and (f / images[0].name).is_file())
    return next(holding, folders[0])


def _pose(quaternion_wxyz: list[float], translation: list[float], where: str) -> Matrix4:
    w, x, y, z = quaternion_wxyz
    try:
        rotation = quaternion_to_matrix([x, y, z, w])
        world_to_camera = check_pose(pose_from(rotation, translation), "world-to-camera pose")
    except FrameRejected as error:
        raise CaptureError(f"{where}: {error}") from None
    return convert_axes(invert_pose(world_to_camera), camera_axes="opencv")


def _lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Numbered lines without comments, split at spaces; empty lines are kept."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"{file}: cannot read ({error})") from None
    for count, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("#"):
            yield f"{file}:{count}", line.split()


def _text_cameras(file: Path) -> Iterator[tuple[int, Camera]]:
    for where, words in _lines(file):
        if not words:
            continue
        try:
            camera_id, width, height = int(words[0]), int(words[2]), int(words[3])
            params = [float(word) for word in words[4:]]
        except (ValueError, IndexError):
            raise CaptureError(
                f"{where}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS, received {words[:5]}"
            ) from None
        yield camera_id, camera_from_colmap(words[1], width, height, params, where)


def _text_images(file: Path) -> Iterator[_Image]:
    """Every image takes two lines; the second, its points, may be empty and is skipped."""
    lines = _lines(file)
    for where, words in lines:
        if not words:
            continue
        try:
            numbers = [float(word) for word in words[1:8]]
            camera_id, name = int(words[8]), " ".join(words[9:])
        except (ValueError, IndexError):
            raise CaptureError(
                f"{where}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, got {words[:10]}"
            ) from None
        yield _Image(name, camera_id, _pose(numbers[:4], numbers[4:], where))
        next(lines, None)


class _Reader:
    """Little-endian values one after the other, never past the end of the file."""

    def __init__(self, file: Path) -> None:
        try:
            self.data = file.read_bytes()
        except OSError as error:
            raise CaptureError(f"{file}: cannot read ({error})") from None
        self.file, self.at = file, 0

    def take(self, form: str) -> tuple[float, ...]:
        size = struct.calcsize("<" + form)
        self._require(size)
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return values

    def skip(self, size: int) -> None:
        self._require(size)
        self.at += size

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        self._require(end - self.at + 1 if end >= 0 else len(self.data) + 1)
        word = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end + 1
        return word

    def _require(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise CaptureError(
                f"{self.file}: truncated: {size} bytes wanted at {self.at} of {len(self.data)}"
            )


def _binary_cameras(file: Path) -> Iterator[tuple[int, Camera]]:
    reader = _Reader(file)
    (count,) = reader.take("Q")
    for _ in range(int(count)):
        camera_id, model_id, width, height = (int(v) for v in reader.take("iiQQ"))
        known = 0 <= model_id < len(MODEL_NAMES)
        name = MODEL_NAMES[model_id] if known else f"number {model_id}"
        where = f"{file}: camera {camera_id}"
        extent = _MAPPINGS.get(name)
        params = reader.take(f"{extent.focals + 2 + extent.extras}d") if extent else ()
        yield camera_id, camera_from_colmap(name, width, height, list(params), where)


def _binary_images(file: Path) -> Iterator[_Image]:
    reader = _Reader(file)
    (count,) = reader.take("Q")
    for _ in range(int(count)):
        image_id, *numbers, camera_id = reader.take("idddddddi")
        name = reader.text()
        (points,) = reader.take("Q")
        reader.skip(24 * int(points))
        where = f"{file}: image {int(image_id)}"
        yield _Image(name, int(camera_id), _pose(numbers[:4], numbers[4:], where))
