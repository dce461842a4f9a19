"""Reader of MatrixCity blocks, both forms, in metres.

Raw form `{train,test}/<block>/transforms.json`: frames carry `frame_index` and `rot_mat`, positions
in metres, the rotation divided by 100. Split form `pose/<block>/transforms_{train,test}.json`:
positions in units of 100 m, the rotation as it is. In both the last matrix row is padding. Camera
axes are opengl, the world is z up.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from mclnf_edge.captures.capture import Capture, Record, make_capture, picture_size
from mclnf_edge.captures.depth import exr_depth
from mclnf_edge.captures.intrinsics import camera_from_keys, load_json
from mclnf_edge.captures.transforms import (
    frame_name,
    frames_of,
    picture_path,
    read_matrix,
    split_of_file,
    transforms_files,
)
from mclnf_edge.errors import CaptureError
from mclnf_edge.geometry import RIGID_TOLERANCE, nearest_rotation, pose_from
from mclnf_edge.types import Matrix4, Split, WorldFrame

_SPLIT_UNIT_M: Final = 100.0
_SCALES: Final = (0.01, 1.0)
_PICTURES: Final = (".png", ".jpg", ".jpeg")


def is_matrixcity(file: Path, content: Mapping[str, Any]) -> bool:
    """Whether a transforms file is MatrixCity's: `rot_mat` frames, or lying at `pose/<block>/`."""
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames or not isinstance(frames[0], dict):
        return False
    if "rot_mat" in frames[0]:
        return True
    apart = split_of_file(file) is not None or file.stem == "transforms_train_dense"
    return apart and file.absolute().parent.parent.name == "pose"


def open_matrixcity(path: Path) -> Capture:
    """Open a block's folder or one of its JSON files.

    A raw training block brings the pictures of `../../test/<block>_test` along as `test`, when they
    are there. The split form takes `transforms_train.json` and `transforms_test.json`
    (`transforms_train_dense.json` only when named itself). Depth EXR files, found beside the
    pictures or in `<block>_depth`, are used when OpenEXR is installed. Raises CaptureError.
    """
    files = transforms_files(path) if path.is_dir() else [path]
    notes: list[str] = []
    records: list[Record] = []
    for file in files:
        content = load_json(file)
        if "rot_mat" in (frames_of(content, str(file)) or [{}])[0]:
            records += _raw_with_test(file, content)
        else:
            records += _split_records(file, content)
    if any(_depth_file(r.image) for r in records):
        if importlib.util.find_spec("OpenEXR") is None:
            notes.append("depth EXR files are left out: the package OpenEXR is not installed")
        else:
            records = [_with_depth(record) for record in records]
    return make_capture(files[0].resolve().parent.name, "matrixcity", WorldFrame(), records, notes)


def _raw_with_test(file: Path, content: dict[str, Any]) -> list[Record]:
    block = file.absolute().parent
    if block.parent.name == "test" or block.name.endswith("_test"):
        return _raw_records(file, content, "test")
    test = block.parent.parent / "test" / f"{block.name}_test" / "transforms.json"
    if not test.is_file():
        return _raw_records(file, content, None)
    return _raw_records(file, content, "train") + _raw_records(test, load_json(test), "test")


def _raw_records(file: Path, content: dict[str, Any], split: Split | None) -> list[Record]:
    return [_raw_record(file, content, f, split) for f in frames_of(content, str(file))]


def _raw_record(
    file: Path, content: dict[str, Any], frame: dict[str, Any], split: Split | None
) -> Record:
    index = frame.get("frame_index")
    if not isinstance(index, int):
        raise CaptureError(f"{file}: expected a whole 'frame_index', received {index!r}")
    where = f"{file}: frame {index}"
    stem = file.parent / f"{index:04d}"
    pictures = [stem.with_suffix(suffix) for suffix in _PICTURES]
    image = next((p for p in pictures if p.is_file()), pictures[0])
    return Record(
        name=f"{file.absolute().parent.name}/{image.name}",
        image=image,
        camera=camera_from_keys(content, where, _size(content, image)),
        T_world_camera=_pose(read_matrix(frame, "rot_mat", where), 1.0, where),
        split=split,
    )


def _split_records(file: Path, content: dict[str, Any]) -> list[Record]:
    split = split_of_file(file) or "train"
    records = []
    for frame in frames_of(content, str(file)):
        file_path = str(frame.get("file_path"))
        where = f"{file}: frame {file_path!r}"
        image = picture_path(file, file_path)
        pose = _pose(read_matrix(frame, "transform_matrix", where), _SPLIT_UNIT_M, where)
        camera = camera_from_keys({**content, **frame}, where, _size(content, image))
        records.append(Record(frame_name(file_path), image, camera, pose, split=split))
    return records


def _size(keys: Mapping[str, Any], image: Path) -> tuple[int, int] | None:
    return None if "w" in keys or not image.is_file() else picture_size(image)


def _pose(written: Matrix4, unit_m: float, where: str) -> Matrix4:
    """Rotation divided by its scale (1/100 or 1), position in metres, padding row replaced."""
    determinant = float(np.linalg.det(written[:3, :3]))
    scale = float(np.cbrt(determinant))
    if not any(abs(scale / expected - 1.0) < 0.01 for expected in _SCALES):
        raise CaptureError(
            f"{where}: expected a rotation times 1/100 or 1, received scale {scale:.4g}"
        )
    rotation = nearest_rotation(written[:3, :3])
    if np.abs(written[:3, :3] / scale - rotation).max() > RIGID_TOLERANCE:
        raise CaptureError(f"{where}: the 3x3 part is not a rotation times a number")
    return pose_from(rotation, written[:3, 3] * unit_m)


def _depth_file(image: Path) -> Path | None:
    """The EXR beside a picture, in the block's `_depth` folder, or in the `_depth` copy of it all.

    The published archives hold `small_city_depth/aerial/train/<block>_depth/NNNN.exr` beside
    `small_city/aerial/train/<block>/NNNN.png`.
    """
    image = image.resolve()
    name, block = image.with_suffix(".exr").name, image.parent
    beside = [image.with_suffix(".exr"), block.with_name(f"{block.name}_depth") / name]
    if len(block.parents) > 3:
        kind, view, city = block.parents[0].name, block.parents[1].name, block.parents[2]
        apart = city.with_name(f"{city.name}_depth") / view / kind / f"{block.name}_depth" / name
        beside.append(apart)
    return next((p for p in beside if p.is_file()), None)


def _with_depth(record: Record) -> Record:
    depth = _depth_file(record.image)
    return record if depth is None else replace(record, depth=lambda: exr_depth(depth))
