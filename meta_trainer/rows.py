"""Rows of the tables: the runs behind one, its JSON contract, the paper's figures beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from meta_trainer.data import DATASETS
from meta_trainer.evaluate import bootstrap, mean_known, pesq_package, summary, worst_fall
from meta_trainer.runs import Job, Setting, SoundBudget, ViewBudget, run_method
from meta_trainer.views import BOUNDS

PAPER_BLOCKS = {"big_high_block_5": "matrixcity-b5", "big_high_block_6": "matrixcity-b6"}
"""MatrixCity's meta-test blocks, most likely those the paper calls B5 and B6."""

OURS = ("Ours (mod)", "Ours (MIM)")

KEYS = ("method", "dataset", "metric", "step1", "best", "best_step", "last", "seeds", "n", "paper")
"""Every row of every target has these; null where a row has no such figure."""


def make_row(
    job: Job,
    setting: Setting,
    name: str,
    metric: str,
    paper: dict[str, Any] | None,
    pictures: bool = False,
) -> dict[str, Any]:
    """One row of the JSON contract, with the spread over seeds and an interval over signals.

    With `pictures` the reconstructions of one run are there as well.
    """
    if metric == "pesq":
        pesq_package()
    records = run_method(job, setting, name, pictures)
    row = summary([r["curve"] for r in records], metric)
    best = str(row["best_step"])
    signals = sorted({r["signal"] for r in records})
    per_signal = [
        float(np.mean([r["curve"][best][metric] for r in records if r["signal"] == s]))
        for s in signals
    ]
    per_seed = [
        float(np.mean([r["curve"][best][metric] for r in records if r["seed"] == k]))
        for k in range(job.budget.seeds)
    ]
    return {
        "method": name,
        "dataset": label(setting),
        "metric": metric,
        **row,
        "seeds": job.budget.seeds,
        "n": len(signals),
        "seed_std": float(np.std(per_seed)),
        "interval": bootstrap(per_signal),
        "per_signal": dict(zip(signals, per_signal, strict=True)),
        "run_falls": [
            worst_fall(r["curve"][k][metric] for k in sorted(r["curve"], key=int)) for r in records
        ],
        "compute_s": {r["key"]: r["seconds"] for r in records},
        "forgetting": mean_known([mean_known(r["forgetting"]) for r in records]),
        "transfer": mean_known([mean_known(r["transfer"]) for r in records]),
        "rate": records[0]["rate"],
        "paper": paper,
        "panel": next((r["key"] for r in records if r["first"]), None),
        **provenance(job),
    }


def label(setting: Setting) -> str:
    """The data set as rows call it: MatrixCity's blocks 5 and 6 have the paper's names."""
    name = Path(setting.folder or "").name
    return (
        PAPER_BLOCKS.get(name, "matrixcity")
        if setting.dataset == "matrixcity"
        else (setting.dataset)
    )


def paper_dataset(setting: Setting) -> str:
    """The data set of the paper's tables whose figures stand beside ours."""
    name = label(setting)
    return name if name in PAPER_BLOCKS.values() else DATASETS[setting.dataset].paper


def provenance(job: Job) -> dict[str, str]:
    """What a reader of a row of views or sound must know; nothing for pictures and videos."""
    budget = job.budget
    if isinstance(budget, SoundBudget):
        rates = ", ".join(map(str, budget.search))
        return {
            "provenance": f"{budget.batch or 'all'} samples per task and step, {budget.meta_steps} "
            f"meta-training steps, step sizes {rates}, first layer of frequency "
            f"{budget.first_omega:g}, others {budget.omega:g}"
        }
    if not isinstance(budget, ViewBudget):
        return {}
    held = f"{budget.held or 'all'} held-out views"
    order = "first-order, with the comparison's steps" if budget.stepping == "adam" else "MAML"
    return {
        "provenance": f"{held} of each block, {budget.view_width} pixels across, "
        f"{budget.ray_samples} samples per ray; meta-training {order}; {BOUNDS}"
    }


@cache
def paper_tables() -> dict[str, Any]:
    """The published figures (`paper_tables.yaml`)."""
    text = (Path(__file__).parent / "paper_tables.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def paper_row(table: str, metric: str, dataset: str, method: str) -> dict[str, Any] | None:
    """The paper's row for a method, "Ours" standing for both variants where it prints one."""
    rows = paper_tables().get(table, {}).get(metric, {}).get(dataset, {})
    figures = rows.get(method) or (rows.get("Ours") if method in OURS else None)
    return (
        dict(zip(("step1", "best", "best_step", "last"), figures, strict=True)) if figures else None
    )


def paper_curve(table: str, setting: Setting, key: str) -> dict[str, Any] | None:
    """The paper's row of tables 4 and 5, which are for view synthesis only."""
    if DATASETS[setting.dataset].kind != "views":
        return None
    printed = paper_tables()[table]
    curve = dict(zip(printed["steps"], printed["rows"][key], strict=True))
    best = max(curve, key=lambda step: curve[step])
    ends = {"step1": curve[1], "best": curve[best], "best_step": best}
    return {
        **ends,
        "last": list(curve.values())[-1],
        "curve": {str(k): v for k, v in curve.items()},
    }


class Case(NamedTuple):
    """A row of table 4 or 5: a method, its setting, the column it is told by, the paper's row."""

    method: str
    setting: Setting
    told: dict[str, int]
    paper: dict[str, Any] | None


def table4_cases(job: Job, setting: Setting) -> Iterator[Case]:
    """mod and MIM at one and two module widths.

    The paper's first row's step 1 and MIM's are those of B5 in Table 1.
    """
    for widen, name in product((1, 2), OURS):
        paper = paper_curve("table4", setting, name.replace(")", f"; {256 * widen})"))
        width = job.budget.width // 2 * widen
        yield Case(name, replace(setting, widen=widen), {"width": width}, paper)


def table5_cases(job: Job, setting: Setting) -> Iterator[Case]:
    """mod and MIM with 5 and 10 tasks."""
    for tasks, name in product((5, 10), OURS):
        paper = paper_curve("table5", setting, f"{name}; {tasks} tasks")
        yield Case(name, replace(setting, tasks=tasks), {"tasks": tasks}, paper)


CASES = {"table4": table4_cases, "table5": table5_cases}
