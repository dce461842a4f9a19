"""A daemon as a process of its own, for soaks and benchmarks that start, kill and watch it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil


class Served:
    """`mclnf-edge serve` on one map at one address; `start` may follow `kill` or `stop`."""

    def __init__(
        self, folder: Path, config: str, program: tuple[str, ...] = ("-m", "mclnf_edge.cli")
    ) -> None:
        """`config` is the YAML text of its settings, `program` what the interpreter runs."""
        self.program = program
        self.map, self.log = folder / "map", folder / "daemon.log"
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.config = folder / "serve.yaml"
        self.config.write_text(config)
        self.process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Start it and do not wait."""
        words = ["serve", "--map", str(self.map), "--bind", self.address]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, *words, "--config", str(self.config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def start(self) -> None:
        """Start it and wait until it takes frames; raises RuntimeError when it ends instead."""
        self.launch()
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not re.match(r"ready ", line):
            raise RuntimeError(f"the daemon did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL: what a power cut does to the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    @property
    def code(self) -> int | None:
        """The exit code once it has ended."""
        assert self.process is not None
        return self.process.poll()

    def resident_mb(self) -> float:
        """Resident memory of the process."""
        assert self.process is not None
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def cpu_s(self) -> float:
        """CPU seconds of the process so far."""
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


def free_port() -> int:
    """A loopback port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
