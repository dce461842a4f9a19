"""SIGKILL a daemon at random moments of a real stream: nothing acknowledged may be lost.

    python tools/kill_soak.py [--kills 200] [--capture DIR] [--seed 0] [--work DIR]

A publisher sends laps of a capture to one daemon, over its socket, and asks it to close the map
after each lap; every lap is a session of its own. Meanwhile the daemon is killed at a random moment
after each of its starts, a fifth of them counted from the launch. After each kill the ledger is
read as it lies on disk: every acknowledged frame has one row, and each closed version has the bytes
it had first. At the end everything is adapted and closed, and the map is checked. The map and the
results are kept in the work folder and in the JSON: a run that was cut short goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mclnf_edge
from mclnf_edge.captures import Capture, open_capture
from mclnf_edge.client import Client
from mclnf_edge.errors import StoreError
from mclnf_edge.report import write_json
from mclnf_edge.store import MapStore, map_check
from mclnf_edge.types import Frame
from mclnf_edge.wire.messages import Ack
from tools.served import Served

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
map: {inactivity_s: 20}
field: {plane_texels: 64, plane_vertical: 8, voxels: 16}
adapt: {passes: 0.1, budget_s_per_frame: 0.1, rays_per_step: 1024, min_rays_per_frame: 256}
watch: {checkpoint_s: 2.0}
"""
"""Small modules that close within seconds, so that kills also meet commits and revisits."""

Identity = tuple[str, str, int]
_LAP_CLOSES_S = 300.0
_WHILE_STARTING = 0.2
"""Share of the kills whose clock runs from the launch, not from the moment it is ready."""


class Publisher(threading.Thread):
    """Sends laps until stopped, through every kill; `acknowledged` is what it may rely on."""

    def __init__(self, address: str, capture: Capture, first_lap: int, rate_hz: float) -> None:
        super().__init__(daemon=True)
        self._address, self._capture, self._rate_hz = address, capture, rate_hz
        self.frames: Sequence[Frame] = capture.split("train").frames
        self.lap = first_lap
        self.acknowledged: set[Identity] = set()
        self.answers: dict[str, int] = {}
        self.last_lap = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Laps, each drained and closed at its end."""
        try:
            with Client(self._address, timeout_s=2.0, give_up_s=600.0) as client:
                while not self.last_lap.is_set():
                    client.hello(session=f"lap-{self.lap}", world=self._capture.world)
                    client.publish(self._numbered(), self._rate_hz, self._heard)
                    end = time.monotonic() + _LAP_CLOSES_S
                    for _ in client.drain():
                        if time.monotonic() > end:
                            break  # kills come faster than the lap is adapted: fly on
                    self.lap += 1
        except BaseException as error:
            self.error = error
            raise

    def _numbered(self) -> list[Frame]:
        return [replace(frame, seq=i) for i, frame in enumerate(self.frames)]

    def _heard(self, ack: Ack) -> None:
        self.answers[ack.status] = self.answers.get(ack.status, 0) + 1
        if ack.status in ("accepted", "duplicate", "redundant"):
            self.acknowledged.add(ack.identity)


def look(folder: Path, acknowledged: set[Identity], closed: dict[str, str]) -> dict[str, Any]:
    """What a kill has left: acknowledged frames without a row, rows beyond one, changed versions.

    `closed` (file name -> SHA-256) is brought up to date.
    """
    with MapStore.open(folder, create=False, read_only=True) as store:
        rows = store.ledger.database.rows(
            "SELECT session, stream, seq, state, rays FROM frames "
            "JOIN streams ON streams.id = stream_id"
        )
        modules = [record for record in store.modules() if record.state == "closed"]
        quarantined = len(store.modules()) - len(modules)
    known = {row[:3] for row in rows}
    changed = []
    for record in modules:
        data = (folder / "modules" / record.file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if closed.setdefault(record.file, digest) != digest or digest != record.digest:
            changed.append(record.file)
    gone = sorted(set(closed) - {record.file for record in modules})
    states = [row[3] for row in rows]
    return {
        "lost": sorted(acknowledged - known),
        "duplicates": len(rows) - len(known),
        "changed": changed + gone,
        "quarantined": quarantined,
        "held": states.count("held"),
        "done": states.count("done"),
        "untrained": sum(row[3] == "done" and row[4] == 0 for row in rows),
        "closed": len(modules),
    }


def wait_for_map(folder: Path, seconds: float) -> bool:
    """Whether the ledger can be read within this time; before its first commit it may not exist."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with MapStore.open(folder, create=False, read_only=True):
                return True
        except StoreError:
            time.sleep(0.05)
    return False


def soak(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Kill until there are enough; a row is written after each."""
    choose = random.Random(f"{args.seed}-{len(results['kills'])}")
    closed: dict[str, str] = results["closed"]
    before = {(s, t, int(n)) for s, t, n in results["acknowledged"]}
    daemon = Served(args.work, CONFIG)
    publisher = Publisher(daemon.address, open_capture(args.capture), results["laps"], args.rate)
    publisher.start()
    while len(results["kills"]) < args.kills:
        starting = choose.random() < _WHILE_STARTING
        if starting:
            daemon.launch()
        else:
            daemon.start()
        moment = choose.uniform(0.0, args.longest)
        time.sleep(moment)
        if daemon.code is not None:
            raise SystemExit(f"the daemon ended by itself with {daemon.code}; see {daemon.log}")
        daemon.kill()
        acknowledged = before | set(publisher.acknowledged)
        if not wait_for_map(daemon.map, 0.1):
            assert not acknowledged, "the map cannot be opened though frames were acknowledged"
            continue
        row = {"starting": starting, "after_s": round(moment, 3)}
        row |= look(daemon.map, acknowledged, closed)
        results["kills"].append(row)
        results["acknowledged"] = sorted(acknowledged)
        results["laps"] = publisher.lap + 1  # a lap that is cut short is never gone on with
        write_json(args.out, results)
        if publisher.error is not None:
            raise SystemExit(f"the publisher failed: {publisher.error!r}")
    daemon.start()
    publisher.last_lap.set()
    publisher.join()
    assert daemon.stop() == 0
    results["acknowledged"] = sorted(before | publisher.acknowledged)
    results["answers"] = publisher.answers
    results["end"] = look(daemon.map, before | publisher.acknowledged, closed)
    results["end"]["problems"] = [f"{p.file}: {p.message}" for p in map_check(daemon.map)]


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The figures that are promised to be 0, and how much was at stake."""
    rows = [*results["kills"], results["end"]]
    return {
        "kills": len(results["kills"]),
        "acknowledged": len(results["acknowledged"]),
        "lost": max(len(row["lost"]) for row in rows),
        "duplicates": max(row["duplicates"] for row in rows),
        "changed_versions": max(len(row["changed"]) for row in rows),
        "quarantined": max(row["quarantined"] for row in rows),
        "held_at_end": results["end"]["held"],
        "problems": results["end"]["problems"],
        "closed_versions": len(results["closed"]),
    }


def main() -> None:
    """Run, or go on; exit 1 when anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = Path(os.environ.get("MCLNF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--capture", type=Path, default=data / "drone" / "boruszyn")
    parser.add_argument("--rate", type=float, default=2.0, help="frames a second")
    parser.add_argument("--longest", type=float, default=10.0, help="most seconds until the kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("kill-soak"), help="for the map")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results" / "kill_soak.json")
    args = parser.parse_args()
    results: dict[str, Any] = {"kills": [], "closed": {}, "acknowledged": [], "laps": 0}
    if args.out.exists() and (args.work / "map").exists():
        results = json.loads(args.out.read_text())
    else:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    soak(args, results)
    results["summary"] = summary(results)
    results["capture"], results["seed"] = args.capture.name, args.seed
    results["version"] = mclnf_edge.__version__
    write_json(args.out, results)
    told = results["summary"]
    print(json.dumps(told))
    if told["lost"] or told["duplicates"] or told["changed_versions"] or told["problems"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
