"""What the client commands do, apart from parsing their flags and printing their reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mclnf_edge.captures import (
    Capture,
    SignalFile,
    SplitFilter,
    VideoSource,
    load_camera,
    open_capture,
    open_signal,
    open_video,
    parse_views,
)
from mclnf_edge.captures.capture import exists
from mclnf_edge.client import Client
from mclnf_edge.errors import CaptureError, ConfigError, FrameRejected
from mclnf_edge.geometry import MAX_VIEW_PIXELS
from mclnf_edge.report import PICTURES, write_bytes, write_depth, write_picture, write_video
from mclnf_edge.types import Camera, Render, View, WorldFrame
from mclnf_edge.wire.messages import Ack, Progress, Quality, RenderReply, ReplyEncoding
from mclnf_edge.wire.planes import render_of
from mclnf_edge.world_frames import parse_world

DEFAULT_SIZE: Final = (480, 360)
DEFAULT_VIEW_DEG: Final = 60.0
OUTCOMES: Final = ("accepted", "duplicate", "redundant", "rejected")
_MAX_REASONS: Final = 100

Size = tuple[int, int]


def open_source(
    source: str,
    split: SplitFilter,
    poses: Path | None,
    camera: Path | None,
    rate_hz: float | None,
    world: WorldFrame | None = None,
    **axes_and_times: Any,
) -> Capture | VideoSource | SignalFile:
    """A capture's split, a video, camera or address with its pose and camera files, or a signal.

    A picture, clip or sound file, or a folder of frames, is a signal without pose.
    `world` is the frame of poses that do not name one, `axes_and_times` are `open_video`'s. Raises
    CaptureError, or ConfigError when only one of `poses` and `camera` is given or what has no pose
    gets a world.
    """
    if rate_hz is not None and not rate_hz > 0:
        raise ConfigError(f"--rate: expected frames per second above 0, received {rate_hz}")
    if poses is not None and camera is not None:
        lens = load_camera(camera)
        return open_video(source, poses, lens, rate_hz=rate_hz, world=world, **axes_and_times)
    if poses is not None or camera is not None:
        raise ConfigError("a video needs both --poses and --camera, received one")
    signal = open_signal(source, rate_hz)
    if signal is not None:
        if world is not None:
            raise ConfigError(f"--world: {source} has no poses")
        return signal
    if not Path(source).is_dir() and Path(source).suffix.lower() != ".json":
        raise CaptureError(
            f"{source}: no such capture folder (a video, camera index or address needs --poses "
            "and --camera)"
        )
    capture = open_capture(source)
    capture = (capture if world is None else capture.in_world(world)).split(split)
    if not len(capture):
        raise CaptureError(f"{source}: no frame of split {split!r}")
    return capture


def publish(
    client: Client,
    source: Capture | VideoSource | SignalFile,
    stream: str | None,
    rate_hz: float | None,
) -> dict[str, Any]:
    """Send every frame or piece and wait for the answers; counts by outcome, refusals with reasons.

    A capture or signal keeps to `rate_hz`; a posed video was thinned to it when it was opened and
    keeps its pace. A folder of pictures is what the map holds: images, or a video's frames.
    """
    rejections: list[dict[str, Any]] = []

    def heard(ack: Ack) -> None:
        if ack.status == "rejected" and len(rejections) < _MAX_REASONS:
            rejections.append({"seq": ack.seq, "code": ack.code, "reason": ack.reason})

    start = time.monotonic()
    if isinstance(source, SignalFile):
        source = as_map_holds(client, source, rate_hz)
        client.hello(stream=stream or source.name, modality=source.modality)
        counts = client.publish_signals(source.pieces(), rate_hz, heard)
    else:
        client.hello(stream=stream or source.name, world=source.world)
        pace = rate_hz if isinstance(source, Capture) else None
        chosen = (replace(frame, split="train") for frame in source)  # to be learned from
        counts = client.publish(chosen, rate_hz=pace, on_ack=heard)
    report: dict[str, Any] = {"stream": client.stream, "session": client.session}
    report |= {name: counts[name] for name in (*OUTCOMES, "spooled")}
    report |= {"rejections": rejections, "seconds": round(time.monotonic() - start, 3)}
    if isinstance(source, SignalFile):
        return report | {"notes": (), "modality": source.modality}
    report["world"] = asdict(source.world)
    if isinstance(source, Capture):
        return report | {"notes": source.notes}
    gap_s = source.poses.largest_gap_s()
    return report | {"notes": (), "skipped": dict(source.skipped), "largest_gap_s": gap_s}


def as_map_holds(client: Client, signal: SignalFile, rate_hz: float | None) -> SignalFile:
    """See `SignalFile.as_held`; asks the daemon only about a folder."""
    if not signal.path.is_dir():
        return signal
    return signal.as_held(client.status().get("modality"), rate_hz)


def wait_adapted(client: Client, say: Callable[[Progress], None]) -> float:
    """Wait until the daemon has adapted and closed all it accepted; returns the seconds."""
    start = time.monotonic()
    for progress in client.drain():
        say(progress)
    return round(time.monotonic() - start, 3)


def parse_size(text: str | None) -> Size | None:
    """`WIDTHxHEIGHT` in pixels; raises ConfigError."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--size: expected WIDTHxHEIGHT in pixels, received {text!r}")
    return int(width), int(height)


def parse_span(text: str | None) -> tuple[float, float] | None:
    """`START:END` in seconds; raises ConfigError."""
    if text is None:
        return None
    try:
        start, end = (float(part) for part in text.split(":"))
    except ValueError:
        start, end = 0.0, 0.0
    if not (math.isfinite(end - start) and end > start):
        raise ConfigError(f"--span: expected START:END in seconds, END later, received {text!r}")
    return start, end


def parse_world_flag(text: str | None) -> WorldFrame | None:
    """See `parse_world`; raises ConfigError."""
    try:
        return None if text is None else parse_world(text)
    except FrameRejected as error:
        raise ConfigError(f"--world: {error}") from None


def views_of(
    pose: str, camera: Path | None, size: Size | None, world: WorldFrame | None = None
) -> list[View]:
    """The views asked for; those that name no frame of their own are in `world`."""
    views = _views_of(pose, camera, size)
    nameless = (None, WorldFrame())
    return (
        views
        if world is None
        else [replace(view, world=world) if view.world in nameless else view for view in views]
    )


def _views_of(pose: str, camera: Path | None, size: Size | None) -> list[View]:
    """Bare numbers without a camera look DEFAULT_VIEW_DEG across."""
    if camera is not None:
        return parse_views(pose, load_camera(camera))
    if "#" in pose or exists(Path(pose)):
        return parse_views(pose)
    width, height = size or DEFAULT_SIZE
    focal = width / 2 / math.tan(math.radians(DEFAULT_VIEW_DEG) / 2)
    return parse_views(pose, Camera(width, height, focal, focal, width / 2, height / 2))


def render_views(
    client: Client,
    views: list[View],
    size: Size | None = None,
    quality: Quality = "full",
    out: Path | None = None,
    depth: Path | None = None,
) -> dict[str, Any]:
    """Render and store every view: one picture, an mp4, or a folder of numbered PNGs.

    `out` in .mp4 takes all views; otherwise it is a picture for one view and a folder for many,
    as `depth` is. Views are rendered in `size`, else in their camera's, reduced to four megapixels
    where that is larger. Returns `views` and the `files` written.
    """
    many = len(views) > 1
    out = out or Path("render.mp4" if many else "render.png")
    film = out.suffix.lower() == ".mp4"
    if many and not film and out.suffix:
        raise ConfigError(f"--out {out}: {len(views)} views need a name in .mp4 or a folder")
    rows: list[dict[str, Any]] = []
    files = [out] if film else []

    def pictures() -> Iterator[npt.NDArray[np.uint8]]:
        for i, view in enumerate(views):
            rendered = client.render(view, *(size or _size_of(view.camera)), quality=quality)
            rows.append(_facts(rendered))
            if depth is not None:
                files.append(depth / f"{i:06d}.png" if many else depth)
                rows[-1]["depth_scale_m"] = write_depth(files[-1], rendered.depth)
            yield rendered.rgb

    if film:
        write_video(out, pictures())
        return {"views": rows, "files": files}
    for i, rgb in enumerate(pictures()):
        files.append(out / f"{i:06d}.png" if many else out)
        write_picture(files[-1], rgb)
    return {"views": rows, "files": files}


def _size_of(camera: Camera) -> Size:
    """A camera's own size, reduced to what a daemon renders."""
    scale = min(1.0, math.sqrt(MAX_VIEW_PIXELS / (camera.width * camera.height)))
    return max(int(camera.width * scale), 1), max(int(camera.height * scale), 1)


def _facts(rendered: Render) -> dict[str, Any]:
    height, width = rendered.rgb.shape[:2]
    return {
        "width": width,
        "height": height,
        "known": float(rendered.known.mean()),
        "map_version": rendered.map_version,
        "modules": rendered.modules,
    }


def render_signal(
    client: Client,
    time_s: float | None,
    span_s: tuple[float, float] | None,
    stream: str = "",
    size: Size | None = None,
    out: Path | None = None,
    rate_hz: float = 0.0,
) -> dict[str, Any]:
    """Store the picture at `time_s`, or `span_s` as a sound (.wav) or a film (.mp4).

    `rate_hz` samples or frames a second, 0 the signal's own. Returns facts and `files`.
    """
    out = out or Path("render.png" if span_s is None else "render.wav")
    suffix = out.suffix.lower()
    if span_s is not None and suffix == ".mp4":
        return _film(client, span_s, stream, size, out, rate_hz)
    encodings: Mapping[str, ReplyEncoding] = PICTURES if span_s is None else {".wav": "wav"}
    if suffix not in encodings:
        known = " or ".join([*encodings, *([".mp4"] if span_s is not None else [])])
        raise ConfigError(f"--out {out}: expected a name in {known}")
    width, height = size or (0, 0)
    reply = client.render_signal(
        time_s=time_s,
        span_s=span_s,
        stream=stream,
        width=width,
        height=height,
        rate_hz=rate_hz,
        encoding=encodings[suffix],
    )
    write_bytes(out, reply.data)
    return {"files": [out], **_signal_facts(reply)}


def _signal_facts(reply: RenderReply) -> dict[str, Any]:
    names = ("width", "height", "rate_hz", "engine", "ms", "map_version", "modules")
    return {name: getattr(reply, name) for name in names}


def _film(
    client: Client,
    span_s: tuple[float, float],
    stream: str,
    size: Size | None,
    out: Path,
    rate_hz: float,
) -> dict[str, Any]:
    """A video's moments from A to B as an mp4, all of the first one's size."""
    width, height = size or (0, 0)
    first = client.render_signal(time_s=span_s[0], stream=stream, width=width, height=height)
    width, height = first.width, first.height
    rate = rate_hz or first.rate_hz
    if not rate > 0:
        raise ConfigError(f"--out {out}: this map holds pictures; a film needs a video, or --rate")
    count = max(round((span_s[1] - span_s[0]) * rate), 1)

    def pictures() -> Iterator[npt.NDArray[np.uint8]]:
        yield render_of(first).rgb
        for i in range(1, count):
            moment = span_s[0] + i / rate
            reply = client.render_signal(time_s=moment, stream=stream, width=width, height=height)
            yield render_of(reply).rgb

    write_video(out, pictures(), rate)
    return {"files": [out], "frames": count, **_signal_facts(first)}
