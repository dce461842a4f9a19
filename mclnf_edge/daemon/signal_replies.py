"""Render requests of a map of images, videos or sounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mclnf_edge.errors import ProtocolError
from mclnf_edge.images import encode_image
from mclnf_edge.inference.signals import render_picture, render_sound
from mclnf_edge.sounds import encode_wav
from mclnf_edge.wire.messages import MAX_PART_BYTES, RenderReply, RenderRequest
from mclnf_edge.wire.planes import pack_plane

if TYPE_CHECKING:
    from mclnf_edge.mapping.signals import SignalMapper

ENGINE = "torch"
MAX_PIXELS = 16_000_000
MAX_SAMPLES = MAX_PART_BYTES // 2 - 64


def signal_reply(
    mapper: SignalMapper,
    request: RenderRequest,
    preview_px: int,
    versions: int,
    pause: Callable[[], None],
) -> RenderReply:
    """The answer to a request for a moment or a span; raises ProtocolError."""
    modality = mapper.init.modality
    if request.view is not None or (modality == "audio") != (request.span_s is not None):
        wanted = "span_s" if modality == "audio" else "time_s"
        raise ProtocolError(f"render: this map holds {modality}: expected {wanted}")
    if request.span_s is not None:
        return _sound(mapper, request, request.span_s, versions, pause)
    if request.time_s is None:
        raise ProtocolError("render: expected time_s")
    return _picture(mapper, request, request.time_s, preview_px, versions, pause)


def _picture(
    mapper: SignalMapper,
    request: RenderRequest,
    time_s: float,
    preview_px: int,
    versions: int,
    pause: Callable[[], None],
) -> RenderReply:
    began = time.monotonic()
    if request.encoding == "wav":
        raise ProtocolError("render: a picture cannot be encoded as wav")
    signal = mapper.find(request.session, request.stream, time_s)
    grid = mapper.signals[signal].grid
    size = _size(request, grid.width, grid.height, preview_px)
    done = render_picture(mapper, signal, time_s, size, versions, pause)
    data = encode_image(done.rgb, request.encoding)
    return RenderReply(
        id=request.id,
        data=data,
        encoding=request.encoding,
        width=size[0],
        height=size[1],
        rate_hz=grid.rate_hz,
        depth=pack_plane(done.depth, "float32") if "depth" in request.want else None,
        known=pack_plane(done.known, "float16") if "known" in request.want else None,
        map_version=versions,
        modules=done.modules[:4096],
        engine=f"{ENGINE}/cpu",
        ms=(time.monotonic() - began) * 1e3,
    )


def _size(request: RenderRequest, width: int, height: int, preview_px: int) -> tuple[int, int]:
    """Pixels asked for, the signal's own for 0; a single given side keeps the shape."""
    if request.width or request.height:
        ratio = width / height
        width = request.width or max(round(request.height * ratio), 1)
        height = request.height or max(round(request.width / ratio), 1)
    if request.quality == "preview" and width > preview_px:
        width, height = preview_px, max(round(height * preview_px / width), 1)
    most = MAX_PART_BYTES // 3 if request.encoding == "raw" else MAX_PIXELS
    if width * height > most:
        raise ProtocolError(
            f"render: expected at most {most} pixels as {request.encoding}, received "
            f"{width}x{height}"
        )
    return width, height


def _sound(
    mapper: SignalMapper,
    request: RenderRequest,
    span_s: tuple[float, float],
    versions: int,
    pause: Callable[[], None],
) -> RenderReply:
    began = time.monotonic()
    if request.encoding != "wav":
        raise ProtocolError(f"render: sound is encoded as wav, received {request.encoding}")
    signal = mapper.find(request.session, request.stream, span_s[0])
    rate = request.rate_hz or mapper.signals[signal].grid.rate_hz
    count = (span_s[1] - span_s[0]) * rate
    if not 0 < count <= MAX_SAMPLES:
        raise ProtocolError(f"render: expected 1 to {MAX_SAMPLES} samples, received {count:.0f}")
    samples, rate_hz, asked = render_sound(mapper, signal, span_s, rate, pause)
    return RenderReply(
        id=request.id,
        data=encode_wav(samples, rate_hz),
        encoding="wav",
        rate_hz=float(rate_hz),
        map_version=versions,
        modules=asked[:4096],
        engine=f"{ENGINE}/cpu",
        ms=(time.monotonic() - began) * 1e3,
    )
