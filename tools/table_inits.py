"""What the shipped initializations are worth: `python tools/table_inits.py [MODALITY ...]`.

Modules of held-out signals learn under the daemon's own rule (its mapper, its default settings)
for 1, 4, 16, 64 and 256 steps each (`--steps`), from the shipped initialization and from a random
network of the same shape, and what they show is compared with the signal. Writes table_inits.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.captures import SignalFile, open_signal  # noqa: E402
from mclnf_edge.config import ServeConfig, SignalsConfig  # noqa: E402
from mclnf_edge.inference.signals import render_picture, render_sound  # noqa: E402
from mclnf_edge.mapping.initialization import SignalInitialization, open_init  # noqa: E402
from mclnf_edge.mapping.signals import SignalMapper  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from meta_trainer.data import open_items  # noqa: E402
from tools.measure import init_facts, save  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 4, 16, 64, 256)
HELD_OUT = {"image": ("free-pictures", "faces"), "video": ("video",), "audio": ("speech",)}
SIGNALS = 4
RANDOM_SEED = 1


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modalities", nargs="*", default=list(HELD_OUT))
    parser.add_argument("--init", type=Path, help="another one than the shipped")
    parser.add_argument("--lr", default=SignalsConfig().lr, type=_rate)
    parser.add_argument("--weighting", default=SignalsConfig().weighting)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "table_inits.json")
    asked = parser.parse_args()
    rows, inits = [], {}
    for modality in asked.modalities:
        init = open_init(asked.init or Path(modality))
        assert isinstance(init, SignalInitialization)
        inits[modality] = init_facts(init)
        for dataset in HELD_OUT[modality]:
            paths = [item.path for item in open_items(dataset, asked.split)]
            for path in paths[:: max(len(paths) // SIGNALS, 1)][:SIGNALS]:
                rows += [
                    {"modality": modality, "dataset": dataset, "signal": path.name, "start": name}
                    | measure(path, start, asked)
                    for name, start in (("init", init), ("random", random_start(init)))
                ]
        report(rows, modality, asked.steps)
    protocol = {
        "inits": inits,
        "split": asked.split,
        "steps": asked.steps,
        "lr": asked.lr,
        "weighting": asked.weighting,
    }
    protocol |= {"random_start_seed": RANDOM_SEED, "signals": SIGNALS}
    save(asked.out, {"protocol": protocol, "rows": rows})
    return 0


def _rate(text: str) -> float | str:
    return text if text == "init" else float(text)


def random_start(init: SignalInitialization) -> SignalInitialization:
    """The same field with the values that meta-training itself began with, of another seed."""
    return replace(init, params=init.field.init(torch.Generator().manual_seed(RANDOM_SEED)))


def measure(path: Path, init: SignalInitialization, asked: argparse.Namespace) -> dict[str, Any]:
    """PSNR in dB after each number of steps."""
    signal = open_signal(str(path), 25.0)
    assert signal is not None
    out = {}
    for steps in asked.steps:
        rule = SignalsConfig(steps=steps, lr=asked.lr, weighting=asked.weighting)
        mapper = SignalMapper(ServeConfig(signals=rule), init, _no_recall)
        for i, piece in enumerate(signal.pieces()):
            mapper.add(i, "a/a", piece, kept=None)
        while mapper.step() is not None:
            pass
        out[str(steps)] = quality(mapper, signal)
    return {"psnr": out}


def _no_recall(module: str, version: int) -> Any:
    raise AssertionError(f"nothing was closed, {module} version {version} was asked for")


def quality(mapper: SignalMapper, signal: SignalFile) -> float:
    """dB over the whole signal."""
    key = next(iter(mapper.signals))
    if signal.modality == "audio":
        truth: npt.NDArray[Any] = signal.samples()
        shown: npt.NDArray[Any] = render_sound(mapper, key, (0.0, len(truth) / signal.rate_hz))[0]
        return psnr(shown, truth, peak=2.0)
    frames = list(signal.frames())[::5]
    moments = [5 * i / (signal.rate_hz or 1.0) for i in range(len(frames))]
    return psnr(np.stack([render_picture(mapper, key, t).rgb for t in moments]), np.stack(frames))


def report(rows: list[dict[str, Any]], modality: str, steps: Sequence[int]) -> None:
    """Means over signals."""
    for dataset in HELD_OUT[modality]:
        for start in ("init", "random"):
            own = [r["psnr"] for r in rows if (r["dataset"], r["start"]) == (dataset, start)]
            told = "  ".join(f"{statistics.mean(p[str(k)] for p in own):6.2f}" for k in steps)
            print(f"{modality:6} {dataset:14} {start:7} {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
