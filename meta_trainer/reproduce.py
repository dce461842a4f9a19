"""The paper's tables and figures, each by one command, at three budgets.

Every (method, signal, seed) is one line of `runs.jsonl` in the output folder, written when it is
done; a command that was stopped goes on with the lines that are missing. Initializations are
trained by `trainer` into `starts/` when they are not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from mclnf_edge import __version__
from mclnf_edge.errors import ConfigError
from mclnf_edge.maths.adaptation import Rule, Weighting
from mclnf_edge.maths.fields import Params, Siren, count, plain_count
from meta_trainer.config import TrainConfig
from meta_trainer.data import DATASETS, Item, open_folder, open_items
from meta_trainer.episodes import CUTTERS, Cut, Episode
from meta_trainer.evaluate import (
    PERCEPTUAL,
    bootstrap,
    pesq_package,
    run_signal,
    search_rate,
    summary,
)
from meta_trainer.methods import METHODS, Learning, Method
from meta_trainer.trainer import load_init, train

STAND_INS = ("faces", "photos", "speech", "video")
ORIGINALS = ("celeba", "imagenette", "ffhq", "librispeech1", "librispeech3", "voxceleb2")
OURS = ("Ours (mod)", "Ours (MIM)")


@dataclass(frozen=True)
class Budget:
    """How much is computed. `batch` coordinates per task and step, alike for all methods (0: all);
    `search` are the step sizes every method tries on validation signals for `search_steps`."""

    name: str
    marks: tuple[int, ...]
    seeds: int
    signals: int
    batch: int
    width: int
    meta_steps: int
    meta_batch: int
    search: tuple[float, ...]
    search_signals: int
    search_steps: int
    frames: int = 8


def _doubling(last: int) -> tuple[int, ...]:
    return tuple(2**k for k in range(last.bit_length()))


_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
BUDGETS = {
    b.name: b
    for b in (
        Budget("smoke", (1, 2, 4), 1, 1, 64, 16, 2, 64, (1e-2,), 1, 2, frames=4),
        Budget("cpu", _doubling(512), 3, 4, 256, 256, 1500, 512, _RATES, 2, 64),
        Budget("paper", _doubling(4096), 3, 100, 0, 256, 500_000, 0, _RATES, 8, 256),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is compared on which signals; part of every run's key.

    `weighting` and `lam` replace the method's own sample weights while it adapts.
    """

    dataset: str
    folder: str | None = None
    cut: Cut = "strips"
    tasks: int = 4
    widen: int = 1
    weighting: Weighting | None = None
    lam: float = 0.1


@dataclass(frozen=True)
class Job:
    """Where and how much: budget, data root, output folder."""

    budget: Budget
    root: Path | None
    out: Path

    def field(self, setting: Setting, method: Method) -> Siren:
        """The paper's network: half the width for modules, so that four weigh as much as one."""
        d_in, d_out = {"image": (2, 3), "video": (3, 3), "audio": (1, 1)}[
            DATASETS[setting.dataset].kind
        ]
        width = self.budget.width // 2 if method.modules else self.budget.width
        return Siren(d_in, d_out, width * setting.widen)

    def learning(self, setting: Setting, method: Method, rate: float = 1e-2) -> Learning:
        """The steps of the comparison: plain gradient steps, FIM weights for MIM only."""
        own: Weighting = "diagonal" if method.start == "mim" else "none"
        rule = Rule(setting.weighting or own, lam=setting.lam)
        return Learning(self.field(setting, method), rate, rule, self.budget.batch)


def start_params(job: Job, setting: Setting, method: Method, seed: int) -> Params:
    """Random parameters of this seed, or the learned start, trained now if it is not there."""
    field = job.field(setting, method)
    if method.start == "random":
        return field.init(torch.Generator().manual_seed(seed))
    config = start_config(job, setting, method)
    path = Path(config.out) / "init.pt"
    if not path.is_file():
        train(config, job.root)
    params: Params = load_init(path)["params"]
    return params


def start_config(job: Job, setting: Setting, method: Method) -> TrainConfig:
    """The meta-training behind a learned start; one per data set, cut, tasks and width."""
    field, budget = job.field(setting, method), job.budget
    name = f"{setting.dataset}-{method.start}-{setting.cut}-{setting.tasks}-{field.width}"
    return TrainConfig(
        dataset=setting.dataset,
        start=method.start,  # type: ignore[arg-type]
        out=str(job.out / "starts" / budget.name / name),
        width=field.width,
        tasks=setting.tasks,
        cut=setting.cut,
        outer_steps=budget.meta_steps,
        batch=budget.meta_batch,
        query=budget.meta_batch,
        frames=max(budget.frames, setting.tasks),
        weighting="diagonal" if method.start == "mim" else "none",
    )


def make_method(name: str, setting: Setting) -> Method:
    """The method with one module per task where it is modular."""
    method = METHODS[name]
    if method.modules:
        method = replace(method, modules=setting.tasks)  # type: ignore[type-var]
    return method


def load_episode(item: Item, setting: Setting, budget: Budget) -> Episode:
    """A signal cut into this setting's tasks."""
    item = replace(item, shape=replace(item.shape, frames=max(budget.frames, setting.tasks)))
    return CUTTERS[item.kind](item.name, item.load(), setting.tasks, setting.cut)


def test_items(job: Job, setting: Setting) -> list[Item]:
    """The signals that are measured: the first of the test split, or of the given folder."""
    if setting.folder is not None:
        found = open_folder(Path(setting.folder), setting.dataset)
    else:
        found = open_items(setting.dataset, "test", job.root)
    return found[: job.budget.signals]


def run_method(job: Job, setting: Setting, name: str) -> list[dict[str, Any]]:
    """All records of one method, computing those that are not in `runs.jsonl`."""
    held = {r["key"]: r for r in _lines(job.out / "runs.jsonl")}
    method, records = make_method(name, setting), []
    for item in test_items(job, setting):
        for seed in range(job.budget.seeds):
            key = run_key(job.budget, setting, name, item, seed)
            if key not in held:
                held[key] = {"key": key, **_compute(job, setting, name, method, item, seed, key)}
                _append(job.out / "runs.jsonl", held[key])
            records.append(held[key])
    return records


def run_key(budget: Budget, setting: Setting, name: str, item: Item, seed: int) -> str:
    """Names a run by everything that decides its result but the code."""
    parts = [dataclasses.asdict(budget), dataclasses.asdict(setting), name, str(item.path), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def chosen_rate(
    job: Job, setting: Setting, name: str, method: Method
) -> tuple[float, dict[str, float]]:
    """This method's step size from the validation signals; kept in `rates.jsonl`."""
    alone = replace(setting, folder=None, weighting=None, lam=0.1)  # one rate for all controls
    parts = [dataclasses.asdict(job.budget), dataclasses.asdict(alone), name]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    for line in _lines(job.out / "rates.jsonl"):
        if line["key"] == key:
            return line["rate"], line["tried"]
    items = open_items(setting.dataset, "val", job.root)[: job.budget.search_signals]
    rate, tried = search_rate(
        method,
        start_params(job, setting, method, 0),
        [load_episode(i, setting, job.budget) for i in items],
        job.learning(setting, method),
        job.budget.search,
        job.budget.search_steps,
        0,
    )
    line = {"key": key, "method": name, "dataset": setting.dataset, "rate": rate, "tried": tried}
    _append(job.out / "rates.jsonl", line)
    return rate, tried


def _compute(
    job: Job, setting: Setting, name: str, method: Method, item: Item, seed: int, key: str
) -> dict[str, Any]:
    rate, _ = chosen_rate(job, setting, name, method)
    first = seed == 0 and item.name == test_items(job, setting)[0].name
    record = run_signal(
        method,
        start_params(job, setting, method, seed),
        load_episode(item, setting, job.budget),
        item.kind,
        job.budget.marks,
        job.learning(setting, method, rate),
        seed,
        job.out / "panels" / key if first else None,
    )
    what = {"method": name, "signal": item.name, "seed": seed, "rate": rate, "first": first}
    return {**what, **dataclasses.asdict(setting), "budget": job.budget.name, **record}


def make_row(
    job: Job, setting: Setting, name: str, metric: str, paper: dict[str, Any] | None
) -> dict[str, Any]:
    """One row of the JSON contract, with the spread over seeds and an interval over signals."""
    if metric == "pesq":
        pesq_package()
    records = run_method(job, setting, name)
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
        "dataset": setting.dataset,
        "metric": metric,
        **row,
        "seeds": job.budget.seeds,
        "n": len(signals),
        "seed_std": float(np.std(per_seed)),
        "interval": bootstrap(per_signal),
        "forgetting": float(np.mean([np.mean(r["forgetting"]) for r in records])),
        "transfer": float(np.mean([np.mean(r["transfer"]) for r in records])),
        "rate": records[0]["rate"],
        "paper": paper,
        "panel": next((r["key"] for r in records if r["first"]), None),
    }


def compare(job: Job, settings: Sequence[Setting], table: str, metric: str) -> Iterator[Any]:
    """Rows of tables 1 to 3: every method on every data set."""
    for setting in settings:
        like = DATASETS[setting.dataset].paper
        own = PERCEPTUAL[DATASETS[setting.dataset].kind] if metric == "perceptual" else metric
        for name in METHODS:
            yield make_row(job, setting, name, own, paper_row(table, own, like, name))


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


def _plain(table: str, metric: str, cut: Cut = "strips") -> Callable[[Job, list[Setting]], Any]:
    return lambda job, settings: compare(
        job, [replace(s, cut=cut) for s in settings if _fits(s, cut)], table, metric
    )


def _fits(setting: Setting, cut: Cut) -> bool:
    return cut == "strips" or DATASETS[setting.dataset].kind != "audio"


def table4(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """mod and MIM at one and two module widths; the paper's figures are for MatrixCity."""
    for setting in settings[:1]:
        for widen in (1, 2):
            for name in OURS:
                row = make_row(job, replace(setting, widen=widen), name, "psnr", None)
                yield {**row, "width": job.budget.width // 2 * widen}


def table5(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """mod and MIM with 5 and 10 tasks; the paper's figures are for MatrixCity."""
    for setting in settings[:1]:
        for tasks in (5, 10):
            for name in OURS:
                row = make_row(job, replace(setting, tasks=tasks), name, "psnr", None)
                yield {**row, "tasks": tasks}


CONTROLS: tuple[Weighting, ...] = (
    "diagonal",
    "factored",
    "shuffled",
    "residual",
    "gradncp",
    "pruned",
)
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)


def controls(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """MIM against mod and its controls, all from the start of (mod), lambda from validation.

    First the sweep of lambda on validation signals (`metric` "psnr-validation"), then each
    weighting on the test signals with the best lambda; "pruned" takes none.
    """
    for setting in settings[:1]:
        method = make_method("Ours (mod)", setting)
        rate, _ = chosen_rate(job, setting, "Ours (mod)", method)
        start = start_params(job, setting, method, 0)
        items = open_items(setting.dataset, "val", job.root)[: job.budget.search_signals]
        episodes = [load_episode(i, setting, job.budget) for i in items]
        sweep = {}
        for lam in LAMBDAS:
            how = job.learning(replace(setting, weighting="diagonal", lam=lam), method)
            _, tried = search_rate(
                method, start, episodes, how, (rate,), job.budget.search_steps, 0
            )
            sweep[lam] = tried[f"{rate:g}"]
            yield {"method": f"lambda {lam:g}", "dataset": setting.dataset,
                   "metric": "psnr-validation", "best": sweep[lam], "paper": None}  # fmt: skip
        best = max(sweep, key=lambda lam: sweep[lam])
        for weighting in ("none", *CONTROLS):
            changed = replace(setting, weighting=weighting, lam=best)
            row = make_row(job, changed, "Ours (mod)", "psnr", None)
            yield {**row, "method": weighting, "lam": best}


def table6(job: Job, settings: list[Setting]) -> Iterator[Any]:
    """Parameters, peak memory, episodes per second and PSNR, each method in a fresh process."""
    from meta_trainer.cost import measure_cost

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


TARGETS: dict[str, Callable[[Job, list[Setting]], Iterator[Any]]] = {
    "controls": controls,
    "table1": _plain("table1", "psnr"),
    "table2": _plain("table2", "perceptual"),
    "table3": _plain("table3", "psnr", "interleaved"),
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "fig2": _plain("table1", "psnr"),
    "fig3": _plain("table1", "psnr"),
    "fig4": lambda job, settings: (
        make_row(job, s, name, "psnr", None)
        for s in settings
        if DATASETS[s.dataset].kind != "audio"
        for name in OURS
    ),
}


def reproduce(
    target: str,
    budget: str = "smoke",
    dataset: str | None = None,
    folder: Path | None = None,
    root: Path | None = None,
    out: Path = Path("results"),
) -> dict[str, Any]:
    """Compute one table or figure; returns and writes `<out>/<target>-<budget>.json`.

    Raises:
        ConfigError: an unknown target, budget or data set, or `folder` without `dataset`.
        CaptureError: a data set that is not there.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if budget not in BUDGETS:
        raise ConfigError(f"unknown budget {budget!r}; known: {', '.join(BUDGETS)}")
    if folder is not None and dataset is None:
        raise ConfigError("--data needs --dataset, which says how its files are cut and compared")
    if dataset == "matrixcity":
        raise ConfigError("view synthesis (matrixcity) is not part of reproduce yet")
    names = (dataset,) if dataset else ORIGINALS if budget == "paper" else STAND_INS
    if unknown := [n for n in names if n not in DATASETS]:
        raise ConfigError(f"unknown data set {unknown[0]!r}; known: {', '.join(DATASETS)}")
    job = Job(BUDGETS[budget], root, out)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    where = str(folder.resolve()) if folder else None
    rows = list(tqdm(TARGETS[target](job, [Setting(n, where) for n in names]), unit="row"))
    result = {
        "target": target,
        "budget": dataclasses.asdict(job.budget),
        "rows": _finite(rows),
        "machine": machine(),
        "wall_s": round(time.monotonic() - begun, 1),
    }
    (out / f"{target}-{budget}.json").write_text(json.dumps(result, indent=1))
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mclnf_edge": __version__,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; a last one cut off by a crash is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def _append(path: Path, record: dict[str, Any]) -> None:
    """Append one whole line, after cutting off what a crash left unfinished."""
    if path.is_file() and not (raw := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(raw[: raw.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
