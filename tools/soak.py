"""Half an hour of publishers, renders and restarts: does memory stay flat, do answers stay quick?

    python tools/soak.py [--minutes 30] [--capture DIR] [--publishers 3] [--out FILE]

Every publisher flies its share of a capture's frames again and again, each lap a session of its own
over a new connection, and rests after it so that modules close and are opened as next versions. A
viewer asks for previews and full views of the held-out poses. The daemon is stopped after a tenth
of the time and killed after a fifth; memory is judged from two fifths on, latencies in the fifth
that follows the restarts and in the last one. Written: every memory sample, percentiles, a plot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import queue
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import mclnf_edge
from mclnf_edge.captures import open_capture, view_of
from mclnf_edge.client import Client
from mclnf_edge.report import write_json
from mclnf_edge.store import map_check
from mclnf_edge.types import View
from tools.served import Served

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
map: {inactivity_s: 20}
adapt: {passes: 0.3, budget_s_per_frame: 0.5}
"""
STOP_AT, KILL_AT, WARM_AT = 0.1, 0.2, 0.4
"""Shares of the time: SIGTERM, SIGKILL, and from when on memory has to be flat."""

_REST_S = 25.0
_SAMPLE_S = 5.0
_PREVIEW_S, _FULL_S = 2.0, 15.0
Row = tuple[float, str, float]
"""(seconds since the start of the soak, what was asked, milliseconds until its answer)."""


def publish(
    address: str, capture: Path, share: tuple[int, int], rate_hz: float, rows: Any, stop: Event
) -> None:
    """Laps of every `share[1]`-th frame from `share[0]` on; a process of its own."""
    opened = open_capture(capture)
    frames, lap = list(opened.split("train").frames)[share[0] :: share[1]], 0
    while not stop.is_set():
        with Client(address, timeout_s=5.0, give_up_s=120.0) as client:
            client.hello(session=f"lap-{lap}", stream=f"camera-{share[0]}", world=opened.world)
            for frame in frames:
                due, asked = time.monotonic() + 1 / rate_hz, time.monotonic()
                client.publish([frame])
                rows.put((time.monotonic(), "ack", (time.monotonic() - asked) * 1e3))
                if stop.wait(max(due - time.monotonic(), 0)):
                    return
        lap += 1
        stop.wait(_REST_S)


def look(address: str, views: list[View], rows: Any, stop: Event) -> None:
    """Previews and full views in turn, each at its own pace; a process of its own."""
    due = {"preview": 0.0, "full": 0.0}
    with Client(address, timeout_s=5.0, give_up_s=120.0) as client:
        while not client.status()["modules"]:
            if stop.wait(1.0):
                return
        for number in range(1_000_000):
            if stop.wait(0.05):
                return
            for quality, every in (("preview", _PREVIEW_S), ("full", _FULL_S)):
                asked = time.monotonic()
                if asked >= due[quality]:
                    client.render(views[number % len(views)], quality=quality)  # type: ignore[arg-type]
                    rows.put((time.monotonic(), quality, (time.monotonic() - asked) * 1e3))
                    due[quality] = asked + every


def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything measured in one soak."""
    capture = open_capture(args.capture)
    views = [view_of(frame, capture) for frame in capture.split("test").frames]
    daemon = Served(folder, CONFIG)
    daemon.start()
    context = mp.get_context("spawn")
    rows, stop = context.Queue(), context.Event()
    tasks = [
        context.Process(
            target=publish,
            args=(daemon.address, args.capture, (i, args.publishers), args.rate, rows, stop),
        )
        for i in range(args.publishers)
    ]
    tasks.append(context.Process(target=look, args=(daemon.address, views, rows, stop)))
    for task in tasks:
        task.start()
    start = time.monotonic()
    samples, latencies = watch(daemon, start, args.minutes * 60, rows)
    stop.set()
    for task in tasks:
        task.join(150)
    failed = [task.name for task in tasks if task.exitcode != 0]
    with Client(daemon.address, give_up_s=60) as client:
        status = client.status()
    code = daemon.stop()
    return {
        "failed": failed,
        "exit_code": code,
        "problems": [f"{p.file}: {p.message}" for p in map_check(daemon.map)],
        "modules": len(status["modules"]),
        "versions": sum(m["version"] for m in status["modules"]),
        "frames": sum(s["accepted"] for s in status["streams"]),
        "sessions": len(status["streams"]),
        **judge(samples, latencies, args.minutes * 60),
        "samples": samples,
    }


def watch(
    daemon: Served, start: float, seconds: float, rows: Any
) -> tuple[list[list[float]], list[Row]]:
    """Sample memory, restart at its times, gather latencies; [seconds, MB, CPU s, load] rows."""
    samples: list[list[float]] = []
    latencies: list[Row] = []
    restarts = [(STOP_AT * seconds, daemon.stop), (KILL_AT * seconds, daemon.kill)]
    while (now := time.monotonic() - start) < seconds:
        if restarts and now >= restarts[0][0]:
            restarts.pop(0)[1]()
            daemon.start()
        if daemon.code is not None:
            raise SystemExit(f"the daemon ended by itself with {daemon.code}; see {daemon.log}")
        load = os.getloadavg()[0]
        samples.append([round(now, 1), daemon.resident_mb(), daemon.cpu_s(), load])
        end = time.monotonic() + _SAMPLE_S
        while (left := end - time.monotonic()) > 0:
            try:
                at, kind, ms = rows.get(timeout=left)
            except queue.Empty:
                break
            latencies.append((at - start, kind, ms))
    return samples, latencies


def judge(samples: list[list[float]], latencies: list[Row], seconds: float) -> dict[str, Any]:
    """Slope of memory after the warm-up, percentiles of latency at start and end."""
    warm = np.array([s for s in samples if s[0] >= WARM_AT * seconds])
    slope = float(np.polyfit(warm[:, 0] / 60, warm[:, 1], 1)[0]) if len(warm) > 2 else None
    told: dict[str, Any] = {
        "mb_per_minute": slope,
        "memory_mb": [float(warm[0, 1]), float(warm[-1, 1])] if len(warm) else None,
        "load": float(np.mean([s[3] for s in samples])),
        "latency_ms": {},
    }
    early = (KILL_AT + 0.02) * seconds, WARM_AT * seconds
    late = 0.8 * seconds, seconds
    for kind in ("ack", "preview", "full"):
        told["latency_ms"][kind] = {
            name: percentiles([ms for at, what, ms in latencies if what == kind and a <= at < b])
            for name, (a, b) in (("start", early), ("end", late))
        }
    return told


def percentiles(values: list[float]) -> dict[str, float]:
    """Count, p50, p95, p99 and the largest; empty for no values."""
    if not values:
        return {}
    p50, p95, p99 = (round(float(np.percentile(values, p)), 1) for p in (50, 95, 99))
    return {"n": len(values), "p50": p50, "p95": p95, "p99": p99, "max": round(max(values), 1)}


def plot(results: dict[str, Any], path: Path) -> None:
    """Memory over time, the restarts marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    samples = np.array(results["samples"])
    seconds = results["minutes"] * 60
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(samples[:, 0] / 60, samples[:, 1])
    for share, name in ((STOP_AT, "SIGTERM"), (KILL_AT, "SIGKILL"), (WARM_AT, "judged from here")):
        axes.axvline(share * seconds / 60, color="grey", lw=0.7)
        axes.text(share * seconds / 60, samples[:, 1].max(), f" {name}", fontsize=7, va="top")
    axes.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
    axes.set_title(f"{results['mb_per_minute']:+.2f} MB a minute after warm-up", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run it and write JSON and plot; exit 1 when something failed or memory grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--capture", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--publishers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.3, help="frames a second and publisher")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = soak(args, Path(folder))
    results |= {"minutes": args.minutes, "capture": args.capture.name}
    results |= {"publishers": args.publishers, "version": mclnf_edge.__version__}
    results |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    write_json(args.out, results)
    plot(results, args.out.with_suffix(".png"))
    print(json.dumps({key: value for key, value in results.items() if key != "samples"}))
    slope = results["mb_per_minute"]
    sound = not (results["failed"] or results["problems"] or results["exit_code"])
    if not sound or slope is None or slope >= 1.0:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
