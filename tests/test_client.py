"""The client against a small real daemon, over TCP, with lost replies, cuts and a spool."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.client import Client
from mclnf_edge.errors import (
    ConfigError,
    DiskFull,
    FrameRejected,
    MessageTooLarge,
    RemoteError,
    Unreachable,
)
from mclnf_edge.types import Frame, Signal, View
from mclnf_edge.wire.messages import Ack, Identity, Put
from tests.wire.echo import EchoDaemon
from tests.wire.examples import CAMERA, POSE, frame
from tests.wire.tcp_proxy import TcpProxy

Make = Callable[..., Client]


@pytest.fixture()
def daemon() -> Iterator[EchoDaemon]:
    """A daemon that keeps frames in memory."""
    with EchoDaemon() as running:
        yield running


@pytest.fixture()
def make() -> Iterator[Make]:
    """Clients with short time-outs, closed at the end."""
    clients: list[Client] = []

    def connect(address: str, **options: object) -> Client:
        settings = {"timeout_s": 0.3, "give_up_s": 5.0, **options}
        clients.append(Client(address, **settings))  # type: ignore[arg-type]
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def frames(count: int, size: int = 100) -> list[Frame]:
    """Frames 0 to `count` - 1, every image different."""
    return [frame(i, image=i.to_bytes(4, "little") * (size // 4)) for i in range(count)]


def in_background(call: Callable[[], object]) -> Callable[[], object]:
    """Start `call` in a thread; the returned function waits for its result or raises its error."""
    results: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> object:
        thread.join(20)
        if errors:
            raise errors[0]
        assert results, "still running after 20 s"
        return results[0]

    return result


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for `condition`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.005)


def kept_seqs(kept: dict[Identity, Put]) -> list[int]:
    """Sequence numbers in the order in which the daemon took them."""
    return [identity[2] for identity in kept]


def test_frames_arrive_whole_and_in_order(daemon: EchoDaemon, make: Make) -> None:
    acks: list[Ack] = []
    client = make(daemon.address)
    counts = client.publish(frames(50), on_ack=acks.append)
    assert counts == {"accepted": 50}
    assert kept_seqs(daemon.kept) == list(range(50)) == [ack.seq for ack in acks]
    first = next(iter(daemon.kept.values()))
    assert first.frame.image == frames(1)[0].image  # type: ignore[union-attr]
    assert client.waiting == 0


def test_same_identity_is_a_duplicate_and_a_new_session_is_not(
    daemon: EchoDaemon, make: Make
) -> None:
    first = make(daemon.address)
    welcome = first.hello(session="flight-9", stream="left")
    assert welcome is not None and welcome.last_seq == -1
    first.publish(frames(3))
    again = make(daemon.address)
    welcome = again.hello(session="flight-9", stream="left")
    assert welcome is not None and welcome.last_seq == 2
    assert again.publish(frames(4))["duplicate"] == 3
    assert make(daemon.address).publish(frames(4))["accepted"] == 4
    assert len(daemon.kept) == 8


def test_rate_paces_the_frames(daemon: EchoDaemon, make: Make) -> None:
    client = make(daemon.address)
    client.hello()
    start = time.monotonic()
    client.publish(frames(11), rate_hz=50)
    assert 0.2 <= time.monotonic() - start < 0.6


def test_lost_acknowledgement_is_resent_and_makes_no_second_frame(
    daemon: EchoDaemon, make: Make
) -> None:
    daemon.lose = 2
    client = make(daemon.address)
    counts = client.publish(frames(5))
    assert sum(counts.values()) == 5 and counts["duplicate"] >= 1
    assert kept_seqs(daemon.kept) == list(range(5))
    assert max(daemon.seen.values()) >= 2


def test_one_lost_answer_among_others_is_asked_for_again(daemon: EchoDaemon, make: Make) -> None:
    """The link is not silent, so no new connection brings it: the frame's own time does."""
    daemon.lose = 1
    client = make(daemon.address)
    counts = client.publish(frames(30), rate_hz=30)
    assert counts["accepted"] + counts["duplicate"] == 30 and counts["duplicate"] >= 1
    assert len(daemon.hellos) == 1 and kept_seqs(daemon.kept) == list(range(30))


def test_busy_frames_go_again_before_newer_ones(daemon: EchoDaemon, make: Make) -> None:
    daemon.busy = {0, 3}
    daemon.credit_bytes = 1  # one frame at a time
    counts = make(daemon.address).publish(frames(6))
    assert counts["accepted"] == 6
    assert kept_seqs(daemon.kept) == list(range(6))
    assert daemon.seen[next(i for i in daemon.seen if i[2] == 3)] == 2


def test_rejected_frame_is_told_once_and_the_rest_goes_on(daemon: EchoDaemon, make: Make) -> None:
    daemon.refuse = {2}
    acks: list[Ack] = []
    counts = make(daemon.address).publish(frames(4), on_ack=acks.append)
    assert counts["rejected"] == 1 and counts["accepted"] == 3
    told = [ack for ack in acks if ack.status == "rejected"]
    assert [(ack.seq, ack.reason) for ack in told] == [(2, "refused by the test")]


def test_unanswered_bytes_stay_within_the_credit(make: Make) -> None:
    with EchoDaemon(credit_bytes=5_000) as daemon:
        client = make(daemon.address, timeout_s=5)
        client.hello()
        daemon.pause()
        taken = in_background(lambda: client.publish(frames(40, 1_000)))
        time.sleep(0.3)
        assert 1 <= client.waiting <= 4  # 1000 bytes of image and a header each
        daemon.resume()
        assert taken() == {"accepted": 40}


def test_credit_in_an_answer_replaces_the_window(make: Make) -> None:
    with EchoDaemon(credit_bytes=1 << 20) as daemon:
        client = make(daemon.address, timeout_s=5)
        client.hello()
        daemon.credit_bytes = 1  # told with the next answer
        client.publish(frames(1))
        daemon.pause()
        taken = in_background(lambda: client.publish(frames(10)[1:]))
        time.sleep(0.2)
        assert client.waiting == 1
        daemon.resume()
        assert taken() == {"accepted": 9}


def test_frame_larger_than_the_credit_goes_alone(make: Make) -> None:
    with EchoDaemon(credit_bytes=1_000) as daemon:
        assert make(daemon.address).publish(frames(3, 4_000))["accepted"] == 3


def test_frame_above_the_daemons_limit_is_not_sent(daemon: EchoDaemon, make: Make) -> None:
    client = make(daemon.address)
    client.hello()
    with pytest.raises(MessageTooLarge, match="at most 1048576 bytes"):
        client.submit(frame(0, image=b"x" * (1 << 20)))
    assert client.publish(frames(1))["accepted"] == 1


def test_a_number_in_flight_is_refused(make: Make) -> None:
    with EchoDaemon() as daemon:
        client = make(daemon.address)
        client.hello()
        daemon.pause()
        client.submit(frame(1))
        with pytest.raises(FrameRejected, match="expected a new seq, 1 "):
            client.submit(frame(1))
        daemon.resume()
        client.flush()


def test_refused_greeting_is_raised(daemon: EchoDaemon, make: Make) -> None:
    daemon.refuse_session = "elsewhere"
    with pytest.raises(RemoteError, match="origin") as caught:
        make(daemon.address).hello(session="elsewhere")
    assert caught.value.code == "world"


def test_nobody_there_is_unreachable(make: Make) -> None:
    client = make("tcp://127.0.0.1:9", give_up_s=0.5)
    for call in (client.status, client.hello, lambda: client.publish(frames(1))):
        with pytest.raises(Unreachable, match="tcp://127.0.0.1:9: no answer "):
            call()


def test_requests(daemon: EchoDaemon, make: Make) -> None:
    client = make(daemon.address)
    assert client.status() == {"frames": 0}
    view = View(CAMERA, POSE)
    picture = client.render(view, 8, 6)
    assert picture.rgb.shape == (6, 8, 3) and picture.rgb[0, 0, 0] == 612 % 256
    assert picture.map_version == 3 and picture.modules == ("m1",)
    assert np.isnan(picture.depth[0, 0]) and picture.depth[5, 7] == 47
    assert picture.known[0, 0] == 0 and picture.known[5, 7] == 0.5
    assert np.isnan(client.render(view, 8, 6, want=("known",)).depth).all()
    assert len(list(client.render_progressive(view, 4, 4))) == 2
    with pytest.raises(RemoteError) as stale:
        client.render(view, deadline_ms=1)
    assert stale.value.code == "stale"
    client.publish(frames(2))
    assert client.close_task("block-7") == ("block-7",)
    assert [progress.done for progress in client.drain()] == [False, False, True]


def test_signals(daemon: EchoDaemon, make: Make) -> None:
    client = make(daemon.address)
    pieces = [Signal(i, i * 0.5, b"\0\1" * 8, "s16le", (8, 1), 16.0) for i in range(3)]
    assert client.publish_signals(pieces)["accepted"] == 3
    assert client.render_signal(span_s=(0.0, 1.0), rate_hz=8.0).data == b"RIFF"
    assert daemon.hellos[-1].modality == "audio"


def test_close_task_without_a_stream_says_so(daemon: EchoDaemon, make: Make) -> None:
    with pytest.raises(ConfigError, match="expected a stream"):
        make(daemon.address).close_task()


# The bad network


def test_publishing_survives_cuts(make: Make) -> None:
    with EchoDaemon(credit_bytes=20_000) as daemon, TcpProxy(daemon.address) as proxy:
        client = make(proxy.address, give_up_s=10.0)
        done = in_background(lambda: client.publish(frames(300, 2_000)))
        for part in (50, 120, 200):
            until(lambda part=part: len(daemon.kept) >= part)  # type: ignore[misc]
            proxy.cut()
        counts = done()
        assert isinstance(counts, dict) and sum(counts.values()) == 300
        assert kept_seqs(daemon.kept) == list(range(300))
        assert proxy.connections >= 4


def test_publishing_survives_a_black_hole_and_delay(make: Make) -> None:
    with EchoDaemon(credit_bytes=20_000) as daemon, TcpProxy(daemon.address) as proxy:
        client = make(proxy.address, give_up_s=10.0)
        done = in_background(lambda: client.publish(frames(100, 2_000)))
        until(lambda: len(daemon.kept) >= 20)
        proxy.black_hole = True
        time.sleep(0.8)
        proxy.black_hole, proxy.delay_s = False, 0.02
        counts = done()
        assert isinstance(counts, dict) and sum(counts.values()) == 100
        assert sorted(kept_seqs(daemon.kept)) == list(range(100))


def test_publishing_survives_a_daemons_restart(make: Make) -> None:
    kept: dict[Identity, Put] = {}
    first = EchoDaemon(kept=kept, credit_bytes=20_000)
    with first, TcpProxy(first.address) as proxy:
        client = make(proxy.address, give_up_s=10.0)
        done = in_background(lambda: client.publish(frames(200, 2_000)))
        until(lambda: len(kept) >= 50)
        first.stop()
        with EchoDaemon(kept=kept, credit_bytes=20_000) as second:
            proxy.retarget(second.address)
            counts = done()
    assert isinstance(counts, dict) and sum(counts.values()) == 200
    assert kept_seqs(kept) == list(range(200))


def test_a_request_is_asked_again_over_a_new_connection(make: Make) -> None:
    with EchoDaemon() as daemon, TcpProxy(daemon.address) as proxy:
        client = make(proxy.address)
        client.status()
        daemon.pause()
        answer = in_background(client.status)
        time.sleep(0.1)
        proxy.cut()
        daemon.resume()
        assert answer() == {"frames": 0}


def test_a_slow_answer_over_a_live_link_is_waited_for(make: Make) -> None:
    with EchoDaemon() as daemon:
        client = make(daemon.address, timeout_s=0.2, give_up_s=5.0)
        client.status()
        daemon.pause()
        answer = in_background(client.status)
        time.sleep(1.0)
        daemon.resume()
        assert answer() == {"frames": 0}
        assert daemon.asked["status"] == 2  # not once a time-out


# The spool


def test_frames_of_a_dead_link_are_spooled_and_sent_later_once(make: Make, tmp_path: Path) -> None:
    with EchoDaemon(credit_bytes=20_000) as daemon, TcpProxy(daemon.address) as proxy:
        client = make(proxy.address, spool=tmp_path / "spool", give_up_s=1.0)
        client.publish(frames(10))
        proxy.refuse = True
        proxy.cut()
        counts = client.publish(frames(30)[10:])
        assert counts["spooled"] == 20 == client.waiting
        proxy.refuse = False
        until(lambda: client.waiting == 0 or bool(client.status()))
        client.flush()
        assert client.waiting == 0
        assert kept_seqs(daemon.kept) == list(range(30))


def test_spooled_frames_outlive_the_process_and_keep_their_identity(
    make: Make, tmp_path: Path
) -> None:
    offline = make("tcp://127.0.0.1:9", spool=tmp_path, give_up_s=0.3)
    offline.hello(session="flight-1", stream="front")
    assert offline.publish(frames(5))["spooled"] == 5
    offline.close()
    with EchoDaemon() as daemon:
        later = make(daemon.address, spool=tmp_path)
        later.hello(session="flight-2")
        assert later.publish(frames(3))["spooled"] == 0
        names = [(session, seq) for session, _, seq in daemon.kept]
        expected = [("flight-1", i) for i in range(5)] + [("flight-2", i) for i in range(3)]
        assert names == expected


def test_spooled_frames_that_were_sent_but_not_answered_go_again(
    make: Make, tmp_path: Path
) -> None:
    with EchoDaemon() as daemon, TcpProxy(daemon.address) as proxy:
        proxy.refuse = True
        client = make(proxy.address, spool=tmp_path, timeout_s=0.2, give_up_s=0.5)
        assert client.publish(frames(10))["spooled"] == 10
        proxy.refuse, daemon.lose = False, 1_000
        until(lambda: bool(client.status()) and len(daemon.kept) == 10)
        proxy.black_hole = True
        assert client.publish(frames(12)[10:])["spooled"] == 12
        proxy.black_hole, daemon.lose = False, 0
        until(lambda: bool(client.status()) and client.waiting == 0)
        assert client.counts == {"duplicate": 10, "accepted": 2}
        assert kept_seqs(daemon.kept) == list(range(12))


def test_full_spool_refuses_the_new_frame_and_keeps_the_old(make: Make, tmp_path: Path) -> None:
    client = make("tcp://127.0.0.1:9", spool=tmp_path, spool_bytes=5_000, give_up_s=0.3)
    taken = 0
    with pytest.raises(DiskFull, match="the new one was not taken"):
        for item in frames(20, 1_000):
            client.submit(item)
            taken += 1
    assert 2 <= taken <= 4 and client.waiting == taken
    assert sum(path.stat().st_size for path in tmp_path.glob("*.spool")) <= 5_000


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
from mclnf_edge.client import Client
Client({address!r}, timeout_s=1.0).publish({frames})
"""


def run_blocked(blocked: set[str], address: str) -> subprocess.CompletedProcess[str]:
    """Publish one frame from a fresh interpreter that cannot import `blocked`."""
    one = "[__import__('tests.wire.examples', fromlist=['frame']).frame(0)]"
    code = BLOCKED.format(blocked=blocked, address=address, frames=one)
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )


def test_a_publisher_needs_neither_torch_nor_numba_nor_onnxruntime(daemon: EchoDaemon) -> None:
    done = run_blocked({"torch", "numba", "onnxruntime", "onnx", "cv2", "typer"}, daemon.address)
    assert done.returncode == 0, done.stderr
    assert kept_seqs(daemon.kept) == [0]


def test_the_import_blocker_blocks(daemon: EchoDaemon) -> None:
    done = run_blocked({"msgpack"}, daemon.address)
    assert done.returncode != 0 and "blocked: msgpack" in done.stderr


@pytest.mark.parametrize("address", ["localhost:7710", "foo", "tcp://127.0.0.1", "tcp://h:port"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        Client(address, give_up_s=5).status()
