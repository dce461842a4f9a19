"""What `tools/bench.py` measures at a daemon: frames acknowledged a second, seconds to start."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from mclnf_edge.captures import open_capture
from mclnf_edge.client import Client
from mclnf_edge.images import decode_image, encode_image
from mclnf_edge.types import Frame
from tools.served import Served

Row = dict[str, Any]
WIDTH = 480
PUBLISHERS = 4
WINDOW_S = 12.0
STARTS = 5
PAUSED = (
    "from mclnf_edge.daemon.worker import Worker\n"
    "from mclnf_edge.cli import app\n"
    "Worker._take_in = lambda self: False\n"
    "app()\n"
)
"""The daemon's own program whose compute thread leaves the journalled frames where they are."""


def ingest(data: Path) -> Row:
    """Acknowledged JPEG frames/s from several publishers, adaptation paused and running."""
    capture = data / "drone" / "brighton"
    frames = pictures(capture)
    sizes = [len(f.image) for f in frames]
    return {
        "goal_frames_per_s": 200, "publishers": PUBLISHERS, "width": WIDTH,
        "kilobytes_a_frame": round(float(np.mean(sizes)) / 1e3, 1),
        "paused": flooded(capture, ("-c", PAUSED)),
        "running": flooded(capture, ("-m", "mclnf_edge.cli")),
    }  # fmt: skip


def pictures(capture: Path) -> list[Frame]:
    """The train frames as JPEG pictures `WIDTH` pixels wide."""
    return [_narrow(f) for f in open_capture(capture).split("train").frames]


def _narrow(frame: Frame) -> Frame:
    if frame.camera.width == WIDTH and frame.encoding == "jpeg":
        return replace(frame, depth=None, mask=None)
    height = round(WIDTH * frame.camera.height / frame.camera.width)
    rgb = decode_image(frame.image, frame.encoding, frame.camera)
    small = cv2.resize(rgb, (WIDTH, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    image, camera = encode_image(small, "jpeg"), frame.camera.scaled(WIDTH, height)
    return replace(frame, image=image, encoding="jpeg", camera=camera, depth=None, mask=None)


def flood(address: str, capture: Path, number: int, stop: Event) -> None:
    """Laps over the frames, each in a session of its own, without a pause."""
    frames, world = pictures(capture), open_capture(capture).world
    with Client(address, give_up_s=300.0) as client:
        for lap in itertools.count():
            client.hello(session=f"lap-{lap}", stream=f"flood-{number}", world=world)
            for frame in frames:
                if stop.is_set():
                    return
                client.submit(frame)


@contextmanager
def publishing(address: str, capture: Path) -> Iterator[list[int]]:
    """The publishers' processes, by number."""
    context = mp.get_context("spawn")
    stop = context.Event()
    workers = [
        context.Process(target=flood, args=(address, capture, i, stop), daemon=True)
        for i in range(PUBLISHERS)
    ]
    for worker in workers:
        worker.start()
    try:
        yield [w.pid for w in workers if w.pid is not None]
    finally:
        stop.set()
        for worker in workers:
            worker.join(10)
            worker.terminate()


def flooded(capture: Path, program: tuple[str, ...]) -> Row:
    """Frames/s over `WINDOW_S`, counted by the daemon once its publishers are at work."""
    with tempfile.TemporaryDirectory() as folder:
        daemon = Served(Path(folder), "map: {inactivity_s: 600}\n", program)
        daemon.start()
        try:
            with (
                Client(daemon.address, give_up_s=60.0) as client,
                publishing(daemon.address, capture) as pids,
            ):
                while client.status()["frames_kept"] < 100:
                    time.sleep(0.1)
                return _window(client, daemon, pids)
        finally:
            daemon.kill()


def _window(client: Client, daemon: Served, pids: list[int]) -> Row:
    marks = [_mark(client, daemon, pids)]
    for _ in range(4):
        time.sleep(WINDOW_S / 4)
        marks.append(_mark(client, daemon, pids))
    per = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]
    first, last = marks[0], marks[-1]
    frames, wall = last[1] - first[1], last[0] - first[0]
    return {
        "frames_per_s": round(frames / wall, 1), "quarters": [round(v, 1) for v in per],
        "frames": frames, "steps": last[2] - first[2], "wall_s": round(wall, 2),
        "daemon_cpu_ms_a_frame": round((last[3] - first[3]) / max(frames, 1) * 1e3, 2),
        "publishers_cpu_ms_a_frame": round((last[4] - first[4]) / max(frames, 1) * 1e3, 2),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def _mark(client: Client, daemon: Served, pids: list[int]) -> tuple[float, int, int, float, float]:
    """Clock, frames kept, steps, CPU seconds of the daemon and of the publishers."""
    status = client.status()
    spent = [psutil.Process(p).cpu_times() for p in pids]
    used = sum(t.user + t.system for t in spent)
    return time.monotonic(), int(status["frames_kept"]), int(status["steps"]), daemon.cpu_s(), used


def start(data: Path) -> Row:
    """Seconds from launch to the ready line, the first status and the first acknowledgement."""
    capture = data / "drone" / "brighton"
    frame, world = pictures(capture)[0], open_capture(capture).world
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
    rows = []
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_started(Path(folder), frame, world))
    names = rows[0]
    return {"goal_s": 2.0, "starts": STARTS, "load": round(os.getloadavg()[0], 2)} | {
        name: {
            "median": round(float(np.median([r[name] for r in rows])), 3),
            "range": [round(min(r[name] for r in rows), 3), round(max(r[name] for r in rows), 3)],
        }
        for name in names
    }


def _prepare(folder: Path) -> None:
    """One start that compiles what no cache holds, so that the timed ones find it."""
    daemon = Served(folder, "map: {inactivity_s: 600}\n")
    daemon.start()
    while "kernels are ready" not in daemon.log.read_text():
        if daemon.code is not None:
            raise RuntimeError(daemon.log.read_text()[-2000:])
        time.sleep(0.2)
    daemon.kill()


def _started(folder: Path, frame: Frame, world: Any) -> dict[str, float]:
    daemon = Served(folder, "map: {inactivity_s: 600}\n")
    began = time.monotonic()
    try:
        daemon.start()
        ready, cpu = time.monotonic() - began, daemon.cpu_s()
        with Client(daemon.address, give_up_s=60.0) as client:
            client.status()
            status = time.monotonic() - began
            client.hello(world=world)
            client.publish([frame])
            acknowledged = time.monotonic() - began
        return {
            "ready_s": ready, "status_s": status, "ack_s": acknowledged, "ready_cpu_s": cpu,
            "ack_cpu_s": daemon.cpu_s(),
        }  # fmt: skip
    finally:
        daemon.kill()
