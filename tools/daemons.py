"""A daemon of its own for a benchmark, its clock, and what it says about its modules."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mclnf_edge.captures import Capture
from mclnf_edge.errors import MclnfError
from mclnf_edge.store import map_check
from mclnf_edge.types import Frame

Status = dict[str, Any]


@dataclass
class Daemon:
    """Where it listens and keeps its map; once it has stopped, what `map check` found."""

    address: str
    map: Path
    problems: int | None = None


@contextmanager
def daemon(settings: dict[str, Any]) -> Iterator[Daemon]:
    """A daemon with a configuration and an empty map, stopped and its map checked at the end.

    Raises MclnfError with the end of its log when it does not start or does not exit with 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config, log, place = (Path(scratch) / n for n in ("bench.yaml", "log", "map"))
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        words = ["serve", "--map", str(place), "--bind", "tcp://127.0.0.1:0"]
        with open(log, "w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "mclnf_edge.cli", *words, "--config", str(config)],
                stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            match = re.match(r"ready (\S+)", process.stdout.readline())
            if match is None:
                raise MclnfError(f"the daemon did not start: {_end(log)}")
            running = Daemon(match[1], place)
            yield running
            process.terminate()
            if process.wait(60) != 0:
                raise MclnfError(f"the daemon ended with {process.returncode}: {_end(log)}")
            running.problems = len(map_check(place))
        finally:
            process.kill()
            process.wait()


def busy_s(status: Status) -> float:
    """The benchmark's clock: CPU seconds of the daemon without those of its renders."""
    return float(status["cpu_s"] - status["render_cpu_s"])


def lag(status: Status) -> int:
    """Frames acknowledged minus frames trained to their minimum: not read yet, or short of rays."""
    return int(status["frames_waiting"] + status["frames_short"])


def open_modules(status: Status) -> int:
    """How many modules learn."""
    return sum(m["state"] in ("open", "adapting") for m in status["modules"])


def digests(status: Status) -> dict[str, str]:
    """Every closed version by "module.version"."""
    return {
        f"{m['id']}.{m['version']}": m["digest"]
        for m in status["modules"]
        if m["state"] == "closed"
    }


def published(capture: Capture) -> Iterator[Frame]:
    """The train frames in capture order as a drone would send them: without exact depth."""
    for frame in capture.split("train").frames:
        yield replace(frame, depth=None)


def _end(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-600:]
