"""What the mapper of signals knows of each signal and of each module."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mclnf_edge.mapping.initialization import SignalModality
from mclnf_edge.mapping.windows import Block, Grid, Place
from mclnf_edge.maths.adaptation import State
from mclnf_edge.maths.fields import Params
from mclnf_edge.types import ModuleState


def psnr_of(mse: float, modality: SignalModality) -> float:
    """dB of a mean squared error: peak 1 for pictures, 2 for sound in [-1, 1].

    Between -120 and 126 dB, the lowest for what is not finite.
    """
    peak = 2.0 if modality == "audio" else 1.0
    return 10 * math.log10(peak * peak / max(mse if mse < 1e12 else 1e12, 1e-12))


@dataclass
class SignalRecord:
    """A signal: its stream ("session/stream"), shape, first moment, and the piece that began it.

    `latest` is the largest task number along the first axis that was seen.
    """

    stream: str
    grid: Grid
    timestamp: float
    born: int
    latest: int = -(2**62)

    def matches(self, session: str, stream: str) -> bool:
        """Whether it is a signal of that session and stream, empty names being any."""
        own_session, _, own_stream = self.stream.rpartition("/")
        return session in ("", own_session) and stream in ("", own_stream)

    def bounds(self, place: Place) -> list[list[float]]:
        """See `Grid.bounds`; an image's seconds are its moment."""
        low, high = self.grid.bounds(place)
        if self.grid.modality == "image":
            low[0] = high[0] = self.timestamp
        return [low, high]

    def as_meta(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "stream": self.stream,
            "grid": self.grid.as_meta(),
            "timestamp": self.timestamp,
            "born": self.born,
            "latest": self.latest,
        }


@dataclass
class SignalModule:
    """One task's module: while it learns, its parameters, optimizer state and samples.

    `blocks` are the samples it may draw, by piece; `frames` all pieces it ever had. `due` is the
    number of steps it owes, `covered` the span of positions along time it has samples of.
    """

    signal: str
    place: Place
    params: Params
    version: int = 1
    learns: bool = True
    steps: int = 0
    rays: int = 0
    due: int = 0
    seconds: float = 0.0
    psnr: float | None = None
    digest: str = ""
    asked: bool = False
    state: State = field(default_factory=State)
    blocks: dict[int, Block] = field(default_factory=dict)
    frames: set[int] = field(default_factory=set)
    tasks: set[str] = field(default_factory=set)
    covered: tuple[float, float] = (math.inf, -math.inf)
    last_piece_at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """As it stands in `status`: the signal and the task's place in it."""
        return f"{self.signal}:{'.'.join(map(str, self.place))}"

    def take(
        self, piece: int, block: Block, span: tuple[float, float], budget: int, task: str | None
    ) -> None:
        """Learn from a piece's samples too.

        The first brings `budget` steps; each further one as many as its share of the samples, from
        now on, so that what comes late is learned as well.
        """
        self.blocks[piece] = block
        self.covered = min(self.covered[0], span[0]), max(self.covered[1], span[1])
        self.last_piece_at = time.monotonic()
        if piece in self.frames:
            return  # it was taken before a restart
        self.frames.add(piece)
        if task is not None:
            self.tasks.add(task)
        share = block.count / sum(b.count for b in self.blocks.values())
        self.due = max(self.due, budget, self.steps + math.ceil(budget * share))

    def freeze(self) -> None:
        """No more learning: drop all that only learning needs."""
        self.learns, self.params, self.state = False, {}, State()
        self.blocks.clear()

    @property
    def status(self) -> ModuleState:
        """As the ledger calls it."""
        return "open" if self.learns else "closed"

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Parameters, running Fisher diagonal and Adam's moments, by name."""
        parts = {
            "params": self.params,
            "fisher": self.state.fisher,
            "first": self.state.first,
            "second": self.state.second,
        }
        return {
            f"{part}/{name}": p.numpy().copy()
            for part, held in parts.items()
            for name, p in (held or {}).items()
        }

    def as_meta(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        names = ("version", "steps", "rays", "due", "seconds", "psnr", "asked")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"frames": sorted(self.frames), "tasks": sorted(self.tasks)}

    @classmethod
    def closed(
        cls, signal: str, place: Place, meta: dict[str, Any], version: int, digest: str
    ) -> SignalModule:
        """A committed module, its parameters kept elsewhere."""
        return cls(
            signal, place, {}, version, False, int(meta["steps"]), int(meta["rays"]),
            psnr=meta["psnr"], digest=digest, covered=_span(meta["covered"]),
        )  # fmt: skip

    @classmethod
    def restored(
        cls, signal: str, place: Place, meta: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
    ) -> SignalModule:
        """A module of a checkpoint; its samples come with the pieces."""
        parts: dict[str, Params] = {}
        for name, array in arrays.items():
            part, _, own = name.partition("/")
            parts.setdefault(part, {})[own] = torch.from_numpy(np.array(array))
        steps = int(meta["steps"])
        state = State(steps, parts.get("fisher"), parts.get("first"), parts.get("second"))
        return cls(
            signal, place, parts["params"], int(meta["version"]), True, steps, int(meta["rays"]),
            int(meta["due"]), float(meta["seconds"]), meta["psnr"], asked=bool(meta["asked"]),
            state=state, frames=set(meta["frames"]), tasks=set(meta["tasks"]),
            covered=_span(meta["covered"]),
        )  # fmt: skip


def _span(pair: list[float]) -> tuple[float, float]:
    low, high = pair
    return float(low), float(high)
