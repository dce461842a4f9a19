"""The EXIF fields that give a picture's relative brightness, against blocks laid out by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclnf_edge.captures.exif import exposure_from_jpeg
from mclnf_edge.images import encode_image

SHORT, RATIONAL, SRATIONAL = 3, 5, 10
TIME = (0x829A, RATIONAL, (1, 250))
F_NUMBER = (0x829D, RATIONAL, (28, 10))
ISO = (0x8827, SHORT, (400,))


def tiff(fields: list[tuple[int, int, tuple[int, ...]]], order: str = "<") -> bytes:
    """A TIFF block: one directory that points to an EXIF directory with these fields."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    root = struct.pack(order + "HHHIII", 1, 0x8769, 4, 1, 26, 0)
    data_at = 26 + 2 + 12 * len(fields) + 4
    entries, data = b"", b""
    for tag, kind, values in fields:
        form = {SHORT: "H", RATIONAL: "I", SRATIONAL: "i"}[kind]
        body = struct.pack(f"{order}{len(values)}{form}", *values)
        entries += struct.pack(order + "HHI", tag, kind, len(values) if kind == SHORT else 1)
        if len(body) <= 4:
            entries += body.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "I", data_at + len(data))
            data += body
    return head + root + struct.pack(order + "H", len(fields)) + entries + bytes(4) + data


def jpeg(block: bytes) -> bytes:
    data = encode_image(np.zeros((8, 8, 3), np.uint8), "jpeg")
    app1 = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    return data[:2] + app1 + data[2:]


@pytest.mark.parametrize("order", ["<", ">"])
def test_exposure_by_hand(order: str) -> None:
    """1/250 s at ISO 400 and f/2.8: 400 / 250 / 7.84 = 0.204."""
    data = jpeg(tiff([TIME, F_NUMBER, ISO], order))
    assert exposure_from_jpeg(data) == pytest.approx(400 / 250 / 2.8**2)


def test_apex_values() -> None:
    """Tv = 8 is 1/256 s, Av = 4 is f/4."""
    fields = [(0x9201, SRATIONAL, (8, 1)), (0x9202, RATIONAL, (4, 1)), ISO]
    assert exposure_from_jpeg(jpeg(tiff(fields))) == pytest.approx(400 / 256 / 16)


def test_one_stop_is_a_factor_of_two() -> None:
    slower = exposure_from_jpeg(jpeg(tiff([(0x829A, RATIONAL, (1, 125)), F_NUMBER, ISO])))
    faster = exposure_from_jpeg(jpeg(tiff([TIME, F_NUMBER, ISO])))
    assert slower is not None
    assert faster is not None
    assert slower / faster == pytest.approx(2.0)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [TIME, F_NUMBER],
        [TIME, ISO],
        [F_NUMBER, ISO],
        [(0x829A, RATIONAL, (1, 0)), F_NUMBER, ISO],
        [(0x829A, RATIONAL, (0, 1)), F_NUMBER, ISO],
        [TIME, (0x829D, RATIONAL, (0, 10)), ISO],
        [TIME, F_NUMBER, (0x8827, SHORT, (0,))],
    ],
)
def test_missing_or_zero_fields_give_none(fields: list) -> None:
    assert exposure_from_jpeg(jpeg(tiff(fields))) is None


def test_jpeg_without_exif() -> None:
    assert exposure_from_jpeg(encode_image(np.zeros((8, 8, 3), np.uint8), "jpeg")) is None
    assert exposure_from_jpeg(b"") is None


@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_damaged_blocks_never_raise(at: int, value: int, length: int) -> None:
    block = bytearray(tiff([TIME, F_NUMBER, ISO]))
    block[at % len(block)] = value
    result = exposure_from_jpeg(jpeg(bytes(block[:length])))
    assert result is None or result > 0


@given(st.binary(max_size=120))
def test_noise_never_raises(block: bytes) -> None:
    exposure_from_jpeg(jpeg(b"II*\0" + block))
    exposure_from_jpeg(b"\xff\xd8" + block)
