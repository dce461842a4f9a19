"""Replay: ER (Rolnick et al. 2019) and MER (Riemer et al. 2019), one reservoir buffer for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mclnf_edge.maths.adaptation import State, inner_step
from mclnf_edge.maths.fields import Params
from meta_trainer.episodes import Episode
from meta_trainer.methods.base import AfterTask, Batch, Learning, flag_last, pick


class Reservoir:
    """At most `capacity` samples of a stream, every sample seen kept with equal chance."""

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        """Room for `capacity` samples, none yet."""
        self.capacity = capacity
        self.seen = 0
        self._generator = generator
        self._coords: Tensor | None = None
        self._values: Tensor | None = None

    def __len__(self) -> int:
        """Samples kept."""
        return min(self.seen, self.capacity)

    def add(self, coords: Tensor, values: Tensor) -> None:
        """Offer samples (n, ...) in order (Vitter's algorithm R)."""
        if self._coords is None or self._values is None:
            self._coords = coords.new_empty(self.capacity, *coords.shape[1:])
            self._values = values.new_empty(self.capacity, *values.shape[1:])
        draws = torch.rand(len(coords), generator=self._generator, dtype=torch.float64)
        kept: dict[int, int] = {}  # place -> sample; of two for one place the later one stays
        for i, draw in enumerate(draws.tolist()):
            self.seen += 1
            place = self.seen - 1 if self.seen <= self.capacity else int(draw * self.seen)
            if place < self.capacity:
                kept[place] = i
        places, samples = list(kept), list(kept.values())
        self._coords[places], self._values[places] = coords[samples], values[samples]

    def sample(self, count: int) -> Batch:
        """`count` of the kept samples with repetition."""
        assert self._coords is not None and self._values is not None
        index = torch.randint(len(self), (count,), generator=self._generator)
        return self._coords[index], self._values[index]


@dataclass(frozen=True)
class Replay:
    """ER: each step joins a batch of the current task with one from the buffer.

    With `within`/`across` below 1 it is MER: the two batches are separate steps, replay first and
    the current samples last; theta returns to theta_before + within * (theta - theta_before) after
    each such pair, and likewise with `across` after every `group` pairs (both Reptile).

    A finished task's samples are offered to the buffer, which holds `share` of the whole signal.
    """

    name: str
    start: str = "random"
    modules: int = 0
    share: float = 1.0
    within: float = 1.0
    across: float = 1.0
    group: int = 5
    reptile: bool = False

    def learn(
        self,
        start: Params,
        episode: Episode,
        marks: Sequence[int],
        how: Learning,
        generator: torch.Generator,
        create_graph: bool = False,
        after_task: AfterTask | None = None,
    ) -> list[Params]:
        """See `Method`."""
        return [
            self._run(start, episode, k, how, generator, create_graph, after_task if last else None)
            for k, last in flag_last(marks)
        ]

    def _run(
        self,
        params: Params,
        episode: Episode,
        steps: int,
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
        after_task: AfterTask | None,
    ) -> Params:
        total = episode.values.shape[0] * episode.values.shape[1]
        buffer = Reservoir(max(1, round(self.share * total)), generator)
        for task, (x, s) in enumerate(zip(episode.coords, episode.values, strict=True)):
            state, group_start = State(), params
            for step in range(1, steps + 1):
                current = pick(x, s, how.batch, generator)
                replayed = buffer.sample(len(current[0])) if buffer.seen else None
                if not self.reptile:
                    params, state = self._joint(
                        params, state, current, replayed, how, generator, create_graph
                    )
                    continue
                before = params
                for part in [current] if replayed is None else [replayed, current]:
                    params, state = self._joint(
                        params, state, part, None, how, generator, create_graph
                    )
                params = towards(before, params, self.within)
                if step % self.group == 0 or step == steps:
                    params = towards(group_start, params, self.across)
                    group_start = params
            buffer.add(x, s)
            if after_task is not None:
                after_task(task, params)
        return params

    @staticmethod
    def _joint(
        params: Params,
        state: State,
        current: Batch,
        replayed: Batch | None,
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
    ) -> tuple[Params, State]:
        data = current
        if replayed is not None:
            data = (torch.cat([current[0], replayed[0]]), torch.cat([current[1], replayed[1]]))
        params, state, _ = inner_step(
            how.field,
            params,
            state,
            data,
            how.rates,
            how.rule,
            rows=how.rows,
            create_graph=create_graph,
            generator=generator,
        )
        return params, state


def towards(a: Params, b: Params, share: float) -> Params:
    """a + share * (b - a): Reptile's step from `a`."""
    return {name: a[name] + share * (b[name] - a[name]) for name in a}
