"""What modules start from, and how bright a view is shown: `python tools/table_seeds.py`.

Every setting of the sweep (`engine/surface.py`, `mapping/structure.py`) seeds the modules of a
capture's train frames anew; they take the same steps from the shipped initialization. How finely
rays are followed (`mapping/optimizer.py`) is changed in steps and pictures alike. Run r has a
seed and a split of its own (`measure.RUNS`). With the shipped settings the exposure of each
held-out view is also told in other ways, and each train frame's gain from the other frames.
Stopped and started again it goes on. Writes table_seeds.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.engine import surface  # noqa: E402
from mclnf_edge.engine.volume import ALL  # noqa: E402
from mclnf_edge.inference import renderer  # noqa: E402
from mclnf_edge.mapping import optimizer, structure  # noqa: E402
from mclnf_edge.mapping.exposures import Taken, predict  # noqa: E402
from mclnf_edge.mapping.frames import HeldFrame  # noqa: E402
from mclnf_edge.mapping.initialization import Initialization, load_init  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from meta_trainer.city_init import Episode  # noqa: E402
from tools import measure  # noqa: E402

F32 = npt.NDArray[np.float32]
STEPS = 64
SHRINK = 3
NEVER = 1e9

SETTINGS: dict[str, dict[str, float]] = {
    "shipped": {},
    "plain variance": {"DOUBT": NEVER, "OCCLUDED": NEVER},
    "OCCLUDED 0.3": {"OCCLUDED": 0.3},
    "DOUBT 0.1": {"DOUBT": 0.1},
    "DOUBT 0.4": {"DOUBT": 0.4},
    "NO_VIEWS 0.15": {"NO_VIEWS": 0.15},
    "NO_VIEWS 1": {"NO_VIEWS": 1.0},
    "smoothing along rows and columns alone, 0.06 and 0.75": {"WAYS": 4},
    "the same, 0.08 and 1": {"WAYS": 4, "_SMALL": 0.08, "_LARGE": 1.0},
    "smoothing 0.08 and 1": {"_SMALL": 0.08, "_LARGE": 1.0},
    "smoothing 0.06 and 0.5": {"_LARGE": 0.5},
    "smoothing 0.04 and 0.5": {"_SMALL": 0.04, "_LARGE": 0.5},
    "smoothing 0.02 and 0.25": {"_SMALL": 0.02, "_LARGE": 0.25},
    "16 views in colours and seen counts": {"_PAINT_VIEWS": 16},
    "32 views in the sweep": {"_SWEEP_VIEWS": 32},
    "96 columns along an edge": {"RASTER": 96},
    "known from 2 views on": {"known_views": 2},
    "edge: ground at the 50th percentile": {"_HIGH_GROUND": 50},
    "edge: at the 90th": {"_HIGH_GROUND": 90},
    "edge: at the 95th": {"_HIGH_GROUND": 95},
    "edge: two pictures agree": {"AGREEING": 2},
    "edge: however many agree": {"AGREEING": NEVER},
    "rays: 6 samples out of 48 steps": {"SAMPLES": 6, "COARSE_STEPS": 48},
    "rays: 16 out of 48": {"COARSE_STEPS": 48},
    "rays: 10 out of 96": {"SAMPLES": 10},
    "rays: 24 out of 96": {"SAMPLES": 24},
    "rays: all samples learned from": {"TRAINED_SAMPLES": ALL},
    "rays: 5 learned from": {"TRAINED_SAMPLES": 5.0},
}
SHIPPED = "shipped"
TOLD = ("told", "interpolated", "zero", "fitted")
"""Ways to a held-out view's exposure: as a render does, linearly in time, none, and the gain that
fits its picture best, which no render can know."""


def main() -> int:
    """Measure what is missing, write after each row, print the table."""
    options = measure.arguments(__doc__, "table_seeds.json")
    init = load_init(None)
    protocol = measure.module_facts(init) | {
        "steps": STEPS, "test_pictures": f"1/{SHRINK} of their width", "runs": measure.RUNS,
        "shipped": constants(),
    }  # fmt: skip
    results = measure.open_results(options.out, protocol)
    for seed, fold in measure.RUNS[: options.runs]:
        for capture in options.captures:
            for setting in SETTINGS:
                key = {"capture": capture, "seed": seed, "fold": fold, "setting": setting}
                values = SETTINGS[setting]
                if measure.find(results, **key, values=values) is None:
                    row = key | {"values": values}
                    row |= adapt(options.data / capture, seed, fold, init, values)
                    results["rows"].append(row)
                    results["summary"] = summarise(results["rows"])
                    measure.save(options.out, results)
                    print(capture, seed, setting, row["psnr"], flush=True)
    for line in lines(results):
        print(line)
    return 0


def constants() -> dict[str, float]:
    """The shipped values of all that a setting changes."""
    names = sorted({name for values in SETTINGS.values() for name in values} - {"known_views"})
    return {name: float(getattr(_homes(name)[0], name)) for name in names}


@contextmanager
def changed(values: dict[str, float]) -> Iterator[None]:
    """Other constants; a sweep that has some is compiled again, and kept nowhere."""
    before = {name: getattr(_homes(name)[0], name) for name in values}
    compiled = surface.sweep, surface.smooth
    options = {**surface._SAME, "cache": False}
    try:
        _set(values)
        if values.keys() & {"DOUBT", "OCCLUDED", "NO_VIEWS"}:
            surface.sweep = njit(**options)(surface.sweep.py_func)
        if "WAYS" in values:
            surface.smooth = njit(**options)(surface.smooth.py_func)
        yield
    finally:
        _set(before)
        surface.sweep, surface.smooth = compiled


def _set(values: dict[str, float]) -> None:
    for name, value in values.items():
        for home in _homes(name):
            setattr(home, name, value)


def _homes(name: str) -> list[Any]:
    """The modules that know a constant."""
    return [m for m in (surface, structure, optimizer, renderer) if hasattr(m, name)]


def adapt(
    path: Path, seed: int, fold: int | None, init: Initialization, values: dict[str, float]
) -> dict[str, Any]:
    """STEPS steps from a seed of the sweep with `values`: PSNR of each held-out view in dB."""
    with changed({name: value for name, value in values.items() if name != "known_views"}):
        episode = Episode(path, None, fold=fold)
        episode.restart(init.mlp, seed)
        began = time.process_time()
        episode.steps(STEPS)
        spent = time.process_time() - began
        assert episode.mapper.pool is not None
        episode.mapper.pool.known_views = int(values.get("known_views", 1))
        scores = episode.score(SHRINK)
    names = [f.name for f in episode.test]
    row: dict[str, Any] = {"psnr": {n: round(v, 3) for n, v in zip(names, scores, strict=True)}}
    row["steps_cpu_s"] = round(spent, 2)
    if not values:
        frames = sorted(episode.mapper.frames.values(), key=lambda f: f.timestamp)
        row["exposure_psnr"] = {way: shown_with(episode, frames, way) for way in TOLD}
        row["gain_error"] = gain_errors(frames)
    return row


def shown_with(episode: Episode, frames: Sequence[HeldFrame], way: str) -> dict[str, float]:
    """PSNR (dB) of each held-out view with its exposure told in one of the ways of `TOLD`."""
    out = {}
    for frame in episode.test:
        gain = np.zeros(3, np.float32)
        if way == "told":
            gain = episode.gain(frame)
        elif way == "interpolated":
            gain = between(frames, frame.timestamp)
        shown, truth = episode.picture(frame, SHRINK, gain)
        seen, true = shown.astype(np.float64) / 255, truth.astype(np.float64) / 255
        if way == "fitted":
            seen = (seen * ((seen * true).sum((0, 1)) / (seen**2).sum((0, 1)))).clip(0, 1)
        out[frame.name] = round(psnr(seen, true, peak=1.0), 3)
    return out


def between(frames: Sequence[HeldFrame], time: float) -> F32:
    """(3,) log gain, linear in time between the frames, which are in order."""
    times = [f.timestamp for f in frames]
    return np.array([np.interp(time, times, [f.gain[c] for f in frames]) for c in range(3)],
                    np.float32)  # fmt: skip


def gain_errors(frames: Sequence[HeldFrame]) -> dict[str, float]:
    """Root mean square over the frames of a log gain told from the other frames less its own."""
    missed: dict[str, list[F32]] = {"told": [], "interpolated": []}
    for k, frame in enumerate(frames):
        others = [*frames[:k], *frames[k + 1 :]]
        taken = [Taken(f.gain, f.brightness, f.exposure) for f in others]
        times = np.array([f.timestamp for f in others])
        at = np.array([frame.timestamp, frame.brightness - frame.gain.mean(), frame.exposure])
        missed["told"].append(predict(times, taken, at) - frame.gain)
        missed["interpolated"].append(between(others, frame.timestamp) - frame.gain)
    return {
        way: round(float(np.sqrt(np.square(errors).mean())), 4) for way, errors in missed.items()
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per capture and over all: mean PSNR of each setting and its gap to the shipped one, view by
    view; of the ways to an exposure the gap to interpolation in time."""
    out: dict[str, Any] = {}
    for capture in [*dict.fromkeys(row["capture"] for row in rows), "all"]:
        here = [row for row in rows if capture in ("all", row["capture"])]
        shipped = [row for row in here if row["setting"] == SHIPPED]
        base = _views(shipped, "psnr")
        out[capture] = {
            setting: {"psnr": round(float(np.mean(list(values.values()))), 3),
                      "minus_shipped": measure.pair(values, base)}
            for setting in SETTINGS
            if (values := _views([r for r in here if r["setting"] == setting], "psnr"))
        }  # fmt: skip
        told = {way: _views(shipped, "exposure_psnr", way) for way in TOLD}
        out[capture]["exposure"] = {
            way: measure.pair(values, told["interpolated"]) for way, values in told.items()
        } | {
            "gain_error": {
                way: round(float(np.sqrt(np.mean([r["gain_error"][way] ** 2 for r in shipped]))), 4)
                for way in ("told", "interpolated")
            }
        }
    return out


def _views(rows: Sequence[dict[str, Any]], *where: str) -> dict[str, float]:
    """Every held-out view of some rows -> dB, found below the keys `where`."""
    out: dict[str, float] = {}
    for row in rows:
        values = row
        for key in where:
            values = values[key]
        out |= {f"{row['capture']}/{row['seed']}/{view}": v for view, v in values.items()}
    return out


def lines(results: dict[str, Any]) -> list[str]:
    """The tables in Markdown: PSNR as shipped, and what every other setting changes."""
    summary = results["summary"]
    out = ["| " + " | ".join(["sweep", *summary]) + " |", "|---" * (len(summary) + 1) + "|"]
    for setting in SETTINGS:
        found = [entry.get(setting) for entry in summary.values()]
        cells = [
            "" if f is None
            else f"{f['psnr']:.2f} dB" if setting == SHIPPED
            else measure.words(f["minus_shipped"])
            for f in found
        ]  # fmt: skip
        out.append("| " + " | ".join([setting, *cells]) + " |")
    out += ["", "| exposure, against interpolation in time" + " |" * (len(summary) + 1)]
    for way in TOLD:
        cells = [measure.words(entry["exposure"][way]) for entry in summary.values()]
        out.append("| " + " | ".join([way, *cells]) + " |")
    errors = [entry["exposure"]["gain_error"] for entry in summary.values()]
    cells = [f"{e['interpolated']:.3f} / {e['told']:.3f}" for e in errors]
    out.append("| " + " | ".join(["log gain, interpolated / told", *cells]) + " |")
    return out


if __name__ == "__main__":
    sys.exit(main())
