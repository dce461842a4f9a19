"""How bright each frame was taken: log gains per frame and colour, found while modules learn."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import HeldFrame

F32 = npt.NDArray[np.float32]
Rows = dict[str, list[list[float]]]
"""Stream -> rows of (time, red, green, blue), as they are stored."""

_GAIN_RATE = 0.04
_GAIN_DECAY = 1e-5
_GAIN_DAMPING = 50.0


class Exposures:
    """Natural logarithms of the gain (3,) at every time of every "session/stream" ever held."""

    def __init__(self) -> None:
        self._known: dict[str, dict[float, F32]] = {}
        self._sorted: dict[str, tuple[list[float], list[F32]]] = {}

    def remember(self, frames: Iterable[HeldFrame]) -> None:
        """Keep the frames' gains; the arrays are shared, later changes of them are seen."""
        self._sorted.clear()
        for f in frames:
            self._known.setdefault(f.stream, {})[f.timestamp] = f.gain

    def guess(self, stream: str, timestamp: float) -> F32:
        """A new frame's first gain (3,): that of its stream's nearest frame in time, else 0."""
        known = self._known.get(stream)
        if not known:
            return np.zeros(3, np.float32)
        gain: F32 = known[min(known, key=lambda t: abs(t - timestamp))].copy()
        return gain

    def at(self, stream: str, timestamp: float | None) -> F32:
        """Gain (3,) at a time, interpolated between a stream's frames; 0 when unknown.

        `stream` is "session/stream" or a stream's name alone, then in any session; "" is any, and
        so is one that sent nothing.
        """
        if timestamp is None:
            return np.zeros(3, np.float32)
        times, gains = self._sorted.get(stream) or self._in_time(stream)
        if not times:
            times, gains = self._in_time("")
        if not times:
            return np.zeros(3, np.float32)
        self._sorted[stream] = times, gains
        first = max(min(bisect.bisect_right(times, timestamp) - 1, len(times) - 2), 0)
        near = slice(first, first + 2)
        values = np.stack(gains[near])
        shares = [np.interp(timestamp, times[near], values[:, c]) for c in range(3)]
        return np.array(shares, np.float32)

    def _in_time(self, stream: str) -> tuple[list[float], list[F32]]:
        """Times in order and the gains at them, of the streams that a name may mean."""
        known = [
            item
            for name, items in self._known.items()
            if stream in ("", name, name.rpartition("/")[2])
            for item in items.items()
        ]
        known.sort(key=lambda item: item[0])
        return [t for t, _ in known], [gain for _, gain in known]

    def rows(self) -> Rows:
        """All there is, JSON-able."""
        return {
            s: [[t, *(float(v) for v in g)] for t, g in known.items()]
            for s, known in self._known.items()
        }

    def load(self, rows: Rows) -> None:
        """Add stored gains."""
        self._sorted.clear()
        for stream, known in rows.items():
            kept = self._known.setdefault(stream, {})
            kept.update({t: np.array(g, np.float32) for t, *g in known})


def rows_of(frames: Iterable[HeldFrame]) -> Rows:
    """The frames' gains, JSON-able."""
    rows: Rows = {}
    for f in frames:
        rows.setdefault(f.stream, []).append([f.timestamp, *(float(v) for v in f.gain)])
    return rows


def update(
    frames: Sequence[HeldFrame], which: npt.NDArray[np.int32], residual: F32, shown: F32
) -> None:
    """A damped Gauss-Newton step on each frame's log gain, pulled weakly towards zero.

    `residual` and `shown` (R, 3) are of rays of frame `which` (R,). Frames that a closed module
    learned from keep their gain, so that what is closed stays as bright as it was.
    """
    slope = np.zeros((len(frames), 3))
    curve = np.zeros((len(frames), 3))
    np.add.at(slope, which, residual * shown)
    np.add.at(curve, which, shown * shown)
    change = slope / (curve + _GAIN_DAMPING)
    for i in np.unique(which):
        if not frames[i].anchored:
            moved = _GAIN_RATE * change[i] + _GAIN_DECAY * frames[i].gain
            frames[i].gain -= moved.astype(np.float32)
