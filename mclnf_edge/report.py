"""What people look at: pictures, depth, fly-throughs, contact sheets and JSON reports on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import ConfigError
from mclnf_edge.images import encode_image

RGB = npt.NDArray[np.uint8]
PICTURES: Final[Mapping[str, Literal["png", "jpeg"]]] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
}
_CAPTION_PX: Final = 22
_GAP_PX: Final = 6
_INK: Final = (30, 30, 30)


class Pair(NamedTuple):
    """A rendered view beside the truth, both (H, W, 3) uint8 of one size, and a line about it."""

    truth: RGB
    rendered: RGB
    caption: str


def write_picture(path: Path, rgb: RGB) -> None:
    """Store (H, W, 3) uint8 as PNG or JPEG by the name's suffix; ConfigError for another one."""
    encoding = PICTURES.get(path.suffix.lower())
    if encoding is None:
        raise ConfigError(f"{path}: expected a name in .png, .jpg or .jpeg")
    write_bytes(path, encode_image(rgb, encoding))


def write_depth(path: Path, depth: npt.NDArray[np.float32]) -> float:
    """Store (H, W) z-depth and return the metres per stored unit.

    `.npy` keeps float32 metres with NaN unknown (unit 1). `.png` is 16-bit with 0 unknown, in
    millimetres, or in the next power of ten that the largest depth needs (65.5 m and up: 1 cm).
    Raises ConfigError for another suffix.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, depth.astype(np.float32), allow_pickle=False)
        return 1.0
    if suffix != ".png":
        raise ConfigError(f"{path}: expected a name in .png (16 bit) or .npy (float32 metres)")
    known = np.isfinite(depth) & (depth > 0)
    largest = float(depth[known].max()) if known.any() else 0.0
    unit_m = 1e-3
    while largest / unit_m > 65534.5:
        unit_m *= 10.0
    units = np.rint(np.where(known, depth, 0.0) / unit_m).astype(np.uint16)
    units[known & (units == 0)] = 1
    write_bytes(path, encode_image(units, "png"))
    return unit_m


def write_video(path: Path, pictures: Iterable[RGB], fps: float = 24.0) -> int:
    """Store pictures of one size as an mp4 and return how many; ConfigError when it cannot be.

    An odd width or height loses its last column or row: the codec wants even numbers. The file
    appears when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.mp4")
    try:
        count = _encode(part, path, pictures, fps)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _encode(part: Path, path: Path, pictures: Iterable[RGB], fps: float) -> int:
    video, count, size = None, 0, (0, 0)
    try:
        for rgb in pictures:
            height, width = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
            if video is None:
                size = (width, height)
                video = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
            if not video.isOpened() or (width, height) != size:
                raise ConfigError(f"{path}: cannot write {width}x{height} into an mp4 of {size}")
            video.write(cv2.cvtColor(rgb[:height, :width], cv2.COLOR_RGB2BGR))
            count += 1
    finally:
        if video is not None:
            video.release()
    if count == 0:
        raise ConfigError(f"{path}: no picture to write")
    return count


def contact_sheet(pairs: Sequence[Pair], columns: int = 2, width: int = 320) -> RGB:
    """Truth and render side by side, each pair with its caption, `columns` pairs to a row.

    Every picture is `width` pixels wide. Raises ConfigError for no pairs.
    """
    if not pairs:
        raise ConfigError("contact sheet: expected at least one pair of pictures, received none")
    tiles = [_tile(pair, width) for pair in pairs]
    columns = min(columns, len(tiles))
    high = max(tile.shape[0] for tile in tiles)
    wide = tiles[0].shape[1]
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full(
        (rows * (high + _GAP_PX) + _GAP_PX, columns * (wide + _GAP_PX) + _GAP_PX, 3), 255, np.uint8
    )
    for i, tile in enumerate(tiles):
        y = _GAP_PX + i // columns * (high + _GAP_PX)
        x = _GAP_PX + i % columns * (wide + _GAP_PX)
        sheet[y : y + tile.shape[0], x : x + wide] = tile
    return sheet


def _tile(pair: Pair, width: int) -> RGB:
    if pair.truth.shape != pair.rendered.shape:
        raise ConfigError(
            f"contact sheet: {pair.caption}: truth is {pair.truth.shape}, "
            f"render is {pair.rendered.shape}"
        )
    height = max(1, round(pair.truth.shape[0] * width / pair.truth.shape[1]))
    tile = np.full((height + _CAPTION_PX, 2 * width + 2, 3), 255, np.uint8)
    for x, picture in ((0, pair.truth), (width + 2, pair.rendered)):
        tile[_CAPTION_PX:, x : x + width] = cv2.resize(
            picture, (width, height), interpolation=cv2.INTER_AREA
        )
    cv2.putText(tile, pair.caption, (2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, _INK, 1, cv2.LINE_AA)
    return tile


def to_json(value: Any) -> str:
    """JSON text of dicts, sequences, numpy values and paths; NaN and infinities become null."""
    return json.dumps(_plain(value), allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Store `value` as indented JSON, as `to_json` reads it."""
    text = json.dumps(_plain(value), allow_nan=False, indent=2)
    write_bytes(path, text.encode() + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that a reader never finds half of it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
