"""Budgets, and the runs behind every table: each method on each signal, once.

Every (method, signal, seed) is one line of `runs.jsonl` in the output folder, written when it is
done; a command that was stopped goes on with the lines that are missing. Initializations come
with the package (`SHIPPED`) or are trained by `trainer` into `starts/` of the output folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mclnf_edge.mapping.initialization import SHAPES
from mclnf_edge.maths.adaptation import Rule, Stepping, Weighting
from mclnf_edge.maths.fields import NerfMlp, Params, Siren
from meta_trainer.config import TrainConfig, parse_config
from meta_trainer.data import DATASETS, SAMPLE_RATE_HZ, Item, open_folder, open_items
from meta_trainer.episodes import Cut, Episode
from meta_trainer.evaluate import run_signal, try_rate
from meta_trainer.methods import METHODS, VARIANTS, Learning, Method, Modular
from meta_trainer.ray_field import RayField, rows_of
from meta_trainer.signals import cut_item
from meta_trainer.trainer import load_init, train


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
    outer_rate: float = 1e-4


@dataclass(frozen=True)
class ViewBudget(Budget):
    """The same for view synthesis. `batch` rays per task and step, `ray_samples` on each, `rays`
    held per task; pictures `view_width` pixels across, `held` test views measured (0: all); an MLP
    of `layers` hidden layers. Steps are Adam's: plain ones leave a deep ReLU network of rays at the
    mean colour (docs/experiments.md). Adam goes with the first-order meta-gradient."""

    view_width: int = 480
    ray_samples: int = 64
    rays: int = 2**18
    held: int = 0
    layers: int = 10
    inner_rate: float = 1e-3
    stepping: Stepping = "adam"
    outer_rate: float = 3e-3


@dataclass(frozen=True)
class SoundBudget(Budget):
    """The same for sound, which is small beside full scale and fast: higher frequencies in the
    first layer and in the others, and smaller steps with them (docs/experiments.md). Step sizes are
    searched with more steps: one that is best after few may not last."""

    first_omega: float = 3000.0
    omega: float = 600.0
    inner_rate: float = 1e-3


SLOW_SOUND = 0.3
"""Outer step size for sound, of one wide network and of modules whose tasks have coordinates of
their own, against a module's in the whole sound's: at that one their weights grow several times
within 1,000 steps, and the start learns nothing more."""

SHIPPED = Path(__file__).parent / "starts"
"""`<budget>/<name>.pt`: trained by `tools/make_starts.py`, used where their configuration is that
asked for. `rates.jsonl`: step sizes chosen with them (those of docs/results), used likewise."""


def _doubling(last: int) -> tuple[int, ...]:
    return tuple(2**k for k in range(last.bit_length()))


_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BUDGETS = {
    b.name: b
    for b in (
        Budget("smoke", (1, 2, 4), 1, 1, 64, 16, 2, 64, (1e-2,), 1, 2, frames=4),
        Budget("cpu", _doubling(512), 3, 4, 256, 256, 1500, 256, _RATES, 2, 64, outer_rate=3e-4),
        Budget("paper", _doubling(4096), 3, 100, 0, 256, 500_000, 0, _RATES, 8, 256),
    )
}  # fmt: skip
_SOUND_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SOUND_BUDGETS = {
    b.name: b
    for b in (
        SoundBudget("smoke", (1, 2, 4), 1, 1, 64, 16, 2, 64, (3e-3,), 1, 2),
        SoundBudget("cpu", _doubling(512), 3, 4, 512, 256, 1000, 512, _SOUND_RATES, 2, 256,
                    outer_rate=1e-5),
        SoundBudget("paper", _doubling(4096), 3, 100, 0, 256, 500_000, 0, _SOUND_RATES, 8, 256,
                    outer_rate=1e-5),
    )
}  # fmt: skip
_VIEW_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
VIEW_BUDGETS = {
    b.name: b
    for b in (
        ViewBudget("smoke", (1, 2, 4), 1, 1, 8, 16, 2, 8, (3e-3,), 1, 2,
                   view_width=32, ray_samples=4, rays=64, held=1),
        ViewBudget("cpu", _doubling(512), 3, 2, 64, 64, 1500, 64, _VIEW_RATES, 1, 64,
                   view_width=96, ray_samples=16, rays=2**15, held=0),
        ViewBudget("paper", _doubling(1024), 3, 100, 256, 512, 500_000, 256,
                   _VIEW_RATES[:-2], 2, 256, outer_rate=1e-4),
    )
}  # fmt: skip


def budget_for(name: str, dataset: str) -> Budget:
    """The budget of this name for a data set's modality."""
    kinds: dict[str, Mapping[str, Budget]] = {"views": VIEW_BUDGETS, "audio": SOUND_BUDGETS}
    return kinds.get(DATASETS[dataset].kind, BUDGETS)[name]


@dataclass(frozen=True)
class Setting:
    """What is compared on which signals; part of every run's key.

    `weighting` and `lam` replace the method's own sample weights while it adapts. Modular methods
    have `modules` of them; 0: one per task.
    """

    dataset: str
    folder: str | None = None
    cut: Cut = "strips"
    tasks: int = 4
    modules: int = 0
    widen: int = 1
    weighting: Weighting | None = None
    lam: float = 0.1


@dataclass(frozen=True)
class Job:
    """Where and how much: budget, data root, output folder, device.

    `signals` are measured; None: the budget's number.
    """

    budget: Budget
    root: Path | None
    out: Path
    signals: int | None = None
    device: str = "cpu"

    def field(self, setting: Setting, method: Method) -> Siren | RayField:
        """The paper's network: half the width for modules, so that four weigh as much as one."""
        width = self.budget.width // 2 if method.modules else self.budget.width
        width *= setting.widen
        if isinstance(self.budget, ViewBudget):
            layers = self.budget.layers
            return RayField(NerfMlp(width, layers, layers // 2), self.budget.ray_samples)
        kind = DATASETS[setting.dataset].kind
        assert kind != "views"  # their budget is a ViewBudget
        d_in, d_out = SHAPES[kind]
        if isinstance(self.budget, SoundBudget):
            first = self.budget.first_omega
            return Siren(d_in, d_out, width, omega=self.budget.omega, first_omega=first)
        return Siren(d_in, d_out, width)

    def learning(self, setting: Setting, method: Method, rate: float = 1e-2) -> Learning:
        """The steps of the comparison: plain ones or Adam's, FIM weights for MIM only."""
        own: Weighting = "diagonal" if method.start == "mim" else "none"
        stepping = self.budget.stepping if isinstance(self.budget, ViewBudget) else "sgd"
        rule = Rule(setting.weighting or own, stepping, lam=setting.lam)
        field, batch = self.field(setting, method), self.budget.batch
        if isinstance(field, RayField):
            batch *= setting.widen  # the paper's Table 4 widens both
        return Learning(field, rate, rule, batch, rows_of(field))


def start_params(job: Job, setting: Setting, method: Method, seed: int) -> Params:
    """Random parameters of this seed, or a learned start: the package's own, else one trained now
    on the data set's training signals."""
    field = job.field(setting, method)
    if method.start == "random":
        drawn = field.init(torch.Generator().manual_seed(seed))
        return {name: p.to(job.device) for name, p in drawn.items()}
    shared = DATASETS[setting.dataset].starts or setting.dataset
    path = shipped_start(start_config(job, setting, method, shared))
    if path is None:
        config = start_config(job, setting, method, setting.dataset)
        path = Path(config.out) / "init.pt"
        if not path.is_file():
            train(config, job.root, job.device)
    return {name: p.to(job.device) for name, p in load_init(path)["params"].items()}


def shipped_path(config: TrainConfig) -> Path:
    """Where the package holds the start that `config` trains, if it has one."""
    return SHIPPED.joinpath(*Path(config.out).parts[-2:]).with_suffix(".pt")


def shipped_start(config: TrainConfig) -> Path | None:
    """The package's own start of this configuration; None where it has none."""
    path = shipped_path(config)
    if not path.is_file():
        return None
    held = parse_config(load_init(path)["config"])
    return path if replace(held, out=config.out) == config else None


def start_config(job: Job, setting: Setting, method: Method, learned_on: str) -> TrainConfig:
    """The meta-training behind a start; one per data set that it learns on, cut, tasks, width."""
    field, budget = job.field(setting, method), job.budget
    name = f"{learned_on}-{method.start}-{setting.cut}-{setting.tasks}-{field.width}"
    config = TrainConfig(
        dataset=learned_on,
        start=method.start,  # type: ignore[arg-type]
        out=str(job.out / "starts" / budget.name / name),
        width=field.width,
        tasks=setting.tasks,
        cut=setting.cut,
        outer_rate=budget.outer_rate,
        outer_steps=budget.meta_steps,
        batch=budget.meta_batch,
        query=budget.meta_batch,
        frames=max(budget.frames, setting.tasks),
        weighting="diagonal" if method.start == "mim" else "none",
    )
    if isinstance(budget, SoundBudget):
        slow = not method.modules or setting.cut == "own"
        return replace(
            config,
            seconds=DATASETS[learned_on].shape.samples / SAMPLE_RATE_HZ,
            outer_rate=budget.outer_rate * (SLOW_SOUND if slow else 1),
            omega=budget.omega,
            first_omega=budget.first_omega,
            inner_rate=budget.inner_rate,
        )
    if not isinstance(budget, ViewBudget):
        return config
    return replace(
        config,
        layers=budget.layers,
        order="first" if budget.stepping == "adam" else "second",
        stepping=budget.stepping,
        inner_rate=budget.inner_rate,
        view_width=budget.view_width,
        rays=budget.rays,
        ray_samples=budget.ray_samples,
    )


def make_method(name: str, setting: Setting) -> Method:
    """The method, with the setting's number of modules where it is modular."""
    method = METHODS[name] if name in METHODS else VARIANTS[name].method
    if method.modules:
        method = replace(method, modules=setting.modules or setting.tasks)  # type: ignore[type-var]
    return method


def fitting(setting: Setting, method: Method) -> Setting:
    """The setting with the coordinates that a modular method gives tasks of this kind of signal.

    Where a module has several tasks, they keep those of the whole signal, which tell them apart.
    """
    kind, alone = DATASETS[setting.dataset].kind, method.modules >= setting.tasks
    own = isinstance(method, Modular) and kind in method.own_coordinates and alone
    return replace(setting, cut="own") if own and setting.cut == "strips" else setting


def load_episode(item: Item, setting: Setting, job: Job) -> Episode:
    """A signal cut into this setting's tasks, on the job's device."""
    budget = job.budget
    shape = replace(item.shape, frames=max(budget.frames, setting.tasks))
    if isinstance(budget, ViewBudget):
        shape = replace(shape, side=budget.view_width, rays=budget.rays, held=budget.held)
    return cut_item(replace(item, shape=shape), setting.tasks, setting.cut).on(job.device)


def test_items(job: Job, setting: Setting) -> list[Item]:
    """The signals that are measured: the first of the test split, or of the given folder."""
    if setting.folder is not None:
        found = open_folder(Path(setting.folder), setting.dataset)
    else:
        found = open_items(setting.dataset, "test", job.root)
    return found[: job.signals or job.budget.signals]


def run_method(
    job: Job, setting: Setting, name: str, pictures: bool = False
) -> list[dict[str, Any]]:
    """All records of one method, computing those that are not in `runs.jsonl`.

    With `pictures` also the one whose reconstructions are not in `panels/`.
    """
    held = {r["key"]: r for r in _lines(job.out / "runs.jsonl")}
    method, records = make_method(name, setting), []
    setting = fitting(setting, method)
    rate, _ = chosen_rate(job, setting, name, method)
    for number, item in enumerate(test_items(job, setting)):
        digest = item.digest
        for seed in range(job.budget.seeds):
            key = run_key(job.budget, setting, name, digest, seed, rate)
            panels = job.out / "panels" / key if number == seed == 0 else None
            shown = item.kind == "audio" or panels is None or (panels / "truth.png").is_file()
            if key not in held or (pictures and not shown):
                record = _compute(job, setting, name, method, item, seed, rate, panels)
                if key not in held:
                    held[key] = {"key": key, **record}
                    _append(job.out / "runs.jsonl", held[key])
            records.append(held[key])
    return records


_SEARCH = ("search", "search_signals", "search_steps")
_BREADTH = ("seeds", "signals")


def run_key(
    budget: Budget, setting: Setting, name: str, digest: str, seed: int, rate: float
) -> str:
    """Names a run by everything that decides its result but the code: `digest` is the signal's."""
    alone = _deciding(setting, name)
    return _key(_without(budget, *_SEARCH, *_BREADTH), alone, name, digest, seed, rate)


def _deciding(setting: Setting, name: str) -> Setting:
    """The setting as far as it can change a result of this method."""
    usual = setting.modules == setting.tasks or not make_method(name, setting).modules
    return replace(setting, folder=None, modules=0 if usual else setting.modules)


def _without(budget: Budget, *fields: str) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(budget).items() if k not in fields}


def _key(budget: dict[str, Any], setting: Setting, *others: str | float) -> str:
    parts = [budget, dataclasses.asdict(setting), *others]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def chosen_rate(
    job: Job, setting: Setting, name: str, method: Method
) -> tuple[float, dict[str, float]]:
    """This method's step size from the validation signals, and every one's figure.

    Kept in `rates.jsonl`, where step sizes that are asked for later are added to those tried; those
    that the package knows are not tried again. One that diverged is worth minus infinity, null in
    the file.
    """
    setting = fitting(setting, method)
    alone, budget = _deciding(setting, name), job.budget
    key = _key(_without(budget, "search", "marks", *_BREADTH), alone, name)
    held = {line["key"]: line for line in _lines(job.out / "rates.jsonl")}
    known = {line["key"]: line for line in _lines(SHIPPED / "rates.jsonl")}
    if key in known and key not in held:
        held[key] = known[key]
        _append(job.out / "rates.jsonl", known[key])
    found = held[key]["tried"] if key in held else {}
    tried = {r: -math.inf if psnr is None else psnr for r, psnr in found.items()}
    if missing := [rate for rate in budget.search if f"{rate:g}" not in tried]:
        items = open_items(setting.dataset, "val", job.root)[: budget.search_signals]
        episodes = [load_episode(i, setting, job) for i in items]
        start, how = start_params(job, setting, method, 0), job.learning(setting, method)
        line = {"key": key, "method": name, **dataclasses.asdict(alone)}
        for rate in missing:
            tried[f"{rate:g}"] = try_rate(
                method, start, episodes, replace(how, rates=rate), budget.search_steps, 0
            )
            best = max(tried, key=lambda r: tried[r])
            told = {r: psnr if math.isfinite(psnr) else None for r, psnr in tried.items()}
            _append(job.out / "rates.jsonl", {**line, "rate": float(best), "tried": told})
    shown = {f"{rate:g}": tried[f"{rate:g}"] for rate in budget.search}
    return max(budget.search, key=lambda rate: shown[f"{rate:g}"]), shown


def _compute(
    job: Job,
    setting: Setting,
    name: str,
    method: Method,
    item: Item,
    seed: int,
    rate: float,
    panels: Path | None,
) -> dict[str, Any]:
    record = run_signal(
        method,
        start_params(job, setting, method, seed),
        load_episode(item, setting, job),
        item.kind,
        job.budget.marks,
        job.learning(setting, method, rate),
        seed,
        panels,
    )
    what = {
        "method": name,
        "signal": item.name,
        "seed": seed,
        "rate": rate,
        "first": panels is not None,
    }
    return {**what, **dataclasses.asdict(setting), "budget": job.budget.name, **record}


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
