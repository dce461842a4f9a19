"""Rendered planes as bytes: what a `RenderReply` carries and how it becomes a `Render` again."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import ProtocolError
from mclnf_edge.types import Camera, Render
from mclnf_edge.wire.messages import PlaneType, RenderReply

_DTYPES: dict[PlaneType, str] = {"float32": "<f4", "float16": "<f2"}


def pack_plane(plane: npt.NDArray[np.floating], kind: PlaneType) -> bytes:
    """A (H, W) plane as little-endian `kind`, zlib level 1. NaN stays NaN."""
    return zlib.compress(np.ascontiguousarray(plane, _DTYPES[kind]).tobytes(), 1)


def unpack_plane(data: bytes, kind: PlaneType, height: int, width: int) -> npt.NDArray[np.float32]:
    """The (H, W) float32 plane in `data`; never inflates more than its stated size."""
    dtype = np.dtype(_DTYPES[kind])
    size = height * width * dtype.itemsize
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ProtocolError(f"plane: expected zlib data: {error}") from error
    if len(raw) != size or not inflater.eof:
        raise ProtocolError(f"plane: expected {size} bytes for {width}x{height}, got {len(raw)}")
    return np.frombuffer(raw, dtype).reshape(height, width).astype(np.float32)


def render_of(reply: RenderReply) -> Render:
    """The `Render` in `reply`. A plane that was not asked for is all NaN.

    Raises ProtocolError when picture or planes are not what their sizes say.
    """
    rgb = _picture(reply)  # checks the size before planes of that size are made
    height, width = rgb.shape[:2]
    absent = np.full((height, width), np.nan, np.float32)
    depth, known = reply.depth, reply.known
    return Render(
        rgb=rgb,
        depth=absent if depth is None else unpack_plane(depth, reply.depth_type, height, width),
        known=absent if known is None else unpack_plane(known, reply.known_type, height, width),
        map_version=reply.map_version,
        modules=reply.modules,
    )


def _picture(reply: RenderReply) -> npt.NDArray[np.uint8]:
    if reply.encoding == "wav":
        raise ProtocolError("render: expected a picture, received sound")
    from mclnf_edge.images import decode_image  # only who looks at pictures needs OpenCV

    width, height = reply.width, reply.height
    frame = Camera(width, height, width, width, width / 2, height / 2)
    return decode_image(reply.data, reply.encoding, frame)
