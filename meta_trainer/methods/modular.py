"""Ours (mod) and Ours (MIM): one module per task from one shared start (paper section 4.1).

The tasks' modules do not interact, so they are stacked and adapted in one batched step. With more
modules than tasks each task is cut into equal runs of its samples; with fewer, a module learns its
tasks one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mclnf_edge.maths.adaptation import State, inner_step
from mclnf_edge.maths.fields import Params, replicate
from meta_trainer.episodes import Episode
from meta_trainer.methods.base import AfterTask, Learning, pick


def stages(x: Tensor, modules: int) -> Tensor:
    """(T, N, ...) -> (stages, M, N', ...): what each module learns, one stage after the other."""
    tasks = len(x)
    if modules % tasks == 0 and x.shape[1] % (modules // tasks) == 0:
        return x.reshape(1, modules, -1, *x.shape[2:])
    if tasks % modules == 0:
        return x.reshape(modules, tasks // modules, *x.shape[1:]).transpose(0, 1)
    raise ValueError(
        f"expected modules to divide tasks or the other way round, with samples to share, "
        f"received {modules} modules, {tasks} tasks of {x.shape[1]} samples"
    )


@dataclass(frozen=True)
class Modular:
    """The sample weighting of `how.rule` makes the difference between (mod) and (MIM).

    Of signals of the kinds in `own_coordinates` each task has such: a part of a sound, stretched to
    [-1, 1], is slow enough for a module to follow (docs/experiments.md). All modules together see
    as many samples in a step as `batches` tasks have (0: each those of a task).
    """

    name: str
    start: str
    modules: int = 4
    own_coordinates: frozenset[str] = frozenset({"audio"})
    batches: int = 0

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
        """See `Method`; the results are stacked modules."""
        if self.batches and how.batch:
            how = replace(how, batch=max(1, how.batch * self.batches // self.modules))
        coords = stages(episode.coords, self.modules)
        values = stages(episode.values, self.modules)
        first = replicate(start, self.modules)
        if len(coords) == 1:
            kept = self._stage(first, coords[0], values[0], marks, how, generator, create_graph)
        else:
            kept = [
                self._sequence(first, coords, values, k, how, generator, create_graph)
                for k in marks
            ]
        if after_task is not None:
            for task in range(episode.tasks):
                after_task(task, kept[-1])
        return kept

    def _sequence(
        self,
        params: Params,
        coords: Tensor,
        values: Tensor,
        steps: int,
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
    ) -> Params:
        for x, s in zip(coords, values, strict=True):
            (params,) = self._stage(params, x, s, [steps], how, generator, create_graph)
        return params

    @staticmethod
    def _stage(
        params: Params,
        coords: Tensor,
        values: Tensor,
        marks: Sequence[int],
        how: Learning,
        generator: torch.Generator,
        create_graph: bool,
    ) -> list[Params]:
        state, kept = State(), {0: params}
        for step in range(1, max(marks) + 1):
            params, state, _ = inner_step(
                how.field,
                params,
                state,
                pick(coords, values, how.batch, generator),
                how.rates,
                how.rule,
                rows=how.rows,
                create_graph=create_graph,
                generator=generator,
            )
            if step in marks:
                kept[step] = params
        return [kept[mark] for mark in marks]
