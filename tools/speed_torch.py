"""What `tools/bench.py` measures of point samples, and how it times things side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mclnf_edge.captures import open_capture
from mclnf_edge.images import decode_image
from mclnf_edge.mapping.initialization import load_signal_init
from mclnf_edge.maths.adaptation import Rule, State, inner_step
from mclnf_edge.maths.fields import Field, Params
from mclnf_edge.sounds import read_sound
from meta_trainer.episodes import Episode, audio_episode, image_episode
from meta_trainer.methods.base import Batch, pick

Row = dict[str, Any]
Timed = dict[str, list[tuple[float, float]]]
"""Name -> (CPU, wall) seconds of each round."""
SAMPLES = 512
ROUNDS = 30
STEPS_A_ROUND = 10


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
    """A signal as the module's tasks: the first picture of a capture, the first recording."""
    if modality == "image":
        frame = open_capture(data / "drone" / "brighton").frame(0)
        rgb = decode_image(frame.image, frame.encoding, frame.camera)
        return image_episode("brighton", rgb.astype(np.float32) / 255)
    path = min((data / "speech").rglob("*.wav"))
    return audio_episode(path.stem, read_sound(path)[0].reshape(-1)[:48000])


def fisher(data: Path) -> Row:
    """Step time plain, exact and factored, and how well factored weights rank samples."""
    torch.set_num_threads(1)  # as the daemon sets it for signals
    return {
        "goal_ratio": 1.1, "samples": SAMPLES, "quartiles": [25, 50, 75],
        "image": points("image", data), "audio": points("audio", data),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def points(modality: str, data: Path) -> Row:
    """Of one modality, with the shipped initialization and the daemon's Adam steps."""
    init, episode = load_signal_init(Path(modality)), signal(modality, data)
    generator = torch.Generator().manual_seed(0)
    batches = [
        pick(episode.coords[0], episode.values[0], SAMPLES, generator) for _ in range(STEPS_A_ROUND)
    ]
    rules = {
        "plain": Rule("none", "adam"),
        "exact": Rule("diagonal", "adam"),
        "factored": Rule("factored", "adam"),
    }
    runs = {n: adapting(init.field, init.params, batches, rule) for n, rule in rules.items()}
    rows = compare(interleaved(runs, ROUNDS), "plain", STEPS_A_ROUND)
    return rows | {"spearman": rankings(init.field, init.params, batches)}


def adapting(
    field: Field, params: Params, batches: Sequence[Batch], rule: Rule
) -> Callable[[], None]:
    """Steps of one module, a batch each, that go on from call to call."""
    held: tuple[Params, State] = params, State()

    def run() -> None:
        nonlocal held
        now, state = held
        for batch in batches:
            now, state, _ = inner_step(field, now, state, batch, 3e-4, rule)
        held = now, state

    return run


def rankings(field: Field, params: Params, batches: Sequence[Batch]) -> list[float]:
    """Spearman correlation of factored and exact weights of each batch along an adaptation."""
    found, state, rule = [], State(), Rule("diagonal", "adam")
    for batch in [*batches] * 3:
        before = params
        params, state, exact = inner_step(field, params, state, batch, 3e-4, rule)
        cheap = inner_step(field, before, State(), batch, 0.0, Rule("factored"))[2]
        ranks = [w.argsort().argsort().double() for w in (exact.weights, cheap.weights)]
        found.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    return spread(found)
