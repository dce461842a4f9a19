"""Headers, decoding limits and undistortion, on pictures made here and on analytic cameras."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mclnf_edge.errors import FrameRejected
from mclnf_edge.images import (
    check_decodes,
    check_image,
    decode_depth,
    decode_image,
    decode_mask,
    encode_image,
    image_info,
    undistort,
    undistort_layer,
)
from mclnf_edge.types import Camera

CAMERA = Camera(37, 23, 40.0, 40.0, 18.5, 11.5)
WIDE = Camera(320, 240, 200.0, 210.0, 161.3, 118.2)
FILES = ("jpeg", "png", "webp")


def ramp(camera: Camera = CAMERA) -> np.ndarray:
    """Red grows with the column, green with the row, blue is 60."""
    rgb = np.full((camera.height, camera.width, 3), 60, np.uint8)
    rgb[..., 0] = np.linspace(0, 250, camera.width)
    rgb[..., 1] = np.linspace(0, 250, camera.height)[:, None]
    return rgb


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that claims a size, whatever its pixel data holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("encoding", FILES)
@given(width=st.integers(1, 70), height=st.integers(1, 70))
@settings(max_examples=15, deadline=None)
def test_header_gives_the_size(encoding: str, width: int, height: int) -> None:
    data = encode_image(np.zeros((height, width, 3), np.uint8), encoding)
    assert image_info(data) == (encoding, width, height)


def test_extended_and_lossless_webp_headers() -> None:
    """Sizes 300x200 in the two other WebP forms, bytes laid out by hand."""
    extended = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + bytes([43, 1, 0, 199, 0, 0])
    assert image_info(extended) == ("webp", 300, 200)
    bits = struct.pack("<I", 299 | 199 << 14)
    assert image_info(b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + bits) == ("webp", 300, 200)


def test_jpeg_thumbnail_is_not_mistaken_for_the_picture() -> None:
    """An APP1 segment that holds a whole small JPEG is stepped over."""
    thumbnail = encode_image(np.zeros((8, 8, 3), np.uint8), "jpeg")
    data = encode_image(ramp(), "jpeg")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert image_info(data[:2] + segment + data[2:]) == ("jpeg", 37, 23)


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(20), b"\xff\xd8\xff", b"RIFF1234WEBPABCD"])
def test_other_headers_are_refused(data: bytes) -> None:
    with pytest.raises(FrameRejected, match="image:"):
        image_info(data)


@given(data=st.binary(max_size=60), start=st.sampled_from([b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"]))
def test_any_header_is_answered_or_refused(data: bytes, start: bytes) -> None:
    with suppress(FrameRejected):
        assert image_info(start + data).encoding in FILES


@pytest.mark.parametrize(("encoding", "tolerance"), [("png", 0), ("jpeg", 6), ("webp", 12)])
def test_decoded_colours_are_rgb(encoding: str, tolerance: int) -> None:
    rgb = ramp()
    back = decode_image(encode_image(rgb, encoding), encoding, CAMERA)
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - rgb)[..., :].mean() <= tolerance


def test_raw_bytes_are_the_picture() -> None:
    assert np.array_equal(decode_image(ramp().tobytes(), "raw", CAMERA), ramp())
    with pytest.raises(FrameRejected, match="raw RGB needs 2553 bytes, received 10"):
        decode_image(bytes(10), "raw", CAMERA)


def test_grey_pictures_become_rgb() -> None:
    grey = ramp()[..., 0]
    rgb = decode_image(encode_image(grey, "png"), "png", CAMERA)
    assert np.array_equal(rgb, np.repeat(grey[..., None], 3, axis=2))


def test_exif_orientation_is_not_applied() -> None:
    """Orientation 6 (turn right) would swap the sides; the stored pixels are what poses mean."""
    tiff = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
    app1 = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff
    data = encode_image(ramp(), "jpeg")
    turned = decode_image(data[:2] + app1 + data[2:], "jpeg", CAMERA)
    assert np.array_equal(turned, decode_image(data, "jpeg", CAMERA))


@pytest.mark.parametrize("encoding", [*FILES, "raw"])
def test_a_check_refuses_what_decoding_refuses(encoding: str) -> None:
    """500 damaged files; a JPEG is judged by an eighth of its pixels."""
    random = np.random.default_rng(2)
    whole = encode_image(random.integers(0, 255, (23, 37, 3), np.uint8), encoding)
    check_decodes(whole, encoding, CAMERA)
    outcomes = set()
    for _ in range(500):
        data = bytearray(whole)
        for at in random.integers(0, len(data), random.integers(1, 12)):
            data[at] = random.integers(0, 256)
        both = [refusal(judge, bytes(data), encoding) for judge in (check_decodes, decode_image)]
        assert both[0] == both[1]
        outcomes.add(both[0])
    assert (True in outcomes) == (encoding != "raw")  # any bytes of the right number are raw pixels


def refusal(judge: Callable[..., object], data: bytes, encoding: str) -> bool:
    try:
        judge(data, encoding, CAMERA)
    except FrameRejected:
        return True
    return False


@pytest.mark.parametrize("encoding", FILES)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(encoding: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (23, 37, 3), np.uint8)
    data = encode_image(noise, encoding)
    with pytest.raises(FrameRejected, match="cut short|breaks off"):
        decode_image(data[: int(len(data) * share)], encoding, CAMERA)


def test_damaged_pixels_are_refused() -> None:
    data = bytearray(encode_image(ramp(), "png"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(FrameRejected, match="decode"):
        decode_image(bytes(data), "png", CAMERA)


def test_stated_and_real_size_must_agree() -> None:
    data = encode_image(ramp(), "png")
    with pytest.raises(FrameRejected, match="camera says 40x23, the file is 37x23"):
        decode_image(data, "png", replace(CAMERA, width=40))
    with pytest.raises(FrameRejected, match="expected jpeg, received png"):
        decode_image(data, "jpeg", CAMERA)


def test_bomb_is_refused_before_it_is_decoded() -> None:
    """27 kB of PNG that claim 30,000x30,000 pixels, with a camera that says the same."""
    bomb = png(30_000, 30_000, bytes(90_001 * 300))
    assert len(bomb) < 60_000
    with pytest.raises(FrameRejected, match="more than 67108864 pixels"):
        check_image(bomb, "png", Camera(30_000, 30_000, 3e4, 3e4, 1.5e4, 1.5e4))
    with pytest.raises(FrameRejected, match="more than 67108864 pixels"):
        check_image(bomb, "png", CAMERA)


def test_header_that_lies_about_its_pixels_is_refused() -> None:
    with pytest.raises(FrameRejected, match="decode"):
        decode_image(png(37, 23, bytes(50)), "png", CAMERA)


def test_jpeg_with_thousands_of_scans_is_refused() -> None:
    data = encode_image(ramp(), "jpeg")
    with pytest.raises(FrameRejected, match="600 scans|601 scans"):
        check_image(data[:-2] + b"\xff\xda" * 600 + b"\xff\xd9", "jpeg", CAMERA)


def test_masks_and_depth() -> None:
    mask = np.zeros((23, 37), np.uint8)
    mask[5:, 7:] = 255
    assert np.array_equal(decode_mask(encode_image(mask, "png"), CAMERA), mask > 0)
    units = np.zeros((23, 37), np.uint16)
    units[2, 3] = 43_210
    depth = decode_depth(encode_image(units, "png"), 0.01, CAMERA)
    assert depth[2, 3] == pytest.approx(432.1)
    assert np.isnan(depth[0, 0])
    with pytest.raises(FrameRejected, match="16-bit"):
        decode_depth(encode_image(mask, "png"), 0.01, CAMERA)
    with pytest.raises(FrameRejected, match="scale"):
        decode_depth(encode_image(units, "png"), float("nan"), CAMERA)


# --- undistortion ------------------------------------------------------------------------------


def distorted_pixels(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Where every pinhole pixel centre lies in the distorted picture: the textbook formulas."""
    x = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    y = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fy
    x, y = np.meshgrid(x, y)
    r2 = x * x + y * y
    d = camera.distortion
    if camera.model == "OPENCV":
        radial = 1 + d[0] * r2 + d[1] * r2**2
        xd = x * radial + 2 * d[2] * x * y + d[3] * (r2 + 2 * x * x)
        yd = y * radial + d[2] * (r2 + 2 * y * y) + 2 * d[3] * x * y
    else:
        r = np.sqrt(r2)
        theta = np.arctan(r)
        bent = theta * (1 + sum(k * theta ** (2 * i + 2) for i, k in enumerate(d)))
        xd, yd = x * bent / r, y * bent / r
    return camera.fx * xd + camera.cx, camera.fy * yd + camera.cy


def smooth(columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A picture as a smooth function of continuous pixel coordinates."""
    red = 128 + 60 * np.sin(columns / 19) + 50 * np.cos(rows / 23)
    green = 128 + 100 * np.sin((columns + 2 * rows) / 31)
    return np.stack([red, green, 255 - green], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize(
    "camera",
    [
        replace(WIDE, model="OPENCV", distortion=(0.08, -0.05, 0.002, -0.003)),
        replace(WIDE, model="OPENCV", distortion=(-0.2, 0.03, 0.0, 0.001)),
        replace(WIDE, model="OPENCV_FISHEYE", distortion=(0.02, -0.01, 0.003, 0.0)),
    ],
    ids=["pincushion", "barrel", "fisheye"],
)
def test_undistortion_follows_the_formula(camera: Camera) -> None:
    """The half pixel between OpenCV's pixel centres and ours would show as a clear error here."""
    rows, columns = np.mgrid[: camera.height, : camera.width] + 0.5
    picture = smooth(columns, rows)
    rgb, pinhole, valid = undistort(picture, camera)
    assert pinhole == WIDE
    u, v = distorted_pixels(camera)
    inside = (u > 0.5) & (u < camera.width - 0.5) & (v > 0.5) & (v < camera.height - 0.5)
    assert valid[inside].all()
    assert not valid[(u < -0.5) | (u > camera.width + 0.5)].any()
    error = np.abs(rgb.astype(int) - smooth(u, v).astype(int))[inside]
    assert error.max() <= 2
    half_off = np.abs(smooth(u + 0.5, v + 0.5).astype(int) - smooth(u, v).astype(int))[inside]
    assert half_off.mean() > 2 * error.mean()


def test_pixels_beyond_the_fold_are_not_valid() -> None:
    """r(1 − 0.5 r²) turns back at r = sqrt(2/3): beyond it nothing is known."""
    camera = replace(WIDE, model="OPENCV", distortion=(-0.5, 0.0, 0.0, 0.0))
    _, _, valid = undistort(ramp(camera), camera)
    x = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    y = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fy
    radius = np.hypot(x[None], y[:, None])
    assert radius.max() > 0.9
    assert valid[radius < 0.80].all()
    assert not valid[radius > 0.83].any()


def test_pinhole_pictures_are_left_alone() -> None:
    rgb, camera, valid = undistort(ramp(), CAMERA)
    assert np.array_equal(rgb, ramp())
    assert camera == CAMERA
    assert valid.all()


def test_masks_are_resampled_by_nearest_pixel() -> None:
    camera = replace(WIDE, model="OPENCV", distortion=(0.3, 0.1, 0.0, 0.0))
    _, _, valid = undistort(ramp(camera), camera)
    everything = np.ones((camera.height, camera.width), np.bool_)
    layer = undistort_layer(everything, camera)
    assert layer.dtype == np.bool_
    assert not layer.all()
    assert (layer == valid).mean() > 0.995
