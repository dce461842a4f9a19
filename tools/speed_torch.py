"""What `tools/bench.py` measures of Fisher weights in PyTorch, and how things are timed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mclnf_edge.captures import open_capture
from mclnf_edge.images import decode_image
from mclnf_edge.mapping.initialization import load_signal_init
from mclnf_edge.maths.adaptation import Rule, State, inner_step
from mclnf_edge.maths.fields import Field, NerfMlp, Params, Siren
from mclnf_edge.sounds import read_sound
from meta_trainer.data import load_video, open_items
from meta_trainer.episodes import Episode, audio_episode, image_episode, video_episode
from meta_trainer.methods.base import Batch, pick
from meta_trainer.ray_field import RayField, rows_of
from meta_trainer.views import view_episode

Row = dict[str, Any]
Timed = dict[str, list[tuple[float, float]]]
"""Name -> (CPU, wall) seconds of each round."""
SAMPLES = 512
ROUNDS = 30
STEPS_A_ROUND = 10
STEPS = 256
SEEDS = (1, 2, 3)
RAYS, RAY_SAMPLES = 64, 24
RULES = {
    "plain": Rule("none", "adam"),
    "exact": Rule("diagonal", "adam"),
    "factored": Rule("factored", "adam"),
}
RAY_RULES = RULES | {"gradncp": Rule("gradncp", "adam"), "residual": Rule("residual", "adam")}


def interleaved(runs: Mapping[str, Callable[[], None]], rounds: int) -> Timed:
    """Each run once a round, in an order that changes; the first round only warms up."""
    timed: Timed = {name: [] for name in runs}
    random = np.random.default_rng(0)
    for i in range(rounds + 1):
        for k in random.permutation(len(runs)):
            name = list(runs)[k]
            cpu, wall = time.process_time(), time.perf_counter()
            runs[name]()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if i:
                timed[name].append(spent)
    return timed


def spread(values: Sequence[float], scale: float = 1.0) -> list[float]:
    """Quartiles: 25th percentile, median, 75th."""
    return [round(float(np.percentile(values, p)) * scale, 4) for p in (25, 50, 75)]


def compare(timed: Timed, base: str, per: int) -> Row:
    """Quartiles of milliseconds a step, and of the ratio to `base` in the same round."""
    rows: Row = {}
    for name, pairs in timed.items():
        rows[name] = {
            "cpu_ms": spread([c for c, _ in pairs], 1e3 / per),
            "wall_ms": spread([w for _, w in pairs], 1e3 / per),
        }
        both = list(zip(pairs, timed[base], strict=True))
        rows[name]["cpu_ratio"] = spread([a[0] / b[0] for a, b in both])
        rows[name]["wall_ratio"] = spread([a[1] / b[1] for a, b in both])
    return rows


def signal(modality: str, data: Path) -> Episode:
    """A signal as the module's tasks: a capture's first picture, the first clip or recording."""
    if modality == "image":
        frame = open_capture(data / "drone" / "brighton").frame(0)
        rgb = decode_image(frame.image, frame.encoding, frame.camera)
        return image_episode("brighton", rgb.astype(np.float32) / 255)
    if modality == "video":
        clip = open_items("video", "train", data)[0]
        return video_episode(clip.name, load_video(clip.path, clip.shape))
    path = min((data / "speech").rglob("*.wav"))
    return audio_episode(path.stem, read_sound(path)[0].reshape(-1)[:48000])


def fisher(data: Path) -> Row:
    """Step time plain, exact and factored, how well factored weights rank samples, and PSNR."""
    torch.set_num_threads(1)  # as the daemon sets it for signals
    return {
        "goal_ratio": 1.1, "samples": SAMPLES, "quartiles": [25, 50, 75],
        **{modality: points(modality, data) for modality in ("image", "video", "audio")},
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def points(modality: str, data: Path) -> Row:
    """Of one modality, with the shipped initialization and the daemon's Adam steps."""
    init, episode = load_signal_init(Path(modality)), signal(modality, data)
    generator = torch.Generator().manual_seed(0)
    batches = [
        pick(episode.coords[0], episode.values[0], SAMPLES, generator) for _ in range(STEPS_A_ROUND)
    ]
    runs = {n: adapting(init.field, init.params, batches, rule) for n, rule in RULES.items()}
    rows = compare(interleaved(runs, ROUNDS), "plain", STEPS_A_ROUND)
    return rows | {
        "spearman": rankings(init.field, init.params, batches, RULES),
        "psnr": quality(init.field, init.params, episode),
    }


def views(data: Path) -> Row:
    """The same for rays through the paper's radiance MLP, whose samples sum before squaring.

    Factored is by Gram matrices, with the cross terms of a ray's samples, and has the first goal;
    GradNCP's score and the squared residual are approximations without F and have the other. From a
    random start.
    """
    torch.set_num_threads(1)
    field = RayField(NerfMlp(256, 10), RAY_SAMPLES)
    start = field.init(torch.Generator().manual_seed(0))
    episode = view_episode(data / "drone" / "brighton", 96, 4096, 1, 4)
    generator = torch.Generator().manual_seed(0)
    batches = [pick(episode.coords[0], episode.values[0], RAYS, generator) for _ in range(2)]
    runs = {n: adapting(field, start, batches, rule) for n, rule in RAY_RULES.items()}
    return {
        "goal_ratio": 1.35, "goal_ratio_cheap": 1.1, "goal_spearman_cheap": 0.8,
        "rays": RAYS, "samples_a_ray": RAY_SAMPLES, "quartiles": [25, 50, 75],
        **compare(interleaved(runs, 8), "plain", 2),
        "spearman": rankings(field, start, batches, RAY_RULES),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def compilers(data: Path) -> Row:
    """Training steps of a SIREN 5x128 on 512 points: eager, torch.compile's, this project's.

    Forward, backward and Adam without weights; torch.compile's first step, with its caches empty,
    is timed alone.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    field = Siren(2, 3, 128)
    start = field.init(generator)
    batch = torch.rand(512, 2, generator=generator), torch.rand(512, 3, generator=generator)
    row: Row = {"quartiles": [25, 50, 75]}
    runs = {
        "eager": autograd_step(field, start, batch, lambda function: function)[1],
        "project": adapting(field, start, [batch], RULES["plain"]),
    }
    compiler = os.environ.get("CXX", "g++")
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        if shutil.which(compiler) is None:
            row["compile"] = f"skipped: no C++ compiler {compiler}"
        else:
            runs["compile"] = autograd_step(field, start, batch, torch.compile)[1]
            began = time.perf_counter()
            runs["compile"]()
            row["compile_wall_s"] = round(time.perf_counter() - began, 1)
        timed = interleaved({n: repeated(run, STEPS_A_ROUND) for n, run in runs.items()}, ROUNDS)
    return row | compare(timed, "eager", STEPS_A_ROUND) | {"load": round(os.getloadavg()[0], 2)}


def autograd_step(
    field: Field, start: Params, batch: Batch, compiled: Callable[[Any], Any]
) -> tuple[Params, Callable[[], None]]:
    """Parameters and a step that moves them by autograd and torch's Adam.

    `compiled` is applied to the loss and to the optimizer's step.
    """
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.Adam(params.values(), 3e-4)

    def loss(x: Tensor, s: Tensor) -> Tensor:
        return (field(params, x) - s).square().sum(-1).mean()

    measured, moved = compiled(loss), compiled(optimizer.step)

    def step() -> None:
        optimizer.zero_grad()
        measured(*batch).backward()
        moved()

    return params, step


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    """`run` so many times."""

    def runs() -> None:
        for _ in range(times):
            run()

    return runs


def quality(field: Field, start: Params, episode: Episode) -> Row:
    """PSNR of each rule and seed after `STEPS` steps and after the plain rule's seconds for them.

    CPU seconds of the same seed, so that what else runs on the machine meets all rules alike.
    """
    rows: Row = {name: {"equal_steps": [], "equal_seconds": []} for name in RULES}
    for seed in SEEDS:
        seconds = None
        for name, rule in RULES.items():  # the plain one first
            at_steps, at_seconds, seconds = marks(field, start, episode, rule, seed, seconds)
            rows[name]["equal_steps"].append(at_steps)
            rows[name]["equal_seconds"].append(at_seconds)
    return {"steps": STEPS, "seeds": list(SEEDS)} | rows


def marks(
    field: Field, start: Params, episode: Episode, rule: Rule, seed: int, seconds: float | None
) -> tuple[float, float, float]:
    """PSNR in dB after `STEPS` steps, that after `seconds` CPU seconds, and these seconds.

    Runs on until both are known; `seconds` None stands for what the steps take.
    """
    params, state, done, spent = start, State(), 0, 0.0
    generator = torch.Generator().manual_seed(seed)
    at_steps = at_seconds = None
    while at_steps is None or at_seconds is None:
        batch = pick(episode.coords[0], episode.values[0], SAMPLES, generator)
        before = time.process_time()
        params, state, _ = inner_step(field, params, state, batch, 3e-4, rule)
        spent += time.process_time() - before
        done += 1
        if done == STEPS:
            at_steps = shown(field, params, episode)
            seconds = spent if seconds is None else seconds
        if at_seconds is None and seconds is not None and spent >= seconds:
            at_seconds = shown(field, params, episode)
    assert seconds is not None
    return at_steps, at_seconds, seconds


def shown(field: Field, params: Params, episode: Episode) -> float:
    """PSNR of the first task in dB."""
    with torch.no_grad():
        error = field(params, episode.coords[0]) - episode.values[0]
    return round(float(10 * torch.log10(episode.peak**2 / error.square().mean())), 2)


def adapting(
    field: Field, params: Params, batches: Sequence[Batch], rule: Rule
) -> Callable[[], None]:
    """Steps of one module, a batch each, that go on from call to call."""
    held: tuple[Params, State] = params, State()

    def run() -> None:
        nonlocal held
        now, state = held
        for batch in batches:
            now, state, _ = inner_step(field, now, state, batch, 3e-4, rule, rows=rows_of(field))
        held = now, state

    return run


def rankings(
    field: Field, params: Params, batches: Sequence[Batch], rules: Mapping[str, Rule]
) -> Row:
    """Spearman correlation of each cheap rule's weights with the exact ones, batch by batch.

    Along one adaptation with exact weights; a cheap rule keeps nothing from batch to batch.
    """
    cheap = [name for name in rules if name not in ("plain", "exact")]
    found: dict[str, list[float]] = {name: [] for name in cheap}
    state, rows = State(), rows_of(field)
    for batch in [*batches] * 3:
        before = params
        params, state, exact = inner_step(
            field, params, state, batch, 3e-4, rules["exact"], rows=rows
        )
        for name in cheap:
            stats = inner_step(field, before, State(), batch, 0.0, rules[name], rows=rows)[2]
            found[name].append(spearman(stats.weights, exact.weights))
    return {name: spread(values) for name, values in found.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors (N,)."""
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
