"""The fast field learning a sequence of tasks: as modules, and as one network of the same size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.frames import TILE, HeldFrame
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell, Module, ModulePool
from mclnf_edge.mapping.optimizer import Optimizer
from mclnf_edge.mapping.structure import Pause
from meta_trainer.city_init import Episode
from tools.tasks import I32, targets

F32 = npt.NDArray[np.float32]
Targets = tuple[I32, I32, I32]
TILE_BYTES = TILE * TILE * 3 + 8
"""A tile in a replay buffer: its pixels, its frame and its place."""
_PASSES = 1000.0
"""No module's budget ends before its task's steps."""
_MOMENTS = ("moment", "square", "adam_steps")


class StreamMapper(Mapper):
    """A mapper that draws its rays from given tiles.

    `tied`: one network. The planes of all cells stay where they are, as one set of planes over the
    capture, and one MLP reads them all: its gradient is summed over all rays before Adam moves it.
    `replay`: half of a batch comes from these tiles. `spent` is the share of the current task's
    steps, which the learning rate of the MLP follows. Cells in `done` are not measured anew: their
    task's rays do not come back.
    """

    tied = False
    drawn: Targets | None = None
    replay: Targets | None = None
    spent = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = _Tying(self)
        self.done: set[Cell] = set()

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

    def settle(self, pause: Pause = lambda: None, *, last: bool = False) -> bool:
        """As the daemon does; one network keeps its MLP, and Adam's moments of it."""
        learned = next(iter(self.learning()), None) if self.tied else None
        if learned is None:
            return super().settle(pause, last=last)
        assert self.pool is not None
        pool = self.pool
        mlp = pool.weights[learned.slot].copy()
        kept = {name: getattr(pool, name)[learned.row].copy() for name in _MOMENTS}
        done = super().settle(pause, last=last)
        open_ = self.learning()
        pool.weights[[m.slot for m in open_]] = mlp
        rows = np.array([m.row for m in open_])
        for name, value in kept.items():
            getattr(pool, name)[rows] = value
        pool.refresh_transposed(rows)
        return done

    def _needs_seed(self, cell: Cell, frames: list[HeldFrame], last: bool) -> bool:
        return cell not in self.done and super()._needs_seed(cell, frames, last)

    def _passed(self, module: Module) -> bool:
        return True  # all frames of a task come at once


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

    def joint(self, mlp: F32, seed: int, *, tied: bool) -> StreamMapper:
        """Every module learning, at its start seeded from all frames."""
        self.restart(mlp, seed)
        mapper = self.mapper
        mapper.optimizer.adapt = replace(mapper.adapt, passes=_PASSES)
        mapper.tied, mapper.replay, mapper.drawn, mapper.spent = tied, None, None, 0.0
        return mapper

    def anew(self, mlp: F32, seed: int, *, tied: bool) -> StreamEpisode:
        """The same capture with the same cells, and a map to which no frame has come yet."""
        whole, other = self.mapper, copy(self)
        assert whole.pool is not None
        mapper = cast(StreamMapper, self.empty_map(whole.pool.cell_m, mlp, whole.threads))
        mapper.optimizer.restart(replace(mapper.adapt, seed=seed, passes=_PASSES))
        mapper.random = np.random.default_rng(seed)
        mapper.origins[0], mapper.tied, other.mapper = whole.origins[0], tied, mapper
        return other


def arrivals(mapper: Mapper, runs: Sequence[Sequence[Cell]]) -> list[list[int]]:
    """Of each task the frames that see a cell of it and none of the tasks before, by id."""
    out, come = [], set[int]()
    for run in runs:
        seeing = {f.id for f in mapper.frames.values() if not f.tiles.keys().isdisjoint(run)}
        out.append(sorted(seeing - come))
        come |= seeing
    return out


def in_turn(
    episode: StreamEpisode, runs: Sequence[Sequence[Cell]], frames: Sequence[Sequence[int]]
) -> Iterator[Targets]:
    """The tiles of each task, once its `frames` have come and what they see has been seeded."""
    for run, numbers in zip(runs, frames, strict=True):
        episode.hold(numbers)
        yield targets(episode.mapper, run)
        episode.mapper.done.update(run)


@dataclass
class Closed:
    """Digests of the modules when they were closed, those that differ at the end, their bytes;
    how many frames were let go.
    """

    digests: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    committed_bytes: int = 0
    let_go: int = 0


def shares(runs: Sequence[Sequence[Cell]], count: dict[Cell, int], steps: int) -> list[int]:
    """Steps of each task, in proportion to its tiles."""
    total = sum(count.values())
    return [round(steps * sum(count[cell] for cell in run) / total) for run in runs]


def learn(mapper: StreamMapper, drawn: Targets, steps: int) -> None:
    """`steps` steps on the rays of some tiles."""
    mapper.drawn = drawn
    for i in range(steps):
        mapper.spent = i / steps
        mapper.step()


def modules(
    mapper: StreamMapper,
    runs: Sequence[Sequence[Cell]],
    tasks: Iterable[Targets],
    steps: Sequence[int],
    after: Callable[[int], None],
) -> Closed:
    """Each task by modules of its own, closed when it is done; closed ones must not change.

    Frames that no open cell needs are let go, as the daemon does.
    """
    closed = Closed()
    for k, drawn in enumerate(tasks):
        assert mapper.pool is not None
        pool = mapper.pool
        own = [mapper.modules[cell] for cell in runs[k] if cell in mapper.modules]
        for module in own:
            pool.rank_closed(module.cell)  # as if the coming tasks' modules were made later
        learn(mapper, drawn, steps[k])
        let_go: dict[int, int] = {}
        for module in own:
            closing = mapper.close(module)
            assert closing.snapshot is not None
            closed.committed_bytes += sum(a.nbytes for a in closing.snapshot.arrays.values())
            closed.digests[module.id] = digest(pool, module.slot)
            let_go |= closing.let_go
        mapper.forget(let_go)
        closed.let_go += len(let_go)
        after(k)
    assert mapper.pool is not None
    for module in mapper.modules.values():
        before = closed.digests.get(module.id)
        if before is not None and digest(mapper.pool, module.slot) != before:
            closed.changed.append(module.id)
    return closed


def one_network(
    mapper: StreamMapper,
    tasks: Iterable[Targets],
    steps: Sequence[int],
    after: Callable[[int], None],
    replay_bytes: int = 0,
) -> None:
    """Task after task into one network; a buffer of `replay_bytes` keeps a sample of past tiles."""
    seen: list[Targets] = []
    for k, drawn in enumerate(tasks):
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
