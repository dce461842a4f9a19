"""Signals without pose: pictures, a clip or a folder of frames, a sound file, as pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.captures.capture import natural_key
from mclnf_edge.captures.detect import is_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.images import encode_image
from mclnf_edge.sounds import encode_s16, read_sound
from mclnf_edge.types import Modality, Signal

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CLIPS: Final = (".mp4", ".avi", ".mov", ".mkv", ".mpg", ".webm")
SOUNDS: Final = (".wav", ".flac")
FOLDER_HZ: Final = 25.0
STILLS_HZ: Final = 1.0
CHUNK_S: Final = 1.0
_JPEG_QUALITY: Final = 95


@dataclass(frozen=True)
class SignalFile:
    """A file's or folder's signal. `rate_hz` is pieces or samples a second, 0 for one picture."""

    path: Path
    modality: Modality
    rate_hz: float

    @property
    def name(self) -> str:
        """The stream's name when none is given."""
        return self.path.stem

    def pieces(self) -> Iterator[Signal]:
        """A picture, frames, or chunks of CHUNK_S seconds; CaptureError when it cannot be read."""
        if self.modality == "audio":
            yield from self._chunks()
            return
        empty = True
        encoding: Literal["png", "jpeg"] = "png" if self.modality == "image" else "jpeg"
        for i, rgb in enumerate(self.frames()):
            empty = False
            data = encode_image(rgb, encoding, _JPEG_QUALITY)
            yield Signal(
                i, self.moment(i), data, encoding, rgb.shape, self.rate_hz, f"{self.name}/{i:06d}"
            )
        if empty:
            raise CaptureError(f"{self.path}: expected frames, found none that decodes")

    def moment(self, number: int) -> float:
        """Second of a picture or frame; a single picture is at 0."""
        return number / self.rate_hz if self.rate_hz else 0.0

    def as_held(self, modality: str | None, rate_hz: float | None = None) -> SignalFile:
        """What the file is to a map of this modality: a folder is pictures to a map of images.

        Picture i of a folder then stands at second i, or at i / `rate_hz`.
        """
        if modality == "image" and self.path.is_dir():
            return replace(self, modality="image", rate_hz=rate_hz or STILLS_HZ)
        return self

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The pictures (H, W, 3) RGB, in order."""
        if self.path.is_dir():
            files = [p for p in self.path.iterdir() if _is_picture(p)]
            files.sort(key=lambda p: natural_key(p.name))
            yield from (_picture(file) for file in files)
        elif self.modality == "image":
            yield _picture(self.path)
        else:
            yield from self._clip()

    def samples(self) -> npt.NDArray[np.float32]:
        """The sound (N,), the mean of its channels."""
        return np.asarray(read_sound(self.path)[0].mean(1), np.float32)

    def _clip(self) -> Iterator[npt.NDArray[np.uint8]]:
        video = cv2.VideoCapture(str(self.path))
        try:
            while True:
                good, bgr = video.read()
                if not good:
                    return
                yield np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        finally:
            video.release()

    def _chunks(self) -> Iterator[Signal]:
        samples, rate = read_sound(self.path)
        step = max(round(rate * CHUNK_S), 1)
        for i, a in enumerate(range(0, len(samples), step)):
            part = samples[a : a + step]
            yield Signal(
                i, a / rate, encode_s16(part), "s16le", part.shape, float(rate), f"{self.name}/{i}"
            )


def open_signal(source: str, rate_hz: float | None = None) -> SignalFile | None:
    """The signal in a file, by its suffix, or in a folder of pictures; None when it is neither.

    A folder's frames are `rate_hz` (FOLDER_HZ) a second. Raises CaptureError for a missing file.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        held = any(map(_is_picture, path.iterdir()))
        if not held or is_capture(path):
            return None
        return SignalFile(path, "video", rate_hz or FOLDER_HZ)
    if suffix not in (*PICTURES, *CLIPS, *SOUNDS):
        return None
    if not path.is_file():
        raise CaptureError(f"{source}: no such file")
    if suffix in PICTURES:
        return SignalFile(path, "image", 0.0)
    if suffix in SOUNDS:
        return SignalFile(path, "audio", float(read_sound(path)[1]))
    video = cv2.VideoCapture(source)
    fps = float(video.get(cv2.CAP_PROP_FPS))
    video.release()
    if not fps > 0:
        raise CaptureError(f"{source}: expected a video with a frame rate, received none")
    return SignalFile(path, "video", fps)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and path.name[0] != "."


def _picture(path: Path) -> npt.NDArray[Any]:
    try:
        bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    except cv2.error as error:  # a header that asks for more pixels than OpenCV makes
        raise CaptureError(f"{path}: cannot be read as a picture ({error})") from None
    if bgr is None:
        raise CaptureError(f"{path}: cannot be read as a picture")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
