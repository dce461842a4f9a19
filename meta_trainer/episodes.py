"""Signals cut into sequences of tasks: coordinates in [-1, 1] and centred values.

Letters: T tasks, N samples per task, d coordinates, c channels. Pictures and videos are stored as
value - 0.5, audio as it is. Coordinates are those of the whole signal, so that one shared start can
know where in the signal a module stands, or each task's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Cut = Literal["strips", "interleaved", "own"]
"""How a signal becomes tasks: parts that follow one another; interleaved samples (appendix D); the
parts of "strips", the coordinates of each stretched to [-1, 1], for modules only: one network could
not tell its tasks apart."""

Signal = npt.NDArray[Any]
Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Episode:
    """One signal as T tasks that arrive one after the other.

    `order` (T, N) numbers each sample by its place in the flattened signal of shape `shape`; the
    number after the last place marks a sample that only fills a task up. `offset` is what was
    subtracted from the values and `peak` their range, for PSNR. `held` is what quality is measured
    on where that is not the samples that are learned: held-out views.
    """

    name: str
    coords: Tensor
    values: Tensor
    order: Tensor
    shape: tuple[int, ...]
    offset: float
    peak: float
    held: Episode | None = None

    def on(self, device: str) -> Episode:
        """The same with its tensors on a device."""
        held = self.held.on(device) if self.held else None
        coords, values = self.coords.to(device), self.values.to(device)
        return replace(self, coords=coords, values=values, order=self.order.to(device), held=held)

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.coords)

    @property
    def measured(self) -> Episode:
        """What quality is measured on."""
        return self.held or self

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Places of the signal, without channels, that some sample belongs to."""
        known = torch.zeros(self._places + 1, dtype=torch.bool)
        known[self.order.reshape(-1).cpu()] = True
        return known[:-1].reshape(self.shape[: self._axes]).numpy()

    def task_values(self, values: Tensor, task: int) -> Signal:
        """One task's values (n, c) of (T, N, c), without what fills it up."""
        return values[task][self.order[task] < self._places].cpu().numpy()

    @property
    def _axes(self) -> int:
        """Axes of the signal besides that of its channels; a sound has none."""
        return len(self.shape) - (self.values.shape[-1] > 1)

    @property
    def _places(self) -> int:
        return math.prod(self.shape[: self._axes])

    def rebuild(self, predicted: Tensor) -> Signal:
        """(T, N, c) -> the signal as it was given, clipped to its range."""
        flat = predicted.new_zeros(self._places + 1, predicted.shape[-1])
        flat[self.order.reshape(-1)] = predicted.reshape(-1, predicted.shape[-1])
        low = 0.0 if self.offset else -1.0
        return (flat[:-1] + self.offset).clamp(low, 1.0).reshape(self.shape).cpu().numpy()


def grid(sizes: Sequence[int]) -> Tensor:
    """Centres of a regular grid over [-1, 1]^d, (prod(sizes), d), last axis fastest."""
    axes = [(torch.arange(n, dtype=torch.float32) * 2 + 1) / n - 1 for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))


def image_episode(name: str, image: Signal, tasks: int = 4, cut: Cut = "strips") -> Episode:
    """(H, W, 3) in 0..1 -> `tasks` vertical strips (180x45 of 180x180), or interleaved quarters.

    Strips drop the last columns where W is no multiple of `tasks`; "interleaved" is appendix D's
    sub-images of half the resolution (pixels (i, j) with the same parities) and needs 4 tasks.
    """
    if cut == "interleaved":
        if tasks != 4:
            raise ValueError(f"interleaved sub-images are 4 tasks, received {tasks}")
        height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
        numbers = np.arange(height * width).reshape(height, width)
        parts = [numbers[i::2, j::2].reshape(-1) for i in (0, 1) for j in (0, 1)]
    else:
        height, width = image.shape[0], image.shape[1] // tasks * tasks
        numbers = np.arange(height * width).reshape(height, width)
        parts = [part.reshape(-1) for part in np.split(numbers, tasks, axis=1)]
    own = (height, width // tasks) if cut == "own" else None
    return _episode(name, image[:height, :width], np.stack(parts), 2, 0.5, 1.0, own)


def video_episode(name: str, frames: Signal, tasks: int = 4, cut: Cut = "strips") -> Episode:
    """(F, H, W, 3) in 0..1 -> `tasks` runs of frames; coordinates (t, y, x).

    "interleaved" cuts every frame into four half-resolution pictures instead (appendix D).
    """
    count, height, width = frames.shape[:3]
    if cut == "interleaved":
        height, width = height // 2 * 2, width // 2 * 2
        frames = frames[:, :height, :width]
        numbers = np.arange(count * height * width).reshape(count, height, width)
        parts = [numbers[:, i::2, j::2].reshape(-1) for i in (0, 1) for j in (0, 1)]
        return _episode(name, frames, np.stack(parts), 3, 0.5, 1.0)
    frames = frames[: count // tasks * tasks]
    if not len(frames):
        raise ValueError(f"{name}: {count} frames cannot be cut into {tasks} runs")
    numbers = np.arange(len(frames) * height * width)
    own = (len(frames) // tasks, height, width) if cut == "own" else None
    return _episode(name, frames, np.stack(np.split(numbers, tasks)), 3, 0.5, 1.0, own)


def audio_episode(name: str, samples: Signal, tasks: int = 4, cut: Cut = "strips") -> Episode:
    """(L,) in -1..1 -> `tasks` segments along time; its PSNR takes the range 2."""
    if cut == "interleaved":
        raise ValueError("audio has no reduced-resolution setting")
    samples = samples[: len(samples) // tasks * tasks]
    order = np.stack(np.split(np.arange(len(samples)), tasks))
    own = (len(samples) // tasks,) if cut == "own" else None
    return _episode(name, samples, order, 1, 0.0, 2.0, own)


CUTTERS: dict[str, Callable[[str, Signal, int, Cut], Episode]] = {
    "image": image_episode,
    "video": video_episode,
    "audio": audio_episode,
}


def _episode(
    name: str,
    signal: Signal,
    order: Order,
    axes: int,
    offset: float,
    peak: float,
    own: tuple[int, ...] | None = None,
) -> Episode:
    """`own` is the shape of a task whose coordinates are its own."""
    channels = 1 if signal.ndim == axes else signal.shape[-1]
    flat = torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32)).reshape(-1, channels)
    index = torch.from_numpy(order)
    coords = grid(own).expand(len(order), -1, -1) if own else grid(signal.shape[:axes])[index]
    return Episode(name, coords, flat[index] - offset, index, tuple(signal.shape), offset, peak)
