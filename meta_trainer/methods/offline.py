"""All data at once: OL from a random start; MOL (LearnedInit, Tancik et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mclnf_edge.maths.adaptation import State, inner_step
from mclnf_edge.maths.fields import Params
from meta_trainer.episodes import Episode
from meta_trainer.methods.base import AfterTask, Learning, flat, pick


@dataclass(frozen=True)
class Offline:
    """Each step draws `batches` batches from the whole signal, 0: as many as there are tasks T, so
    that it sees as many samples as a step on each of the tasks."""

    name: str
    start: str
    modules: int = 0
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
        """See `Method`. `after_task` is called once for every task, at the end."""
        coords, values = flat(episode)
        params, state, kept = start, State(), {0: start}
        for step in range(1, max(marks) + 1):
            data = pick(coords, values, how.batch * (self.batches or episode.tasks), generator)
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
            if step in marks:
                kept[step] = params
        if after_task is not None:
            for task in range(episode.tasks):
                after_task(task, params)
        return [kept[mark] for mark in marks]
