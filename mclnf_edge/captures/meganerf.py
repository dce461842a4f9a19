"""Reader of Mega-NeRF data sets, in metres with z up.

Stored poses are camera-to-world with opengl camera axes in a DRB world (down, right, backward),
shifted by `origin_drb` and divided by `pose_scale_factor`. Both are undone and the world turned to
(right, forward, up): "right" is east only where the data set was aligned so. Lengths are metres
where the data set's real units are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mclnf_edge.captures.capture import Capture, Record, make_capture
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import check_camera, convert_axes, pose_from
from mclnf_edge.types import Camera, Matrix4, Split, WorldFrame

_SUFFIXES: Final = (".jpg", ".JPG", ".png", ".PNG")
_FOLDERS: Final[tuple[Split, ...]] = ("train", "val")
_NOTES: Final = (
    "val frames: Mega-NeRF trains on their left half and measures on the right one",
    "DRB world turned to x right, y forward, z up",
)


def is_meganerf(path: Path) -> bool:
    """Whether a folder holds `coordinates.pt`."""
    return (path / "coordinates.pt").is_file()


def open_meganerf(path: Path) -> Capture:
    """Open the folder that holds `coordinates.pt`, `train` and `val`.

    Frames of `val` have split `val`. The `.pt` files are read with torch, tensors and plain values
    only. Raises CaptureError when torch is missing or a file is not of that form.
    """
    coordinates = _load(path / "coordinates.pt")
    origin = _array(coordinates, "origin_drb", (3,), path / "coordinates.pt")
    scale = float(_array(coordinates, "pose_scale_factor", (), path / "coordinates.pt"))
    if not 0.0 < scale < np.inf:
        raise CaptureError(f"{path}: expected a positive pose_scale_factor, received {scale}")
    records = [
        _record(file, split, origin, scale)
        for split in _FOLDERS
        for file in sorted((path / split / "metadata").glob("*.pt"))
    ]
    return make_capture(path.resolve().name, "meganerf", WorldFrame(), records, _NOTES)


def _record(file: Path, split: Split, origin: npt.NDArray[np.float64], scale: float) -> Record:
    metadata = _load(file)
    c2w = _array(metadata, "c2w", (3, 4), file)
    in_metres = pose_from(c2w[:, :3], c2w[:, 3] * scale + origin)
    pictures = [file.parent.parent / "rgbs" / (file.stem + suffix) for suffix in _SUFFIXES]
    image = next((p for p in pictures if p.is_file()), pictures[0])
    meta = {"measured_columns": "right half"} if split == "val" else {}
    return Record(
        name=f"{split}/{image.name}",
        image=image,
        camera=_camera(metadata, file),
        T_world_camera=_to_enu(in_metres),
        timestamp=_place(file),
        split=split,
        meta=meta,
    )


def _to_enu(pose_drb: Matrix4) -> Matrix4:
    return convert_axes(pose_drb, camera_axes="opengl", world_axes="DRB")


def _place(file: Path) -> float | None:
    """The picture's number: `train` and `val` were numbered together, in order of name."""
    return float(file.stem) if file.stem.isdecimal() else None


def _camera(metadata: dict[str, Any], file: Path) -> Camera:
    """`distortion`, where present, was already taken out of the pictures and is not used."""
    fx, fy, cx, cy = (float(v) for v in _array(metadata, "intrinsics", (4,), file))
    width, height = (int(_array(metadata, key, (), file)) for key in ("W", "H"))
    try:
        return check_camera(Camera(width, height, fx, fy, cx, cy), str(file))
    except FrameRejected as error:
        raise CaptureError(str(error)) from None


def _array(
    values: dict[str, Any], key: str, shape: tuple[int, ...], file: Path
) -> npt.NDArray[np.float64]:
    if key not in values:
        raise CaptureError(f"{file}: no {key!r}; it holds {sorted(values)}")
    try:
        array = np.asarray(values[key], dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(f"{file}: {key!r} is not numeric ({error})") from None
    if array.shape != shape or not np.isfinite(array).all():
        raise CaptureError(
            f"{file}: expected {key!r} finite, of shape {shape}, received {array.shape}"
        )
    return array


def _load(file: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise CaptureError(f"{file}: reading Mega-NeRF files needs torch") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damaged pickle leads to
        raise CaptureError(f"{file}: cannot be loaded safely ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CaptureError(f"{file}: expected a dictionary, received {type(content).__name__}")
    return content
