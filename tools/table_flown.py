"""A flight learned frame by frame, counted in steps: `python tools/table_flown.py [CAPTURE ...]`.

A frame comes each EVERY_S seconds of a clock that only this tool moves, and the daemon's mapper
takes STEPS steps in between and after the last one, until every module is closed: the same on any
machine, where `bench_live.py` tells what a machine's seconds are worth. Settings: as shipped; no
ground added that later frames are the first to see; a module that has spent half of its budget
begins anew only when half as many frames again see it. `at once` holds every frame before the first
step. `three parts` is one flight after the other, each held at once, learned and closed before the
next; `... or not at all` gives a new version up whose parent's probes it does not show as well,
instead of taking back what it changed of known ground. Run r has a seed and a split of its own
(`measure.RUNS`). Stopped and started again it goes on. Writes table_flown.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.captures import Capture, open_capture  # noqa: E402
from mclnf_edge.config import ServeConfig  # noqa: E402
from mclnf_edge.evaluate import compare  # noqa: E402
from mclnf_edge.images import decode_image  # noqa: E402
from mclnf_edge.inference.renderer import Renderer  # noqa: E402
from mclnf_edge.mapping import mapper as mapping  # noqa: E402
from mclnf_edge.mapping import revisits  # noqa: E402
from mclnf_edge.mapping.initialization import Initialization, load_init  # noqa: E402
from mclnf_edge.mapping.mapper import Mapper  # noqa: E402
from mclnf_edge.mapping.modules import Module  # noqa: E402
from mclnf_edge.types import ModuleSnapshot, View  # noqa: E402
from tools import measure  # noqa: E402

EVERY_S = 2.0
STEPS = 120
SHRINK = 2
STREAM = "flight"
PARTS = ("three parts", "three parts, or not at all")
SETTINGS = ("shipped", "nothing added", "anew only when young", "at once", *PARTS)
Kept = dict[tuple[str, int], ModuleSnapshot]
"""Committed modules by name and version."""
MARKS = ("flown", "end")
"""When the last frame has had its steps, and when every module is closed."""


@dataclass
class Clock:
    """What the mapper takes for `time`: monotonic seconds that stand still but for `pass_by`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def perf_counter(self) -> float:
        """Real seconds: what a step took counts for no budget here."""
        return time.perf_counter()


class NothingAdded(Mapper):
    """What a module does not know when it begins, it never sees unless it begins anew."""

    def _add_ground(self, *_: Any) -> None:
        for module in self.learning():
            module.fresh = 0


class AnewWhenYoung(Mapper):
    """Half a budget is not given up for a tenth more frames."""

    def _left(self, module: Module) -> bool:
        more = 1.0 if self._progress(module) < 0.5 else 1.5
        return super()._left(module) and self.views[module.cell] > more * module.seeded_with


class OrNotAtAll(Mapper):
    """A new version stands as it is, or its parent does."""

    def _holds(self, module: Module, parent: ModuleSnapshot) -> bool:
        assert self.pool is not None
        good = revisits.judge(self.pool, module, parent, self._show).share == 1
        if not good:
            revisits.give_up(self.pool, module, parent)
        return good


MAPPERS: dict[str, type[Mapper]] = {
    PARTS[1]: OrNotAtAll,
    "nothing added": NothingAdded,
    "anew only when young": AnewWhenYoung,
}


def main() -> int:
    """Fly what is missing, write after each flight, print the table."""
    options = measure.arguments(__doc__, "table_flown.json")
    init = load_init(None)
    protocol = measure.module_facts(init) | {
        "steps_per_frame": STEPS, "every_s": EVERY_S,
        "test_pictures": f"1/{SHRINK} of their width", "runs": measure.RUNS,
    }  # fmt: skip
    results = measure.open_results(options.out, protocol)
    for seed, fold in measure.RUNS[: options.runs]:
        for name in options.captures:
            for setting in SETTINGS:
                key = {"capture": name, "seed": seed, "fold": fold, "setting": setting}
                if measure.find(results, **key) is None:
                    capture = open_capture(options.data / name).fold(fold)
                    results["rows"].append(key | fly(capture, setting, seed, init))
                    results["summary"] = summarise(results["rows"])
                    measure.save(options.out, results)
                    print(results["rows"][-1], flush=True)
    for line in lines(results):
        print(line)
    return 0


@contextmanager
def own_time() -> Iterator[Clock]:
    """The mapper's clock in the hands of this tool."""
    clock = Clock()
    try:
        vars(mapping)["time"] = clock
        yield clock
    finally:
        vars(mapping)["time"] = time


def fly(capture: Capture, setting: str, seed: int, init: Initialization) -> dict[str, Any]:
    """One flight to its end: held-out views at both marks, steps, CPU seconds."""
    config = ServeConfig()
    adapt = replace(config.adapt, budget_s_per_frame=1e9, seed=seed)
    kept: Kept = {}
    made = MAPPERS.get(setting, Mapper)(
        config.map, config.field, adapt, init.mlp, threads=1, recall=lambda *key: kept[key]
    )
    began = time.process_time()
    with own_time() as clock:
        if setting in PARTS:
            row: dict[str, Any] = {"flown": {}, "versions": learn_parts(made, capture, kept, clock)}
        else:
            row = {"flown": learn(made, capture, kept, clock, at_once=setting == "at once")}
    row["end"] = score(made, capture)
    return {**row, "steps": made.steps, "modules": len(made.modules),
            "cpu_s": round(time.process_time() - began, 1)}  # fmt: skip


def learn(
    mapper: Mapper, capture: Capture, kept: Kept, clock: Clock, *, at_once: bool
) -> dict[str, Any]:
    """Fly and learn to the end; the held-out views when the last frame had its steps."""
    for i, frame in enumerate(capture.split("train").frames):
        mapper.add(i, STREAM, frame)
        mapper.frames[i].arrived = clock.now
        if not at_once:
            take(mapper, kept, clock)
    mapper.settle()
    flown = {} if at_once else score(mapper, capture)
    while mapper.learning():
        take(mapper, kept, clock)
    return flown


def learn_parts(mapper: Mapper, capture: Capture, kept: Kept, clock: Clock) -> dict[str, int]:
    """A third of the frames after the other; how many versions of closed cells were tried, held."""
    frames, tried, held = capture.split("train").frames, 0, 0
    for part in np.array_split(np.arange(len(frames)), 3):
        mapper.draining = False
        for i in part.tolist():
            mapper.add(i, STREAM, frames[i])
        mapper.draining = True
        before = {m.id: m.version for m in mapper.modules.values()}
        mapper.settle()
        again = [m for m in mapper.modules.values() if m.version > before.get(m.id, 1)]
        while mapper.learning():
            take(mapper, kept, clock)
        mapper.forget(mapper.unused())
        tried += len(again)
        held += sum(m.version > before[m.id] for m in again)
    return {"tried": tried, "held": held}


def take(mapper: Mapper, kept: Kept, clock: Clock) -> None:
    """What the daemon does between two frames."""
    mapper.settle()
    for _ in range(STEPS):
        if mapper.step() is None:
            break
    for module in mapper.finished():
        closing = mapper.close(module)
        if closing.snapshot is not None:
            kept[closing.snapshot.id, closing.snapshot.version] = closing.snapshot
        mapper.forget(closing.let_go)
    clock.now += EVERY_S


def score(mapper: Mapper, capture: Capture) -> dict[str, dict[str, float | None]]:
    """Of each held-out view: PSNR in dB with unknown pixels grey, of known ones, their share."""
    out, renderer = {}, Renderer()
    for frame in capture.split("test").frames:
        size = (frame.camera.width // SHRINK, frame.camera.height // SHRINK)
        full = decode_image(frame.image, frame.encoding, frame.camera)
        truth = cv2.resize(full, size, interpolation=cv2.INTER_AREA)
        view = View(frame.camera.scaled(*size), frame.T_world_camera, frame.timestamp, STREAM)
        meter = mapper.exposures.meter(STREAM, frame.timestamp, frame.exposure)
        gain = renderer.gain(mapper.pool, mapper.origins[0], view, meter)
        shown = renderer.render(mapper.pool, mapper.origins[0], view, gain)
        found = compare(shown, truth.astype(np.uint8), np.ones(truth.shape[:2], bool))
        figures = {key: found[key] for key in ("psnr", "psnr_known", "known")}
        out[frame.name] = {k: None if v is None else round(v, 4) for k, v in figures.items()}
    return out


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per capture and over all: means of each setting, and its gap to the shipped one per view."""
    out: dict[str, Any] = {}
    for capture in [*dict.fromkeys(row["capture"] for row in rows), "all"]:
        here = [row for row in rows if capture in ("all", row["capture"])]
        out[capture] = {}
        for setting in SETTINGS:
            mine = [row for row in here if row["setting"] == setting]
            out[capture][setting] = {
                mark: {
                    "psnr": round(float(np.mean(list(views.values()))), 3),
                    "known": round(float(np.mean(list(_views(mine, mark, "known").values()))), 4),
                    "minus_shipped": measure.pair(views, _views(
                        [row for row in here if row["setting"] == SETTINGS[0]], mark, "psnr")),
                }
                for mark in MARKS
                if (views := _views(mine, mark, "psnr"))
            }  # fmt: skip
    return out


def _views(rows: list[dict[str, Any]], mark: str, what: str) -> dict[str, float]:
    return {
        f"{row['capture']}/{row['seed']}/{view}": found[what]
        for row in rows
        for view, found in row[mark].items()
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The table in Markdown: PSNR as shipped, and what the other settings change."""
    summary = results["summary"]
    out = ["| " + " | ".join(["", *summary]) + " |", "|---" * (len(summary) + 1) + "|"]
    for setting in SETTINGS:
        for mark in MARKS:
            found = [entry[setting].get(mark) for entry in summary.values()]
            cells = [
                "" if f is None
                else f"{f['psnr']:.2f} dB, {100 * f['known']:.1f} % known" if setting == SETTINGS[0]
                else measure.words(f["minus_shipped"])
                for f in found
            ]  # fmt: skip
            if any(cells):
                out.append("| " + " | ".join([f"{setting}, {mark}", *cells]) + " |")
    return out


if __name__ == "__main__":
    sys.exit(main())
