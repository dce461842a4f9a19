"""Which weights of rays help, on real captures: `python tools/table_weights.py [CAPTURE ...]`.

Every setting takes the same steps from the same seeded modules and the shipped initialization, with
the same rays: Fisher weights of the output layer (on), of every parameter (exact), none (off), the
controls (GradNCP's score, squared residual, Fisher weights shuffled within the batch), half as many
rays (drawn by the output layer's weights from the batch; taken evenly and weighted), and sweeps of
fisher_lambda and, in run 0 only, of its damping and the clamps. Run r has seed r and a split of
its own (`measure.RUNS`), so that a capture of 18 frames has more than two held-out views; settings
are compared view by view within a run.
Stopped and started again it goes on. Writes table_weights.json and .png.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.mapping.frames import TILE  # noqa: E402
from mclnf_edge.mapping.initialization import Initialization, load_init  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools import measure  # noqa: E402

STEPS = 192
SHRINK = 3
LAST = 64
"""Steps at the end whose weights are counted in the distribution."""

SETTINGS: dict[str, dict[str, Any]] = {
    "on": {},
    "off": {"weighting": "none"},
    "exact": {"weighting": "diagonal"},
    "gradncp": {"weighting": "gradncp"},
    "residual": {"weighting": "residual"},
    "shuffled": {"weighting": "shuffled"},
    "drawn": {"weighting": "drawn"},
    "half the rays": {"rays_per_step": 1024},
    "lambda 0.03": {"fisher_lambda": 0.03},
    "lambda 0.3": {"fisher_lambda": 0.3},
    "lambda 1": {"fisher_lambda": 1.0},
}
FIRST_RUN_ONLY: dict[str, dict[str, Any]] = {
    "damping 0.01": {"fisher_damping": 0.01},
    "damping 1": {"fisher_damping": 1.0},
    "clamp 3": {"weight_clamp": 3.0},
    "clamp 100": {"weight_clamp": 100.0},
    "residuals not capped": {"robust_cap": 1e9},
}
EVERY = SETTINGS | FIRST_RUN_ONLY
QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def main() -> int:
    """Measure what is missing, write after each run, print the table."""
    options = measure.arguments(__doc__, "table_weights.json")
    init = load_init(None)
    results = measure.open_results(options.out, protocol(init))
    for seed, fold in measure.RUNS[: options.runs]:
        for capture in options.captures:
            run(results, options.data / capture, seed, fold, init, options.out)
    for line in lines(results):
        print(line)
    return 0


def protocol(init: Initialization) -> dict[str, Any]:
    """What the rows have in common; rows of another protocol are measured anew."""
    return measure.module_facts(init) | {
        "steps": STEPS,
        "rates": "the defaults, falling tenfold over these steps",
        "test_pictures": f"1/{SHRINK} of their width, exposure {measure.EXPOSURE}",
        "runs": measure.RUNS,
    }


def run(
    results: dict[str, Any],
    path: Path,
    seed: int,
    fold: int | None,
    init: Initialization,
    out: Path,
) -> None:
    """Every setting that this capture lacks in this run."""
    wanted = SETTINGS if (seed, fold) != measure.RUNS[0] else EVERY
    key = {"capture": path.name, "seed": seed, "fold": fold}
    todo = [s for s in wanted if not measure.find(results, **key, setting=s, values=EVERY[s])]
    if not todo:
        return
    episode = Episode(path, None, fold=fold)
    for setting in todo:
        row = key | {"setting": setting, "values": EVERY[setting]}
        row |= adapt(episode, init, seed, EVERY[setting])
        results["rows"].append(row)
        results["summary"] = summarise(results["rows"])
        measure.save(out, results)
        print(path.name, seed, setting, row["psnr"], row["cpu_s"], flush=True)
    plot(results, out.with_suffix(".png"))


def adapt(
    episode: Episode, init: Initialization, seed: int, setting: dict[str, Any]
) -> dict[str, Any]:
    """STEPS steps with a setting: PSNR of each held-out view, quantiles of the last weights."""
    episode.restart(init.mlp, seed)
    mapper = episode.mapper
    tiles = sum(len(t) for f in mapper.frames.values() for t in f.tiles.values())
    settings = replace(mapper.adapt, **setting)
    passes = STEPS * settings.rays_per_step / (tiles * TILE * TILE)
    mapper.optimizer.adapt = replace(settings, passes=passes)
    began, weights = time.process_time(), []
    for step in range(STEPS):
        report = mapper.step()
        if report is not None and step >= STEPS - LAST:
            weights.append(report.weights)
    spent = time.process_time() - began
    return {
        "psnr": {
            f.name: round(v, 3) for f, v in zip(episode.test, episode.score(SHRINK), strict=True)
        },
        "weights": distribution(np.concatenate(weights)),
        "steps": mapper.optimizer.steps,
        "cpu_s": round(spent, 2),
    }


def distribution(weights: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    """Quantiles, and the effective share of rays (sum w)^2 / (n sum w^2)."""
    values = np.percentile(weights, QUANTILES)
    share = float(weights.sum()) ** 2 / (len(weights) * float(np.square(weights).sum()))
    return {
        "quantiles": {str(q): round(float(v), 4) for q, v in zip(QUANTILES, values, strict=True)},
        "effective_share": round(share, 4),
    }


def views(rows: Iterable[dict[str, Any]], setting: str) -> dict[str, float]:
    """Every held-out view of some rows with this setting -> dB."""
    return {
        f"{row['capture']}/{row['seed']}/{view}": value
        for row in rows
        if row["setting"] == setting
        for view, value in row["psnr"].items()
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per capture and over all: mean PSNR of each setting and its gap to `off`, view by view."""
    out: dict[str, Any] = {}
    for capture in [*dict.fromkeys(row["capture"] for row in rows), "all"]:
        here = [row for row in rows if capture in ("all", row["capture"])]
        out[capture] = {}
        for setting in EVERY:
            values = views(here, setting)
            if values:
                mean = round(float(np.mean(list(values.values()))), 3)
                gap = measure.pair(values, views(here, "off"))
                out[capture][setting] = {"psnr": mean, "minus_off": gap}
                if setting != "on":
                    out[capture][setting]["minus_on"] = measure.pair(values, views(here, "on"))
    return out


def seconds(rows: list[dict[str, Any]], setting: str) -> float:
    """Median over captures and runs of the steps' CPU seconds relative to `off`."""
    spent = {(r["capture"], r["seed"], r["setting"]): r["cpu_s"] for r in rows}
    runs = [(capture, seed) for capture, seed, name in spent if name == setting]
    return float(np.median([spent[a, b, setting] / spent[a, b, "off"] for a, b in runs]))


def lines(results: dict[str, Any]) -> list[str]:
    """The table in Markdown: PSNR without weights, the others' gap to it, CPU, weights' quantiles.

    CPU seconds are those of `seconds`; a setting that was measured on another day met another load.
    """
    summary = results["summary"]
    head = ["weights", *summary, "CPU s", "5, 50, 95, 99 % of w", "effective rays"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting in EVERY:
        cells = [setting]
        for entry in summary.values():
            found = entry.get(setting)
            if setting == "off" or found is None:
                cells.append(f"{found['psnr']:.2f} dB" if found else "")
            else:
                cells.append(measure.words(found["minus_off"]))
        cells.append(f"{seconds(results['rows'], setting):.2f}")
        spread = [row["weights"] for row in results["rows"] if row["setting"] == setting]
        middle = [np.mean([s["quantiles"][q] for s in spread]) for q in ("5", "50", "95", "99")]
        cells.append(", ".join(f"{m:.2f}" for m in middle))
        cells.append(f"{np.mean([s['effective_share'] for s in spread]):.2f}")
        out.append("| " + " | ".join(cells) + " |")
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """Gap to `off` with its interval per capture, and the weights' quantiles."""
    from matplotlib.figure import Figure

    summary = results["summary"]
    names = [s for s in EVERY if s != "off"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    gaps, spread = figure.subplots(1, 2)
    at = np.arange(len(names))
    for i, (capture, entry) in enumerate(summary.items()):
        found = [entry.get(name, {}).get("minus_off") for name in names]
        shown = [(k, f) for k, f in enumerate(found) if f and f["interval"]]
        y = [f["difference_db"] for _, f in shown]
        low = [f["difference_db"] - f["interval"][0] for _, f in shown]
        high = [f["interval"][1] - f["difference_db"] for _, f in shown]
        x = [k + 0.18 * (i - 1.5) for k, _ in shown]
        colour = "k" if capture == "all" else f"C{i}"
        gaps.errorbar(x, y, [low, high], fmt="o", color=colour, label=capture, ms=4, capsize=2)
    gaps.axhline(0, color="0.5", lw=0.8)
    gaps.set_xticks(at, names, rotation=40, ha="right")
    gaps.set(ylabel="held-out PSNR minus that without weights (dB)", title="95 % intervals")
    gaps.legend(fontsize=8)
    for i, name in enumerate(EVERY):
        rows = [r["weights"]["quantiles"] for r in results["rows"] if r["setting"] == name]
        if rows:
            middle = [np.mean([r[str(q)] for r in rows]) for q in QUANTILES]
            spread.plot(QUANTILES, middle, marker="o", label=name, ms=3, color=f"C{i % 10}",
                        ls="-" if i < 10 else "--")  # fmt: skip
    spread.set(xlabel="percentile of rays", ylabel="weight", yscale="log", title="weights")
    spread.legend(fontsize=7)
    spread.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
