"""Renders of a map of images, videos or sounds against the file that was published."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from mclnf_edge.captures import SignalFile
from mclnf_edge.errors import ProtocolError
from mclnf_edge.maths.metrics import psnr, ssim
from mclnf_edge.sounds import decode_wav
from mclnf_edge.wire.messages import RenderReply

Samples = npt.NDArray[np.float32]
SPAN_S: Final = 10.0
"""A sound is asked for in spans of this many seconds."""

_SSIM_SIDE: Final = 11
_PESQ_BANDS: Final = {8000: "nb", 16000: "wb"}


class RenderSignal(Protocol):
    """`Client.render_signal`, as far as it is used here."""

    def __call__(
        self,
        *,
        time_s: float | None = None,
        span_s: tuple[float, float] | None = None,
        stream: str = "",
        width: int = 0,
        height: int = 0,
        encoding: Any = "png",
    ) -> RenderReply:
        """The encoded picture at a moment, or the sound of a span."""
        ...


def evaluate_signal(
    signal: SignalFile,
    render: RenderSignal,
    stream: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compare a file with what its stream (by default of the file's name) shows now.

    Pictures and video frames, each at its own size: `psnr` in dB and `ssim` (None below 11
    pixels), means over `views`. Sound: `snr` in dB, `psnr` in dB (range 2) and `pesq` (None
    without the package `pesq`, or at another rate than 8 or 16 kHz), of the whole file.
    Raises CaptureError when the file cannot be read, and what `render` raises.
    """
    name = stream or signal.name
    known = {"signal": signal.name, "stream": name, "modality": signal.modality}
    if signal.modality == "audio":
        return known | _sound(signal, render, name, progress)
    views: list[dict[str, Any]] = []
    frames = list(signal.frames())
    for i, truth in enumerate(frames):
        time_s = signal.moment(i)
        height, width = truth.shape[:2]
        reply = render(time_s=time_s, stream=name, width=width, height=height)
        views.append({"time_s": time_s, **_compare(_picture(reply), truth)})
        progress(i + 1, len(frames))
    means = {key: _mean([v[key] for v in views]) for key in ("psnr", "ssim")}
    return known | means | {"views": views}


def _picture(reply: RenderReply) -> npt.NDArray[np.uint8]:
    bgr = cv2.imdecode(np.frombuffer(reply.data, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ProtocolError(f"render-reply: expected a picture, received {len(reply.data)} bytes")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def _compare(shown: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8]) -> dict[str, Any]:
    big = min(truth.shape[:2]) >= _SSIM_SIDE
    return {"psnr": psnr(shown, truth), "ssim": ssim(shown, truth) if big else None}


def _sound(
    signal: SignalFile, render: RenderSignal, stream: str, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """A whole sound's figures; `views` has the SNR of each span."""
    truth, rate = signal.samples(), signal.rate_hz
    step = round(SPAN_S * rate)
    starts = range(0, len(truth), step)
    parts: list[Samples] = []
    views: list[dict[str, Any]] = []
    for n, a in enumerate(starts):
        own = truth[a : a + step]
        span = a / rate, (a + len(own)) / rate
        part, _ = decode_wav(render(span_s=span, stream=stream, encoding="wav").data)
        parts.append(part)
        views.append({"span_s": span, "snr": snr(part, own)})
        progress(n + 1, len(starts))
    shown = np.concatenate(parts)
    return {
        "snr": snr(shown, truth),
        "psnr": psnr(shown, truth, peak=2.0),
        "pesq": pesq(shown, truth, round(rate)),
        "views": views,
    }


def snr(shown: Samples, truth: Samples) -> float | None:
    """10 log10(power of `truth` / power of the error) in dB; None for silence, inf when equal."""
    power = float(np.square(truth, dtype=np.float64).sum())
    error = float(np.square(shown.astype(np.float64) - truth).sum())
    if not power:
        return None
    return 10 * math.log10(power / error) if error else math.inf


def pesq(shown: Samples, truth: Samples, rate_hz: int) -> float | None:
    """ITU-T P.862 (narrow band at 8 kHz, wide band at 16 kHz); None where it cannot be had."""
    try:
        package = importlib.import_module("pesq")
    except ImportError:
        return None
    if rate_hz not in _PESQ_BANDS or not shown.any():
        return None
    try:
        return float(package.pesq(rate_hz, truth, shown, _PESQ_BANDS[rate_hz]))
    except package.PesqError:
        return None


def _mean(values: list[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else None
