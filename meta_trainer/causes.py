"""What was tried where our order of two methods is not the paper's, and the rows that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from meta_trainer.data import DATASETS
from meta_trainer.evaluate import PERCEPTUAL
from meta_trainer.methods import METHODS, VARIANTS
from meta_trainer.rows import CASES, OURS, make_row, paper_dataset, paper_row
from meta_trainer.runs import Job, Setting, chosen_rate, make_method

CAUSES = {
    "table1": "causes", "table2": "causes", "table3": "causes3", "table4": "causes4",
    "table5": "causes5",
}  # fmt: skip
"""Where the tried causes of a table's disagreements are."""

_LEARNED = ("MOL", *OURS)
FURTHER: dict[str, dict[str, int]] = {
    "image": dict.fromkeys(_LEARNED, 8) | dict.fromkeys(("MAML+CL", "OML"), 4),
    "video": dict.fromkeys(_LEARNED, 8) | dict.fromkeys(("OL", "MAML+CL", "OML"), 4),
    "audio": dict.fromkeys((*_LEARNED, "OL"), 2) | {"MAML+CL": 4},
    "views": dict.fromkeys(_LEARNED, 2),
    "interleaved": dict.fromkeys((*_LEARNED, "OL"), 4),
}
"""How many times the budget's steps `causes` runs a method, by kind of signal or cut."""


def causes(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Tried causes of an order that is not the paper's: more steps, other readings of a method.

    In Table 1's and Table 2's metric where the paper has it, from the same runs. A row's method
    says what was changed, `of` whose change it is, `further` whether it is more steps; the paper's
    figure beside it is that method's own.
    """
    for setting in settings[:1]:
        kind = DATASETS[setting.dataset].kind
        for table, metric in (("table1", "psnr"), ("table2", PERCEPTUAL[kind])):
            paper = partial(paper_row, table, metric, paper_dataset(setting))
            if not any(map(paper, METHODS)):
                continue
            yield from _longer(job, setting, metric, FURTHER[kind], paper)
            for name in OURS if kind != "views" else ():  # no run of a module falls there
                smaller = _smaller_steps(job, setting, name)
                if smaller is None:
                    continue
                row = make_row(smaller, setting, name, metric, paper(name))
                told = f"{name} (step size {row['rate']:g})"
                yield {**row, "method": told, "of": name, "further": False}
            yield from _variants(job, setting, metric, "table1", paper)


def causes3(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """The same for table 3."""
    for setting in settings[:1]:
        cut = replace(setting, cut="interleaved")
        for metric in ("psnr", PERCEPTUAL[DATASETS[setting.dataset].kind]):
            paper = partial(paper_row, "table3", metric, paper_dataset(setting))
            yield from _longer(job, cut, metric, FURTHER["interleaved"], paper)
            yield from _variants(job, cut, metric, "table3", paper)


def causes_of_cases(table: str, job: Job, settings: list[Setting]) -> Iterator[Any]:
    """The same for each row of table 4 or 5; more steps there are in `causes`."""
    for setting in settings[:1]:
        for case in CASES[table](job, setting):
            paper = {case.method: case.paper}.get
            for row in _variants(job, case.setting, "psnr", table, paper, case.method):
                yield row | case.told


Printed = Callable[[str], dict[str, Any] | None]


def _longer(
    job: Job, setting: Setting, metric: str, further: Mapping[str, int], paper: Printed
) -> Iterator[Any]:
    """Rows of methods that take several times the budget's steps."""
    marks = job.budget.marks
    for name, times in further.items():
        more = tuple(marks[-1] * 2**k for k in range(1, times.bit_length()))
        longer = replace(job, budget=replace(job.budget, marks=marks + more))
        row = make_row(longer, setting, name, metric, paper(name))
        told = f"{name} (to {more[-1]} steps)"
        yield {**row, "method": told, "of": name, "further": True}


def _variants(
    job: Job, setting: Setting, metric: str, table: str, paper: Printed, of: str | None = None
) -> Iterator[Any]:
    """Rows of other readings of the methods, or of the one called `of`, that a table tries."""
    kind = DATASETS[setting.dataset].kind
    for name, variant in VARIANTS.items():
        if kind in variant.kinds and table in variant.tables and of in (None, variant.own):
            changed = setting if variant.lam is None else replace(setting, lam=variant.lam)
            row = make_row(job, changed, name, metric, paper(variant.own))
            yield {**row, "of": variant.own, "further": False}


def _smaller_steps(job: Job, setting: Setting, name: str) -> Job | None:
    """The same with the next smaller step size than validation chose; None where there is none."""
    rate, tried = chosen_rate(job, setting, name, make_method(name, setting))
    smaller = [float(r) for r in tried if float(r) < rate]
    return replace(job, budget=replace(job.budget, search=(max(smaller),))) if smaller else None
