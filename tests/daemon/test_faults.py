"""A daemon as a process among misbehaving peers, networks, clocks and files."""

from __future__ import annotations

import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from mclnf_edge.client import Client
from mclnf_edge.daemon.sockets import ROUND
from mclnf_edge.errors import RemoteError
from mclnf_edge.mapping.initialization import load_init, save_init
from mclnf_edge.store import MapStore, map_check
from mclnf_edge.types import Camera, Frame, View
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.messages import (
    MAX_PART_BYTES,
    Acks,
    ErrorReply,
    Hello,
    PutFrame,
    RenderRequest,
    StatusRequest,
    Welcome,
)
from tests.daemon.broken import SLOW_S
from tests.daemon.conftest import CONFIG, Daemon
from tests.mapping.flights import Flight
from tests.wire.tcp_proxy import TcpProxy


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that must live through every fault that uses it."""
    made = Daemon(tmp_path_factory.mktemp("shared")).start().warm()
    yield made
    assert made.process is not None and made.process.poll() is None, "it did not"
    assert made.stop() == 0
    assert map_check(made.map) == []


@contextmanager
def raw(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket to it."""
    context = zmq.Context[zmq.Socket[bytes]]()
    with context, context.socket(zmq.DEALER) as bare:
        bare.linger = 0
        bare.connect(address)
        yield bare


@contextmanager
def broken(fault: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A daemon with a fault of `tests.daemon.broken` in its compute thread, and its address."""
    words = [sys.executable, "-m", "tests.daemon.broken", fault, str(folder)]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().removeprefix("ready ").strip()
        finally:
            process.kill()


def moved(frame: Frame, seq: int, metres: float) -> Frame:
    """The frame taken elsewhere, so that it does not look like hovering."""
    pose = frame.T_world_camera.copy()
    pose[0, 3] += metres
    return replace(frame, seq=seq, T_world_camera=pose)


def serves(daemon: Daemon, seconds: float = 10.0) -> float:
    """Resident MB, from a status that came within that time."""
    start = time.monotonic()
    with daemon.client() as client:
        memory = float(client.status()["memory_mb"])
    assert time.monotonic() - start < seconds
    return memory


# Peers


def test_a_client_that_never_reads_costs_bounded_memory(shared: Daemon) -> None:
    before = serves(shared)
    view = View(Camera(600, 600, 600.0, 600.0, 300.0, 300.0), np.eye(4))
    asked = encode(RenderRequest(view=view, encoding="raw"))
    with raw(shared.address) as deaf:
        deaf.rcvhwm = 1
        for _ in range(250):  # a megabyte each
            deaf.send_multipart(asked)
        end = time.monotonic() + 30
        with shared.client() as client:
            while client.status()["renders"] < 250:
                assert time.monotonic() < end
                time.sleep(0.1)
            status = client.status()
        assert status["dropped"].get("unread", 0) > 50
        assert status["memory_mb"] - before < 120


def test_a_hundred_idle_connections_disturb_nobody(shared: Daemon) -> None:
    context = zmq.Context[zmq.Socket[bytes]]()
    with context:
        idle = [context.socket(zmq.DEALER) for _ in range(100)]
        for connection in idle:
            connection.linger = 0
            connection.connect(shared.address)
        idle[0].send_multipart(encode(StatusRequest(id=1)))
        assert idle[0].poll(10_000)
        serves(shared)
        for connection in idle:
            connection.close()


def test_oversized_messages_end_their_connection_or_are_named(
    shared: Daemon, flight: Flight
) -> None:
    before = serves(shared)
    with raw(shared.address) as big:
        big.send_multipart([b"x" * (MAX_PART_BYTES + 1)])
        assert not big.poll(500)
    picture = bytes(MAX_PART_BYTES // 4 * 3)
    frame = replace(flight.frames[0], depth=b"x", mask=b"x")
    with raw(shared.address) as big:
        header, *_ = encode(PutFrame(id=5, session="s", stream="c", frame=frame))
        big.send_multipart([header, picture, picture, picture])
        assert big.poll(10_000)
        reply = decode(big.recv_multipart())
    assert isinstance(reply, ErrorReply) and reply.code == "too-large"
    assert serves(shared) - before < 150


def test_another_protocol_version_is_told_so(shared: Daemon) -> None:
    with raw(shared.address) as old:
        for version in ([0, 9], [99, 0]):
            old.send_multipart([msgpack.packb({"v": version, "t": "status", "i": 7, "f": {}})])
            assert old.poll(10_000)
            reply = decode(old.recv_multipart())
            assert isinstance(reply, ErrorReply) and (reply.code, reply.id) == ("version", 7)
    serves(shared)


def png_bomb(side: int) -> bytes:
    """A picture of side x side black pixels in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, data) for name, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )


def test_a_decompression_bomb_is_rejected_unopened(shared: Daemon, flight: Flight) -> None:
    before, side, reasons = serves(shared), 20_000, []
    bomb = png_bomb(side)
    lens = Camera(side, side, 9e3, 9e3, side / 2, side / 2)
    frames = [replace(flight.frames[0], seq=i, image=bomb, camera=lens) for i in range(3)]
    with shared.client("bomb") as client:
        counts = client.publish(frames, on_ack=lambda ack: reasons.append(ack.reason))
    assert counts["rejected"] == 3 and len(bomb) < 100_000
    assert all("pixels" in reason for reason in reasons)
    assert serves(shared) - before < 100


# Numbers, clocks and networks


def test_clocks_that_jump_back_and_numbers_out_of_order(shared: Daemon, flight: Flight) -> None:
    times = [100.0, 101.0, 3.0, 2.0, 1e9, -5.0, 0.0, 0.0]
    frames = [
        replace(frame, seq=seq, timestamp=at)
        for frame, seq, at in zip(flight.frames, (7, 3, 9, 1, 30, 2, 8, 4), times, strict=True)
    ]
    with shared.client("clock") as client:
        assert client.publish(frames)["accepted"] == 8
        assert client.publish(frames[::-1])["duplicate"] == 8
    with shared.client("clock") as client:
        assert list(client.drain())[-1].done
        stream = next(s for s in client.status()["streams"] if s["session"] == "clock")
    assert (stream["accepted"], stream["duplicate"], stream["last_seq"]) == (8, 8, 30)


def test_a_bad_network_loses_and_doubles_nothing(
    shared: Daemon, flight: Flight, tmp_path: Path
) -> None:
    """Delays, cuts, a dead link and refused connections, while frames go through.

    What was lost with a connection is sent again over the next one, behind newer frames.
    """
    frames = [moved(flight.frames[i % 8], i, 0.5 * i) for i in range(60)]
    answers: list[int] = []
    with TcpProxy(shared.address) as link:
        client = Client(link.address, timeout_s=0.5, give_up_s=60, spool=tmp_path / "spool")
        faults = threading.Thread(target=_spoil, args=(link,))
        with client:
            client.hello(session="bad", stream="front")
            faults.start()
            client.publish(frames, 30.0, lambda ack: answers.append(ack.seq))
            client.flush()
            faults.join()
        assert link.connections >= 4
    assert sorted(answers) == list(range(60)), "each frame has one final answer"
    with MapStore.open(shared.map, create=False, read_only=True) as store:
        rows = store.ledger.database.rows(
            "SELECT seq, state FROM frames JOIN streams ON streams.id = stream_id "
            "WHERE session = 'bad' ORDER BY seq"
        )
    assert [row[0] for row in rows] == list(range(60))


def _spoil(link: TcpProxy) -> None:
    for fault in range(3):
        time.sleep(0.2)
        link.delay_s = 0.1 * fault
        link.black_hole = True
        time.sleep(0.2)
        link.cut()
        link.black_hole, link.refuse = False, fault == 1
        time.sleep(0.3)
        link.refuse = False
        link.cut()
    link.delay_s = 0.0


def test_four_flooding_streams_do_not_starve_a_modest_one(daemon: Daemon, flight: Flight) -> None:
    """The flood knows no credit; the modest client is answered within seconds all the same."""
    stop = threading.Event()
    floods = [
        threading.Thread(target=_flood, args=(daemon.address, flight, i, stop)) for i in range(4)
    ]
    for flood in floods:
        flood.start()
    waits = []
    try:
        time.sleep(0.5)
        with daemon.client("modest") as client:
            for i in range(15):
                asked = time.monotonic()
                assert client.publish([moved(flight.frames[0], i, 0.4 * i)])["accepted"] == 1
                waits.append(time.monotonic() - asked)
            streams = {s["session"]: s["accepted"] for s in client.status()["streams"]}
    finally:
        stop.set()
        for flood in floods:
            flood.join()
    assert max(waits) < 3.0
    assert all(streams[f"flood-{i}"] >= 15 for i in range(4)), "there was no flood"


def test_a_flood_is_held_back_while_a_view_is_made(tmp_path: Path, flight: Flight) -> None:
    """A view that never ends: a round of frames in each 0.3 s is all that is taken."""
    with broken("paint", tmp_path / "map") as (_, address):
        stop = threading.Event()
        for i in range(4):
            threading.Thread(target=_flood, args=(address, flight, i, stop), daemon=True).start()
        try:
            time.sleep(1.0)
            begin = time.monotonic()
            with Client(address, give_up_s=20) as client:
                before = sum(s["accepted"] for s in client.status()["streams"])
                time.sleep(3.0)
                taken = sum(s["accepted"] for s in client.status()["streams"]) - before
            seconds = time.monotonic() - begin
        finally:
            stop.set()
    assert 0 < taken <= ROUND * (seconds / 0.3 + 1)


def _flood(address: str, flight: Flight, number: int, stop: threading.Event) -> None:
    """Frames as fast as the socket takes them, whatever the answers say."""
    with raw(address) as greedy:
        session, seq = f"flood-{number}", 0
        greedy.send_multipart(encode(Hello(session=session, stream="front")))
        assert isinstance(decode(greedy.recv_multipart()), Welcome)
        greedy.sndtimeo = 200
        while not stop.is_set():
            frame = moved(flight.frames[seq % 8], seq, 0.3 * seq % 40)
            seq += 1
            try:
                greedy.send_multipart(
                    encode(PutFrame(session=session, stream="front", frame=frame))
                )
            except zmq.Again:
                continue
            while greedy.poll(0):
                assert isinstance(decode(greedy.recv_multipart()), Acks)


# What it is started with


def refused(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a daemon that must not start."""
    done = subprocess.run(
        [sys.executable, "-m", "mclnf_edge.cli", "serve", "--map", str(folder), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "ready" not in done.stdout
    return done.returncode, done.stderr


def test_a_port_and_a_map_in_use_are_named(shared: Daemon, tmp_path: Path) -> None:
    code, told = refused(tmp_path / "map", "--bind", shared.address)
    assert code == 2 and "the port is in use" in told
    code, told = refused(shared.map, "--bind", "tcp://127.0.0.1:0", "--config", str(shared.config))
    assert code == 1 and "another daemon serves this map" in told


def test_another_init_and_a_newer_format_are_refused(tmp_path: Path) -> None:
    start, folder = load_init(None), tmp_path / "map"
    with MapStore.open(folder, meta={"init": start.digest}):
        pass
    save_init(tmp_path / "other.pt", start.mlp * 1.01, start.meta)
    code, told = refused(
        folder, "--bind", "tcp://127.0.0.1:0", "--init", str(tmp_path / "other.pt")
    )
    assert code == 1 and f"expected init '{start.digest}'" in told
    ledger = sqlite3.connect(folder / "ledger.db")
    ledger.execute("PRAGMA user_version=7")
    ledger.close()
    code, told = refused(folder, "--bind", "tcp://127.0.0.1:0")
    assert code == 1 and "received format 7" in told


# The compute thread, and a copy while it works


@pytest.mark.parametrize(
    ("fault", "said"), [("crash", "compute thread ended: ZeroDivision"), ("hang", "stalled for")]
)
def test_a_broken_compute_thread_ends_the_process(
    tmp_path: Path, flight: Flight, fault: str, said: str
) -> None:
    with broken(fault, tmp_path / "map") as (process, address):
        with Client(address, give_up_s=20) as client:
            client.hello(session="one", stream="front")
            assert client.publish(flight.frames[:1])["accepted"] == 1
        assert process.wait(30) == 1
    assert said in (tmp_path / "map.log").read_text()
    with MapStore.open(tmp_path / "map", create=False, read_only=True) as store:
        assert store.counts()["held"] == 1, "what was acknowledged is there for the next start"


def test_a_drain_on_a_device_without_room_is_answered(tmp_path: Path, flight: Flight) -> None:
    with broken("full", tmp_path / "map") as (process, address):
        with Client(address, give_up_s=20) as client:
            client.hello(session="one", stream="front")
            assert client.publish(flight.frames)["accepted"] == 8
            with pytest.raises(RemoteError, match="no room to learn") as told:
                list(client.drain())
            assert told.value.code == "device" and client.status()["out_of_memory"]
        process.terminate()
        assert process.wait(10) == 0
    with MapStore.open(tmp_path / "map", create=False, read_only=True) as store:
        assert store.counts()["held"] == 8


def test_a_slow_disk_holds_up_no_view(tmp_path: Path, flight: Flight) -> None:
    """Every fsync takes 2 s: publishers wait or are told busy, views and status come at once."""
    waits: dict[str, list[float]] = {"render": [], "status": []}
    stop = threading.Event()

    def ask() -> None:
        with Client(address, give_up_s=60) as client:
            while not stop.is_set():
                for name, call in (("render", lambda: client.render(view)),
                                   ("status", client.status)):  # fmt: skip
                    asked = time.monotonic()
                    call()
                    waits[name].append(time.monotonic() - asked)
                time.sleep(0.05)

    with broken("slow", tmp_path / "map") as (_, address):
        view = replace(flight.views[0], camera=Camera(32, 24, 30.0, 30.0, 16.0, 12.0))
        with Client(address, give_up_s=60) as client:
            client.render(view)  # until the kernels are ready
            asking = threading.Thread(target=ask)
            asking.start()
            client.hello(session="one", stream="front")
            asked = time.monotonic()
            assert client.publish(flight.frames[:4])["accepted"] == 4
            assert time.monotonic() - asked > 0.9 * SLOW_S, "accepted before it was durable"
            with raw(address) as hasty:
                hasty.send_multipart(encode(Hello(session="two", stream="front")))
                assert isinstance(decode(hasty.recv_multipart()), Welcome)
                for number in (4, 5):  # the second while the first is being kept
                    put = PutFrame(session="two", stream="front", frame=flight.frames[number])
                    hasty.send_multipart(encode(put))
                    time.sleep(0.5 * SLOW_S)
                told = [decode(hasty.recv_multipart()) for _ in range(2)]
            acks = [ack for reply in told if isinstance(reply, Acks) for ack in reply.acks]
            assert [(a.seq, a.status, a.code) for a in acks] == [
                (5, "busy", "slow-disk"), (4, "accepted", ""),
            ]  # fmt: skip
            end = time.monotonic() + 120
            for progress in client.drain():
                assert time.monotonic() < end
                if progress.modules_closed > 0:
                    break
            else:
                pytest.fail("no module was committed")
            stop.set()
            asking.join()
    assert len(waits["render"]) > 30
    assert max(waits["render"]) < 0.7 * SLOW_S and max(waits["status"]) < 0.7 * SLOW_S


@pytest.mark.parametrize("kind", ["full", "readonly", "broken"])
def test_a_failing_disk_is_busy_and_work_goes_on_after_it(
    tmp_path: Path, flight: Flight, kind: str
) -> None:
    fault = tmp_path / "map.fault"
    with broken("disk", tmp_path / "map") as (process, address):
        with Client(address, give_up_s=90) as client, Client(address, give_up_s=90) as viewer:
            client.hello(session="one", stream="front")
            assert client.publish(flight.frames[:4])["accepted"] == 4
            while not any(m["steps"] for m in viewer.status()["modules"]):
                time.sleep(0.1)
            fault.write_text(kind)
            sending = threading.Thread(target=client.publish, args=(flight.frames[4:],))
            sending.start()
            end = time.monotonic() + 6.0  # longer than a checkpoint waits
            while time.monotonic() < end:
                viewer.render(flight.views[0], 16, 12)
                status = viewer.status()
            assert status["health"]["disk_full"] and status["streams"][0]["accepted"] == 4
            fault.unlink()
            sending.join()
            assert client.counts["accepted"] == 8
            assert list(client.drain())[-1].modules_closed > 0
        process.terminate()
        assert process.wait(20) == 0
    assert map_check(tmp_path / "map") == []
    with MapStore.open(tmp_path / "map", create=False, read_only=True) as store:
        counts = store.counts()
    assert (counts["held"], counts["done"]) == (0, 8)


def test_a_disk_that_never_answers_ends_the_process(tmp_path: Path, flight: Flight) -> None:
    with broken("stuck", tmp_path / "map") as (process, address), raw(address) as publisher:
        publisher.send_multipart(encode(Hello(session="one", stream="front")))
        assert process.wait(60) == 1
    assert "the disk has not answered" in (tmp_path / "map.log").read_text()


def test_a_snapshot_of_a_map_that_adapts_is_sound_and_can_be_served(
    daemon: Daemon, flight: Flight, tmp_path: Path
) -> None:
    daemon.kill()
    daemon.config.write_text(CONFIG.replace("passes: 0.3", "passes: 30"))
    daemon.start()
    with daemon.client("flight") as client:
        assert client.publish(flight.frames)["accepted"] == 8
        while not any(m["steps"] > 2 for m in client.status()["modules"]):
            time.sleep(0.05)
    words = [sys.executable, "-m", "mclnf_edge.cli", "map"]
    out = tmp_path / "copy" / "map"
    out.parent.mkdir()
    subprocess.run([*words, "snapshot", str(daemon.map), str(out)], check=True, timeout=60)
    with daemon.client() as client:
        assert any(m["state"] == "open" for m in client.status()["modules"]), "it adapts still"
    done = subprocess.run([*words, "check", str(out)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "sound")
    daemon.kill()
    copy = Daemon(out.parent)
    copy.start()
    try:
        with copy.client("flight") as client:
            assert client.publish(flight.frames)["duplicate"] == 8
            assert list(client.drain())[-1].done
    finally:
        copy.kill()
