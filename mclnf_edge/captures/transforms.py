"""Reader of nerfstudio and instant-ngp `transforms.json` captures.

Poses are taken exactly as written: camera-to-world, opengl camera axes, z up, in the file's own
units and origin. `applied_transform`, `applied_scale`, `scale`, `offset` and
`orientation_override` describe what was or would be done to them by other programs; they are kept
in each frame's `meta` and never applied or undone, so nothing is recentred, rescaled or reoriented.
`exposure_gain` (estimated from pixels) goes to `meta` too and never into `Frame.exposure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from mclnf_edge.captures.capture import Capture, Record, make_capture, picture_size
from mclnf_edge.captures.depth import depth_png, mask_png
from mclnf_edge.captures.intrinsics import INTRINSIC_KEYS, camera_from_keys, load_json, number
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.types import Matrix4, Split, WorldFrame
from mclnf_edge.world_frames import check_world

_SPLIT_NAMES: Final[tuple[Split, ...]] = ("train", "val", "test")
_POSE_NOTES: Final = ("applied_transform", "applied_scale", "scale", "offset")
_HANDLED: Final = INTRINSIC_KEYS | {
    "file_path",
    "transform_matrix",
    "timestamp",
    "split",
    "exposure",
    "height_m",
    "task",
    "depth_file_path",
    "depth_path",
    "mask_path",
}


def open_transforms(path: Path) -> Capture:
    """Open a `transforms.json`, or all of `transforms_{train,val,test}.json` of a folder.

    Per frame, beside the usual keys: `split`, `timestamp` (s), `exposure` (relative brightness,
    any common scale), `height_m` (camera above ground), `task` (its name), `gps` and others kept in
    `meta`. Top level: `crs` names the world frame, either "EPSG:<code>" or {"type": "ENU",
    "origin_lat", "origin_lon", "origin_alt"} or {"type": "EPSG:<code>", "origin": [easting,
    northing, height]}; without it the frame is anonymous. Raises CaptureError.
    """
    files = transforms_files(path)
    records: list[Record] = []
    notes: list[str] = []
    contents = [load_json(file) for file in files]
    for file, content in zip(files, contents, strict=True):
        read, said = _read_file(file, content)
        records += read
        notes += [note for note in said if note not in notes]
    worlds = {read_world(content, str(file)) for file, content in zip(files, contents, strict=True)}
    if len(worlds) > 1:
        raise CaptureError(f"{path}: its files name different world frames")
    return make_capture(files[0].resolve().parent.name, "transforms", worlds.pop(), records, notes)


def transforms_files(path: Path) -> list[Path]:
    """The file itself, `transforms.json` of a folder, or its one file per split."""
    if path.is_file():
        return [path]
    single = path / "transforms.json"
    if single.is_file():
        return [single]
    return [f for s in _SPLIT_NAMES if (f := path / f"transforms_{s}.json").is_file()]


def split_of_file(file: Path) -> Split | None:
    """`train`, `val` or `test` when the file is a `transforms_<split>.json`."""
    word = file.stem.removeprefix("transforms_")
    return next((split for split in _SPLIT_NAMES if split == word), None)


def frames_of(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The list under `frames`, each entry an object; CaptureError otherwise."""
    frames = content.get("frames")
    if not isinstance(frames, list) or not all(isinstance(f, dict) for f in frames):
        raise CaptureError(f"{where}: expected a list of objects under 'frames'")
    return frames


def read_matrix(frame: Mapping[str, Any], key: str, where: str) -> Matrix4:
    """A 3x4 or 4x4 matrix of finite numbers as (4, 4) float64; its last row is left as written."""
    try:
        matrix = np.array(frame.get(key), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        matrix = np.empty(0)
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, [0.0, 0.0, 0.0, 1.0]])
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise CaptureError(f"{where}: expected a 4x4 or 3x4 matrix of finite numbers in {key!r}")
    return matrix


def read_world(content: Mapping[str, Any], where: str) -> WorldFrame:
    """The world frame named by `crs`, anonymous without it; CaptureError when it is none."""
    crs = content.get("crs")
    if crs is None:
        return WorldFrame()
    keys = {"type": crs} if isinstance(crs, str) else crs
    if not isinstance(keys, dict) or keys.get("units", "m") != "m":
        raise CaptureError(f"{where}: expected 'crs' as a name or an object in metres, got {crs!r}")
    kind = keys.get("type")
    if kind == "ENU":
        names = ("origin_lat", "origin_lon", "origin_alt")
        world = WorldFrame("local-enu", _triple(keys, names, f"{where}: crs"))
    else:
        listed = keys.get("origin")
        if listed is not None and not (isinstance(listed, list) and len(listed) == 3):
            raise CaptureError(f"{where}: crs: expected origin as 3 numbers, received {listed!r}")
        axes = dict(zip("xyz", listed, strict=True)) if listed else None
        world = WorldFrame(str(kind), _triple(axes, "xyz", f"{where}: crs") if axes else None)
    try:
        return check_world(world)
    except FrameRejected as error:
        raise CaptureError(f"{where}: {error}") from None


def _triple(
    keys: Mapping[str, Any], names: Sequence[str], where: str
) -> tuple[float, float, float]:
    x, y, z = (number(keys, name, where) for name in names)
    return x, y, z


def frame_name(file_path: str) -> str:
    """The written path without leading "./" and "../" and with forward slashes."""
    parts = file_path.replace("\\", "/").split("/")
    while parts and parts[0] in (".", ".."):
        parts.pop(0)
    return "/".join(parts)


def _read_file(file: Path, content: dict[str, Any]) -> tuple[list[Record], list[str]]:
    frames = frames_of(content, str(file))
    listed = _listed_splits(content, file)
    notes = [f"{key} is kept in meta, not applied" for key in _POSE_NOTES if key in content]
    if listed:
        used = [f for f in frames if str(f.get("file_path")) in listed]
        if len(used) < len(listed):
            missing = sorted(set(listed) - {str(f.get("file_path")) for f in used})
            raise CaptureError(f"{file}: listed in a split but not under 'frames': {missing[:3]}")
        if len(used) < len(frames):
            notes.append(f"{len(frames) - len(used)} frames in no *_filenames list are left out")
        frames = used
    shared: dict[str, Any] = {k: content[k] for k in _POSE_NOTES if k in content}
    return [_read_record(file, content, frame, listed, shared) for frame in frames], notes


def _listed_splits(content: Mapping[str, Any], file: Path) -> dict[str, Split]:
    listed: dict[str, Split] = {}
    for split in _SPLIT_NAMES:
        names = content.get(f"{split}_filenames", [])
        if not isinstance(names, list):
            raise CaptureError(f"{file}: expected a list under '{split}_filenames'")
        listed |= dict.fromkeys(map(str, names), split)
    return listed


def _read_record(
    file: Path,
    content: dict[str, Any],
    frame: dict[str, Any],
    listed: Mapping[str, Split],
    shared: Mapping[str, Any],
) -> Record:
    file_path = frame.get("file_path")
    if not isinstance(file_path, str) or not file_path:
        raise CaptureError(f"{file}: a frame without 'file_path'")
    where = f"{file}: frame {file_path!r}"
    if "transform_matrix" not in frame and "transform_matrix_start" in frame:
        raise CaptureError(f"{where}: rolling-shutter poses (transform_matrix_start) not supported")
    image = picture_path(file, file_path)
    keys = {**content, **frame}
    sized = "w" in keys or not image.is_file()
    return Record(
        name=frame_name(file_path),
        image=image,
        camera=camera_from_keys(keys, where, None if sized else picture_size(image)),
        T_world_camera=read_matrix(frame, "transform_matrix", where),
        timestamp=number(frame, "timestamp", where) if "timestamp" in frame else None,
        split=_split(frame, listed.get(file_path) or split_of_file(file), where),
        exposure=_exposure(frame, where),
        height_m=number(frame, "height_m", where) if "height_m" in frame else None,
        task=_task(frame, where),
        depth=_depth_reader(file, content, frame),
        mask=_mask_reader(file, frame),
        meta={**shared, **{k: v for k, v in frame.items() if k not in _HANDLED}},
    )


def picture_path(file: Path, file_path: str) -> Path:
    """Where a `file_path` of this JSON file lies; Windows separators are understood."""
    return file.parent / file_path.replace("\\", "/")


def _split(frame: Mapping[str, Any], fallback: Split | None, where: str) -> Split | None:
    split = frame.get("split", fallback)
    if split not in (*_SPLIT_NAMES, None):
        raise CaptureError(f"{where}: expected split train, val or test, received {split!r}")
    return cast("Split | None", split)


def _task(frame: Mapping[str, Any], where: str) -> str | None:
    task = frame.get("task")
    if task is not None and not (isinstance(task, str) and task):
        raise CaptureError(f"{where}: expected the name of a task under 'task', received {task!r}")
    return task


def _exposure(frame: Mapping[str, Any], where: str) -> float | None:
    if "exposure" not in frame:
        return None
    exposure = number(frame, "exposure", where)
    if exposure <= 0.0:
        raise CaptureError(f"{where}: expected a positive exposure, received {exposure}")
    return exposure


def _depth_reader(file: Path, content: Mapping[str, Any], frame: Mapping[str, Any]) -> Any:
    """nerfstudio `depth_file_path` (mm unless scaled) or instant-ngp `depth_path`."""
    if "depth_file_path" in frame:
        scale = number(content, "depth_unit_scale_factor", str(file), 1e-3)
        path = picture_path(file, str(frame["depth_file_path"]))
    elif "depth_path" in frame and "integer_depth_scale" in content:
        scale = number(content, "integer_depth_scale", str(file))
        path = picture_path(file, str(frame["depth_path"]))
    else:
        return None
    return lambda: depth_png(path, scale)


def _mask_reader(file: Path, frame: Mapping[str, Any]) -> Any:
    if "mask_path" not in frame:
        return None
    path = picture_path(file, str(frame["mask_path"]))
    return lambda: mask_png(path)
