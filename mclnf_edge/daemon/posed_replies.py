"""Render requests of a map of posed frames."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from mclnf_edge.errors import ProtocolError
from mclnf_edge.geometry import MAX_VIEW_PIXELS, check_camera, check_pose
from mclnf_edge.images import encode_image
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.types import Camera, Render, View
from mclnf_edge.wire.messages import RenderReply, RenderRequest
from mclnf_edge.wire.planes import pack_plane

_MOST_NAMES = 4096


def posed_replies(
    mapper: Mapper,
    renderer: Renderer,
    painter: str,
    request: RenderRequest,
    site: int,
    preview_px: int,
    versions: int,
) -> Iterator[RenderReply]:
    """The preview, the view, or one after the other; `painter` is what the renderer is called.

    Raises FrameRejected or ProtocolError, and DeviceError where the device fails.
    """
    view = _sized(request)
    wanted = []
    if request.quality in ("preview", "progressive"):
        wanted.append(replace(view, camera=_preview(view.camera, preview_px)))
    if request.quality != "preview":
        wanted.append(view)
    origin = mapper.origins.get(site)
    start = time.monotonic()
    meter = mapper.exposures.meter(view.stream, view.timestamp, view.exposure)
    gain = renderer.gain(mapper.pool, origin, view, meter, site)
    for number, shown in enumerate(wanted, 1):
        done = renderer.render(mapper.pool, origin, shown, gain, versions, site)
        ms = (time.monotonic() - start) * 1e3
        yield RenderReply(
            id=request.id,
            data=_encoded(done, request),
            encoding=request.encoding,
            width=shown.camera.width,
            height=shown.camera.height,
            depth=pack_plane(done.depth, "float32") if "depth" in request.want else None,
            known=pack_plane(done.known, "float16") if "known" in request.want else None,
            map_version=versions,
            modules=done.modules[:_MOST_NAMES],
            engine=f"{painter}/{mapper.optimizer.device}",
            ms=ms,
            final=number == len(wanted),
        )
        start = time.monotonic()


def _sized(request: RenderRequest) -> View:
    """The view at the size that was asked for; raises FrameRejected or ProtocolError."""
    if request.view is None:
        raise ProtocolError("render: expected a view; this map holds posed frames")
    view = request.view
    check_pose(view.T_world_camera, "view")
    camera = replace(check_camera(view.camera, "view"), model="PINHOLE", distortion=())
    if request.width or request.height:
        width = request.width or max(round(camera.width * request.height / camera.height), 1)
        height = request.height or max(round(camera.height * request.width / camera.width), 1)
        camera = camera.scaled(width, height)
    if camera.width * camera.height > MAX_VIEW_PIXELS:
        raise ProtocolError(
            f"render: expected at most {MAX_VIEW_PIXELS // 10**6} megapixels, received "
            f"{camera.width}x{camera.height}; ask for a smaller size"
        )
    return replace(view, camera=camera)


def _preview(camera: Camera, pixels: int) -> Camera:
    scale = min(1.0, pixels / camera.width)
    return camera.scaled(max(round(camera.width * scale), 1), max(round(camera.height * scale), 1))


def _encoded(done: Render, request: RenderRequest) -> bytes:
    if request.encoding == "raw":
        return done.rgb.tobytes()
    if request.encoding == "jpeg":
        return encode_image(done.rgb, "jpeg")
    return encode_image(done.rgb, "png")
