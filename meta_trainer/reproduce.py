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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from mclnf_edge import __version__
from mclnf_edge.errors import ConfigError
from mclnf_edge.maths.adaptation import Weighting
from mclnf_edge.maths.fields import NerfMlp, Siren, count, plain_count
from meta_trainer.causes import CAUSES, causes, causes3, causes_of_cases
from meta_trainer.cost import measure_cost
from meta_trainer.data import DATASETS, Kind, open_items
from meta_trainer.episodes import Cut
from meta_trainer.evaluate import (
    PERCEPTUAL,
)
from meta_trainer.methods import METHODS
from meta_trainer.rows import (
    CASES,
    KEYS,
    OURS,
    PAPER_BLOCKS,
    make_row,
    paper_dataset,
    paper_row,
    paper_tables,
)
from meta_trainer.runs import (
    BUDGETS,
    Job,
    Setting,
    budget_for,
    chosen_rate,
    make_method,
    test_items,
)

log = logging.getLogger(__name__)

STAND_INS = ("faces", "photos", "speech", "video", "drone")
ORIGINALS = (
    "celeba", "imagenette", "ffhq", "librispeech1", "librispeech3", "voxceleb2", "matrixcity"
)  # fmt: skip


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


def _plain(
    table: str, metric: str, cut: Cut = "strips", pictures: bool = False
) -> Callable[[Job, list[Setting]], Any]:
    return lambda job, settings: compare(
        job, [replace(s, cut=cut) for s in settings], table, metric, pictures
    )


def of_cases(table: str, job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Rows of table 4 or 5; the paper's figures are for MatrixCity."""
    for setting in settings[:1]:
        for case in CASES[table](job, setting):
            yield make_row(job, case.setting, case.method, "psnr", case.paper) | case.told


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
    "causes4": partial(causes_of_cases, "table4"),
    "causes5": partial(causes_of_cases, "table5"),
    "table1": _plain("table1", "psnr"),
    "table2": _plain("table2", "perceptual"),
    "table3": _plain("table3", "both", "interleaved"),
    "table4": partial(of_cases, "table4"),
    "table5": partial(of_cases, "table5"),
    "table6": table6,
    "table7": table7,
    "fig2": _plain("table1", "psnr"),
    "fig3": _plain("table1", "psnr", pictures=True),
    "fig4": lambda job, settings: (
        make_row(job, s, name, "psnr", None, pictures=True) for s in settings for name in OURS
    ),
}

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
    if target in CASES:
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
