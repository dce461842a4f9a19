"""OpenSplat at marks of CPU seconds: a binary of the user's own, run on a project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    for found, path in list(train(binary, project, out, marks)):
        began = time.process_time()
        shown = splats.read(path)
        pictures = [splats.render(shown, v.camera, v.pose, BACKGROUND) for v in views]
        taken = (time.process_time() - began) / len(views)
        yield found | {"render_s": taken, "splats": len(shown.at)}, pictures


def train(
    binary: Path, project: Path, out: Path, marks: Sequence[float]
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Figures and splat file of each mark, as it passes."""
    words = [binary, project, "-o", out / "splat.ply", "-s", str(EVERY), *SETTINGS]
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
