"""The client's end of a connection: a DEALER that is opened anew when it breaks or falls silent."""

from __future__ import annotations

import logging
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from mclnf_edge.errors import ConfigError, ProtocolError
from mclnf_edge.wire.codec import decode
from mclnf_edge.wire.keys import KeyPair
from mclnf_edge.wire.messages import MAX_PART_BYTES, ErrorReply, Message, Welcome

log = logging.getLogger(__name__)

Context = zmq.Context[zmq.Socket[bytes]]

_FAULTS = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the daemon does not know our key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the peer's encryption is not ours",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed: wrong server key, or no daemon",
}
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | sum(_FAULTS)


class Link:
    """One connection, with a greeting for who publishes. For one thread.

    `connection` counts the sockets opened so far: what was sent over an older one may be lost.
    `lost` says that the daemon did not answer the greeting or the frames in time; `fault` why the
    last handshake failed, "" when none did. `sent_bytes` and `received_bytes` count the messages'
    parts, without ZeroMQ's few bytes around each.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float,
        server_key: str | None = None,
        client_keys: KeyPair | None = None,
        context: Context | None = None,
    ) -> None:
        """Nothing is connected before the first `maintain`."""
        self.address, self.hello, self.hello_id = address, b"", -1
        self.welcome: Welcome | None = None
        self.lost, self.fault, self.connection = False, "", 0
        self.sent_bytes = self.received_bytes = 0
        self._timeout_s = timeout_s
        self._server_key, self._client_keys = server_key, client_keys
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._shaken = False
        self._quiet_since = 0.0
        self._failures = 0
        self._announced: set[bytes] = set()

    @property
    def up(self) -> bool:
        """Whether the daemon has answered this connection's greeting."""
        return self._socket is not None and self.welcome is not None

    def greet(self, hello: bytes, hello_id: int) -> None:
        """Greet with this encoded `Hello` from now on, over this and every later connection."""
        self.hello, self.hello_id, self.welcome = hello, hello_id, None
        self._quiet_since = time.monotonic()
        if self._socket is not None:
            self.announce(hello)

    def maintain(self, expecting: bool) -> bool:
        """Open the connection, anew when it broke or after too long a silence; True for a silence.

        `expecting` says whether an answer to a frame is due; a greeting's always is. The patience
        doubles with every failure, up to eight times the time-out: the back-off.
        """
        now = time.monotonic()
        if self._socket is None:
            self._open(now)
        elif self._broken():
            log.warning("%s: the connection broke, connecting again", self.address)
            self.reopen()
        if not self.hello or (self.up and not expecting):
            self._quiet_since = now
        patience = self._timeout_s * 2 ** min(self._failures, 3)
        if now - self._quiet_since < patience:
            return False
        self._failures += 1
        log.warning("%s: silent for %.1f s, connecting again", self.address, patience)
        self.reopen()
        self.lost = True
        return True

    def _broken(self) -> bool:
        """Whether ZeroMQ reports that an established connection ended; notes failed handshakes."""
        broken = False
        while self._monitor is not None and self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaken, self.fault = True, ""
            elif event == zmq.EVENT_DISCONNECTED:
                broken = broken or self._shaken
            else:
                self.fault = _FAULTS[zmq.Event(event)]
        return broken

    def reopen(self) -> None:
        """Throw the socket away and connect, and greet, over a new one."""
        self._drop()
        self._open(time.monotonic())

    def _open(self, now: float) -> None:
        socket = self._context.socket(zmq.DEALER)
        heartbeat_ms = max(1, int(self._timeout_s * 1e3))
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 1_000),
            (zmq.RCVHWM, 1_000),
            (zmq.MAXMSGSIZE, MAX_PART_BYTES),
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 2_000),
            # Answered by ZeroMQ itself: a dead link shows while the daemon is busy for minutes.
            (zmq.HEARTBEAT_IVL, max(1, heartbeat_ms // 2)),
            (zmq.HEARTBEAT_TIMEOUT, heartbeat_ms),
            (zmq.IPV6, 1),
        ):
            socket.setsockopt(option, value)
        if self._server_key is not None and self._client_keys is not None:
            socket.curve_serverkey = self._server_key.encode()
            socket.curve_publickey = self._client_keys.public.encode()
            socket.curve_secretkey = self._client_keys.secret.encode()
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise ConfigError(
                f"address {self.address!r}: expected tcp://HOST:PORT ({error})"
            ) from None
        self._monitor = socket.get_monitor_socket(_EVENTS)
        self._socket, self.welcome, self._shaken = socket, None, False
        self.connection += 1
        self._quiet_since = now
        self._announced.clear()
        if self.hello:
            self.announce(self.hello)

    def announce(self, hello: bytes) -> None:
        """Send a greeting once a connection; frames of its stream follow it."""
        if hello not in self._announced and self.send([hello]):
            self._announced.add(hello)

    def send(self, parts: list[bytes]) -> bool:
        """Queue one message; False when the queue is full."""
        assert self._socket is not None
        try:
            self._socket.send_multipart(parts, zmq.DONTWAIT)
        except zmq.Again:
            return False
        self.sent_bytes += sum(map(len, parts))
        return True

    def receive(self, wait_s: float) -> list[Message]:
        """What has arrived, waiting at most `wait_s` for the first; broken messages are logged."""
        assert self._socket is not None
        messages: list[Message] = []
        if not self._socket.poll(int(wait_s * 1e3)):
            return messages
        while len(messages) < 64:
            try:
                parts = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            self._quiet_since = time.monotonic()
            self.received_bytes += sum(map(len, parts))
            try:
                messages.append(decode(parts))
            except ProtocolError as error:
                log.warning("%s: %s", self.address, error)
        for message in messages:
            self._greeted(message)
        return messages

    def _greeted(self, message: Message) -> None:
        if isinstance(message, Welcome) and message.id == self.hello_id:
            self.welcome, self.lost, self._failures = message, False, 0
        elif isinstance(message, ErrorReply) and message.code == "no-hello" and self.up:
            self.reopen()  # the daemon, or ZeroMQ below us, began a new connection

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close(linger=0)
            self._socket = self._monitor = None

    def close(self) -> None:
        """Close at once."""
        self._drop()
        if self._own_context:
            self._context.term()
