"""How long a render waits: on an idle daemon, and while a module adapts and publishers flood it.

    python tools/bench_latency.py [--capture DIR] [--publishers 4] [--renders 40] [--out FILE]

Half of a capture is mapped and closed, then previews and full views of the held-out poses are timed
from the client. Then every publisher sends the other half again and again, each lap in a session of
its own, as fast as its credit allows, and the same views are timed again. The JSON has percentiles
of both, the daemon's own milliseconds of computing each view, and the machine's load meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import platform
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import mclnf_edge
from mclnf_edge.captures import open_capture, view_of
from mclnf_edge.client import Client
from mclnf_edge.report import write_json
from mclnf_edge.types import View
from tools.served import Served
from tools.soak import percentiles

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "map: {inactivity_s: 600}\n"
QUALITIES = ("preview", "full")


def flood(address: str, capture: Path, number: int, stop: Event) -> None:
    """Laps over every second frame, without a pause; a process of its own."""
    opened = open_capture(capture)
    frames = list(opened.split("train").frames)[1::2]
    with Client(address, give_up_s=300.0) as client:
        for lap in itertools.count():
            client.hello(session=f"lap-{lap}", stream=f"flood-{number}", world=opened.world)
            for frame in frames:
                if stop.is_set():
                    return
                client.submit(frame)


def timed(client: Client, views: list[View], count: int) -> dict[str, Any]:
    """Percentiles of `count` previews and full views, and the load while they were made."""
    told: dict[str, Any] = {"load": os.getloadavg()[0]}
    cpu, start = client.status()["render_cpu_s"], time.monotonic()
    for quality in QUALITIES:
        waits = []
        for i in range(count):
            asked = time.monotonic()
            client.render(views[i % len(views)], quality=quality)  # type: ignore[arg-type]
            waits.append((time.monotonic() - asked) * 1e3)
        after = client.status()["render_cpu_s"]
        told[quality] = {**percentiles(waits), "cpu_ms_each": round((after - cpu) * 1e3 / count, 1)}
        cpu = after
    return told | {"seconds": round(time.monotonic() - start, 1), "load_after": os.getloadavg()[0]}


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Idle, then flooded."""
    capture = open_capture(args.capture)
    views = [view_of(frame, capture) for frame in capture.split("test").frames]
    daemon = Served(folder, CONFIG)
    daemon.start()
    stop = mp.get_context("spawn").Event()
    publishers = [
        mp.get_context("spawn").Process(
            target=flood, args=(daemon.address, args.capture, i, stop), daemon=True
        )
        for i in range(args.publishers)
    ]
    with Client(daemon.address, give_up_s=300.0) as client:
        client.hello(session="before", world=capture.world)
        client.publish(list(capture.split("train").frames)[::2])
        for _ in client.drain():
            pass
        timed(client, views, 3)
        results = {"idle": timed(client, views, args.renders)}
        for publisher in publishers:
            publisher.start()
        while not any(m["state"] == "open" for m in client.status()["modules"]):
            time.sleep(0.2)
        before = client.status()
        results["flooded"] = timed(client, views, args.renders)
        after = client.status()
        stop.set()
    kept, steps = (after[name] - before[name] for name in ("frames_kept", "steps"))
    results["flooded"] |= {"frames_taken": kept, "steps": steps}
    for publisher in publishers:
        publisher.terminate()
    daemon.kill()
    return results


def main() -> None:
    """Run it, write the JSON and say what was promised beside what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--capture", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--publishers", type=int, default=4)
    parser.add_argument("--renders", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "latency.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = bench(args, Path(folder))
    results |= {"capture": args.capture.name, "publishers": args.publishers}
    results |= {"version": mclnf_edge.__version__}
    results |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    idle, flooded = results["idle"], results["flooded"]
    results["promised"] = {
        "preview_p95_at_most_150_ms": flooded["preview"]["p95"] <= 150,
        "full_p95_at_most_twice_idle": flooded["full"]["p95"] <= 2 * idle["full"]["p95"],
    }
    write_json(args.out, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
