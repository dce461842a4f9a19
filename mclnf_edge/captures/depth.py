"""Depth maps and masks of captures, brought into the form that frames carry."""

from __future__ import annotations

import importlib
import math
import struct
from pathlib import Path
from typing import Any, Final, cast

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import MAX_PIXELS
from mclnf_edge.images import encode_image, image_info

_FLOAT16_INVALID: Final = 65504.0


def depth_png(path: Path, depth_scale_m: float) -> tuple[bytes, float]:
    """The bytes of a 16-bit one-channel PNG of z-depth, as they are, and its scale in metres."""
    data = _read(path)
    if _png_form(data) != (16, 0):
        raise FrameRejected(f"depth {path}: expected a PNG of one 16-bit channel")
    return data, depth_scale_m


def mask_png(path: Path) -> bytes:
    """A mask as an 8-bit one-channel PNG: the file's own bytes, or re-encoded from another form."""
    data = _read(path)
    if _png_form(data) == (8, 0):
        return data
    info = image_info(data)
    if info.width * info.height > MAX_PIXELS:
        raise FrameRejected(f"mask {path}: more than {MAX_PIXELS} pixels")
    grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise FrameRejected(f"mask {path}: does not decode")
    # Half way: a lossy mask has grey noise around both black and white.
    return encode_image(np.where(grey >= 128, 255, 0).astype(np.uint8), "png")


def exr_depth(path: Path) -> tuple[bytes, float]:
    """MatrixCity depth (EXR, z-depth in centimetres) as a 16-bit PNG and its scale in metres.

    The unit is 1 cm, or as much more as the farthest point needs. Not finite, not positive or the
    float16 limit 65504 means unknown. Needs the package OpenEXR; CaptureError without it.
    """
    centimetres = _read_exr(path).astype(np.float64)
    known = np.isfinite(centimetres) & (centimetres > 0) & (centimetres != _FLOAT16_INVALID)
    farthest = float(centimetres[known].max()) if known.any() else 1.0
    unit_cm = max(1.0, farthest / 65535.0)
    units = np.where(known, np.clip(np.rint(centimetres / unit_cm), 1, 65535), 0)
    return encode_image(units.astype(np.uint16), "png"), unit_cm / 100.0


def _read_exr(path: Path) -> npt.NDArray[Any]:
    try:
        openexr = importlib.import_module("OpenEXR")
    except ImportError:
        raise CaptureError(f"{path}: reading EXR depth needs `pip install OpenEXR`") from None
    try:
        first, last = openexr.File(str(path), header_only=True).header()["dataWindow"]
        if math.prod(int(b) - int(a) + 1 for a, b in zip(first, last, strict=True)) > MAX_PIXELS:
            raise CaptureError(f"{path}: more than {MAX_PIXELS} pixels")
        channels = openexr.File(str(path), separate_channels=True).channels()
    except RuntimeError as error:
        raise CaptureError(f"{path}: cannot read EXR ({error})") from None
    for name in ("Z", "R", "Y", "B", "V"):
        if name in channels:
            return cast("npt.NDArray[Any]", channels[name].pixels)
    raise CaptureError(f"{path}: expected a depth channel Z, R, Y, B or V, found {list(channels)}")


def _png_form(data: bytes) -> tuple[int, int] | None:
    """(bit depth, colour type) of a PNG, where colour type 0 is one grey channel."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        return None
    return cast(tuple[int, int], struct.unpack_from(">BB", data, 24))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CaptureError(f"{path}: cannot read ({error})") from None
