"""OpenSplat at marks of CPU seconds: a binary of the user's own, run on a project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mclnf_edge.images import decode_image
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.types import Camera
from tools.peers import splats
from tools.peers.project import ONE_THREAD, RGB, HeldOut, PeerError, needs_points

EVERY = 5
"""Steps from one saved state to the next."""
BACKGROUND = (0.6130, 0.0101, 0.3984)
"""What OpenSplat trains and shows its splats before."""
SETTINGS = ("--cpu", "--keep-crs", "--num-downscales", "0")
_STEP = re.compile(r"Step (\d+): ")
_TICKS = os.sysconf("SC_CLK_TCK")


class Clock:
    """CPU seconds of training at each step of the log.

    It starts when the last picture is loaded. A step after which a state was saved counts as much
    as the one before: writing splats is no training.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.spent = 0.0
        self.at: dict[int, float] = {}
        self._before: float | None = None
        self._delta = 0.0

    def line(self, text: str, cpu_s: float) -> int | None:
        """Take a line of the log and the process's CPU time then; the step that it reports."""
        if text.startswith("Loading "):
            self._before = cpu_s
        match = _STEP.match(text)
        if match is None or self._before is None:
            return None
        step = int(match[1])
        if step == 1 or (step - 1) % self.every:
            self._delta = cpu_s - self._before
        self.spent += self._delta
        self.at[step] = self.spent
        self._before = cpu_s
        return step

    def newest(self, step: int, mark: float) -> int | None:
        """The last state saved before `step` that took no longer than the mark."""
        done = [s for s in range(self.every, step, self.every) if self.at.get(s, mark + 1) <= mark]
        return done[-1] if done else None


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def version(binary: Path) -> str:
    """What the binary says of itself; PeerError when it does not run."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise PeerError(f"--binary {binary.name}: {error.strerror}") from None
    if said.returncode or not said.stdout.strip():
        raise PeerError(f"--binary {binary.name}: expected OpenSplat, it said {said.stderr[-200:]}")
    return said.stdout.strip()


def run(
    binary: Path, project: Path, out: Path, marks: Sequence[float], views: Sequence[HeldOut]
) -> Iterator[tuple[dict[str, Any], list[RGB]]]:
    """Train until the last mark; per mark its figures and the held-out views.

    Raises PeerError when the process ends before, or the capture has no sparse points.
    """
    needs_points(project)
    frames = json.loads((project / "transforms.json").read_text(encoding="utf-8"))["frames"]
    unit = unit_of(frames)
    states = list(train(binary, project, out, marks))
    flat = sorts_flat(splats.read(states[-1][1]), project, frames[0], unit)
    for found, path in states:
        began = time.process_time()
        shown = splats.read(path)
        pictures = []
        for view in views:
            key = flat_key(shown, view.camera, view.pose, unit) if flat else None
            pictures.append(splats.render(shown, view.camera, view.pose, BACKGROUND, key))
        taken = (time.process_time() - began) / len(views)
        more = {"render_s": taken, "splats": len(shown.at), "sorted_by_depth": not flat}
        yield found | more, pictures


def unit_of(frames: Sequence[dict[str, Any]]) -> float:
    """World units in OpenSplat's own: the largest coordinate of a camera from the cameras' mean."""
    at = np.array([frame["transform_matrix"] for frame in frames])[:, :3, 3]
    return float(np.abs(at - at.mean(0)).max())


def flat_key(shown: splats.Splats, camera: Camera, pose: splats.F64, unit: float) -> splats.F32:
    """What the CPU build of OpenSplat 1.1.5 sorts splats by in place of their depth.

    It takes the last column of the splats' (x, y, depth) on the picture (-1..1, near plane 0.001
    and far plane 1000 of its units) for a list of its own, but steps through all three columns.
    """
    x, y, z = splats.facing(pose) @ (shown.at - pose[:3, 3]).T
    z = np.maximum(z, 1e-6 * unit)
    across, down = 2 * camera.fx / camera.width, 2 * camera.fy / camera.height
    depth = (1000.001 - unit / z) / 999.999
    flat = np.stack([across * x / z, down * y / z, depth], 1).astype(np.float32).ravel()
    return flat[2 : 2 + len(x)]


def sorts_flat(shown: splats.Splats, project: Path, frame: dict[str, Any], unit: float) -> bool:
    """Whether splats fit a train frame better in the order of `flat_key` than in depth's.

    Splats are learned in the order in which their trainer blends them, so that one tells the other.
    """
    intrinsics = [frame[k] for k in ("w", "h", "fl_x", "fl_y", "cx", "cy")]
    camera, pose = Camera(*intrinsics), np.array(frame["transform_matrix"])
    truth = decode_image((project / frame["file_path"]).read_bytes(), "png", camera)
    key = flat_key(shown, camera, pose, unit)
    orders = [psnr(splats.render(shown, camera, pose, BACKGROUND, k), truth) for k in (None, key)]
    return orders[1] > orders[0]


def train(
    binary: Path, project: Path, out: Path, marks: Sequence[float]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Figures and splat file of each mark, as it passes."""
    words = [str(binary), str(project), "-o", str(out / "splat.ply"), "-s", str(EVERY), *SETTINGS]
    out.mkdir(parents=True, exist_ok=True)
    clock, left, kept, said = Clock(EVERY), list(marks), 0, ""
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ONE_THREAD},
    ) as process:
        assert process.stdout is not None
        try:
            for said in process.stdout:
                step = clock.line(said, cpu_s(process.pid))
                if step is None:
                    continue
                while left and clock.spent > left[0]:
                    mark = left.pop(0)
                    state = clock.newest(step, mark)
                    if state is None:
                        raise PeerError(f"OpenSplat: {EVERY} steps took more than {mark:g} s")
                    path = out / f"{mark:g}.ply"
                    shutil.copy(out / f"splat_{state}.ply", path)
                    print(f"opensplat, {mark:g} s: {state} steps", flush=True)
                    yield {"mark_s": mark, "spent_s": clock.at[state], "steps": state}, path
                if not left:
                    return
                state = clock.newest(step, left[0]) or 0
                for old in range(kept, state, EVERY):
                    (out / f"splat_{old}.ply").unlink(missing_ok=True)
                kept = state
        finally:
            process.kill()
    raise PeerError(f"OpenSplat ended before {left[0]:g} s: {said.strip()}")
