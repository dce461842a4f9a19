"""A moment of an image or video, a span of sound, at any resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mclnf_edge.types import Render

if TYPE_CHECKING:
    from mclnf_edge.mapping.signals import SignalMapper

UNKNOWN = 0.5
"""What stands where no module has learned anything: mid-grey."""


def render_picture(
    mapper: SignalMapper,
    signal: str,
    time_s: float,
    size: tuple[int, int] | None = None,
    map_version: int = 0,
    pause: Callable[[], None] = lambda: None,
) -> Render:
    """A picture at `size` (width, height) pixels, None its own; of a video the moment `time_s`.

    The depth is all NaN. Raises Corrupt.
    """
    grid = mapper.signals[signal].grid
    width, height = size or (grid.width, grid.height)
    y, x = grid.across(height, width)
    at = np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
    if grid.modality == "video":
        at = np.concatenate([np.full((len(at), 1), float(grid.along_time(time_s))), at], axis=1)
    values, known, asked = mapper.evaluate(signal, at, pause)
    values[~known] = UNKNOWN
    rgb = np.rint(values.clip(0, 1) * 255).astype(np.uint8).reshape(height, width, 3)
    return Render(
        rgb,
        np.full((height, width), np.nan, np.float32),
        known.reshape(height, width).astype(np.float32),
        map_version,
        tuple(asked),
    )


def render_sound(
    mapper: SignalMapper,
    signal: str,
    span_s: tuple[float, float],
    rate_hz: float = 0.0,
    pause: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.float32], int, tuple[str, ...]]:
    """Samples (N,) of a span of seconds, their rate (0: the sound's own), the modules asked.

    Silence where nothing is known. Raises Corrupt.
    """
    grid = mapper.signals[signal].grid
    rate = round(rate_hz or grid.rate_hz)
    count = max(round((span_s[1] - span_s[0]) * rate), 1)
    at = grid.along_time(span_s[0] + np.arange(count) / rate)[:, None]
    values, _, asked = mapper.evaluate(signal, at, pause)
    return values[:, 0], rate, tuple(asked)
