"""Sound as samples: checking and decoding chunks, reading WAV and FLAC, writing WAV files.

Samples are (N,) or (N, channels) float32, full scale -1 to 1.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import CaptureError, FrameRejected

Samples = npt.NDArray[np.float32]
WIDTHS = {"s16le": 2, "f32le": 4}
MOST = 16.0
"""Samples further beyond full scale are no sound: an error squared would end in infinity."""


def decode_sound(data: bytes, encoding: str, shape: tuple[int, ...]) -> Samples:
    """A chunk of interleaved channels as mono samples (N,), the channels' mean.

    `shape` is (samples, channels). Raises FrameRejected when size, encoding or a number is wrong.
    """
    if encoding not in WIDTHS:
        raise FrameRejected(f"audio: expected encoding s16le or f32le, received {encoding}")
    if len(shape) != 2:
        raise FrameRejected(f"audio: expected shape (samples, channels), received {shape}")
    expected = shape[0] * shape[1] * WIDTHS[encoding]
    if len(data) != expected:
        raise FrameRejected(
            f"audio: expected {expected} bytes for {shape[0]} samples of {shape[1]} channels in "
            f"{encoding}, received {len(data)}"
        )
    if encoding == "s16le":
        values = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    else:
        values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise FrameRejected("audio: expected finite samples, received NaN or infinity")
    if len(values) and np.abs(values).max() > MOST:
        raise FrameRejected(
            f"audio: expected samples of at most {MOST:g} times full scale, received "
            f"{np.abs(values).max():g}"
        )
    return np.asarray(values.reshape(shape).mean(1), np.float32)


def read_sound(path: Path) -> tuple[Samples, int]:
    """(N, channels) samples and their rate in Hz of a WAV or a FLAC file; else CaptureError."""
    return _read_other(path, "FLAC") if path.suffix.lower() == ".flac" else _read_wav(path)


def _read_other(path: Path, what: str) -> tuple[Samples, int]:
    """FLAC, and WAV of what is not integers."""
    try:
        import soundfile  # the only sounds that need it
    except ImportError as error:
        raise CaptureError(f"{path}: {what} needs the package soundfile: {error}") from error
    try:
        with soundfile.SoundFile(path) as file:
            told, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise CaptureError(f"{path}: cannot be read as a {what} file: {error}") from error
    if not 0 < len(samples) == told:
        raise CaptureError(f"{path}: expected {told} samples, received {len(samples)}")
    return samples, rate


def _read_wav(path: Path) -> tuple[Samples, int]:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            told = file.getnframes() * width * channels
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        if "unknown format" in str(error):
            return _read_other(path, "WAV without integer samples")
        reason = str(error) or "it ends within its header"
        raise CaptureError(f"{path}: cannot be read as a PCM WAV file: {reason}") from error
    if len(data) != told:
        raise CaptureError(
            f"{path}: truncated: its header tells of {told} bytes of samples, received {len(data)}"
        )
    if not data:
        raise CaptureError(f"{path}: expected samples, found none")
    return _pcm(data, width).reshape(-1, channels), rate


def _pcm(data: bytes, width: int) -> Samples:
    """Integer samples of 1 (unsigned) to 4 bytes -> float32."""
    if width == 1:
        return np.asarray((np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128)
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw
    return np.asarray(wide.view("<i4")[:, 0] / np.float64(2**31), np.float32)


def encode_wav(samples: Samples, rate_hz: int) -> bytes:
    """Mono samples (N,) as a 16-bit WAV file; what lies outside -1 to 1 is clipped."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(encode_s16(samples))
    return out.getvalue()


def encode_s16(samples: Samples) -> bytes:
    """Samples of any shape as interleaved 16-bit little endian; clipped to -1..1."""
    return np.rint(np.clip(samples, -1, 32767 / 32768) * 32768).astype("<i2").tobytes()


def decode_wav(data: bytes) -> tuple[Samples, int]:
    """(N,) samples and rate of `encode_wav`'s bytes; CaptureError when they are not such a file."""
    try:
        with wave.open(io.BytesIO(data), "rb") as file:
            return _pcm(file.readframes(file.getnframes()), 2), file.getframerate()
    except (EOFError, wave.Error) as error:
        raise CaptureError(f"rendered sound: cannot be read as WAV: {error}") from error
