"""Two hosts joined by a bad link: network namespaces, and a relay that loses and reorders packets.

Each host has a TUN device of its own; the relay passes whole IP packets between the two, so that
the kernels' own TCP meets loss, delay and reordering as on a radio link. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from types import TracebackType

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET = 65_536


def why_not() -> str:
    """Why there can be no such link here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    name = f"mcl{os.getpid()}p"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class LossyLink:
    """`hosts[0]` and `hosts[1]` are namespaces, `addresses` their IP addresses.

    Faults are switched while it runs: `loss` is the share of packets that vanish, `late` the share
    that comes `late_s` after its turn, behind later ones; all take `delay_s`; `cut` loses all.
    `passed`, `lost` and `reordered` count packets.
    """

    def __init__(self, seed: int = 0) -> None:
        mark = f"mcl{os.getpid()}"
        self.hosts = (f"{mark}a", f"{mark}b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.loss = self.late = self.delay_s = 0.0
        self.late_s = 0.03
        self.cut = False
        self.passed = self.lost = self.reordered = 0
        self._random = random.Random(seed)
        self._ends: list[int] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LossyLink:
        for host, address in zip(self.hosts, self.addresses, strict=True):
            _ip("netns", "add", host)
            self._ends.append(_tun(host))
            _ip("link", "set", host, "netns", host)
            _ip("-n", host, "addr", "add", f"{address}/30", "dev", host)
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", host, "up")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join(10)
        for end in self._ends:
            os.close(end)
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)

    def _run(self) -> None:
        held: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._stop:
            wait = min(max(held[0][0] - time.monotonic(), 0.0), 0.02) if held else 0.02
            ready, _, _ = select.select(self._ends, [], [], wait)
            for end in ready:
                packet, other = os.read(end, _PACKET), self._ends[1 - self._ends.index(end)]
                if self.cut or self._random.random() < self.loss:
                    self.lost += 1
                    continue
                late = self._random.random() < self.late
                self.reordered += late
                due = time.monotonic() + self.delay_s + self.late_s * late
                number += 1
                heapq.heappush(held, (due, number, other, packet))
            while held and held[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(held)
                with contextlib.suppress(OSError):  # the other end's device is full
                    os.write(other, packet)
                    self.passed += 1


def _tun(name: str) -> int:
    """A new TUN device of this name; whoever holds the descriptor is its other end."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
