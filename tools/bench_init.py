"""Meta-learned start against random start on real captures: `python tools/bench_init.py brighton`.

The daemon's own engine, offline: all train frames held, swept and seeded, then its steps. Test
frames are never sent; they are rendered at a third of their width with the exposure that is told
from the frames around, from how bright the map is there and from their metadata. Both starts begin
from the same seeded surfaces and painted colours, so step 0 already shows the scene. Each start has
its own learning rate: both of the engine's rates times the factor of FACTORS with the best
train-frame loss after TUNE_STEPS steps. Stopped and started again it goes on; what was measured
with another initialization or other settings is measured anew. Writes bench_init.json and .png.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mclnf_edge.engine.field import random_mlp  # noqa: E402
from mclnf_edge.mapping.initialization import Initialization, load_init  # noqa: E402
from meta_trainer.city_init import F32, Episode  # noqa: E402
from tools import measure  # noqa: E402

STARTS = ("random", "meta")
MARKS = (0, 1, 4, 16, 64, 256, 1024)
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
TUNE_STEPS = 256
SHRINK = 3


def main() -> int:
    """Measure the captures named, write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", nargs="*", default=list(measure.CAPTURES))
    beside = ROOT.parent / "shared" / "data"
    data = Path(os.environ.get("MCLNF_DATA", beside)) / "drone"
    parser.add_argument("--data", type=Path, default=data, help="folder of the captures")
    parser.add_argument("--init", type=Path, help="default: the shipped one")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_init.json")
    options = parser.parse_args()
    init = load_init(options.init)
    results = _open(options.out, init)
    for name in options.captures:
        entry = results["captures"].setdefault(name, {start: _fresh() for start in STARTS})
        if all(_done(entry[start], options.seeds) for start in STARTS):
            continue
        episode = Episode(options.data / name, None)
        for start in STARTS:
            run_start(episode, entry[start], start, init.mlp, options.seeds, options.out, results)
    for line in lines(results):
        print(line)
    return 0


def run_start(
    episode: Episode,
    entry: dict[str, Any],
    start: str,
    meta: F32,
    seeds: int,
    out: Path,
    results: dict[str, Any],
) -> None:
    """Choose one start's rate on train frames, then run its seeds; saves after every run."""
    for factor in FACTORS:
        if str(factor) not in entry["train_psnr"]:
            episode.restart(parameters(start, meta, 0), 0, factor)
            episode.steps(TUNE_STEPS)
            entry["train_psnr"][str(factor)] = round(episode.mapper.psnr or 0.0, 3)
            _save(out, results)
    entry["factor"] = float(max(entry["train_psnr"], key=entry["train_psnr"].__getitem__))
    for seed in range(seeds):
        if str(seed) not in entry["runs"]:
            entry["runs"][str(seed)] = curve(
                episode, parameters(start, meta, seed), seed, entry["factor"]
            )
            _save(out, results)


def parameters(start: str, meta: F32, seed: int) -> F32:
    """(MLP_SIZE,) what every module starts from."""
    return meta if start == "meta" else random_mlp(seed)


def curve(episode: Episode, mlp: F32, seed: int, factor: float) -> dict[str, list[float]]:
    """Steps -> PSNR in dB of every test frame."""
    episode.restart(mlp, seed, factor)
    out, taken = {}, 0
    for mark in MARKS:
        episode.steps(mark - taken)
        taken = mark
        out[str(mark)] = [round(value, 3) for value in episode.score(SHRINK)]
    return out


def summarise(entry: dict[str, Any]) -> dict[str, Any]:
    """Mean PSNR over views and seeds, and what issue 2 asks of the meta-learned start."""
    mean = {
        start: {
            mark: round(float(np.mean([run[mark] for run in entry[start]["runs"].values()])), 2)
            for mark in map(str, MARKS)
        }
        for start in STARTS
        if entry[start]["runs"]
    }
    if len(mean) < len(STARTS):
        return mean
    target = mean["random"]["256"]
    reached = [mark for mark in MARKS if mean["meta"][str(mark)] >= target]
    return mean | {
        "random_at_256": target,
        "meta_reaches_it_at_step": min(reached) if reached else None,
        "within_64_steps": bool(reached) and min(reached) <= 64,
    }


def compare(captures: dict[str, Any]) -> dict[str, Any]:
    """Per capture and over all, at each mark: the meta-learned start minus the random one, view by
    view.
    """
    both = {k: v for k, v in captures.items() if all(v[start]["runs"] for start in STARTS)}
    out: dict[str, Any] = {}
    for name in [*both, "all"]:
        chosen = both if name == "all" else {name: both[name]}
        out[name] = {
            str(mark): measure.pair(views(chosen, "meta", mark), views(chosen, "random", mark))
            for mark in MARKS
        }
    return out


def views(captures: dict[str, Any], start: str, mark: int) -> dict[str, float]:
    """View -> dB at a mark, its mean over seeds: seeds are no further views."""
    return {
        f"{name}/{view}": float(np.mean(values))
        for name, entry in captures.items()
        for view, values in enumerate(
            zip(*(run[str(mark)] for run in entry[start]["runs"].values()), strict=True)
        )
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The curves in Markdown, and the difference of the starts."""
    steps = MARKS[1:]
    table = ["| capture | start | " + " | ".join(map(str, steps)) + " |", "|---" * 8 + "|"]
    found = compare(results["captures"])
    for name, gaps in found.items():
        for start in STARTS if name != "all" else ():
            means = results["captures"][name]["summary"][start]
            cells = " | ".join(f"{means[str(mark)]:.2f}" for mark in steps)
            table.append(f"| {name} | {start} | {cells} |")
        cells = " | ".join(measure.words(gaps[str(mark)]) for mark in steps)
        table.append(f"| {name} | meta - random | {cells} |")
    return table


def plot(results: dict[str, Any], path: Path) -> None:
    """One panel per capture: mean PSNR against steps, the range over seeds shaded."""
    from matplotlib.figure import Figure

    shown = {k: v for k, v in results["captures"].items() if any(v[s]["runs"] for s in STARTS)}
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    for axes, (name, entry) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for start, colour in zip(STARTS, ("C1", "C0"), strict=True):
            runs = entry[start]["runs"].values()
            if not runs:
                continue
            values = np.array([[np.mean(run[str(mark)]) for mark in MARKS] for run in runs])
            label = f"{start} start, rates x {entry[start]['factor']:g}"
            axes.plot(MARKS, values.mean(0), "o-", color=colour, label=label)
            axes.fill_between(MARKS, values.min(0), values.max(0), color=colour, alpha=0.2)
        axes.set_xscale("symlog", base=4, linthresh=1)
        axes.set_xticks(MARKS, [str(mark) for mark in MARKS])
        axes.set(title=name, xlabel="steps after seeding", ylabel="held-out PSNR (dB)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _fresh() -> dict[str, Any]:
    return {"train_psnr": {}, "factor": None, "runs": {}}


def _done(entry: dict[str, Any], seeds: int) -> bool:
    return all(str(seed) in entry["runs"] for seed in range(seeds))


def _open(path: Path, init: Initialization) -> dict[str, Any]:
    """The results so far with the same initialization and settings."""
    protocol = measure.module_facts(init) | {
        "init_config": init.meta,
        "factors": FACTORS,
        "tuned_on": f"train-frame loss after {TUNE_STEPS} steps, seed 0",
        "test_pictures": f"1/{SHRINK} of their width, never sent to the mapper",
        "rate_schedule": "by rays, no time budget",
        "engine_threads": 1,
    }
    results = measure.open_results(path, protocol, "captures")
    return results | {"captures": results["captures"] or {}}


def _save(path: Path, results: dict[str, Any]) -> None:
    for entry in results["captures"].values():
        entry["summary"] = summarise(entry)
    results["meta_minus_random"] = compare(results["captures"])
    measure.save(path, results)
    if any(entry[start]["runs"] for entry in results["captures"].values() for start in STARTS):
        plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
