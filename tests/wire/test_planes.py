"""Rendered planes and pictures: whole, bounded, and refused when they lie."""

from __future__ import annotations

import dataclasses
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclnf_edge.errors import ProtocolError
from mclnf_edge.wire.messages import PlaneType, RenderReply, ReplyEncoding
from mclnf_edge.wire.planes import pack_plane, render_of, unpack_plane

RNG = np.random.default_rng(5)
RGB = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def reply(encoding: ReplyEncoding) -> RenderReply:
    """The picture RGB as the daemon would send it."""
    suffix = {"png": ".png", "jpeg": ".jpg"}.get(encoding)
    bgr = np.ascontiguousarray(RGB[:, :, ::-1])
    data = cv2.imencode(suffix, bgr)[1].tobytes() if suffix else RGB.tobytes()
    return RenderReply(data=data, encoding=encoding, width=20, height=12)


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["float32", "float16"]))
def test_plane_round_trip_keeps_nan(height: int, width: int, kind: PlaneType) -> None:
    plane = RNG.normal(50, 30, (height, width)).astype(np.float32)
    plane[0, 0] = np.nan
    received = unpack_plane(pack_plane(plane, kind), kind, height, width)
    np.testing.assert_array_equal(received, plane.astype(kind).astype(np.float32))


def test_transposed_plane_keeps_its_rows() -> None:
    plane = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(
        unpack_plane(pack_plane(plane, "float32"), "float32", 3, 2), plane
    )


@pytest.mark.parametrize("size", [0, 95, 97, 10_000_000])
def test_plane_of_another_size_is_refused_without_inflating_it(size: int) -> None:
    data = zlib.compress(bytes(size), 9)
    with pytest.raises(ProtocolError, match="plane: expected 96 bytes for 6x4, got (0|95|97)"):
        unpack_plane(data, "float32", 4, 6)


def test_plane_that_is_no_zlib_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected zlib data"):
        unpack_plane(b"plain", "float32", 1, 1)
    whole = pack_plane(np.zeros((1, 1), np.float32), "float32")
    with pytest.raises(ProtocolError, match="plane: expected 4 bytes"):
        unpack_plane(whole[:-3], "float32", 1, 1)


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_lossless_picture_is_the_same_rgb(encoding: ReplyEncoding) -> None:
    render = render_of(reply(encoding))
    np.testing.assert_array_equal(render.rgb, RGB)
    assert np.isnan(render.depth).all() and render.known.shape == (12, 20)


def test_jpeg_keeps_the_order_of_colours() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :, 0] = 200
    data = cv2.imencode(".jpg", np.ascontiguousarray(red[:, :, ::-1]))[1].tobytes()
    received = render_of(RenderReply(data=data, encoding="jpeg", width=16, height=16)).rgb
    assert np.abs(received.astype(int) - red).max() <= 3


@pytest.mark.parametrize("encoding", ["png", "jpeg", "raw"])
def test_picture_of_another_size_or_none_is_refused(encoding: ReplyEncoding) -> None:
    good = reply(encoding)
    for bad in (dataclasses.replace(good, width=21), dataclasses.replace(good, data=b"no picture")):
        with pytest.raises(ProtocolError, match="image: "):
            render_of(bad)


def test_nothing_and_sound_are_no_pictures() -> None:
    for bad in (b"", b"RIFF"):
        with pytest.raises(ProtocolError, match="expected"):
            render_of(dataclasses.replace(reply("png"), data=bad))
    with pytest.raises(ProtocolError, match="received sound"):
        render_of(RenderReply(data=b"RIFF", encoding="wav"))


def test_absurd_size_is_refused_before_planes_are_made() -> None:
    with pytest.raises(ProtocolError, match="expected"):
        render_of(dataclasses.replace(reply("png"), width=65_535, height=65_535))
