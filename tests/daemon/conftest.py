"""A daemon as a process of its own, and a small capture of which it makes a map in seconds."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mclnf_edge.client import Client
from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon import painters
from mclnf_edge.daemon.warm_up import warm_up
from tests.mapping import flights

CONFIG = """
map: {cell_size_m: 20.0, inactivity_s: 600}
field: {plane_texels: 64, plane_vertical: 8, voxels: 16}
adapt: {passes: 0.3, rays_per_step: 1024, min_rays_per_frame: 256}
watch: {checkpoint_s: 1.0}
"""


class Daemon:
    """`mclnf-edge serve` on a map; `start` may be called again after `kill` or `stop`."""

    def __init__(
        self, folder: Path, *words: str, host: str | None = None, bind: str = "tcp://127.0.0.1:0"
    ) -> None:
        """`host`: the network namespace it runs in."""
        self.map, self.words, self.bind = folder / "map", words, bind
        self.inside = [] if host is None else ["ip", "netns", "exec", host]
        self.log = folder / "daemon.log"
        self.config = folder / "serve.yaml"
        self.config.write_text(CONFIG)
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> Daemon:
        """Run it and wait for the line that says where it listens."""
        words = [*self.inside, sys.executable, "-m", "mclnf_edge.cli", "serve"]
        words += ["--map", str(self.map), "--bind", self.bind, "--config", str(self.config)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                words + list(self.words),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"ready (\S+)", line)
        assert match, f"no ready line: {line!r}; {self.log.read_text()[-2000:]}"
        self.address = match[1]
        return self

    def warm(self) -> Daemon:
        """Wait until its kernels are ready: it then has the speed and size it keeps."""
        end = time.monotonic() + 300
        while "kernels are ready" not in self.log.read_text():
            assert time.monotonic() < end, "the compiler takes too long"
            time.sleep(0.1)
        return self

    def client(self, session: str | None = None) -> Client:
        """A connection to it, its stream announced when a session is named."""
        client = Client(self.address, give_up_s=60)
        if session is not None:
            client.hello(session=session, stream="front")
        return client

    def kill(self) -> None:
        """SIGKILL: what a power cut does to the process."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM, and the exit code it ends with within 10 s."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture(scope="session", autouse=True)
def _kernels() -> None:
    """Compiled and measured once for all processes, so that no daemon does it in a test."""
    warm_up(ServeConfig(), 2)
    if painters.remembered(ServeConfig()) is None:
        trial = painters.Trial(ServeConfig())
        while trial.result() is None:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def flight() -> flights.Flight:
    return flights.flight()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of this test's own, started; killed afterwards if it still runs."""
    made = Daemon(tmp_path).start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()
