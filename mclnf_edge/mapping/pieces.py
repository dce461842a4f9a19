"""Pieces of a signal: from bytes to values, checked, and held until their modules are closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import FrameRejected
from mclnf_edge.images import decode_image
from mclnf_edge.mapping.initialization import SignalModality
from mclnf_edge.mapping.windows import Place, Places
from mclnf_edge.sounds import decode_sound
from mclnf_edge.types import Camera, Signal

F32 = npt.NDArray[np.float32]
PICTURE_OFFSET = 0.5
"""Pictures are learned as value - 0.5, sound as it is (as in meta-training)."""


def decode_piece(signal: Signal, modality: SignalModality) -> npt.NDArray[Any]:
    """(H, W, 3) uint8 of a picture, (N,) float32 of sound.

    Raises FrameRejected when encoding, shape, rate or bytes do not fit the modality.
    """
    sound = signal.encoding in ("s16le", "f32le")
    if sound != (modality == "audio"):
        raise FrameRejected(
            f"signal: this map holds {modality}, received a piece in {signal.encoding}"
        )
    if modality != "image" and not signal.rate_hz > 0:
        raise FrameRejected(f"signal: {modality} needs rate_hz above 0, received {signal.rate_hz}")
    if modality == "audio":
        return decode_sound(signal.data, signal.encoding, signal.shape)
    if len(signal.shape) != 3 or signal.shape[2] != 3 or max(signal.shape[:2]) > 65_535:
        raise FrameRejected(f"signal: expected shape (height, width, 3), received {signal.shape}")
    height, width = signal.shape[:2]
    side = float(max(height, width))  # a picture's decoder wants a camera; any that is possible
    camera = Camera(width, height, side, side, width / 2, height / 2)
    return decode_image(signal.data, signal.encoding, camera)  # type: ignore[arg-type]


def reduced(picture: npt.NDArray[Any], edge: int) -> npt.NDArray[np.uint8]:
    """The picture with no side longer than `edge` pixels."""
    scale = edge / max(picture.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(picture)
    size = max(round(picture.shape[1] * scale), 1), max(round(picture.shape[0] * scale), 1)
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


@dataclass
class Piece:
    """A piece in memory: its values, the tasks that own parts of it, draws so far."""

    id: int
    signal: str
    timestamp: float
    values: npt.NDArray[Any]
    places: tuple[Place, ...]
    rays: int = 0

    def targets(self, index: Places) -> F32:
        """(N, c) values of samples `index` (N, axes) as the field learns them."""
        if self.values.ndim == 1:
            return np.asarray(self.values[index[:, 0]][:, None], np.float32)
        pixels = self.values[index[:, 0], index[:, 1]].astype(np.float32)
        return np.asarray(pixels / 255 - PICTURE_OFFSET, np.float32)
