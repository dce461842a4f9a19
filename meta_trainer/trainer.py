"""Meta-training: episodes -> meta-gradient -> Adam on the start; log, checkpoints, resume.

Everything random in outer step k comes from (seed, k, episode number), so a run that was killed and
started again from its checkpoint ends with the same parameters, and the episodes of one step can be
shared among processes (torchrun, gloo) without changing the gradient.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mclnf_edge.errors import ConfigError
from mclnf_edge.mapping.initialization import SHAPES, Window, load_signal_init, signal_content
from mclnf_edge.maths.adaptation import Rates
from mclnf_edge.maths.fields import Field, Params, Siren
from meta_trainer.config import TrainConfig, parse_config
from meta_trainer.data import DATASETS, SAMPLE_RATE_HZ, Item, open_folder, open_items
from meta_trainer.episodes import Episode
from meta_trainer.evaluate import run_signal, summary
from meta_trainer.meta_gradient import MetaGradient, initial_rates, meta_gradient
from meta_trainer.methods import METHODS, STARTS, Learning, Method
from meta_trainer.ray_field import RayField, rows_of
from meta_trainer.signals import cut_item

VIEW_FORMAT = "mclnf-views-1"
"""Of initializations for views, which serve the experiments only: no daemon reads them."""

LOG_COLUMNS = ("step", "loss", "psnr", "seconds")


@dataclass
class Run:
    """The mutable state of a meta-training: parameters, learned rates, optimizer, steps done."""

    params: Params
    rates: Rates
    optimizer: torch.optim.Adam
    step: int = 0


def start_run(config: TrainConfig, field: Field, device: str = "cpu") -> Run:
    """Step 0: parameters drawn from the seed."""
    drawn = field.init(torch.Generator().manual_seed(config.seed))
    params = {name: p.to(device) for name, p in drawn.items()}
    rates = initial_rates(config.learned_rates, params, config.inner_rate, config.inner_steps)
    return make_run(config, params, rates)


def make_run(config: TrainConfig, params: Params, rates: Rates) -> Run:
    """A run over given parameters and rates, with a fresh optimizer."""
    leaves = [*params.values(), *(rates.values() if isinstance(rates, Mapping) else ())]
    for leaf in leaves:
        leaf.grad = None
    return Run(params, rates, torch.optim.Adam(leaves, lr=config.outer_rate))


def train_step(
    run: Run, episodes: Sequence[Episode], method: Method, how: Learning, config: TrainConfig
) -> float:
    """One outer step on these episodes, shared among processes; returns the mean query loss.

    Process r of W takes episodes r, r + W, ...; the summed gradients are divided by their number.
    """
    rank, world = _place()
    leaves = _leaves(run)
    totals: list[Tensor] = [leaves[0].new_zeros(()), *map(torch.zeros_like, leaves)]
    for number in range(rank, len(episodes), world):
        generator = step_generator(config.seed, run.step, number)
        got = meta_gradient(
            method,
            run.params,
            run.rates,
            episodes[number],
            how,
            config.inner_steps,
            config.query,
            config.order,
            generator,
        )
        for total, part in zip(totals, [got.loss, *_flatten(got, run)], strict=True):
            total += part
    if world > 1:
        for total in totals:
            dist.all_reduce(total)
    loss, *grads = [total / len(episodes) for total in totals]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    run.optimizer.step()
    run.step += 1
    return float(loss)


def train(config: TrainConfig, root: Path | None = None, device: str = "cpu") -> Path:
    """Run or resume a meta-training on a device; returns the path of the written initialization.

    Writes `log.csv`, `checkpoint.pt` and `init.pt` below `config.out`.

    Raises:
        CaptureError: the data set is not there.
        ConfigError: the folder holds a run of another configuration.
    """
    _join_processes()
    items = open_items(config.dataset, "train", root)
    field = field_of(config)
    method = METHODS[STARTS[config.start]]
    if method.modules:
        method = dataclasses.replace(method, modules=config.tasks)  # type: ignore[type-var]
    how = Learning(field, config.inner_rate, config.rule, config.batch, rows_of(field))
    out = Path(config.out)
    checkpoint, log = out / "checkpoint.pt", out / "log.csv"
    run = (
        load_checkpoint(checkpoint, config, device)
        if checkpoint.is_file()
        else start_run(config, field, device)
    )
    chief = _place()[0] == 0
    if chief:
        out.mkdir(parents=True, exist_ok=True)
        _cut_log(log, run.step)
    cache: dict[int, Episode] = {}
    begun = time.monotonic()
    bar = tqdm(total=config.outer_steps, initial=run.step, unit="step", disable=not chief)
    while run.step < config.outer_steps:
        chosen = choose(items, run.step, config)
        episodes = [make_episode(items, i, config, cache).on(device) for i in chosen]
        loss = train_step(run, episodes, method, how, config)
        bar.update()
        if not chief:
            continue
        psnr = 10 * math.log10(episodes[0].peak ** 2 * episodes[0].values.shape[-1] / loss)
        bar.set_postfix_str(f"query PSNR {psnr:.2f} dB", refresh=False)
        _append_log(
            log, [run.step, f"{loss:.6g}", f"{psnr:.3f}", f"{time.monotonic() - begun:.1f}"]
        )
        if run.step % config.checkpoint_every == 0 or run.step == config.outer_steps:
            save_checkpoint(checkpoint, run, config)
    bar.close()
    if chief:
        save_init(out / "init.pt", run, config, len(items))
    return out / "init.pt"


def field_of(config: TrainConfig) -> Siren | RayField:
    """The network for the data set's modality."""
    kind = DATASETS[config.dataset].kind
    return config.ray_field() if kind == "views" else config.field(*SHAPES[kind])


def choose(items: Sequence[Item], step: int, config: TrainConfig) -> list[int]:
    """Numbers of the signals of outer step `step`, without repetition where there are enough."""
    order = torch.randperm(len(items), generator=step_generator(config.seed, step, -1))
    return [int(order[i % len(items)]) for i in range(config.episodes)]


def make_episode(
    items: Sequence[Item], number: int, config: TrainConfig, cache: dict[int, Episode]
) -> Episode:
    """Signal `number` cut into tasks, read once (at most 256 are kept)."""
    if number not in cache:
        if len(cache) >= 256:
            cache.pop(next(iter(cache)))
        item = items[number]
        shape = dataclasses.replace(item.shape, frames=config.frames, rays=config.rays, held=1)
        shape = dataclasses.replace(shape, samples=round(config.seconds * SAMPLE_RATE_HZ))
        if item.kind == "views":
            shape = dataclasses.replace(shape, side=config.view_width)
        item = dataclasses.replace(item, shape=shape)
        cache[number] = cut_item(item, config.tasks, config.cut)
    return cache[number]


def step_generator(seed: int, step: int, number: int) -> torch.Generator:
    """Randomness of one episode of one outer step."""
    mixed = (seed * 1_000_003 + step) * 1_009 + number + 1
    return torch.Generator().manual_seed(mixed)


def save_init(path: Path, run: Run, config: TrainConfig, signals: int) -> None:
    """Write the initialization: field, parameters, rates, window, configuration, data it saw."""
    data = DATASETS[config.dataset]
    named = dataclasses.replace(config, out=Path(config.out).name)  # no folder of this machine
    meta = {
        "config": dataclasses.asdict(named),
        "step": run.step,
        "data": {"dataset": data.name, "signals": signals, "licence": data.licence},
    }
    params = {n: p.detach().cpu().clone() for n, p in run.params.items()}
    rates, field = _rates_state(run.rates), field_of(config)
    if data.kind == "views" or isinstance(field, RayField):
        _write(path, {"format": VIEW_FORMAT, "params": params, "rates": rates, **meta})
        return
    samples = round(config.seconds * SAMPLE_RATE_HZ)
    window = Window(config.tasks, data.shape.side + 2 * data.shape.pad, config.frames, samples)
    _write(path, signal_content(data.kind, field, params, rates, window, meta))


def load_init(path: Path) -> dict[str, Any]:
    """`field`, `params`, `rates` and `config` of an initialization; InitError for anything else."""
    if (views := _load_views(path)) is not None:
        return views
    init = load_signal_init(path)
    return {
        "field": init.field,
        "params": init.params,
        "rates": init.rates,
        "config": init.meta["config"],
    }


def _load_views(path: Path) -> dict[str, Any] | None:
    """An initialization for views; None for a file that is none."""
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch raises many kinds; `load_signal_init` names what is wrong
        return None
    if not isinstance(held, dict) or held.get("format") != VIEW_FORMAT:
        return None
    field = field_of(parse_config(held["config"]))
    return {"field": field, **{k: held[k] for k in ("params", "rates", "config")}}


def save_checkpoint(path: Path, run: Run, config: TrainConfig) -> None:
    """Everything needed to go on, replaced atomically."""
    state = {
        "step": run.step,
        "params": {n: p.detach() for n, p in run.params.items()},
        "rates": _rates_state(run.rates),
        "optimizer": run.optimizer.state_dict(),
        "config": dataclasses.asdict(config),
    }
    _write(path, state)


def load_checkpoint(path: Path, config: TrainConfig, device: str = "cpu") -> Run:
    """The run as it was saved. More outer steps may be asked for; all else must be the same."""
    try:
        held = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # torch raises many kinds
        raise ConfigError(f"{path}: cannot be read as a checkpoint: {error}") from error
    free = {"outer_steps", "checkpoint_every", "out"}
    before, now = dataclasses.asdict(parse_config(held["config"])), dataclasses.asdict(config)
    if changed := sorted(k for k in now if k not in free and now[k] != before[k]):
        raise ConfigError(
            f"{path} was made with other values of {', '.join(changed)}; use another `out`"
        )
    run = make_run(config, held["params"], held["rates"])
    run.optimizer.load_state_dict(held["optimizer"])
    run.step = held["step"]
    return run


def evaluate_init(
    path: Path,
    folder: Path | None,
    signals: int,
    steps: int,
    batch: int,
    root: Path | None,
    device: str = "cpu",
) -> dict[str, Any]:
    """PSNR of an initialization on test signals at 1, 2, 4 ... `steps` steps, its own method."""
    held = load_init(path)
    start = {name: p.to(device) for name, p in held["params"].items()}
    rates = held["rates"]
    if isinstance(rates, Mapping):
        rates = {name: r.to(device) for name, r in rates.items()}
    config = parse_config(held["config"])
    items = open_folder(folder, config.dataset) if folder else None
    items = (items or open_items(config.dataset, "test", root))[:signals]
    method = METHODS[STARTS[config.start]]
    if method.modules:
        method = dataclasses.replace(method, modules=config.tasks)  # type: ignore[type-var]
    how = Learning(held["field"], rates, config.rule, batch, rows_of(held["field"]))
    marks = [2**k for k in range(steps.bit_length())]
    cache: dict[int, Episode] = {}
    runs = [
        run_signal(
            method, start, make_episode(items, i, config, cache).on(device), items[i].kind,
            marks, how, config.seed,
        )
        for i in range(len(items))
    ]  # fmt: skip
    return {
        "method": method.name,
        "dataset": config.dataset,
        "n": len(items),
        **summary([r["curve"] for r in runs], "psnr"),
        "signals": {item.name: r["curve"] for item, r in zip(items, runs, strict=True)},
    }


def _leaves(run: Run) -> list[Tensor]:
    return [*run.params.values(), *(run.rates.values() if isinstance(run.rates, Mapping) else ())]


def _flatten(got: MetaGradient, run: Run) -> list[Tensor]:
    parts = [got.start[n] for n in run.params]
    if isinstance(run.rates, Mapping):
        parts += [got.rates[n] for n in run.rates]
    return parts


def _rates_state(rates: Rates) -> float | dict[str, Tensor]:
    if isinstance(rates, Mapping):
        return {n: r.detach().cpu().clone() for n, r in rates.items()}
    return rates


def _write(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _cut_log(path: Path, step: int) -> None:
    """Keep the rows up to `step`: later ones belong to work that was lost with the process."""
    rows: list[list[str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [r for r in list(csv.reader(file))[1:] if r and int(r[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(LOG_COLUMNS), *rows])


def _append_log(path: Path, row: list[Any]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(row)


def _join_processes() -> None:
    """Join the group torchrun set up, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def _place() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
