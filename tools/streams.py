"""The fast field learning a sequence of tasks: as modules, and as one network of the same size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import TILE
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell, ModulePool
from mclnf_edge.mapping.optimizer import Optimizer
from meta_trainer.city_init import Episode
from tools.tasks import I32, targets

F32 = npt.NDArray[np.float32]
Targets = tuple[I32, I32, I32]
TILE_BYTES = TILE * TILE * 3 + 8
"""A tile in a replay buffer: its pixels, its frame and its place."""


class StreamMapper(Mapper):
    """A mapper that draws its rays from given tiles.

    `tied`: one network. The planes of all cells stay where they are, as one set of planes over the
    capture, and one MLP reads them all: its gradient is summed over all rays before Adam moves it.
    `replay`: half of a batch comes from these tiles. `spent` is the share of the current task's
    steps, which the learning rate of the MLP follows.
    """

    tied = False
    drawn: Targets | None = None
    replay: Targets | None = None
    spent = 0.0

    def progress(self) -> float:
        """Share of the current task's steps that is taken."""
        return self.spent

    def ray_targets(self) -> dict[int, tuple[I32, ...]]:
        """The tiles in `drawn`, and as many of `replay`."""
        assert self.drawn is not None
        if self.replay is None:
            return {0: self.drawn}
        pick = self.random.integers(0, len(self.replay[0]), len(self.drawn[0]))
        both = zip(self.drawn, self.replay, strict=True)
        return {0: tuple(np.concatenate([now, past[pick]]) for now, past in both)}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = _Tying(self)


class _Tying(Optimizer):
    """The daemon's optimizer; a tied mapper's MLPs get one gradient."""

    def __init__(self, mapper: StreamMapper) -> None:
        super().__init__(mapper.adapt, mapper.threads)
        self._mapper = mapper

    def step_texels(self, pool: ModulePool, length: int) -> None:
        super().step_texels(pool, length)
        if self._mapper.tied:
            tie(pool.weight_gradient, pool.owner[pool.owner >= 0])


def tie(gradients: Sequence[F32], rows: npt.NDArray[np.int32]) -> None:
    """Give each of `rows` of the threads' (all rows, n) gradients the sum over rows and threads."""
    total = np.sum([g[rows].sum(0) for g in gradients], axis=0)
    for g in gradients:
        g[rows] = 0
    gradients[0][rows] = total


class StreamEpisode(Episode):
    """An episode whose rays come task by task."""

    make_mapper = StreamMapper
    mapper: StreamMapper


@dataclass
class Closed:
    """Digests of the modules when they were closed, those that differ at the end, their bytes."""

    digests: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    committed_bytes: int = 0


def shares(runs: Sequence[Sequence[Cell]], count: dict[Cell, int], steps: int) -> list[int]:
    """Steps of each task, in proportion to its tiles."""
    total = sum(count.values())
    return [round(steps * sum(count[cell] for cell in run) / total) for run in runs]


def begin(episode: StreamEpisode, mlp: F32, seed: int, *, tied: bool) -> StreamMapper:
    """Every module at its seeded start and learning."""
    mapper = episode.mapper
    assert mapper.pool is not None
    for module in mapper.modules.values():
        module.state = "open"
        mapper.pool.rank_learning(module.cell)
        if module.row < 0:
            mapper.pool.thaw(module)
    episode.restart(mlp, seed)
    mapper.optimizer.adapt = replace(mapper.adapt, passes=1000.0)
    mapper.tied, mapper.replay, mapper.drawn, mapper.spent = tied, None, None, 0.0
    return mapper


def learn(mapper: StreamMapper, drawn: Targets, steps: int) -> None:
    """`steps` steps on the rays of some tiles."""
    mapper.drawn = drawn
    for i in range(steps):
        mapper.spent = i / steps
        mapper.step()


def modules(
    mapper: StreamMapper,
    runs: Sequence[Sequence[Cell]],
    steps: Sequence[int],
    after: Callable[[int], None],
) -> Closed:
    """Each task by modules of its own, closed when it is done; closed ones must not change."""
    pool, closed = mapper.pool, Closed()
    assert pool is not None
    for module in mapper.modules.values():
        pool.freeze(module)
    for k, run in enumerate(runs):
        own = [mapper.modules[cell] for cell in run]
        for module in own:
            pool.thaw(module)
            pool.rank_closed(module.cell)  # as if the coming tasks' modules were made later
        learn(mapper, targets(mapper, run), steps[k])
        for module in own:
            closing = mapper.close(module)
            assert closing.snapshot is not None
            closed.committed_bytes += sum(a.nbytes for a in closing.snapshot.arrays.values())
            closed.digests[module.id] = digest(pool, module.slot)
        after(k)
    for module in mapper.modules.values():
        if module.id in closed.digests and digest(pool, module.slot) != closed.digests[module.id]:
            closed.changed.append(module.id)
    return closed


def one_network(
    mapper: StreamMapper,
    runs: Sequence[Sequence[Cell]],
    steps: Sequence[int],
    after: Callable[[int], None],
    replay_bytes: int = 0,
) -> None:
    """Task after task into one network; a buffer of `replay_bytes` keeps a sample of past tiles."""
    seen: list[Targets] = []
    for k, run in enumerate(runs):
        drawn = targets(mapper, run)
        mapper.replay = kept(seen, replay_bytes, mapper.adapt.seed) if replay_bytes else None
        learn(mapper, drawn, steps[k])
        seen.append(drawn)
        after(k)


def jointly(mapper: StreamMapper, runs: Sequence[Sequence[Cell]], steps: int) -> None:
    """All tasks at once."""
    learn(mapper, targets(mapper, [cell for run in runs for cell in run]), steps)


def kept(seen: Sequence[Targets], size: int, seed: int) -> Targets | None:
    """An even sample of the tiles seen so far that fits into `size` bytes, None before any."""
    if not seen:
        return None
    every = [np.concatenate(parts) for parts in zip(*seen, strict=True)]
    chosen = np.random.default_rng(seed).permutation(len(every[0]))[: max(size // TILE_BYTES, 1)]
    frame, tile, row = (part[np.sort(chosen)] for part in every)
    return frame, tile, row


def digest(pool: ModulePool, slot: int) -> str:
    """SHA-256 of everything a render reads of a module."""
    hashed = hashlib.sha256()
    for name in ("features", "weights", "density", "surface", "seen", "box", "band"):
        hashed.update(np.ascontiguousarray(getattr(pool, name)[slot]).tobytes())
    return hashed.hexdigest()


def parameters(mapper: StreamMapper, runs: Sequence[Sequence[Cell]], *, tied: bool) -> int:
    """Learned numbers of the modules of all tasks."""
    pool: Any = mapper.pool
    cells = sum(len(run) for run in runs)
    return cells * int(pool.layout.features) + (1 if tied else cells) * int(pool.weights.shape[1])
