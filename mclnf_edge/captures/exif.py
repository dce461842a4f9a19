"""Relative brightness from a JPEG's EXIF block: shutter time, ISO and aperture.

Only the few fields needed are read (TIFF 6.0 directories, EXIF 2.3 tags), within bounds, so that a
damaged block gives None and never an error: a picture without EXIF is as good as any.
"""

from __future__ import annotations

import math
import struct
from typing import Final

_EXIF_POINTER: Final = 0x8769
_EXPOSURE_TIME: Final = 0x829A
_F_NUMBER: Final = 0x829D
_ISO: Final = 0x8827
_SHUTTER_APEX: Final = 0x9201
_APERTURE_APEX: Final = 0x9202
_SENSITIVITY: Final = 0x8833  # ISOSpeed, used where the 16-bit ISO field overflows
_MAX_ENTRIES: Final = 512
_READERS: Final = {3: "H", 4: "I", 5: "II", 9: "i", 10: "ii"}
"""TIFF field types: short, long, rational, signed long, signed rational."""


def exposure_from_jpeg(data: bytes) -> float | None:
    """shutter_s * ISO / f_number² of a JPEG, or None when one of the three is not recorded.

    Shutter and aperture may be given directly or as APEX values (t = 2^−Tv, N = 2^(Av/2)).
    """
    block = _exif_block(data)
    if block is None:
        return None
    try:
        tags = _read_tags(block)
    except (struct.error, OverflowError):
        return None
    shutter_s = tags.get(_EXPOSURE_TIME) or _power(-tags.get(_SHUTTER_APEX, math.nan))
    f_number = tags.get(_F_NUMBER) or _power(tags.get(_APERTURE_APEX, math.nan) / 2.0)
    iso = tags.get(_ISO, math.nan)
    if iso >= 65535 or not iso > 0:
        iso = tags.get(_SENSITIVITY, iso)
    exposure = shutter_s * iso / f_number**2 if f_number > 0 else math.nan
    return exposure if 0.0 < exposure < math.inf else None


def _power(exponent: float) -> float:
    return 2.0**exponent if abs(exponent) < 64 else math.nan


def _exif_block(data: bytes) -> bytes | None:
    """The TIFF block of the first APP1 segment that starts with "Exif"."""
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) >= at + 4:
        marker = data[at + 1]
        if marker in (0xD9, 0xDA):
            return None
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : at + 2 + length]
        at += 2 + length
    return None


def _read_tags(block: bytes) -> dict[int, float]:
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or struct.unpack_from(order + "H", block, 2)[0] != 42:
        return {}
    (first,) = struct.unpack_from(order + "I", block, 4)
    tags = _read_directory(block, first, order)
    if _EXIF_POINTER in tags:
        tags |= _read_directory(block, int(tags[_EXIF_POINTER]), order)
    return tags


def _read_directory(block: bytes, at: int, order: str) -> dict[int, float]:
    """First value of every numeric entry of the directory at this offset."""
    (count,) = struct.unpack_from(order + "H", block, at)
    tags = {}
    for i in range(min(count, _MAX_ENTRIES)):
        entry = at + 2 + 12 * i
        tag, kind, values = struct.unpack_from(order + "HHI", block, entry)
        if kind in _READERS and values >= 1:
            value = _read_value(block, entry + 8, order, _READERS[kind], values)
            if value is not None:
                tags[tag] = value
    return tags


def _read_value(block: bytes, at: int, order: str, reader: str, values: int) -> float | None:
    if struct.calcsize(order + reader) * values > 4:  # longer values lie elsewhere
        (at,) = struct.unpack_from(order + "I", block, at)
    parts = struct.unpack_from(order + reader, block, at)
    if len(parts) == 1:
        return float(parts[0])
    return float(parts[0]) / float(parts[1]) if parts[1] else None
