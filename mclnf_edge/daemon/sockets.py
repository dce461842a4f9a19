"""The daemon's one ZeroMQ endpoint: options, bind, receive, send, close. No other file opens one.

The socket belongs to the thread that made it; only `wake` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import re
import select
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from mclnf_edge.daemon.security import LOCAL_USER, ZAP_DOMAIN, Keyring, User, start_authenticator
from mclnf_edge.errors import ConfigError
from mclnf_edge.wire.messages import MAX_PART_BYTES, MAX_PARTS

RECEIVE_HWM = 16
"""Messages of one connection that wait inside ZeroMQ before TCP pushes back."""

ROUND = 8
"""Messages of all connections that are taken before any is answered; they come in turn."""

SEND_HWM = 32
"""Unread messages of one client, beyond its own buffers, before further ones are dropped."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as it came in; `peer` is where the answer goes."""

    peer: bytes
    user: User
    parts: list[bytes]


class Endpoint:
    """A bound ROUTER. Without a keyring only loopback and inproc addresses are accepted."""

    def __init__(
        self,
        bind: str,
        keyring: Keyring | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Bind; raises ConfigError when the address is refused, in use or not ours."""
        check_address(bind, encrypted=keyring is not None)
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._keyring = keyring
        self._authenticator: ThreadAuthenticator | None = None
        self.dropped: Counter[str] = Counter()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakes = select.poll()
        self._wakes.register(self._wake_read, select.POLLIN)
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._configure(ipv6="[" in bind)
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"bind {bind}: {_bind_fault(error)}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        log.info("listening at %s, %s", self.address, "CURVE" if keyring else "loopback, plain")

    def _configure(self, ipv6: bool) -> None:
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.RCVHWM, RECEIVE_HWM),
            (zmq.SNDHWM, SEND_HWM),
            (zmq.MAXMSGSIZE, MAX_PART_BYTES),
            (zmq.HANDSHAKE_IVL, 5_000),
            (zmq.HEARTBEAT_IVL, 5_000),
            (zmq.HEARTBEAT_TIMEOUT, 15_000),
            (zmq.HEARTBEAT_TTL, 20_000),
            (zmq.BACKLOG, 256),
            (zmq.IPV6, int(ipv6)),
        ):
            self._socket.setsockopt(option, value)
        if self._keyring is not None:
            self._authenticator = start_authenticator(self._context, self._keyring)
            # With the domain enforced a missing authenticator admits nobody, not everybody.
            self._socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self._socket.curve_secretkey = self._keyring.server.secret.encode()
            self._socket.curve_server = True

    def receive(self, timeout_ms: int, limit: int = ROUND) -> list[Incoming]:
        """Up to `limit` waiting messages; waits at most `timeout_ms` for the first or a `wake`.

        A message with too many parts, or of a key that lost its rights while connected, is counted
        in `dropped` and let go before it is copied.
        """
        ready = dict(self._poller.poll(timeout_ms))
        if self._wake_read in ready:
            self._swallow_wakes()
        messages: list[Incoming] = []
        while self._socket in ready and len(messages) < limit:
            try:
                peer, *frames = self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            if not 1 <= len(frames) <= MAX_PARTS:
                self.dropped["parts"] += 1
                continue
            user = self._user(frames[0])
            if not user.roles:
                self.dropped["stranger"] += 1
                continue
            messages.append(Incoming(peer.bytes, user, [frame.bytes for frame in frames]))
        return messages

    def rest(self, timeout_ms: int) -> None:
        """Wait for a `wake` alone, `timeout_ms` at most; messages stay where they are."""
        if self._wakes.poll(timeout_ms):
            self._swallow_wakes()

    def _user(self, frame: zmq.Frame) -> User:
        return LOCAL_USER if self._keyring is None else self._keyring.user(str(frame["User-Id"]))

    def send(self, peer: bytes, parts: Sequence[bytes]) -> bool:
        """Send without waiting; False, and counted, when the client is gone or reads nothing."""
        try:
            self._socket.send_multipart([peer, *parts], zmq.DONTWAIT)
        except zmq.Again:
            self.dropped["unread"] += 1
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.dropped["gone"] += 1
            return False
        return True

    def wake(self) -> None:
        """Make a waiting `receive` return; from any thread or signal handler."""
        with contextlib.suppress(BlockingIOError):  # full of wakes already
            os.write(self._wake_write, b"\0")

    def _swallow_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def close(self) -> None:
        """Free the port at once; what was not sent is dropped."""
        self._socket.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._wake_read >= 0:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1
        if self._own_context:
            self._context.term()


def check_address(address: str, *, encrypted: bool) -> None:
    """Raise ConfigError unless the daemon may bind `address`: loopback, or encrypted."""
    if re.fullmatch(r"inproc://\S+", address) and not encrypted:  # has no encryption of its own
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^:\[\]/]+):(\d{1,5}|\*)", address)
    if match is None or match[2] != "*" and int(match[2]) > 65_535:
        raise ConfigError(f"bind: expected tcp://HOST:PORT, received {address!r}")
    if not encrypted and not _is_loopback(match[1].strip("[]")):
        raise ConfigError(
            f"bind {address}: only a loopback address may be used without keys; make them with "
            "`mclnf-edge keygen` and name them in the configuration, or bind tcp://127.0.0.1:PORT"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A host name could resolve to anything; the one name that may not is this one (RFC 6761).
        return host == "localhost"


def _bind_fault(error: zmq.ZMQError) -> str:
    faults = {
        zmq.EADDRINUSE: "the port is in use by another process",
        zmq.EADDRNOTAVAIL: "expected an address of this machine",
        errno.ENODEV: "expected an address of this machine",
    }
    return faults.get(error.errno or 0, str(error))
