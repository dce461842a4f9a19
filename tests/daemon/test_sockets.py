"""The endpoint: which addresses it takes, what it drops, that it frees its port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from mclnf_edge.daemon.security import Keyring, authorise
from mclnf_edge.daemon.sockets import Endpoint, check_address
from mclnf_edge.errors import ConfigError
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.keys import keygen
from mclnf_edge.wire.messages import MAX_PART_BYTES, MAX_PARTS
from tests.wire.echo import EchoDaemon
from tests.wire.examples import EXAMPLES

STATUS = encode(EXAMPLES["status"])


@pytest.fixture()
def endpoint() -> Iterator[Endpoint]:
    """An endpoint on a free loopback port."""
    bound = Endpoint("tcp://127.0.0.1:0")
    yield bound
    bound.close()


@pytest.fixture()
def dealer() -> Iterator[zmq.Socket[bytes]]:
    """A bare client socket."""
    context = zmq.Context[zmq.Socket[bytes]]()
    with context, context.socket(zmq.DEALER) as bare:
        bare.linger = 0
        yield bare


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:7710", "tcp://127.3.2.1:0", "tcp://[::1]:7710", "tcp://localhost:*"],
)
def test_loopback_needs_no_keys(address: str) -> None:
    check_address(address, encrypted=False)


@pytest.mark.parametrize(
    "address",
    ["tcp://0.0.0.0:7710", "tcp://*:7710", "tcp://10.0.0.1:1", "tcp://[::]:1", "tcp://drone:7710"],
)
def test_any_other_address_needs_keys(address: str) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        check_address(address, encrypted=False)
    check_address(address, encrypted=True)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:7710", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "ipc:///tmp/x", "udp://a:1", ""],
)
def test_other_forms_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
        check_address(address, encrypted=True)


def test_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"):
            Endpoint(f"tcp://127.0.0.1:{port}")


def test_address_of_another_machine_is_named(tmp_path: Path) -> None:
    # A documentation address (RFC 5737) belongs to no machine.
    keygen(tmp_path / "keys", "daemon")
    authorise(tmp_path / "keys" / "list", "a", ("admin",), zmq.curve_keypair()[0].decode())
    ring = Keyring.load(tmp_path / "keys" / "daemon.secret", tmp_path / "keys" / "list")
    with pytest.raises(ConfigError, match="expected an address of this machine"):
        Endpoint("tcp://192.0.2.1:7710", ring)


def test_port_is_free_again_after_close() -> None:
    first = Endpoint("tcp://127.0.0.1:0")
    first.close()
    second = Endpoint(first.address)
    assert second.address == first.address
    second.close()


def test_ipv6_loopback_and_port_zero(dealer: zmq.Socket[bytes]) -> None:
    try:
        endpoint = Endpoint("tcp://[::1]:0")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert endpoint.address.startswith("tcp://[::1]:")
    dealer.ipv6 = True
    dealer.connect(endpoint.address)
    dealer.send_multipart(STATUS)
    assert [incoming.parts for incoming in endpoint.receive(5_000)] == [STATUS]
    endpoint.close()


def test_message_comes_in_and_answer_goes_out(
    endpoint: Endpoint, dealer: zmq.Socket[bytes]
) -> None:
    assert endpoint.address.startswith("tcp://127.0.0.1:")
    dealer.connect(endpoint.address)
    dealer.send_multipart(STATUS)
    (incoming,) = endpoint.receive(5_000)
    assert incoming.parts == STATUS and incoming.user.name == "local"
    assert endpoint.send(incoming.peer, [b"a", b"b"])
    assert dealer.poll(5_000) and dealer.recv_multipart() == [b"a", b"b"]


def test_too_many_parts_are_dropped_and_counted(
    endpoint: Endpoint, dealer: zmq.Socket[bytes]
) -> None:
    dealer.connect(endpoint.address)
    dealer.send_multipart([b"x"] * (MAX_PARTS + 1))
    dealer.send_multipart(STATUS)
    assert [incoming.parts for incoming in endpoint.receive(5_000)] == [STATUS]
    assert endpoint.dropped == {"parts": 1}


def test_part_above_the_limit_ends_its_connection_unread(
    endpoint: Endpoint, dealer: zmq.Socket[bytes]
) -> None:
    dealer.connect(endpoint.address)
    dealer.send_multipart([b"x" * (MAX_PART_BYTES + 1)])
    assert endpoint.receive(1_000) == []
    context = zmq.Context[zmq.Socket[bytes]]()
    with context, context.socket(zmq.DEALER) as honest:
        honest.linger = 0
        honest.connect(endpoint.address)
        honest.send_multipart(STATUS)
        assert [incoming.parts for incoming in endpoint.receive(5_000)] == [STATUS]


def test_client_that_is_gone_is_counted(endpoint: Endpoint) -> None:
    assert not endpoint.send(b"\0nobody", [b"x"])
    assert endpoint.dropped == {"gone": 1}


def test_client_that_never_reads_costs_a_bounded_queue(
    endpoint: Endpoint, dealer: zmq.Socket[bytes]
) -> None:
    dealer.rcvhwm = 1
    dealer.connect(endpoint.address)
    dealer.send_multipart(STATUS)
    (incoming,) = endpoint.receive(5_000)
    reply, sent = [b"x" * 1_000_000], 0
    start = time.monotonic()
    while endpoint.send(incoming.peer, reply):
        sent += 1
        assert sent < 200, "every unread reply was queued"
    assert time.monotonic() - start < 5
    assert endpoint.dropped["unread"] == 1


def test_wake_ends_a_wait_from_another_thread(endpoint: Endpoint) -> None:
    timer = threading.Timer(0.1, endpoint.wake)
    timer.start()
    start = time.monotonic()
    assert endpoint.receive(10_000) == []
    assert time.monotonic() - start < 5
    for _ in range(100_000):  # more wakes than a pipe holds
        endpoint.wake()
    assert endpoint.receive(1_000) == [] == endpoint.receive(0)


def test_a_hundred_idle_connections_disturb_nobody(dealer: zmq.Socket[bytes]) -> None:
    with EchoDaemon() as daemon:
        host, port = daemon.address.removeprefix("tcp://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(100)]
        dealer.connect(daemon.address)
        dealer.send_multipart(STATUS)
        assert dealer.poll(5_000)
        for connection in idle:
            connection.close()
