"""How bright each frame was taken: log gains per frame and colour, found while modules learn.

A view has no pixels to find its gain from. What is known of it is its time, how bright the map is
there, and perhaps its metadata: `predict` learns from the frames what those tell (drift of a white
balance, automatic exposure, shutter and ISO).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import HeldFrame

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Rows = dict[str, list[list[float | None]]]
"""Stream -> rows of (time, red, green, blue, brightness, exposure), as they are stored.

The last two, natural logarithms, are None or missing where unknown.
"""
Meter = Callable[[float], F32]
"""Mean brightness of a view at exposure 0, in (0, 1] -> its log gain (3,)."""

_GAIN_RATE = 0.04
_GAIN_DECAY = 1e-5
_GAIN_DAMPING = 50.0

_NEAREST = 32
"""Frames in time that a view's gain is told from."""
_LEVEL, _DRIFT, _STATED = 0.3, 0.1, 0.5
"""Deviations a priori of the frames' common log gain, of its drift in time, and of its slope over
the log exposure of the metadata (a display's gamma makes about half of it)."""
_REACH = 4.0
"""How many gaps between frames the drift remembers."""
_METERED, _JITTER = (0.0, 1.0), (0.02, 0.06)
"""The deviations that the frames choose among: of the slope over log brightness, and of what two
frames of the same moment differ by."""


@dataclass(frozen=True)
class Taken:
    """A frame's log gain (3,), and what is known besides: natural logarithms of its picture's mean
    brightness and of the exposure in its metadata, NaN where unknown."""

    gain: F32
    brightness: float = np.nan
    exposure: float = np.nan


class Exposures:
    """Natural logarithms of the gain (3,) at every time of every "session/stream" ever held."""

    def __init__(self) -> None:
        self._known: dict[str, dict[float, Taken]] = {}
        self._sorted: dict[str, tuple[list[float], list[Taken]]] = {}

    def remember(self, frames: Iterable[HeldFrame]) -> None:
        """Keep the frames' gains; the arrays are shared, later changes of them are seen."""
        self._sorted.clear()
        for f in frames:
            self._known.setdefault(f.stream, {})[f.timestamp] = _taken(f)

    def guess(self, stream: str, timestamp: float) -> F32:
        """A new frame's first gain (3,): that of its stream's nearest frame in time, else 0."""
        known = self._known.get(stream)
        if not known:
            return np.zeros(3, np.float32)
        gain: F32 = known[min(known, key=lambda t: abs(t - timestamp))].gain.copy()
        return gain

    def meter(self, stream: str, timestamp: float | None, exposure: float | None = None) -> Meter:
        """What tells a view's gain (3,) once it is known how bright the map is there.

        `stream` is "session/stream" or a stream's name alone, then in any session; "" is any, and
        so is one that sent nothing. `exposure` is that of the view's metadata. The gain is 0 for a
        view without a time and where nothing is known; a frame's own moment has that frame's gain.
        """
        times, taken = self._sorted.get(stream) or self._in_time(stream)
        if not times:
            times, taken = self._in_time("")
        if timestamp is None or not times:
            return lambda brightness: np.zeros(3, np.float32)
        self._sorted[stream] = times, taken
        after = bisect.bisect_left(times, timestamp)
        if after < len(times) and times[after] == timestamp:
            own = taken[after].gain.copy()
            return lambda brightness: own
        first = max(min(after - _NEAREST // 2, len(times) - _NEAREST), 0)
        near = slice(first, first + _NEAREST)
        stated = float(np.log(exposure)) if exposure else np.nan

        def told(brightness: float) -> F32:
            at = np.array([timestamp, np.log(max(brightness, 1e-3)), stated])
            return predict(np.array(times[near]), taken[near], at)

        return told

    def _in_time(self, stream: str) -> tuple[list[float], list[Taken]]:
        """Times in order and what was taken at them, of the streams that a name may mean."""
        known = [
            item
            for name, items in self._known.items()
            if stream in ("", name, name.rpartition("/")[2])
            for item in items.items()
        ]
        known.sort(key=lambda item: item[0])
        return [t for t, _ in known], [taken for _, taken in known]

    def rows(self) -> Rows:
        """All there is, JSON-able."""
        return {s: [_row(t, k) for t, k in known.items()] for s, known in self._known.items()}

    def load(self, rows: Rows) -> None:
        """Add stored gains."""
        self._sorted.clear()
        for stream, known in rows.items():
            kept = self._known.setdefault(stream, {})
            for time, *values in known:
                gain, told = values[:3], [np.nan if v is None else v for v in values[3:]]
                kept[float(time or 0.0)] = Taken(np.array(gain, np.float32), *told)


def _taken(frame: HeldFrame) -> Taken:
    return Taken(frame.gain, frame.brightness, frame.exposure)


def _row(time: float, taken: Taken) -> list[float | None]:
    told = (taken.brightness, taken.exposure)
    known = [None if np.isnan(v) else float(v) for v in told]
    return [time, *(float(v) for v in taken.gain), *known]


def rows_of(frames: Iterable[HeldFrame]) -> Rows:
    """The frames' gains, JSON-able."""
    rows: Rows = {}
    for f in frames:
        rows.setdefault(f.stream, []).append(_row(f.timestamp, _taken(f)))
    return rows


def predict(times: F64, taken: Sequence[Taken], at: F64) -> F32:
    """Log gain (3,) of a view `at` (time, log brightness of the map there, log exposure or NaN).

    A Gaussian process over the frames' gains: a common level, a drift in time, slopes over the
    log brightness that the map has where a frame looks (automatic exposure holds that times the
    gain constant) and over the log exposure of the metadata, and jitter. How far brightness counts
    and how much jitter there is, is what tells every frame best from the others (leave one out).
    What is unknown of a frame or of the view counts as the frames' mean.
    """
    gains = np.stack([k.gain for k in taken]).astype(np.float64)
    metered, metered_at = _centred(np.array([k.brightness for k in taken]) - gains.mean(1), at[1])
    stated, stated_at = _centred(np.array([k.exposure for k in taken]), at[2])
    reach = _REACH * max(float(np.median(np.diff(times))) if len(times) > 1 else 1.0, 1e-6)
    apart, away = np.abs(times[:, None] - times), np.abs(times - at[0])
    found = _LEVEL**2 + _DRIFT**2 * np.exp(-np.stack([*apart, away]) / reach)
    found += _STATED**2 * np.append(stated, stated_at)[:, None] * stated
    slopes = np.append(metered, metered_at)[:, None] * metered
    told, least = np.zeros(3), np.inf
    for by_meter, jitter in itertools.product(_METERED, _JITTER):
        covariance = found + by_meter**2 * slopes
        inverse = np.linalg.inv(covariance[:-1] + jitter**2 * np.eye(len(times)))
        missed = np.square(inverse @ gains / np.diagonal(inverse)[:, None]).mean()
        if missed < least:
            told, least = covariance[-1] @ inverse @ gains, missed
    return told.astype(np.float32)


def _centred(values: F64, at: float) -> tuple[F64, float]:
    """Values and another one less their mean; 0 for what is not known."""
    known = np.isfinite(values)
    mean = values[known].mean() if known.any() else np.nan
    return np.nan_to_num(values - mean), float(np.nan_to_num(at - mean))


def update(
    frames: Sequence[HeldFrame], which: npt.NDArray[np.int32], residual: F32, shown: F32
) -> None:
    """A damped Gauss-Newton step on each frame's log gain, pulled weakly towards zero.

    `residual` and `shown` (R, 3) are of rays of frame `which` (R,). Frames that a closed module
    learned from keep their gain, so that what is closed stays as bright as it was.
    """
    good = np.isfinite(residual).all(1) & np.isfinite(shown).all(1)
    which, residual, shown = which[good], residual[good], shown[good]
    slope = np.zeros((len(frames), 3))
    curve = np.zeros((len(frames), 3))
    np.add.at(slope, which, residual * shown)
    np.add.at(curve, which, shown * shown)
    change = slope / (curve + _GAIN_DAMPING)
    for i in np.unique(which):
        if not frames[i].anchored:
            moved = _GAIN_RATE * change[i] + _GAIN_DECAY * frames[i].gain
            frames[i].gain -= moved.astype(np.float32)
