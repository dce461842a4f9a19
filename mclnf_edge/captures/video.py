"""Frames from a video file, a camera or a network stream, posed by a pose file."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import cv2

from mclnf_edge.captures.poses import MAX_GAP_S, PoseFile
from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.images import encode_image
from mclnf_edge.types import Camera, Frame, WorldFrame
from mclnf_edge.world_frames import beginning_at

_LOG = logging.getLogger(__name__)
_MAX_WAITING: Final = 64
"""Live pictures held for their pose, or for a slow reader; beyond it the oldest is dropped."""
_POLL_S: Final = 0.01


class _Picture(NamedTuple):
    number: int
    time_s: float
    jpeg: bytes
    camera: Camera


@dataclass
class VideoSource:
    """Frames of a video file, a camera (`source` an index) or a stream address, as JPEG.

    The time of a picture is `offset_s` plus its time in a file, or plus the wall clock at which a
    live one was received; poses are in that clock. A live source follows the pose file as it grows.
    With `rate_hz` pictures are thinned to at most that many per second. A picture without a pose is
    skipped and counted in `skipped`: "outside" the pose file's times, in a "gap" longer than
    `max_gap_s`, "late" (live: no pose came within `max_gap_s`), "overrun" (live: the reader is too
    slow) or "broken" (does not decode). All frames are `train`.
    """

    source: str | int
    camera: Camera
    poses: PoseFile
    world: WorldFrame = field(default_factory=WorldFrame)
    name: str = "video"
    max_gap_s: float = MAX_GAP_S
    rate_hz: float | None = None
    offset_s: float = 0.0
    quality: int = 92
    clock: Callable[[], float] = time.time
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Frame]:
        """Frames in order; CaptureError when it cannot be opened or no picture has a pose."""
        self.skipped.clear()
        seq = 0
        for number, time_s, jpeg, camera in self._live() if self.poses.growing else self._stored():
            gap_s = self.poses.gap_at(time_s)
            if gap_s > self.max_gap_s:
                self._skip("outside" if math.isinf(gap_s) else "gap", number, time_s)
                continue
            pose = self.poses.at(time_s, self.max_gap_s)
            yield Frame(seq, time_s, jpeg, "jpeg", camera, pose, f"{self.name}/{number:06d}")
            seq += 1
        if seq == 0:
            raise CaptureError(
                f"{self.source}: no picture has a pose (skipped: {dict(self.skipped)}): the poses "
                f"cover {self.poses.covered()}, their largest gap is "
                f"{self.poses.largest_gap_s():.3f} s, allowed {self.max_gap_s} s, clock offset "
                f"{self.offset_s} s"
            )

    def _skip(self, reason: str, number: int, time_s: float) -> None:
        self.skipped[reason] += 1
        _LOG.debug("%s: picture %d at %.3f s skipped: %s", self.source, number, time_s, reason)

    def _stored(self) -> Iterator[_Picture]:
        video = self._open()
        fps = float(video.get(cv2.CAP_PROP_FPS)) or 30.0

        def file_time(number: int) -> float:
            return float(video.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0 or number / fps

        yield from self._grab(video, file_time)

    def _live(self) -> Iterator[_Picture]:
        """Hold each picture back until a pose after it is known, or `max_gap_s` has passed.

        A thread takes pictures off the source as they arrive, so that their time is true even when
        whoever consumes the frames is slow.
        """
        video = self._open()
        waiting: deque[_Picture] = deque()
        lock, ended, stop = threading.Lock(), threading.Event(), threading.Event()
        failure: list[Exception] = []

        def receive() -> None:
            try:
                for picture in self._grab(video, lambda _: self.clock()):
                    with lock:
                        waiting.append(picture)
                        if len(waiting) > _MAX_WAITING:
                            self._skip("overrun", *waiting.popleft()[:2])
                    if stop.is_set():
                        return
            except Exception as error:  # handed to the reader below
                failure.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=receive, name="video", daemon=True)
        thread.start()
        try:
            while waiting or not ended.is_set():
                with lock:
                    ready = self._with_pose(waiting)
                yield from ready
                time.sleep(_POLL_S)
        finally:
            stop.set()
            thread.join(timeout=5.0)
        if failure:
            raise failure[0]
        _LOG.warning("%s: the stream ended", self.source)

    def _with_pose(self, waiting: deque[_Picture]) -> list[_Picture]:
        """Take off `waiting` what has a pose after it; drop what has waited too long."""
        self.poses.refresh()
        latest = self.poses.times[-1] if self.poses.times else -math.inf
        ready = []
        while waiting and waiting[0].time_s <= latest:
            ready.append(waiting.popleft())
        overdue = self.clock() + self.offset_s - self.max_gap_s
        while waiting and waiting[0].time_s < overdue:
            self._skip("late", *waiting.popleft()[:2])
        return ready

    def _grab(self, video: Any, time_of: Callable[[int], float]) -> Iterator[_Picture]:
        """Every picture of an open source, thinned to `rate_hz`, until it ends."""
        due, number = -math.inf, 0
        try:
            while video.grab():
                time_s = time_of(number) + self.offset_s
                if time_s >= due:
                    due = self._next_due(due, time_s)
                    decoded, bgr = video.retrieve()
                    if decoded:
                        yield self._encode(number, time_s, bgr)
                    else:
                        self._skip("broken", number, time_s)
                number += 1
        finally:
            video.release()

    def _next_due(self, due: float, time_s: float) -> float:
        """Keep the beat of `rate_hz` instead of drifting by the interval between pictures."""
        if self.rate_hz is None:
            return due
        period = 1.0 / self.rate_hz
        return (due if time_s - due < period else time_s - 1e-6) + period

    def _encode(self, number: int, time_s: float, bgr: Any) -> _Picture:
        height, width = bgr.shape[:2]
        camera = self.camera
        if abs(camera.height * width / camera.width - height) > 1.0:
            raise CaptureError(
                f"{self.source}: the camera file says {camera.width}x{camera.height}, the video is "
                f"{width}x{height}: not the same shape"
            )
        if (width, height) != (camera.width, camera.height):
            camera = camera.scaled(width, height)
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        return _Picture(number, time_s, encode_image(rgb, "jpeg", self.quality), camera)

    def _open(self) -> Any:
        video = cv2.VideoCapture(self.source)
        if not video.isOpened():
            raise CaptureError(f"{self.source}: OpenCV cannot open this video, camera or address")
        # Intrinsics belong to the stored pixels, not to a turned picture.
        video.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        return video


def open_video(
    source: str | int,
    pose_file: Path,
    camera: Camera,
    *,
    camera_axes: str = "opencv",
    world_axes: str | None = None,
    world: WorldFrame | None = None,
    max_gap_s: float = MAX_GAP_S,
    rate_hz: float | None = None,
    offset_s: float = 0.0,
) -> VideoSource:
    """A video source posed by `pose_file` (see `PoseFile` for its forms and axes).

    A number is a camera index and anything with "://" an address: both are live. Raises
    CaptureError when the pose file or the video file cannot be used.
    """
    text = str(source)
    live = text.isdecimal() or "://" in text
    if not live and not Path(text).is_file():
        raise CaptureError(f"{source}: no such video file")
    if rate_hz is not None and not rate_hz > 0.0:
        raise CaptureError(f"rate: expected pictures per second above 0, received {rate_hz}")
    posed = PoseFile(pose_file, camera_axes, world_axes, growing=live)
    try:
        posed_in = beginning_at(world, posed.poses[0]) if world and posed.poses else world
    except FrameRejected as error:
        raise CaptureError(f"{pose_file}: {error}") from None
    return VideoSource(
        source=int(text) if text.isdecimal() else text,
        camera=camera,
        poses=posed,
        world=posed_in or WorldFrame(),
        name="live" if live else Path(text).stem,
        max_gap_s=max_gap_s,
        rate_hz=rate_hz,
        offset_s=offset_s,
    )
