"""What a stream of tasks makes a map forget: `python tools/table_continual.py [CAPTURE ...]`.

The inner cells of a capture are cut into four spatial tasks of about equal size, in the order in
which the flight sees them. A task's rays are those whose ground lies in its cells; tasks come one
after the other, each is done after its share of STEPS steps and its rays never come back.

| method | what learns |
|---|---|
| modules | the daemon's map: each task its own modules, closed when it is done |
| modules, joint | the same modules, all tasks at once |
| one network | the same planes over the whole capture, read by one MLP: task after task |
| one network, replay | half of each batch from a buffer as large as the closed modules on disk |
| one network, joint | all tasks at once: offline training |
| MLP, MLP replay, MLP joint | the paper's ReLU MLP (10 layers of 256) in the same three ways |

PSNR is taken on held-out pixels whose swept surface lies in the first task, after every task; on
those of every other task when it is done; and on all of them at the end. The fast field starts from
the shipped initialization and the seeded planes in every row, the MLP from random. A task's frames
come with it, and planes are seeded from the frames that have come by then: what an earlier task
saw of a later one's ground is a guess until that one comes. Only which cells make a task, and where
held-out pixels lie, is told by the whole capture. Joint rows are seeded from all frames. Run r has
seed r and its own split (`measure.RUNS`); the MLP has run 0 only. Stopped and started again it goes
on. Writes table_continual.json and .png.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mclnf_edge.mapping.initialization import Initialization, load_init  # noqa: E402
from mclnf_edge.mapping.modules import Cell  # noqa: E402
from mclnf_edge.maths.fields import count as count_parameters  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from tools import measure, streams  # noqa: E402
from tools.field_stream import RAYS, FieldStream, box_of, learn_in_turn  # noqa: E402
from tools.tasks import I32, TASKS, cut, targets, task_map, tiles_of  # noqa: E402

STEPS = 400
SHRINK = 3
INSET = 0.12
"""Share of a cell's edge by which `inside` pixels keep away from other tasks' cells."""
FEWEST = 200
"""Held-out pixels (at 1/SHRINK) a view must have in the first task to count there."""

FAST = ("modules", "modules, joint", "one network", "one network, replay", "one network, joint")
MLP = ("MLP", "MLP, replay", "MLP, joint")
JOINT = {
    "modules": "one network, joint",
    "modules, joint": "one network, joint",
    "one network": "one network, joint",
    "one network, replay": "one network, joint",
    "MLP": "MLP, joint",
    "MLP, replay": "MLP, joint",
}
TARGETS = {"forgetting_db": -0.05, "gap_to_joint_db": -0.5}

Scores = dict[str, float]
Curves = dict[str, list[float]]


def main() -> int:
    """Measure what is missing, write after each method, print the table."""
    options = measure.arguments(__doc__, "table_continual.json")
    init = load_init(None)
    results = measure.open_results(options.out, protocol(init))
    for number, (seed, fold) in enumerate(measure.RUNS[: options.runs]):
        for capture in options.captures:
            methods = FAST if number else FAST + MLP
            todo = [m for m in methods if not measure.find(
                results, capture=capture, seed=seed, method=m)]  # fmt: skip
            if todo:
                stage = Stage(options.data / capture, seed, fold, init)
                known = measure.find(results, capture=capture, seed=seed, method="modules")
                stage.replay_bytes = known["committed_bytes"] if known else 0
                for method in todo:
                    results["rows"].append(stage.run(method))
                    results["summary"] = summarise(results["rows"])
                    measure.save(options.out, results)
                    print(line(results["rows"][-1]), flush=True)
        plot(results, options.out.with_suffix(".png"))
    for text in lines(results):
        print(text)
    return 0


def protocol(init: Initialization) -> dict[str, Any]:
    """What the rows have in common; rows of another protocol are measured anew."""
    return measure.module_facts(init) | {
        "tasks": TASKS,
        "steps": STEPS,
        "rays_per_step": {"fast field": 2048, "MLP": RAYS},
        "rates": "the defaults, the MLP's rates falling tenfold within each task",
        "test_pictures": f"1/{SHRINK} of their width, exposure {measure.EXPOSURE}",
        "fewest_pixels": FEWEST,
        "inset": INSET,
        "seeded": "in turn, from the frames that have come",
        "runs": measure.RUNS,
    }


class Stage:
    """One capture in one run, cut into tasks, and the held-out pixels of each."""

    def __init__(self, path: Path, seed: int, fold: int | None, init: Initialization) -> None:
        """Hold, sweep and seed; cells are halved when one of them is larger than a task."""
        self.capture, self.seed, self.fold, self.init = path.name, seed, fold, init
        self.episode = streams.StreamEpisode(path, None, fold=fold)
        self.count, place = self._cells()
        if max(self.count.values()) > sum(self.count.values()) / TASKS:
            assert self.episode.mapper.pool is not None
            half = 0.5 * self.episode.mapper.pool.cell_m
            self.episode = streams.StreamEpisode(path, None, fold=fold, cell_m=half)
            self.count, place = self._cells()
        self.tasks = cut(self.count, place, TASKS)
        self.steps = streams.shares(self.tasks, self.count, STEPS)
        self.frames = streams.arrivals(self.episode.mapper, self.tasks)
        self.masks: list[I32] = [self._mask(frame, 0) for frame in self.episode.test]
        self.inner: list[I32] = [self._mask(frame, INSET) for frame in self.episode.test]
        self.box = box_of(self.episode.mapper, [cell for run in self.tasks for cell in run])
        self.replay_bytes = 0

    def _cells(self) -> tuple[dict[Cell, int], dict[Cell, float]]:
        mapper = self.episode.mapper
        count, place = tiles_of(list(mapper.frames.values()))
        return {c: n for c, n in count.items() if c in mapper.modules}, place

    def _mask(self, frame: Any, inset: float) -> I32:
        camera = frame.camera.scaled(frame.camera.width // SHRINK, frame.camera.height // SHRINK)
        return task_map(self.episode.mapper, self.tasks, camera, frame.T_world_camera, inset)

    def run(self, method: str) -> dict[str, Any]:
        """Learn the stream with one method; the row of the JSON."""
        began = time.process_time()
        first: Curves = {}
        own: Curves = {}
        row: dict[str, Any] = {
            "capture": self.capture, "seed": self.seed, "fold": self.fold, "method": method,
            "cells": [len(run) for run in self.tasks], "steps": self.steps,
            "tiles": [sum(self.count[cell] for cell in run) for run in self.tasks],
            "frames": [len(numbers) for numbers in self.frames],
        }  # fmt: skip
        tied = method.startswith("one network")
        if method.endswith("joint"):
            episode = self.episode
            episode.joint(self.init.mlp, self.seed, tied=tied)
        else:
            episode = self.episode.anew(self.init.mlp, self.seed, tied=tied)
        learn = self._mlp if method in MLP else self._fast
        row |= learn(method, episode, first, own)
        spent = time.process_time() - began
        row |= {"first_task": first, "own_task": own, "cpu_s": round(spent, 1)}
        return row | {"commit": measure.commit()}

    def _fast(
        self, method: str, episode: streams.StreamEpisode, first: Curves, own: Curves
    ) -> dict[str, Any]:
        mapper = episode.mapper
        turns = streams.in_turn(episode, self.tasks, self.frames)
        show = partial(self._picture, episode, None)
        after = partial(self._note, first, own, show)
        size = streams.parameters(self.episode.mapper, self.tasks, tied=mapper.tied)
        facts: dict[str, Any] = {"parameters": size}
        if method == "modules":
            gains: list[Any] = []
            inside: Curves = {}

            def closing(task: int) -> None:
                after(task)
                gains.extend(episode.gain(frame) for frame in episode.test)
                if task in (0, len(self.tasks) - 1):
                    for name, value in self._scores(show, 0, self.inner).items():
                        inside.setdefault(name, []).append(value)

            closed = streams.modules(mapper, self.tasks, turns, self.steps, closing)
            self.replay_bytes = closed.committed_bytes
            facts |= {"closed": len(closed.digests), "changed": closed.changed,
                      "committed_bytes": closed.committed_bytes,
                      "frames_let_go": closed.let_go,
                      "first_task_inside": inside}  # fmt: skip
            held = partial(self._picture, episode, gains[: len(self.masks)])
            facts["first_task_exposure_held"] = self._scores(held, 0)
        elif method.endswith("joint"):
            streams.jointly(mapper, self.tasks, sum(self.steps))
            after(len(self.tasks) - 1)
        else:
            size = self.replay_bytes if method.endswith("replay") else 0
            streams.one_network(mapper, turns, self.steps, after, size)
            facts |= {"replay_bytes": size, "capture_bytes": self._all_tiles()}
        return facts | {"all_tasks": self._scores(show, None)}

    def _mlp(
        self, method: str, episode: streams.StreamEpisode, first: Curves, own: Curves
    ) -> dict[str, Any]:
        stream = FieldStream(episode.mapper, self.box, self.seed)
        show = partial(self._mlp_picture, episode, stream)
        after = partial(self._note, first, own, show)
        size = self.replay_bytes if method.endswith("replay") else 0
        if method.endswith("joint"):
            everything = targets(episode.mapper, [cell for run in self.tasks for cell in run])
            learn_in_turn(stream, [everything], [sum(self.steps)], lambda k: None)
            after(len(self.tasks) - 1)
        else:
            buffer = partial(streams.kept, size=size, seed=self.seed)
            keep = {"keep": buffer} if size else {}
            turns = streams.in_turn(episode, self.tasks, self.frames)
            learn_in_turn(stream, turns, self.steps, after, **keep)
        return {
            "parameters": count_parameters(stream.params), "replay_bytes": size,
            "all_tasks": self._scores(show, None),
        }  # fmt: skip

    def _note(self, first: Curves, own: Curves, show: Callable[[int, Any], Any], task: int) -> None:
        """Task `task` is done: add its own PSNR and the first one's; all of them after the last."""
        for name, value in self._scores(show, 0).items():
            first.setdefault(name, []).append(value)
        for k in range(len(self.tasks)) if task == len(self.tasks) - 1 else [task]:
            for name, value in self._scores(show, k).items():
                own.setdefault(f"{k}/{name}", []).append(value)

    def _scores(
        self, show: Callable[[int, Any], Any], task: int | None, masks: list[I32] | None = None
    ) -> Scores:
        """dB of each held-out view on its pixels in one task, or in any."""
        out = {}
        for i, mask in enumerate(masks or self.masks):
            wanted = mask == task if task is not None else mask >= 0
            if wanted.sum() >= FEWEST:
                shown, truth, at = show(i, wanted)
                name = self.episode.test[i].name or str(i)
                out[name] = round(psnr(shown, truth, at), 4)
        return out

    def _picture(
        self,
        episode: streams.StreamEpisode,
        gains: list[Any] | None,
        view: int,
        wanted: npt.NDArray[np.bool_],
    ) -> tuple[Any, Any, Any]:
        """What the map shows; `gains` are the views' exposures, None: the map's own now."""
        gain = None if gains is None else gains[view]
        return *episode.picture(episode.test[view], SHRINK, gain), wanted

    def _mlp_picture(
        self,
        episode: streams.StreamEpisode,
        stream: FieldStream,
        view: int,
        wanted: npt.NDArray[np.bool_],
    ) -> tuple[Any, Any, Any]:
        """Every fourth of the wanted pixels: the MLP takes long to evaluate."""
        frame = episode.test[view]
        height, width = wanted.shape
        truth = episode.truth(frame, SHRINK)
        at = wanted.copy()
        at[1::2] = False
        at[:, 1::2] = False
        pixels = np.argwhere(at)[:, ::-1].astype(np.int64)
        gain = episode.gain(frame)
        colours = stream.pixels(
            frame.camera.scaled(width, height), frame.T_world_camera, gain, pixels
        )
        shown = np.zeros((height, width, 3))
        shown[at] = colours
        return shown, truth / 255.0, at

    def _all_tiles(self) -> int:
        return sum(self.count.values()) * streams.TILE_BYTES


def views(rows: Iterable[dict[str, Any]], method: str, what: str) -> Scores:
    """View -> dB: the first task when `closed`, at the `end`, there with the exposures `held` as
    they were when it closed; each task but the last when done (`own closed`) and at the end
    (`own end`), a view once per task; the first task's pixels away from others (`inside closed`,
    `inside end`); `all` tasks together at the end.
    """
    out = {}
    for row in rows:
        if row["method"] == method:
            known = {
                "closed": {view: values[0] for view, values in row["first_task"].items()},
                "end": {view: values[-1] for view, values in row["first_task"].items()},
                "held": row.get("first_task_exposure_held", {}),
                "inside closed": {k: v[0] for k, v in row.get("first_task_inside", {}).items()},
                "inside end": {k: v[-1] for k, v in row.get("first_task_inside", {}).items()},
                "own closed": {k: v[0] for k, v in row["own_task"].items() if len(v) > 1},
                "own end": {k: v[-1] for k, v in row["own_task"].items() if len(v) > 1},
                "all": row["all_tasks"],
            }
            for view, value in known[what].items():
                out[f"{row['capture']}/{row['seed']}/{view}"] = value
    return out


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per capture and over all: forgetting and gap to joint training of every method."""
    out: dict[str, Any] = {}
    for capture in [*dict.fromkeys(row["capture"] for row in rows), "all"]:
        here = [row for row in rows if capture in ("all", row["capture"])]
        out[capture] = {
            method: entry(here, method)
            for method in FAST + MLP
            if any(row["method"] == method for row in here)
        }
    return out


def entry(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """The figures of one method over some rows."""
    end, everything = views(rows, method, "end"), views(rows, method, "all")
    found: dict[str, Any] = {"first_at_end": _mean(end), "all_tasks": _mean(everything)}
    if not method.endswith("joint"):
        closed = views(rows, method, "closed")
        found["first_when_closed"] = _mean(closed)
        found["forgetting"] = measure.pair(end, closed)
        found["forgetting_every_task"] = measure.pair(
            views(rows, method, "own end"), views(rows, method, "own closed")
        )
    if method in JOINT:
        other = JOINT[method]
        found["gap_to_joint"] = measure.pair(everything, views(rows, other, "all"))
        found["gap_to_joint_first_task"] = measure.pair(end, views(rows, other, "end"))
    if method == "modules":
        own = [row for row in rows if row["method"] == method]
        found["closed"] = sum(row["closed"] for row in own)
        found["changed"] = sum(len(row["changed"]) for row in own)
        held = views(rows, method, "held")
        found["forgetting_exposure_held"] = measure.pair(held, closed)
        found["forgetting_inside"] = measure.pair(
            views(rows, method, "inside end"), views(rows, method, "inside closed")
        )
        lost, gap = found["forgetting"]["difference_db"], found["gap_to_joint"]["difference_db"]
        found["met"] = {
            "forgets at most 0.05 dB": lost is not None and lost >= TARGETS["forgetting_db"],
            "at most 0.5 dB below joint": gap is not None and gap >= TARGETS["gap_to_joint_db"],
        }
    return found


def line(row: dict[str, Any]) -> str:
    """One row in words, as it comes."""
    first = row["first_task"].values()
    closed, end = _mean([v[0] for v in first]), _mean([v[-1] for v in first])
    return (
        f"{row['capture']} {row['seed']} {row['method']}: first task {closed} -> {end} dB in "
        f"{len(first)} views, all tasks {_mean(row['all_tasks'].values())} dB, {row['cpu_s']} s"
    )


def lines(results: dict[str, Any]) -> list[str]:
    """The tables in Markdown, one per capture and one over all."""
    out = []
    for capture, methods in results["summary"].items():
        heads = ["method", "first task when closed", "at the end", "change"]
        heads += ["change of every task", "all tasks", "against joint"]
        out += ["", capture, "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for method, found in methods.items():
            cells = [
                method,
                _number(found.get("first_when_closed")),
                _number(found["first_at_end"]),
            ]
            cells += [
                measure.words(found.get("forgetting")),
                measure.words(found.get("forgetting_every_task")),
            ]
            cells += [_number(found["all_tasks"]), measure.words(found.get("gap_to_joint"))]
            out.append("| " + " | ".join(cells) + " |")
    return out


def plot(results: dict[str, Any], path: Path) -> None:
    """PSNR on the first task's held-out pixels after each task, a panel per capture."""
    from matplotlib.figure import Figure

    captures = [name for name in results["summary"] if name != "all"]
    figure = Figure(figsize=(4.2 * len(captures), 3.8), layout="constrained")
    panels = figure.subplots(1, len(captures), squeeze=False)[0]
    for axes, capture in zip(panels, captures, strict=True):
        for i, method in enumerate(FAST + MLP):
            rows = [
                row for row in results["rows"]
                if row["capture"] == capture and row["method"] == method and row["first_task"]
            ]  # fmt: skip
            if not rows:
                continue
            mean = np.mean([np.mean(list(r["first_task"].values()), axis=0) for r in rows], axis=0)
            if method.endswith("joint"):
                axes.axhline(mean[-1], color=f"C{i}", ls=":", label=method)
            else:
                axes.plot(range(1, len(mean) + 1), mean, "o-", color=f"C{i}", ms=4, label=method)
        axes.set(title=capture, xlabel="tasks learned", ylabel="PSNR on the first task (dB)")
        axes.set_xticks(range(1, TASKS + 1))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _mean(values: Any) -> float | None:
    known = list(values.values() if isinstance(values, dict) else values)
    return round(float(np.mean(known)), 3) if known else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
