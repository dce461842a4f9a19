"""Pictures as bytes: what their header claims, decoding within limits, and undistortion.

A header is read before anything is decoded, so that a small file claiming a huge picture is refused
before memory is spent. Sizes and pixels are the stored ones: an EXIF orientation is not applied,
because intrinsics and poses belong to the pixels as they lie in the file.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import FrameRejected
from mclnf_edge.geometry import MAX_PIXELS, check_camera
from mclnf_edge.types import Camera, Encoding

RGB = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

_STORED_PIXELS: Final = cv2.IMREAD_IGNORE_ORIENTATION
_JPEG_SIZES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MAX_JPEG_SCANS: Final = 500
"""A progressive JPEG of a few kilobytes can ask for thousands of passes over the picture."""


class ImageInfo(NamedTuple):
    """What a picture's header says."""

    encoding: Encoding
    width: int
    height: int


def image_info(data: bytes) -> ImageInfo:
    """Encoding and stored size of a JPEG, PNG or WebP from its header; nothing is decoded.

    The first part of a file is enough when it reaches the size field. Raises FrameRejected for
    any other format or a header that breaks off.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return ImageInfo("jpeg", *_jpeg_size(data))
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return ImageInfo("png", *struct.unpack_from(">II", data, 16))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return ImageInfo("webp", *_webp_size(data))
    except (struct.error, IndexError):
        raise FrameRejected(
            f"image: the header breaks off within {len(data)} bytes; expected a size"
        ) from None
    raise FrameRejected(f"image: expected JPEG, PNG or WebP, received {data[:12].hex(' ')}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the marker segments to the start-of-frame segment."""
    at = 2
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:  # fill bytes
            at += 1
        lead, marker = data[at], data[at + 1]
        if lead != 0xFF or marker in (0x00, 0xD9, 0xDA):
            raise FrameRejected("image: a JPEG without a start-of-frame segment before its pixels")
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 if 0xD0 <= marker <= 0xD8 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    """Sizes of the three WebP forms: extended, lossless and lossy."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = data[24:27], data[27:30]
        if len(height) < 3:
            raise IndexError
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise FrameRejected(f"image: a WebP of unknown kind {kind!r}")


def check_image(data: bytes, encoding: Encoding, camera: Camera) -> None:
    """Refuse a picture whose header does not match what its sender says; decodes nothing.

    Raises FrameRejected when the encoding or the size differs from `encoding` and `camera`, when
    the picture has more than MAX_PIXELS pixels, or when the file is visibly cut short.
    """
    check_camera(camera)
    if encoding == "raw":
        expected = camera.width * camera.height * 3
        if len(data) != expected:
            raise FrameRejected(f"image: raw RGB needs {expected} bytes, received {len(data)}")
        return
    info = image_info(data)
    if info.encoding != encoding:
        raise FrameRejected(f"image: expected {encoding}, received {info.encoding}")
    if info.width * info.height > MAX_PIXELS:
        raise FrameRejected(f"image: {info.width}x{info.height} is more than {MAX_PIXELS} pixels")
    if (info.width, info.height) != (camera.width, camera.height):
        raise FrameRejected(
            f"image: the camera says {camera.width}x{camera.height}, the file is "
            f"{info.width}x{info.height}"
        )
    _check_whole(data, encoding)


def _check_whole(data: bytes, encoding: Encoding) -> None:
    """Decoders differ in what they make of a truncated file, so it is found here."""
    if encoding == "jpeg":
        scans = data.count(b"\xff\xda")
        if scans > _MAX_JPEG_SCANS:
            raise FrameRejected(f"image: a JPEG with {scans} scans, allowed {_MAX_JPEG_SCANS}")
        whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") > 0
    elif encoding == "png":
        whole = data.find(b"IEND", -64) > 0
    else:
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise FrameRejected(f"image: the {encoding} is cut short at {len(data)} bytes")


def decode_image(data: bytes, encoding: Encoding, camera: Camera) -> RGB:
    """The picture as (H, W, 3) uint8 RGB, of exactly the camera's size.

    Grey pictures are spread to three channels, 16-bit ones reduced to 8, an alpha channel dropped.
    Raises FrameRejected as `check_image` does, and when the file does not decode.
    """
    check_image(data, encoding, camera)
    if encoding == "raw":
        return np.frombuffer(data, np.uint8).reshape(camera.height, camera.width, 3)
    bgr = _decode(data, cv2.IMREAD_COLOR, camera)
    return cast(RGB, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))


def check_decodes(data: bytes, encoding: Encoding, camera: Camera) -> None:
    """Raise FrameRejected where `decode_image` would, for less: of a JPEG an eighth is made.

    All of its entropy-coded data is read, which is what may be broken.
    """
    if encoding != "jpeg":
        decode_image(data, encoding, camera)
        return
    check_image(data, encoding, camera)
    eighth = replace(camera, width=-(-camera.width // 8), height=-(-camera.height // 8))
    _decode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8, eighth)


def decode_mask(data: bytes, camera: Camera) -> Mask:
    """An 8-bit PNG mask as (H, W) bool, True where the picture counts; FrameRejected otherwise."""
    check_image(data, "png", camera)
    counts: Mask = _decode(data, cv2.IMREAD_GRAYSCALE, camera) > 0
    return counts


def decode_depth(data: bytes, depth_scale_m: float, camera: Camera) -> npt.NDArray[np.float32]:
    """A 16-bit PNG of z-depth as (H, W) float32 metres, NaN where unknown (stored 0)."""
    if not 0.0 < depth_scale_m < 1e3:
        raise FrameRejected(f"depth: expected a scale in metres per unit, received {depth_scale_m}")
    check_image(data, "png", camera)
    units = _decode(data, cv2.IMREAD_UNCHANGED, camera)
    if units.dtype != np.uint16 or units.ndim != 2:
        raise FrameRejected(
            f"depth: expected one 16-bit channel, received {units.dtype} of shape {units.shape}"
        )
    metres = units * np.float32(depth_scale_m)
    metres[units == 0] = np.nan
    return np.asarray(metres, np.float32)


def _decode(data: bytes, mode: int, camera: Camera) -> npt.NDArray[Any]:
    # IMREAD_UNCHANGED is −1 and already leaves the orientation alone.
    flags = mode if mode == cv2.IMREAD_UNCHANGED else mode | _STORED_PIXELS
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise FrameRejected(f"image: does not decode ({error})") from None
    if pixels is None:
        raise FrameRejected(f"image: {len(data)} bytes do not decode")
    if pixels.shape[:2] != (camera.height, camera.width):
        raise FrameRejected(
            f"image: the header says {camera.width}x{camera.height}, the pixels are "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return cast("npt.NDArray[Any]", pixels)


def encode_image(pixels: npt.NDArray[Any], encoding: Encoding, quality: int = 92) -> bytes:
    """Encode (H, W, 3) RGB, or (H, W) grey or 16-bit, as JPEG, PNG or WebP bytes.

    `quality` (1 to 100) holds for JPEG and WebP. Raises FrameRejected when it cannot be encoded.
    """
    if encoding == "raw":
        return np.ascontiguousarray(pixels, np.uint8).tobytes()
    options = {
        "jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        "png": [],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
    }
    suffix = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}[encoding]
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    done, data = cv2.imencode(suffix, bgr, options[encoding])
    if not done:
        raise FrameRejected(f"image: {pixels.dtype} {pixels.shape} cannot be stored as {encoding}")
    return bytes(data)


def undistort(rgb: RGB, camera: Camera) -> tuple[RGB, Camera, Mask]:
    """Resample a picture of an OPENCV or OPENCV_FISHEYE camera as a pinhole would have seen it.

    Returns the picture, the PINHOLE camera (same size, focal lengths and principal point, so the
    centre keeps its resolution and wide corners are cut off), and an (H, W) mask that is False
    where the original holds nothing. A PINHOLE picture comes back as it is.
    """
    pinhole = _pinhole(camera)
    if camera.model == "PINHOLE":
        return rgb, pinhole, np.ones(rgb.shape[:2], np.bool_)
    columns, rows, valid = _undistort_maps(camera)
    picture = cv2.remap(rgb, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cast(RGB, picture), pinhole, valid


def reduced(rgb: RGB, camera: Camera, valid: Mask, edge_px: int) -> tuple[RGB, Camera, Mask]:
    """A picture (H, W, 3), its pinhole camera and (H, W) mask, at most `edge_px` wide and high."""
    scale = min(1.0, edge_px / max(camera.width, camera.height))
    if scale == 1:
        return rgb, camera, valid
    w, h = max(round(camera.width * scale), 1), max(round(camera.height * scale), 1)
    small = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA)
    counts = cv2.resize(valid.astype(np.uint8), (w, h), interpolation=cv2.INTER_NEAREST) > 0
    return cast(RGB, small), camera.scaled(w, h), counts


def undistort_layer(layer: npt.NDArray[Any], camera: Camera) -> npt.NDArray[Any]:
    """Resample a mask or depth picture (H, W) like `undistort`, by the nearest pixel.

    What lies outside the original is 0 (False). z-depth stays z-depth: the viewing axis is kept.
    """
    if camera.model == "PINHOLE":
        return layer
    columns, rows, _ = _undistort_maps(camera)
    source = layer.astype(np.uint8) if layer.dtype == np.bool_ else layer
    return cast("npt.NDArray[Any]", cv2.remap(source, columns, rows, cv2.INTER_NEAREST)).astype(
        layer.dtype
    )


def _pinhole(camera: Camera) -> Camera:
    return Camera(camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy)


@lru_cache(maxsize=4)
def _undistort_maps(
    camera: Camera,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Mask]:
    """For every pinhole pixel, where it lies in the distorted picture, and whether it does."""
    # OpenCV counts pixel centres from 0, this package from 0.5.
    k = np.array(
        [[camera.fx, 0.0, camera.cx - 0.5], [0.0, camera.fy, camera.cy - 0.5], [0.0, 0.0, 1.0]]
    )
    size, distortion = (camera.width, camera.height), np.array(camera.distortion)
    maps = cv2.fisheye if camera.model == "OPENCV_FISHEYE" else cv2
    columns, rows = maps.initUndistortRectifyMap(k, distortion, np.eye(3), k, size, cv2.CV_32FC1)
    inside = (columns > -0.5) & (columns < camera.width - 0.5)
    inside &= (rows > -0.5) & (rows < camera.height - 0.5)
    valid = inside & _before_fold(camera)
    for array in (columns, rows, valid):
        array.setflags(write=False)
    return columns, rows, valid


def _before_fold(camera: Camera) -> Mask:
    """Pixels within the radius up to which the distortion polynomial still grows.

    Beyond it the polynomial turns back and would show the same part of the picture twice.
    """
    x = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    y = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fy
    radius = np.hypot(x[None, :], y[:, None])
    samples = np.linspace(0.0, float(radius.max()), 2048)
    falling = np.diff(_distorted_radius(camera, samples)) <= 0.0
    fold = samples[np.argmax(falling)] if falling.any() else np.inf
    return np.asarray(radius <= fold)


def _distorted_radius(camera: Camera, radius: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Radial part of OpenCV's models: normalised distorted radius of an undistorted one."""
    if camera.model == "OPENCV_FISHEYE":
        theta = np.arctan(radius)
        powers = [c * theta ** (2 * i + 2) for i, c in enumerate(camera.distortion)]
        return np.asarray(theta * (1.0 + np.sum(powers, axis=0)))
    k1, k2, _, _, k3, k4, k5, k6 = (*camera.distortion, 0.0, 0.0, 0.0, 0.0)[:8]
    r2 = radius**2
    over = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
    under = 1.0 + r2 * (k4 + r2 * (k5 + r2 * k6))
    return radius * over / under
