"""The paper's tables and figures, each by one command, at three budgets (see `runs`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import yaml
from tqdm import tqdm

from mclnf_edge import __version__
from mclnf_edge.errors import ConfigError
from mclnf_edge.maths.adaptation import Weighting
from mclnf_edge.maths.fields import NerfMlp, Siren, count, plain_count
from meta_trainer.cost import measure_cost
from meta_trainer.data import DATASETS, Kind, open_items
from meta_trainer.episodes import Cut
from meta_trainer.evaluate import (
    PERCEPTUAL,
    bootstrap,
    mean_known,
    pesq_package,
    summary,
    worst_fall,
)
from meta_trainer.methods import METHODS, VARIANTS
from meta_trainer.runs import (
    BUDGETS,
    Job,
    Setting,
    SoundBudget,
    ViewBudget,
    budget_for,
    chosen_rate,
    make_method,
    run_method,
    test_items,
)
from meta_trainer.views import BOUNDS

log = logging.getLogger(__name__)

STAND_INS = ("faces", "photos", "speech", "video", "drone")
ORIGINALS = (
    "celeba", "imagenette", "ffhq", "librispeech1", "librispeech3", "voxceleb2", "matrixcity"
)  # fmt: skip
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


def compare(
    job: Job, settings: Sequence[Setting], table: str, metric: str, pictures: bool = False
) -> Iterator[Any]:
    """Rows of tables 1 to 3: every method on every data set.

    Metric "perceptual" is that of the data set's kind, "both" the PSNR and then that.
    """
    for setting, asked in product(
        settings, ("psnr", "perceptual") if metric == "both" else (metric,)
    ):
        like = paper_dataset(setting)
        own = PERCEPTUAL[DATASETS[setting.dataset].kind] if asked == "perceptual" else asked
        for name in METHODS:
            paper = paper_row(table, own, like, name)
            yield make_row(job, setting, name, own, paper, pictures)


def paper_tables() -> dict[str, Any]:
    """The published figures (`paper_tables.yaml`)."""
    return _paper()


@cache
def _paper() -> dict[str, Any]:
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


def _plain(
    table: str, metric: str, cut: Cut = "strips", pictures: bool = False
) -> Callable[[Job, list[Setting]], Any]:
    return lambda job, settings: compare(
        job, [replace(s, cut=cut) for s in settings], table, metric, pictures
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


class Cell(NamedTuple):
    """A row of table 4 or 5: a method, its setting, the column it is told by, the paper's row."""

    method: str
    setting: Setting
    told: dict[str, int]
    paper: dict[str, Any] | None


def table4_cells(job: Job, setting: Setting) -> Iterator[Cell]:
    """mod and MIM at one and two module widths.

    The paper's first row's step 1 and MIM's are those of B5 in Table 1.
    """
    for widen, name in product((1, 2), OURS):
        paper = paper_curve("table4", setting, name.replace(")", f"; {256 * widen})"))
        width = job.budget.width // 2 * widen
        yield Cell(name, replace(setting, widen=widen), {"width": width}, paper)


def table5_cells(job: Job, setting: Setting) -> Iterator[Cell]:
    """mod and MIM with 5 and 10 tasks."""
    for tasks, name in product((5, 10), OURS):
        paper = paper_curve("table5", setting, f"{name}; {tasks} tasks")
        yield Cell(name, replace(setting, tasks=tasks), {"tasks": tasks}, paper)


CELLS = {"table4": table4_cells, "table5": table5_cells}


def of_cells(table: str, job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Rows of table 4 or 5; the paper's figures are for MatrixCity."""
    for setting in settings[:1]:
        for cell in CELLS[table](job, setting):
            yield make_row(job, cell.setting, cell.method, "psnr", cell.paper) | cell.told


CONTROLS: tuple[Weighting, ...] = (
    "diagonal",
    "factored",
    "shuffled",
    "residual",
    "gradncp",
    "pruned",
)
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def controls(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """MIM against mod and its controls, all from the start of (mod), lambda from validation.

    First the sweep of lambda on validation signals (`metric` "psnr-validation", 0: no weights),
    then each weighting on the test signals with the best lambda above 0; "pruned" takes none. Every
    lambda and every weighting has its own step size, chosen on the same validation signals. Last
    MIM as in the tables, from its own start, with that lambda.
    """
    for setting in settings[:1]:
        method, sweep = make_method("Ours (mod)", setting), {}
        for lam in (0.0, *LAMBDAS):
            weighted = replace(setting, weighting="diagonal", lam=lam) if lam else setting
            rate, tried = chosen_rate(job, weighted, "Ours (mod)", method)
            sweep[lam] = max(tried.values())
            yield {"method": f"lambda {lam:g}", "dataset": setting.dataset, "rate": rate,
                   "metric": "psnr-validation", "best": sweep[lam], "paper": None}  # fmt: skip
        best = max(LAMBDAS, key=lambda lam: sweep[lam])
        for weighting in ("none", *CONTROLS):
            changed = replace(setting, weighting=weighting, lam=best)
            row = make_row(job, changed, "Ours (mod)", "psnr", None)
            yield {**row, "method": weighting, "lam": best}
        row = make_row(job, replace(setting, lam=best), "Ours (MIM)", "psnr", None)
        yield {**row, "lam": best}


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


def causes_of_cells(table: str, job: Job, settings: list[Setting]) -> Iterator[Any]:
    """The same for each row of table 4 or 5; more steps there are in `causes`."""
    for setting in settings[:1]:
        for cell in CELLS[table](job, setting):
            paper = {cell.method: cell.paper}.get
            for row in _variants(job, cell.setting, "psnr", table, paper, cell.method):
                yield row | cell.told


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


def table6(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Parameters, peak memory, episodes per second and PSNR, each method in a fresh process."""
    for setting in settings[:1]:
        for name in METHODS:
            paper = paper_tables()["table6"].get("Ours" if name in OURS else name)
            yield {
                "method": name,
                "dataset": setting.dataset,
                "metric": "cost",
                **measure_cost(job, setting, name),
                "paper": dict(zip(("parameters", "memory_mb", "episodes_per_s", "psnr"), paper,
                                  strict=True)),
            }  # fmt: skip


def table7(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Parameter counts by the formula that gives the published numbers."""
    generator = torch.Generator()
    formula = {
        "Un-modularized": plain_count(2, 512, 10, 3) - 3 * 512,  # lacks the input layer
        "Modularized": 4 * plain_count(2, 256, 10, 3),
    }
    for name, (networks, width, layers, printed) in paper_tables()["table7"].items():
        yield {
            "method": name,
            "metric": "parameters",
            "networks": networks,
            "width": width,
            "layers": layers,
            "parameters": formula[name],
            "paper": {"parameters": printed},
        }
    for name, single in (("single SIREN", Siren(2, 3, 256)), ("module SIREN", Siren(2, 3, 128))):
        n = count(single.init(generator)) * (4 if name.startswith("module") else 1)
        yield {"method": name, "metric": "parameters", "parameters": n, "paper": None}
    if any(DATASETS[s.dataset].kind == "views" for s in settings):
        for name, networks, width in (("single ReLU MLP", 1, 512), ("module ReLU MLP", 4, 256)):
            n = count(NerfMlp(width).init(generator)) * networks
            yield {"method": name, "metric": "parameters", "parameters": n, "paper": None}


TARGETS: dict[str, Callable[[Job, list[Setting]], Iterator[Any]]] = {
    "controls": controls,
    "causes": causes,
    "causes3": causes3,
    "causes4": partial(causes_of_cells, "table4"),
    "causes5": partial(causes_of_cells, "table5"),
    "table1": _plain("table1", "psnr"),
    "table2": _plain("table2", "perceptual"),
    "table3": _plain("table3", "both", "interleaved"),
    "table4": partial(of_cells, "table4"),
    "table5": partial(of_cells, "table5"),
    "table6": table6,
    "table7": table7,
    "fig2": _plain("table1", "psnr"),
    "fig3": _plain("table1", "psnr", pictures=True),
    "fig4": lambda job, settings: (
        make_row(job, s, name, "psnr", None, pictures=True) for s in settings for name in OURS
    ),
}

CAUSES = {
    "table1": "causes", "table2": "causes", "table3": "causes3", "table4": "causes4",
    "table5": "causes5",
}  # fmt: skip
"""Where the tried causes of a table's disagreements are."""

ON_ONE = ("controls", *dict.fromkeys(CAUSES.values()), "table4", "table5", "table6", "table7")
"""Targets about one data set, where none is named the first, or of the paper's kind."""

KINDS: dict[str, tuple[Kind, ...]] = {
    "table3": ("image", "video"),
    "causes3": ("image", "video"),
    "causes4": ("views",),
    "causes5": ("views",),
    "fig4": ("image", "video", "views"),
}
"""Targets that are not for every kind of signal."""


def reproduce(
    target: str,
    budget: str = "smoke",
    dataset: str | None = None,
    folder: Path | None = None,
    root: Path | None = None,
    out: Path = Path("results"),
    signals: int | None = None,
    modules: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compute one table or figure; returns and writes `<out>/<target>-<budget>.json`.

    One data set's, or a folder's, has its name behind the budget's; two folders of one name that
    lie in different places are told apart by digits behind it.

    Raises:
        ConfigError: an unknown target, budget or data set, one that the target is not for, or
            `folder` without `dataset`.
        CaptureError: a data set that is not there.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if budget not in BUDGETS:
        raise ConfigError(f"unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    if folder is not None and dataset is None:
        raise ConfigError("--data needs --dataset, which says how its files are cut and compared")
    names = _datasets(target, dataset, ORIGINALS if budget == "paper" else STAND_INS)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    where = folder.resolve() if folder else None
    jobs = {n: Job(budget_for(budget, n), root, out, signals, device) for n in names}
    found = {n: _settings(n, where, root, modules) for n in names}
    for n, settings in found.items():
        _tell_counts(jobs[n], settings, n)
    parts = (TARGETS[target](job, found[n]) for n, job in jobs.items())
    rows = list(tqdm(chain.from_iterable(parts), unit="row"))
    seconds: dict[str, float] = {}  # of each run once; apart, as rows repeat themselves exactly
    for row in rows:
        seconds |= row.pop("compute_s", {})
    result = {
        "target": target,
        "folder": str(where) if where else None,
        "budgets": {name: dataclasses.asdict(job.budget) for name, job in jobs.items()},
        "rows": _finite([dict.fromkeys(KEYS) | row for row in rows]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "compute_s": round(sum(seconds.values()), 1),
        "wall_s": round(time.monotonic() - begun, 1),
    }
    stem = [target, budget, *([dataset] if dataset else []), *([where.name] if where else [])]
    stem += [f"{modules}-modules"] if modules else []
    _free_path(out, "-".join(stem), result).write_text(json.dumps(result, indent=1))
    return result


def _datasets(target: str, asked: str | None, usual: Sequence[str]) -> list[str]:
    """What a target runs on: the data set asked for, else those of the usual ones it is for."""
    names = [asked] if asked else list(usual)
    if unknown := [n for n in names if n not in DATASETS]:
        raise ConfigError(f"unknown data set {unknown[0]!r}; known: {', '.join(DATASETS)}")
    names = [n for n in names if is_for(target, n)]
    if not names:
        raise ConfigError(f"{target} is for {', '.join(KINDS[target])} only, received {asked}")
    if target in CELLS:
        names.sort(key=lambda n: DATASETS[n].kind != "views")
    return names[:1] if target in ON_ONE else names


def is_for(target: str, dataset: str) -> bool:
    """Whether a target is for signals of a data set's kind."""
    return DATASETS[dataset].kind in KINDS.get(target, get_args(Kind))


def _free_path(out: Path, stem: str, result: dict[str, Any]) -> Path:
    """`<out>/<stem>.json`, with digits of the folder behind it where that holds another one's."""
    path = out / f"{stem}.json"
    before = json.loads(path.read_text()).get("folder") if path.is_file() else None
    if before in (None, result["folder"]):
        return path
    digits = hashlib.sha256(str(result["folder"]).encode()).hexdigest()[:6]
    return out / f"{stem}-{digits}.json"


def _tell_counts(job: Job, settings: Sequence[Setting], name: str) -> None:
    """Say how many of a data set's signals are measured, where that is not all."""
    for setting in settings:
        count, there = len(test_items(job, setting)), len(test_items(_all(job), setting))
        if count < there:
            log.info("%s: %d of %d signals are measured (--signals)", name, count, there)


def _all(job: Job) -> Job:
    return replace(job, signals=sys.maxsize)


def _settings(dataset: str, folder: Path | None, root: Path | None, modules: int) -> list[Setting]:
    """One setting, or one for each of MatrixCity's blocks 5 and 6, which the paper lists apart."""
    if dataset == "matrixcity" and folder is None:
        blocks = [i.path for i in open_items(dataset, "test", root) if i.path.name in PAPER_BLOCKS]
        if blocks:
            return [Setting(dataset, str(p.resolve()), modules=modules) for p in blocks]
    return [Setting(dataset, str(folder) if folder else None, modules=modules)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mclnf_edge": __version__,
    }


def cpu_name() -> str:
    """The processor's model where the system tells it, else its architecture."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
