"""`mclnf-edge demo`: a daemon, a flight streamed into it, held-out views, pictures, a report."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mclnf_edge.captures import Capture, open_capture, view_of
from mclnf_edge.client import Client
from mclnf_edge.errors import CaptureError, MclnfError, Unreachable
from mclnf_edge.evaluate import evaluate, held_out
from mclnf_edge.geometry import interpolate_pose
from mclnf_edge.report import Pair, contact_sheet, write_json, write_picture, write_video
from mclnf_edge.types import Render, View
from mclnf_edge.wire.messages import Progress

_SHEET_VIEWS = 8
_FLY_SECONDS = 6.0
_FLY_FPS = 12.0
_FLY_WIDTH = 320
_READY_S = 120.0

Say = Callable[[str], None]


def run_demo(data: Path | None, seconds: float, out: Path, say: Say) -> dict[str, Any]:
    """Map `data` (a generated city when None) for about `seconds` and write what came of it.

    Leaves `contact_sheet.png`, `fly_through.mp4`, `report.json` and the map in `out`; returns the
    report. Raises CaptureError, or MclnfError when the daemon ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    capture = open_capture(data or _generated_city(out, say))
    train = capture.split("train")
    for split in ("train", "test"):
        if not len(capture.split(split)):
            raise CaptureError(f"{capture.name}: no frame of split {split!r}")
    say(f"{capture.name}: {len(train)} frames to map, {len(capture.split('test'))} held out")
    settings = {"adapt": {"budget_s_per_frame": seconds / max(len(train), 1), "passes": 1000.0}}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "demo.yaml"
        config.write_text(yaml.safe_dump(settings))
        map_dir = out / time.strftime("map-%Y%m%d-%H%M%S")
        daemon, address = _start_daemon(map_dir, config, out / "daemon.log")
        try:
            with Client(address) as client:
                report = _map_and_measure(client, capture, train, out, say)
        finally:
            daemon.terminate()
            code = daemon.wait(60)
    report |= {"map": str(map_dir), "seconds_asked": seconds, "daemon_exit_code": code}
    write_json(out / "report.json", report)
    say(
        f"mapped {report['accepted']} frames into {len(report['modules'])} modules; held-out: "
        f"{report['psnr']:.2f} dB, {report['psnr_known']:.2f} dB where the map is known, "
        f"SSIM {report['ssim']:.3f}"
    )
    say(f"see {out / 'contact_sheet.png'}, {out / 'fly_through.mp4'}, {out / 'report.json'}")
    return report


def _generated_city(out: Path, say: Say) -> Path:
    """The demo's own city, made once by the meta-trainer's generator (a program of its own)."""
    folder = out / "city"
    if not (folder / "transforms.json").exists():
        say("generating a city (once; about a minute)")
    done = subprocess.run(
        [sys.executable, "-m", "meta_trainer.city", str(folder), "--preset", "demo"]
    )
    if done.returncode != 0:
        raise CaptureError(f"{folder}: the city generator failed; its message is above")
    return folder


def _start_daemon(map_dir: Path, config: Path, log: Path) -> tuple[subprocess.Popen[str], str]:
    """A daemon of its own on a free port; its address once it is ready."""
    words = ["serve", "--map", str(map_dir), "--bind", "tcp://127.0.0.1:0", "--config", str(config)]
    with open(log, "w") as errors:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "mclnf_edge.cli", *words],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    match = re.match(r"ready (\S+)", line)
    if match is None:
        daemon.kill()
        raise MclnfError(f"the daemon did not start: {log.read_text()[-500:]}")
    return daemon, match[1]


def _map_and_measure(
    client: Client, capture: Capture, train: Capture, out: Path, say: Say
) -> dict[str, Any]:
    start = time.monotonic()
    client.hello(stream=capture.name, world=capture.world)
    counts = client.publish(train.frames)
    say(f"{counts['accepted']} frames accepted in {time.monotonic() - start:.1f} s")
    for progress in client.drain():
        _say_progress(progress, say, start)
    mapped_s = time.monotonic() - start
    figures = evaluate(capture, client.render, "test")
    write_picture(out / "contact_sheet.png", contact_sheet(_pairs(client, capture, figures)))
    views = _flight(train)
    say(f"rendering a fly-through of {len(views)} pictures")
    write_video(out / "fly_through.mp4", (_shown(client, view).rgb for view in views), _FLY_FPS)
    status = client.status()
    keys = ("device", "engine", "memory_mb", "peak_memory_mb", "cpu_s", "steps")
    return {
        **figures,
        "accepted": counts["accepted"],
        "mapped_s": mapped_s,
        "steps_per_s": status["steps"] / mapped_s,
        "modules": status["modules"],
        **{key: status[key] for key in keys},
    }


def _say_progress(progress: Progress, say: Say, start: float) -> None:
    left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
    quality = "" if progress.psnr is None else f", {progress.psnr:.2f} dB on its rays"
    rate = progress.steps / max(time.monotonic() - start, 1e-3)
    say(
        f"{progress.modules_closed} modules closed, {progress.modules_open} open, "
        f"step {progress.steps} ({rate:.1f}/s){quality}{left}"
    )


def _pairs(client: Client, capture: Capture, figures: dict[str, Any]) -> list[Pair]:
    frames = capture.split("test").frames
    step = max(len(frames) // _SHEET_VIEWS, 1)
    pairs = []
    for i in range(0, len(frames), step):
        frame = frames[i]
        truth, camera, _ = held_out(frame)
        done = _shown(client, replace(view_of(frame, capture), camera=camera, exposure=None))
        caption = f"{figures['views'][i]['frame']}: {figures['views'][i]['psnr']:.1f} dB"
        pairs.append(Pair(truth, done.rgb, caption))
    return pairs[:_SHEET_VIEWS]


def _flight(train: Capture) -> list[View]:
    """Views along the flown path, evenly in path length, at a reduced size."""
    stops = [view_of(f, train) for f in train.frames]
    if len(stops) < 2:
        return stops
    at = np.array([v.T_world_camera[:3, 3] for v in stops])
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(at, axis=0), axis=1) + 1e-6)])
    camera = stops[0].camera
    small = camera.scaled(
        _FLY_WIDTH, max(round(camera.height * _FLY_WIDTH / camera.width) // 2 * 2, 2)
    )
    views = []
    for s in np.linspace(0, length[-1], int(_FLY_SECONDS * _FLY_FPS)):
        i = int(np.clip(np.searchsorted(length, s, side="right") - 1, 0, len(stops) - 2))
        u = float((s - length[i]) / (length[i + 1] - length[i]))
        pose = interpolate_pose(stops[i].T_world_camera, stops[i + 1].T_world_camera, min(u, 1.0))
        views.append(View(small, pose, world=train.world))
    return views


def _shown(client: Client, view: View) -> Render:
    try:
        return client.render(view, want=())
    except Unreachable as error:
        raise MclnfError(f"the daemon ended while rendering: {error}") from error
