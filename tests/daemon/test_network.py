"""Daemon and publisher on two hosts with a bad link between them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mclnf_edge.client import Client
from mclnf_edge.store import MapStore, map_check
from tests.daemon.conftest import Daemon
from tests.mapping.flights import flight
from tests.wire import lossy_link
from tests.wire.lossy_link import LossyLink

FRAMES = 60


def publish(address: str, keys: str, spool: str) -> None:
    """What the publisher's host runs: 60 frames, one after the other, through the spool."""
    from dataclasses import replace

    frames = flight().frames
    client = Client(
        address, timeout_s=1.0, give_up_s=100, spool=Path(spool),
        server_key=Path(keys, "server.public"), client_key=Path(keys, "drone.secret"),
    )  # fmt: skip
    with client:
        client.hello(session="bad", stream="front")
        for number in range(FRAMES):
            frame = frames[number % len(frames)]
            pose = frame.T_world_camera.copy()
            pose[0, 3] += 0.5 * number
            client.submit(replace(frame, seq=number, T_world_camera=pose))
            time.sleep(0.05)
        client.flush()
        assert client.counts.keys() <= {"accepted", "duplicate"}  # by an answer that was lost
        print(client.counts.total(), client.waiting, flush=True)


@pytest.mark.skipif(bool(lossy_link.why_not()), reason=lossy_link.why_not() or "-")
def test_a_lossy_reordering_link_loses_and_doubles_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    words = [sys.executable, "-m", "mclnf_edge.cli", "keygen", str(keys)]
    subprocess.run([*words, "server"], check=True, capture_output=True)
    subprocess.run([*words, "drone", "--role", "publish"], check=True, capture_output=True)
    with LossyLink() as link:
        there = f"tcp://{link.addresses[1]}:7710"
        daemon = Daemon(tmp_path, host=link.hosts[1], bind=there)
        daemon.config.write_text(daemon.config.read_text() + f"security: {{keys: {keys}}}\n")
        daemon.start()
        try:
            link.loss, link.late, link.delay_s = 0.05, 0.25, 0.02
            faults = threading.Thread(target=_spoil, args=(link,))
            faults.start()
            program = "from tests.daemon.test_network import publish; import sys; "
            program += "publish(*sys.argv[1:])"
            told = subprocess.run(
                ["ip", "netns", "exec", link.hosts[0], sys.executable, "-c", program, there,
                 str(keys), str(tmp_path / "spool")],
                capture_output=True, text=True, timeout=150,
            )  # fmt: skip
            faults.join()
            assert told.returncode == 0, told.stderr
            assert told.stdout.split() == [str(FRAMES), "0"], "each has one final answer"
            assert link.lost > 20 and link.reordered > 50
            assert daemon.stop() == 0
        finally:
            daemon.kill()
    assert map_check(daemon.map) == []
    with MapStore.open(daemon.map, create=False, read_only=True) as store:
        rows = store.ledger.database.rows("SELECT seq FROM frames ORDER BY seq")
    assert [seq for (seq,) in rows] == list(range(FRAMES))


def _spoil(link: LossyLink) -> None:
    """Two dead spells, the second long enough for the client to give its connection up."""
    for seconds in (0.5, 4.0):
        time.sleep(1.5)
        link.cut = True
        time.sleep(seconds)
        link.cut = False
