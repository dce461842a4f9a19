"""Long streams into one map: `python tools/bench_long.py captures` or `... flight DIR`.

`captures`: brighton, boruszyn and ochota_a one after the other into one daemon's map, each learned
and closed before the next comes. All captures seen so far are rendered after each: their held-out
PSNR must not fall, and no closed version's digest may change.

`flight DIR`: a long generated flight at `--rate`, from

    python tools/make_city.py DIR --blocks 12 --seed 900 --flight 1000 --exposure-drift 0.15

`--frames N` flies only the first N, held-out ones among them. Against the frame number are
recorded: frames acknowledged but not yet trained to their minimum (lag), those of them not yet read
(backlog), memory, modules, journal. Then the daemon drains, and held-out PSNR and the surface model
against the exact depth are taken. Both add their part to one JSON and plot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mclnf_edge.captures import Capture, Frames, open_capture  # noqa: E402
from mclnf_edge.client import Client  # noqa: E402
from mclnf_edge.evaluate import evaluate  # noqa: E402
from mclnf_edge.mapping.initialization import load_init  # noqa: E402
from mclnf_edge.report import write_json  # noqa: E402
from mclnf_edge.types import Render, View  # noqa: E402
from tools import daemons, measure  # noqa: E402
from tools.bench_stream import shapes  # noqa: E402

FIGURES = ("psnr", "psnr_known", "psnr_aligned", "ssim", "known")
LOST_DB = -0.05
SAMPLE_S = 2.0

Row = dict[str, Any]


def captures(paths: Sequence[Path], seconds: float, seed: int) -> Row:
    """Several captures into one map; `seconds` of optimization for each frame a module sees."""
    settings = {"adapt": {"budget_s_per_frame": seconds, "seed": seed}}
    opened = [open_capture(path) for path in paths]
    stages: list[Row] = []
    with (
        daemons.daemon(settings) as running,
        Client(running.address, give_up_s=600) as client,
    ):
        for number, capture in enumerate(opened):
            client.hello(stream=capture.name, world=capture.world)
            counts = client.publish(daemons.published(capture))
            for _ in client.drain():
                pass
            status = client.status()
            row = {"capture": capture.name, "accepted": counts["accepted"], **costs(status)}
            row["digests"] = daemons.digests(status)
            row["views"] = {c.name: psnrs(client, c) for c in opened[: number + 1]}
            stages.append(row)
            print(capture.name, {k: np.mean(list(v.values())) for k, v in row["views"].items()})
    return measure.module_facts(load_init(None)) | {
        "settings": settings, "stages": stages, "map_problems": running.problems,
        "changed_versions": changed([s["digests"] for s in stages]), "lost": lost(stages),
        "machine": measure.machine(),
    }  # fmt: skip


def psnrs(client: Client, capture: Capture) -> dict[str, float]:
    """Held-out view -> PSNR in dB."""
    return {v["frame"]: v["psnr"] for v in evaluate(capture, client.render, "test")["views"]}


def costs(status: daemons.Status) -> Row:
    """What the daemon has used and made so far."""
    closed = sum(m["state"] == "closed" for m in status["modules"])
    return {
        "cpu_s": daemons.busy_s(status), "steps": status["steps"], "closed": closed,
        "open": daemons.open_modules(status), "memory_mb": status["memory_mb"],
        "arrays_mb": status["arrays_mb"], "journal_mb": status["journal_bytes"] / 1e6,
    }  # fmt: skip


def changed(digests: Sequence[dict[str, str]]) -> list[str]:
    """Closed versions that a later stage lists with another digest."""
    first: dict[str, str] = {}
    for stage in digests:
        first = {**stage, **first}
    wrong = {k for stage in digests for k, digest in stage.items() if digest != first[k]}
    return sorted(wrong)


def lost(stages: Sequence[Row]) -> dict[str, Row]:
    """Each capture's views at the end against right after it was learned, and whether any is lost.

    The last capture has no later stage.
    """
    end = stages[-1]["views"]
    out = {}
    for stage in stages[:-1]:
        before, after = stage["views"][stage["capture"]], end[stage["capture"]]
        found = measure.pair(after, before)
        found["worst_view_db"] = min(after[view] - before[view] for view in before)
        found["met"] = found["difference_db"] >= LOST_DB
        out[stage["capture"]] = found
    return out


def flight(path: Path, frames: int, rate_hz: float, seconds: float, seed: int) -> Row:
    """One long flight in real time; a sample of the daemon's state every SAMPLE_S seconds."""
    whole = open_capture(path)
    capture = replace(whole, frames=Frames(whole.frames.records[:frames]))
    settings = {"adapt": {"budget_s_per_frame": seconds, "seed": seed}}
    with (
        daemons.daemon(settings) as running,
        Client(running.address, give_up_s=600) as client,
        Client(running.address, give_up_s=600) as watcher,
    ):
        client.hello(stream=capture.name, world=capture.world)
        began = time.monotonic()
        samples, sent = send(client, capture, rate_hz, began)
        first, flown = daemons.digests(client.status()), time.monotonic() - began
        for _ in client.drain():
            samples.append(sample(watcher, began, sent))
        drained = time.monotonic() - began - flown
        renders: list[Render] = []

        def render(view: View) -> Render:
            renders.append(client.render(view))
            return renders[-1]

        figures = evaluate(capture, render, "test")
        status = client.status()
        shape = shapes(path, capture, renders)
    return measure.module_facts(load_init(None)) | {
        "flight": city(path), "frames": len(capture), "sent": sent,
        "rate_hz": rate_hz, "settings": settings,
        "counts": {k: status["streams"][0][k] for k in ("accepted", "redundant", "rejected")},
        "samples": samples, "drain_s": drained, **costs(status), "shape": shape,
        "peak_memory_mb": status["peak_memory_mb"], "map_problems": running.problems,
        "largest_lag": max(s["lag"] for s in samples),
        "largest_backlog": max(s["backlog"] for s in samples),
        "versions": versions(status), "changed_versions": changed([first, daemons.digests(status)]),
        "held_out": {k: figures[k] for k in FIGURES}, "views": figures["views"],
        "machine": measure.machine(),
    }  # fmt: skip


def send(client: Client, capture: Capture, rate_hz: float, began: float) -> tuple[list[Row], int]:
    """The train frames in time: samples, and how many were sent."""
    due, sent = 0.0, 0
    samples: list[Row] = []
    for frame in daemons.published(capture):
        while (now := time.monotonic() - began) < sent / rate_hz or now >= due:
            if now >= due:
                due = now + SAMPLE_S
                samples.append(sample(client, began, sent))
            else:
                time.sleep(min(0.05, max(sent / rate_hz - now, 0)))
        client.submit(frame)
        sent += 1
    client.flush()
    samples.append(sample(client, began, sent))
    return samples, sent


def sample(client: Client, began: float, sent: int) -> Row:
    """The daemon's state at one moment."""
    status = client.status()
    return {
        "wall_s": time.monotonic() - began, "sent": sent, "lag": daemons.lag(status),
        "backlog": status["frames_waiting"], "held": status["frames_held"],
        "acknowledged": sum(s["accepted"] for s in status["streams"]),
    } | costs(status)  # fmt: skip


def versions(status: daemons.Status) -> dict[str, int]:
    """How many closed versions there are of each number: those above 1 come from revisits."""
    out: dict[str, int] = {}
    for module in status["modules"]:
        if module["state"] == "closed":
            out[str(module["version"])] = out.get(str(module["version"]), 0) + 1
    return out


def city(path: Path) -> Any:
    """What a generated flight was made from; None for other captures."""
    facts = path / "city.json"
    return json.loads(facts.read_text(encoding="utf-8"))["request"] if facts.exists() else None


def plot(results: Row, path: Path) -> None:
    """Lag and backlog, memory, modules against the frame number; PSNR per stage of `captures`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    lag, memory, modules, stages = figure.subplots(1, 4)
    flying = results.get("flight", {}).get("samples", [])
    for axes, keys, label in (
        (lag, ("lag", "backlog", "held"), "frames"),
        (memory, ("memory_mb", "arrays_mb", "journal_mb"), "MB"),
        (modules, ("open", "closed"), "modules"),
    ):
        for key in keys:
            axes.plot([s["sent"] for s in flying], [s[key] for s in flying], label=key)
        axes.set(xlabel="frames sent", ylabel=label)
    found = results.get("captures", {}).get("stages", [])
    for stage in found:
        name, steps = stage["capture"], range(found.index(stage), len(found))
        means = [np.mean(list(found[i]["views"][name].values())) for i in steps]
        stages.plot(steps, means, "o-", label=name)
    stages.set_xticks(range(len(found)), [f"after {s['capture']}" for s in found], fontsize=7)
    stages.set(ylabel="held-out PSNR (dB)")
    for axes in (lag, memory, modules, stages):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure one of the two and add it to the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data")) / "drone"
    parser.add_argument("what", choices=("captures", "flight"))
    parser.add_argument("path", nargs="*", type=Path, help="captures; the flight's folder")
    parser.add_argument("--frames", type=int, default=1000, help="of the flight, at most")
    parser.add_argument("--rate", type=float, default=1.0, help="of the flight, frames a second")
    parser.add_argument("--seconds", type=float, default=4.0, help="adapt.budget_s_per_frame")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tools/results/bench_long.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.what == "captures":
        paths = options.path or [data / name for name in measure.CAPTURES]
        found = captures(paths, options.seconds, options.seed)
        print(found["lost"], "changed:", found["changed_versions"])
    else:
        if len(options.path) != 1:
            parser.error("flight: expected one folder")
        found = flight(options.path[0], options.frames, options.rate, options.seconds, options.seed)
        print({k: v for k, v in found.items() if k not in ("samples", "views")})
    results[options.what] = found
    write_json(options.out, results)
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
