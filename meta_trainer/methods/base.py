"""What every method shares: its one signature, batches, evaluation of a field on an episode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mclnf_edge.maths.adaptation import Rates, Rule
from mclnf_edge.maths.fields import Field, Params
from meta_trainer.episodes import Episode

Batch = tuple[Tensor, Tensor]
AfterTask = Callable[[int, Params], None]

CHUNK = 8192
"""Rows of a field's layers evaluated at once: coordinates, or samples of rays."""


@dataclass(frozen=True)
class Learning:
    """How a method takes its steps, the same for all that are compared.

    `batch` samples per task and step (0: all of them); `rows` as in `fisher`.
    """

    field: Field
    rates: Rates = 1e-2
    rule: Rule = dataclasses.field(default_factory=Rule)
    batch: int = 0
    rows: int = 1


class Method(Protocol):
    """A way to learn an episode."""

    @property
    def name(self) -> str:
        """As the paper's tables call it."""
        ...

    @property
    def start(self) -> str:
        """The initialization it uses, "random" for none."""
        ...

    @property
    def modules(self) -> int:
        """Number of modules, 0 for one network."""
        ...

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
        """Parameters after the whole sequence with k steps per task, for every k in `marks`.

        A method that sees all data at once, or has a network per task, passes its marks in one run;
        one that goes through the tasks in order is run anew for each mark. `after_task(i, params)`
        is called after each task of the run for the last mark.
        """
        ...


def pick(coords: Tensor, values: Tensor, batch: int, generator: torch.Generator) -> Batch:
    """`batch` samples without repetition along the sample axis, the same places in every task.

    coords (..., N, d), values (..., N, c); all samples, in order, when `batch` is 0 or >= N.
    """
    count = values.shape[-2]
    if not 0 < batch < count:
        return coords, values
    index = torch.randperm(count, generator=generator)[:batch].to(values.device)
    return coords.index_select(values.ndim - 2, index), values.index_select(-2, index)


def batches(
    coords: Tensor, values: Tensor, batch: int, steps: int, generator: torch.Generator
) -> Iterator[Batch]:
    """`steps` random batches."""
    return (pick(coords, values, batch, generator) for _ in range(steps))


def flag_last(marks: Sequence[int]) -> list[tuple[int, bool]]:
    """Every mark and whether it is the last."""
    return [(mark, i == len(marks) - 1) for i, mark in enumerate(marks)]


def flat(episode: Episode) -> Batch:
    """All tasks of an episode as one: (T N, d), (T N, c)."""
    return episode.coords.flatten(0, 1), episode.values.flatten(0, 1)


def predict(how: Learning, modules: int, params: Params, episode: Episode) -> Tensor:
    """Values (T, N, c) of the whole episode, without gradients, a chunk at a time.

    `modules` 0: one network; else stacked modules, each for its own share of the tasks.
    """
    coords = episode.coords.flatten(0, 1)
    if modules:
        coords = coords.reshape(modules, -1, *coords.shape[1:])
    axis, chunk = 1 if modules else 0, max(1, CHUNK // how.rows)
    with torch.no_grad():
        parts = [how.field(params, c) for c in coords.split(chunk, dim=axis)]  # type: ignore[no-untyped-call]
        return torch.cat(parts, dim=axis).reshape(episode.values.shape)
