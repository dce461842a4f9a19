"""Where the samples of a signal lie: windows, tasks and coordinates.

A signal is cut into windows of the size its initialization was meta-trained on, and each window
into `tasks` tasks along one axis: strips of a picture, runs of frames, segments of sound (paper
sections 5.2 to 5.4). A module learns one task in coordinates of its window, [-1, 1] along each
axis, so that every window of an endless stream looks like a meta-training signal to it.

Positions are float64 and counted in windows: p = 3.25 lies a quarter into the fourth window.
Axes are (y, x) for an image, (t, y, x) for a video, (t) for audio. Nothing depends on the
resolution at which a signal is sampled or rendered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mclnf_edge.errors import FrameRejected
from mclnf_edge.mapping.initialization import SignalModality, Window

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Place = tuple[int, ...]
"""A task's number along each axis: (row of windows, strip), (run, row, column) or (segment,)."""

MIN_SIDE = 8


class Grid(NamedTuple):
    """A signal's shape: `height` x `width` pixels (0 for audio) at `rate_hz` pieces a second."""

    modality: SignalModality
    window: Window
    height: int
    width: int
    rate_hz: float

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows of a picture: as many of about `side` pixels as fit."""
        side = self.window.side
        return max(1, round(self.height / side)), max(1, round(self.width / side))

    @property
    def axis(self) -> int:
        """The axis that is cut into tasks: x of an image, else time."""
        return 1 if self.modality == "image" else 0

    @property
    def samples_per_window(self) -> int:
        """Frames or samples along time."""
        return self.window.frames if self.modality == "video" else self.window.samples

    def along_time(self, seconds: F64 | float) -> F64:
        """Position of moments: a piece's own moment is the middle of the time it stands for."""
        return np.asarray((np.asarray(seconds) * self.rate_hz + 0.5) / self.samples_per_window)

    def seconds(self, position: float) -> float:
        """The moment at a position along time."""
        return position * self.samples_per_window / self.rate_hz

    def across(self, height: int, width: int) -> tuple[F64, F64]:
        """Positions of the pixel rows and columns of the picture at `height` x `width`."""
        rows, columns = self.windows
        return (np.arange(height) + 0.5) / height * rows, (np.arange(width) + 0.5) / width * columns

    def places(self, positions: F64) -> Places:
        """Task numbers (N, d) of positions (N, d)."""
        scaled = positions.copy()
        scaled[:, self.axis] *= self.window.tasks
        return np.asarray(np.floor(scaled), np.int64)

    def coordinates(self, positions: F64) -> F32:
        """Field coordinates (N, d) in [-1, 1] of positions (N, d)."""
        return (2 * (positions - np.floor(positions)) - 1).astype(np.float32)

    def bounds(self, place: Place) -> list[list[float]]:
        """[[t, y, x], [t, y, x]]: a task's lowest and highest second and pixel, None as 0."""
        low, high = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        axes = {"image": (1, 2), "video": (0, 1, 2), "audio": (0,)}[self.modality]
        rows, columns = self.windows
        unit = (0.0, self.height / rows, self.width / columns)
        for i, (axis, number) in enumerate(zip(axes, place, strict=True)):
            share = 1 / self.window.tasks if i == self.axis else 1.0
            for corner, n in ((low, number), (high, number + 1)):
                p = n * share
                corner[axis] = self.seconds(p) if axis == 0 else p * unit[axis]
        return [low, high]

    def as_meta(self) -> list[Any]:
        """JSON-able; `grid_of` reads it."""
        return [self.height, self.width, self.rate_hz]


def grid_of(modality: SignalModality, window: Window, meta: list[Any]) -> Grid:
    """The grid that `Grid.as_meta` described."""
    height, width, rate_hz = meta
    return Grid(modality, window, int(height), int(width), float(rate_hz))


@dataclass(frozen=True)
class Block:
    """The samples of one piece that belong to one task: ranges along the piece's own axes."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(np.prod([b - a for a, b in zip(self.low, self.high, strict=True)]))

    def draw(self, count: int, random: np.random.Generator) -> Places:
        """`count` samples, uniformly with repetition: (count, axes) indices into the piece."""
        return np.asarray(random.integers(self.low, self.high, (count, len(self.low))))

    def all(self) -> Places:
        """Every sample: (N, axes) indices into the piece, in order."""
        axes = [np.arange(a, b) for a, b in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def positions(grid: Grid, timestamp: float, shape: tuple[int, ...], index: Places) -> F64:
    """Positions (N, d) of samples `index` of a piece of `shape` that starts at `timestamp`."""
    if grid.modality == "audio":
        return grid.along_time(timestamp + index[:, 0] / grid.rate_hz)[:, None]
    y, x = grid.across(*shape[:2])
    across = np.stack([y[index[:, 0]], x[index[:, 1]]], axis=1)
    if grid.modality == "image":
        return across
    time = np.full((len(index), 1), float(grid.along_time(timestamp)))
    return np.concatenate([time, across], axis=1)


def block_span(grid: Grid, timestamp: float, block: Block) -> tuple[float, float]:
    """Positions along time where a piece's samples of a task begin and end, (0, 0) for an image."""
    if grid.modality == "image":
        return 0.0, 0.0
    first, last = (block.low[0], block.high[0] - 1) if grid.modality == "audio" else (0, 0)
    half = 0.5 / grid.samples_per_window
    low, high = (float(grid.along_time(timestamp + i / grid.rate_hz)) for i in (first, last))
    return low - half, high + half


def blocks(grid: Grid, timestamp: float, shape: tuple[int, ...]) -> dict[Place, Block]:
    """The tasks that own samples of a piece, and which of its samples they own.

    Raises FrameRejected for a picture with fewer pixels than tasks or under MIN_SIDE a side.
    """
    if grid.modality == "audio":
        index = np.arange(shape[0])[:, None]
        numbers = [grid.places(positions(grid, timestamp, shape, index))[:, 0]]
        return _runs(numbers, ())
    if min(shape[:2]) < max(MIN_SIDE, grid.window.tasks):
        raise FrameRejected(
            f"image: expected at least {max(MIN_SIDE, grid.window.tasks)} pixels a side, received "
            f"{shape[1]}x{shape[0]}"
        )
    y, x = grid.across(*shape[:2])
    if grid.modality == "image":
        return _runs([np.floor(y), np.floor(x * grid.window.tasks)], ())
    run = int(np.floor(grid.along_time(timestamp) * grid.window.tasks))
    return _runs([np.floor(y), np.floor(x)], (run,))


def _runs(numbers: list[npt.NDArray[Any]], first: Place) -> dict[Place, Block]:
    """Ranges of equal numbers along each axis -> one block for each combination."""
    out: dict[Place, Block] = {(): Block((), ())}
    for values in numbers:
        edges = np.flatnonzero(np.diff(values)) + 1
        starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(values)]
        out = {
            (*place, int(values[a])): Block((*block.low, a), (*block.high, b))
            for place, block in out.items()
            for a, b in zip(starts, ends, strict=True)
        }
    return {(*first, *place): block for place, block in out.items()}
