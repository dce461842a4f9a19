"""What a flight's map shows while it is flown: `python tools/bench_live.py [CAPTURE ...]`.

Train frames are sent one by one at `--rate`, to a daemon with its default budgets; `test` frames
never. Every `--every` seconds small renders of all held-out views are asked for (after the last
frame a quarter as often), and whole ones when 25, 50, 75 and 100 % of the stream are sent; the
flight's clock stands still for the whole ones.
Afterwards the final map's depth says which sent frames had seen a held-out pixel's surface:

* `quarters`: PSNR on the pixels that two or more of the frames sent by then had seen, and of the
  same pixels at the end.
* `blocks`: seconds from the first frame that sees a quarter of a module's pixels in a held-out view
  until that view's pixels seen by then are 3 dB above the picture of their mean colour.
* `end`: all held-out pixels `--after` seconds after the last frame, or when all is closed.

`--budgets 1,4` flies again with 4 times the budget, to its end, and pairs the views: the default
budget's value should lie within 0.3 dB of it. `--rate 100` sends everything at once; `--frames N`
only the first N, whose end is what a flight's first frames alone can tell. Finished flights are not
flown again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mclnf_edge.captures import Capture, open_capture, view_of  # noqa: E402
from mclnf_edge.client import Client  # noqa: E402
from mclnf_edge.config import AdaptConfig  # noqa: E402
from mclnf_edge.evaluate import evaluate  # noqa: E402
from mclnf_edge.images import decode_image  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.maths.metrics import psnr  # noqa: E402
from mclnf_edge.types import Frame, Render  # noqa: E402
from tools import daemons, ground, measure  # noqa: E402
from tools.bench_unknown import points  # noqa: E402

RGB = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

KEY = ("capture", "budget", "seed", "rate_hz", "first_frames")
QUARTERS = (0.25, 0.5, 0.75, 1.0)
SMALL_PX = 160
USEFUL_DB = 3.0
FIRST_SHARE = 0.25
"""A frame is a block's first when it sees this share of its pixels in a held-out view."""
FEWEST = 150
"""Pixels (of the small renders) that a block must have in a view to count there."""
CLOSELY_S = 10.0
"""So long after the last frame renders go on as often as before, then a quarter as often."""
GOAL_DB = -0.3
GIVE_UP_S = 1800.0


@dataclass
class Shots:
    """Renders of all held-out views at one moment: frames sent, wall and CPU seconds by then."""

    sent: int
    wall_s: float
    cpu_s: float
    pictures: list[RGB]


@dataclass
class Flight:
    """What was recorded while flying."""

    sent_at: list[tuple[float, float]] = field(default_factory=list)
    """Wall and CPU seconds at which each train frame was sent."""
    small: list[Shots] = field(default_factory=list)
    whole: list[Shots] = field(default_factory=list)
    largest_lag: int = 0


class Flyer:
    """One capture sent to one daemon in time, with renders in between."""

    def __init__(self, client: Client, capture: Capture, rate_hz: float, every_s: float) -> None:
        self.client, self.capture, self.period, self.every_s = client, capture, 1 / rate_hz, every_s
        self.held_out = list(capture.split("test").frames)
        self.flight = Flight()
        self._started, self._paused, self._due = time.monotonic(), 0.0, 0.0
        self._cpu = daemons.busy_s(client.status())

    def now(self) -> tuple[float, float]:
        """Wall seconds of the flight without whole renders, CPU seconds without any render."""
        wall = time.monotonic() - self._started - self._paused
        status = self.client.status()
        self.flight.largest_lag = max(self.flight.largest_lag, daemons.lag(status))
        return wall, daemons.busy_s(status) - self._cpu

    def fly(self, frames: Sequence[Frame]) -> float:
        """Send all frames in time; the wall second of the last one."""
        ends = {max(round(share * len(frames)), 1) for share in QUARTERS}
        for number, frame in enumerate(frames):
            self.watch(number * self.period)
            self.client.submit(frame)
            self.flight.sent_at.append(self.now())
            if number + 1 in ends:
                self.watch((number + 1) * self.period)
                self.whole(number + 1)
        self.client.flush()
        return self.flight.sent_at[-1][0]

    def watch(self, until_s: float) -> None:
        """Small renders every `every_s` until a second of the flight."""
        while (wall := self.now()[0]) < until_s:
            if wall >= self._due:
                self._due = wall + self.every_s
                wall, cpu = self.now()
                shown = [self._render(frame, SMALL_PX).rgb for frame in self.held_out]
                sent = len(self.flight.sent_at)
                self.flight.small.append(Shots(sent, wall, cpu, shown))
            time.sleep(0.05)

    def whole(self, sent: int) -> None:
        """Renders of all held-out views in full, off the flight's clock."""
        wall, cpu = self.now()
        began = time.monotonic()
        shown = [self._render(frame).rgb for frame in self.held_out]
        self._paused += time.monotonic() - began
        self.flight.whole.append(Shots(sent, wall, cpu, shown))

    def _render(self, frame: Frame, width: int = 0) -> Render:
        return self.client.render(view_of(frame, self.capture), width, want=(), encoding="raw")

    def wait(self, until_s: float) -> str:
        """Wait for a second of the flight or until every module is closed; which came first."""
        closely_s = self.now()[0] + CLOSELY_S
        while (wall := self.now()[0]) < until_s:
            if wall >= closely_s:
                self.every_s, closely_s = self.every_s * 4, math.inf
            status = self.client.status()
            done = status["modules"] and not daemons.open_modules(status)
            if done and not daemons.lag(status):
                return "closed"
            self.watch(min(self.now()[0] + 1.0, until_s))
        return "time"

    def small_depths(self, frames: Sequence[Frame]) -> list[ground.Depth]:
        """What the map shows as depth of some frames, `SMALL_PX` wide."""
        views = [view_of(frame, self.capture) for frame in frames]
        return [self.client.render(view, SMALL_PX, want=("depth",)).depth for view in views]


def fly(path: Path, budget: float, options: argparse.Namespace) -> dict[str, Any]:
    """One capture flown with `budget` times the default budget; its row."""
    capture = open_capture(path)
    train, default = list(daemons.published(capture))[: options.frames], AdaptConfig()
    adapt = {
        "passes": default.passes * budget,
        "budget_s_per_frame": default.budget_s_per_frame * budget,
        "seed": options.seed,
    }
    with (
        daemons.daemon({"adapt": adapt}) as running,
        Client(running.address, give_up_s=300) as client,
    ):
        client.hello(stream=capture.name, world=capture.world)
        flyer = Flyer(client, capture, options.rate, options.every if budget == 1 else math.inf)
        last = flyer.fly(train)
        ended = flyer.wait(last + (options.after if budget == 1 else GIVE_UP_S))
        row = {"after_last_frame_s": flyer.now()[0] - last, "ended_by": ended} | at_end(flyer)
        if budget == 1:
            row |= during(flyer, train)
    row |= {"sent": len(train), "every_s": options.every, "adapt": adapt}
    return key_of(capture.name, budget, options) | row | {"map_problems": running.problems}


def key_of(name: str, budget: float, options: argparse.Namespace) -> dict[str, Any]:
    """What tells a row from the others."""
    told = {"capture": name, "budget": budget, "seed": options.seed}
    return told | {"rate_hz": options.rate, "first_frames": options.frames}


def at_end(flyer: Flyer) -> dict[str, Any]:
    """The finished map's figures on the held-out views, and what it cost."""
    cpu = flyer.now()[1]
    figures = evaluate(flyer.capture, flyer.client.render, "test")
    status = flyer.client.status()
    means = ("psnr", "psnr_known", "psnr_aligned", "ssim", "known")
    return {
        "cpu_s": cpu, "steps": status["steps"], "modules": len(status["modules"]),
        "still_open": daemons.open_modules(status), "end": {k: figures[k] for k in means},
        "views": figures["views"], "largest_lag_frames": flyer.flight.largest_lag,
        "peak_memory_mb": status["peak_memory_mb"], "render_cpu_s": status["render_cpu_s"],
    }  # fmt: skip


def during(flyer: Flyer, train: Sequence[Frame]) -> dict[str, Any]:
    """What the renders of the flight showed of the ground that had been seen by then."""
    truth = [decode_image(f.image, f.encoding, f.camera) for f in flyer.held_out]
    depths = flyer.small_depths(flyer.held_out)
    seen = visible(flyer.held_out, depths, train, flyer.small_depths(train))
    flyer.whole(len(train))
    status = flyer.client.status()
    blocks = [split(f, d, status) for f, d in zip(flyer.held_out, depths, strict=True)]
    found = useful(flyer.flight, truth, seen, blocks)
    return {
        "quarters": quarters(flyer.flight.whole, truth, seen),
        "blocks": found,
        "summary": summarise(found),
    }


def visible(
    held_out: Sequence[Frame],
    depths: Sequence[ground.Depth],
    frames: Sequence[Frame],
    frame_depths: Sequence[ground.Depth],
) -> list[Bools]:
    """Of each held-out view, (frames, H, W): which of its pixels each train frame has seen."""
    out = []
    for view, depth in zip(held_out, depths, strict=True):
        at = points(view, depth)
        pairs = zip(frames, frame_depths, strict=True)
        seen = [ground.seen_by(at, frame, known).reshape(depth.shape) for frame, known in pairs]
        out.append(np.stack(seen))
    return out


def quarters(
    shots: Sequence[Shots], truth: Sequence[RGB], seen: Sequence[Bools]
) -> list[dict[str, Any]]:
    """PSNR on ground seen by two or more of the frames sent; the last of `shots` is the end."""
    *during, end = shots
    out = []
    for shot in during:
        row: dict[str, Any] = {"sent": shot.sent, "wall_s": shot.wall_s, "cpu_s": shot.cpu_s}
        then, later, share = [], [], []
        for k, true in enumerate(truth):
            mask = (seen[k][: shot.sent].sum(0) >= 2).astype(np.uint8)
            mask = cv2.resize(mask, true.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
            share.append(float(mask.mean()))
            if mask.any():
                then.append(psnr(shot.pictures[k], true, mask))
                later.append(psnr(end.pictures[k], true, mask))
        row |= {"views": len(then), "share_seen": float(np.mean(share))}
        row |= {"psnr_seen": _mean(then), "psnr_same_pixels_at_end": _mean(later)}
        out.append(row)
    return out


def split(frame: Frame, depth: ground.Depth, status: daemons.Status) -> dict[str, Bools]:
    """The pixels of a held-out view by the inner module in whose bounds their surface lies."""
    at, edge = points(frame, depth)[:, :2], status["cell_size_m"]
    found = {}
    for module in status["modules"]:
        low, high = (np.array(corner[:2]) for corner in module["bounds"])
        if not np.isclose(high[0] - low[0], edge, rtol=1e-3):
            continue  # an outer module: ground that only borders on the flight
        with np.errstate(invalid="ignore"):
            mask = ((at >= low) & (at < high)).all(1).reshape(depth.shape)
        if mask.sum() >= FEWEST:
            found[module["id"]] = mask
    return found


def useful(
    flight: Flight,
    truth: Sequence[RGB],
    seen: Sequence[Bools],
    blocks: Sequence[dict[str, Bools]],
) -> list[dict[str, Any]]:
    """For each block in each held-out view: wall and CPU seconds to its first useful render."""
    out = []
    for k, true in enumerate(truth):
        for name, mask in blocks[k].items():
            first = first_frame(seen[k], mask)
            row: dict[str, Any] = {"module": name, "view": k, "pixels": int(mask.sum())}
            if first is not None:
                row["first_frame"] = first
                row |= first_useful(flight, true, seen[k], mask, first, k)
                out.append(row)
    return out


def first_frame(seen: Bools, mask: Bools) -> int | None:
    """The first of (frames, H, W) that sees FIRST_SHARE of the pixels of `mask`; None: none."""
    shares = seen[:, mask].mean(1)
    enough = np.flatnonzero(shares >= FIRST_SHARE)
    return int(enough[0]) if len(enough) else None


def first_useful(
    flight: Flight, true: RGB, seen: Bools, mask: Bools, first: int, view: int
) -> dict[str, Any]:
    """When the small renders of a view first beat the mean colour by USEFUL_DB on a mask's pixels.

    Only the pixels that the frames sent by then have seen count; the mean colour is their own.
    """
    began = flight.sent_at[first]
    for shot in flight.small:
        if shot.sent <= first:
            continue
        shown = shot.pictures[view]
        small = cv2.resize(true, shown.shape[1::-1], interpolation=cv2.INTER_AREA).astype(np.uint8)
        known = mask & seen[: shot.sent].any(0)
        gain = above_mean(shown, small, known)
        if gain >= USEFUL_DB:
            return {
                "wall_s": shot.wall_s - began[0], "cpu_s": shot.cpu_s - began[1], "gain_db": gain
            }  # fmt: skip
    return {"wall_s": None, "cpu_s": None, "gain_db": None}


def above_mean(shown: RGB, true: RGB, mask: Bools) -> float:
    """PSNR of a picture in dB above that of the truth's own mean colour, over a mask's pixels."""
    flat = np.broadcast_to(np.rint(true[mask].mean(0)).astype(np.uint8), true.shape)
    return psnr(shown, true, mask) - psnr(flat, true, mask)


def summarise(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds to the first useful render over all blocks, None where it never came.

    A block that never became useful counts as infinitely slow.
    """
    never = sum(b["wall_s"] is None for b in blocks)
    found: dict[str, Any] = {"blocks_in_views": len(blocks), "useful": len(blocks) - never}
    found["never"] = never
    for clock in ("wall_s", "cpu_s"):
        values = [math.inf if b[clock] is None else b[clock] for b in blocks] or [math.inf]
        found[clock] = {
            "median": _finite(float(np.median(values))), "slowest": _finite(max(values))
        }  # fmt: skip
    return found


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def against_more(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per capture: the default budget's held-out views against those of the larger ones."""
    out = {}
    for row in (row for row in rows if row["budget"] != 1):
        for base in rows:
            if all(base[k] == (1 if k == "budget" else row[k]) for k in KEY):
                found = measure.pair(_views(base), _views(row))
                found["met"] = found["difference_db"] >= GOAL_DB
                out[f"{row['capture']}, budget 1 against {row['budget']:g}"] = found
    return out


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """PSNR on seen ground against the stream's share; seconds to the first useful render."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    slow = [r for r in rows if r["budget"] == 1 and r["rate_hz"] <= 1 and not r["first_frames"]]
    for i, row in enumerate(slow):
        share = [100 * q["sent"] / row["sent"] for q in row["quarters"]]
        name, colour = row["capture"], f"C{i}"
        left.plot(share, _series(row, "psnr_seen"), "o-", color=colour, label=name)
        left.plot(share, _series(row, "psnr_same_pixels_at_end"), ":", color=colour)
        seconds = sorted(b["wall_s"] for b in row["blocks"] if b["wall_s"] is not None)
        reached = 100 * (np.arange(len(seconds)) + 1) / max(len(row["blocks"]), 1)
        right.step([0, *seconds], [0, *reached], where="post", color=colour, label=name)
    left.set(xlabel="frames sent (%)", ylabel="PSNR on ground seen so far (dB)")
    left.set_title("dotted: the same pixels at the end", fontsize=9)
    right.set(xlabel="s since a block's first frame", ylabel="blocks with a useful render (%)")
    right.set_title(f"useful: {USEFUL_DB:g} dB above the mean colour", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fly what is missing, write after each flight."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data")) / "drone"
    parser.add_argument("captures", nargs="*", default=list(measure.CAPTURES))
    parser.add_argument("--data", type=Path, default=data, help="folder of the captures")
    parser.add_argument("--rate", type=float, default=0.5, help="frames per second")
    parser.add_argument("--frames", type=int, help="only the first so many")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between small renders")
    parser.add_argument("--after", type=float, default=200.0, help="seconds after the last frame")
    parser.add_argument("--budgets", default="1", help="times the default budget, e.g. 1,4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_live.json")
    options = parser.parse_args()
    results = measure.open_results(options.out, protocol())
    for row in (row for row in results["rows"] if "blocks" in row):
        row["summary"] = summarise(row["blocks"])
    for name in options.captures:
        path = Path(name) if Path(name).is_dir() else options.data / name
        for budget in map(float, options.budgets.split(",")):
            if measure.find(results, **key_of(path.name, budget, options)):
                continue
            load = measure.machine()
            results["rows"].append(fly(path, budget, options) | {"machine": load})
            results["against_more"] = against_more(results["rows"])
            measure.save(options.out, results)
            plot(results["rows"], options.out.with_suffix(".png"))
            print(path.name, budget, results["rows"][-1]["end"], results["rows"][-1].get("summary"))
    print(results.get("against_more"))


def protocol() -> dict[str, Any]:
    """What the rows have in common; rows of another protocol are measured anew."""
    return measure.module_facts(load_init(None)) | {
        "quarters": QUARTERS, "small_px": SMALL_PX, "useful_db": USEFUL_DB,
        "first_share": FIRST_SHARE, "fewest_pixels": FEWEST, "goal_db": GOAL_DB,
    }  # fmt: skip


def _views(row: dict[str, Any]) -> dict[str, float]:
    return {view["frame"]: view["psnr"] for view in row["views"]}


def _series(row: dict[str, Any], key: str) -> list[float]:
    return [np.nan if q[key] is None else q[key] for q in row["quarters"]]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    main()
