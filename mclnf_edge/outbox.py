"""Frames on their way to the daemon: link, credit window and spool as one first-in first-out queue.

Invariant: an unspooled frame in the window is newer than every record in the spool that is not
done, so frames leave in the order they were taken.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from mclnf_edge.errors import (
    DiskFull,
    FrameRejected,
    MclnfError,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    Unreachable,
    VersionMismatch,
)
from mclnf_edge.spool import Spool
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.link import Link
from mclnf_edge.wire.messages import (
    Ack,
    Acks,
    ErrorReply,
    Message,
    Put,
    PutFrame,
    PutSignal,
    Welcome,
    answer,
)
from mclnf_edge.wire.window import Entry, SendWindow

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Longest wait for a message before timers are looked at again."""


class Outbox:
    """What has been taken from the caller and is not answered yet. For one thread."""

    def __init__(self, link: Link, spool: Spool | None, timeout_s: float) -> None:
        """`counts` grows by one status for each final answer; `on_ack` hears each once."""
        self.counts: Counter[str] = Counter()
        self.on_ack: Callable[[Ack], None] | None = None
        self._link, self._spool = link, spool
        self._timeout_s = timeout_s
        self._window = SendWindow()
        self._refused: dict[bytes, ErrorReply] = {}

    @property
    def waiting(self) -> int:
        """Frames taken but not answered, in flight or in the spool."""
        spooled = len(self._spool) if self._spool is not None else 0
        return spooled + sum(entry.ticket is None for entry in self._window)

    def take(self, put: Put, patience_s: float) -> None:
        """Take a frame; it leaves as soon as link, credit and the older frames allow.

        Waits up to `patience_s` for credit, with a spool never for a lost link. Raises
        Unreachable or, with a spool, DiskFull (not taken); MessageTooLarge, FrameRejected,
        BadField.
        """
        entry = Entry(put.identity, put.id, self._link.hello, encode(put))
        self._check(entry)
        self.wait(lambda: self._may_send(entry) or self._must_spool(), patience_s)
        if not self._must_spool() and self._may_send(entry):
            self._window.add(entry)
        elif self._spool is not None:
            self.keep()
            self._spool.append([entry.record])
        else:
            where = self._link.address
            raise Unreachable(
                f"{where}: no answer that allows another frame for {patience_s:.3g} s"
            )
        self.pump(0)

    def keep(self) -> None:
        """Move what is in flight to the spool, behind what is there; DiskFull changes nothing."""
        if self._spool is None:
            return
        fresh = [entry for entry in self._window if entry.ticket is None]
        self._spool.append([entry.record for entry in fresh])
        self._spool.rewind()
        self._window.clear()

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Pump until `done` or `seconds` have passed; whether it was done."""
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.pump(min(left, TICK_S))
        return True

    def pump(self, wait_s: float) -> list[Message]:
        """One turn: connection, spool, what is due, what has arrived; the replies to requests."""
        if self._link.maintain(expecting=bool(self._window)):
            try:
                self.keep()
            except DiskFull as error:
                log.warning("%s; %d frames stay in memory", error, len(self._window))
        if self._link.up:
            self._refill()
            for entry in self._window.due(time.monotonic(), self._timeout_s):
                self._link.announce(entry.hello)
                self._link.send(entry.parts)
        return [message for message in self._link.receive(wait_s) if not self._took(message)]

    def close(self) -> None:
        """Unanswered frames go to the spool; without one they are lost, and logged."""
        try:
            self.keep()
        finally:
            if self._window:
                log.warning("closing with %d frames unanswered, not spooled", len(self._window))
            self._link.close()
            if self._spool is not None:
                self._spool.close()

    def _check(self, entry: Entry) -> None:
        limits = self._link.welcome.limits if self._link.welcome is not None else {}
        limit = limits.get("message_bytes", entry.size)
        if entry.size > limit:
            raise MessageTooLarge(f"frame: at most {limit} bytes here, {entry.size} encoded")
        if entry.identity in self._window:
            seq = entry.identity[2]
            raise FrameRejected(f"frame: expected a new seq, {seq} is still unanswered")

    def _may_send(self, entry: Entry) -> bool:
        return self._link.up and self._window.room(entry.size)

    def _must_spool(self) -> bool:
        return self._spool is not None and (self._link.lost or self._spool.unread > 0)

    def _refill(self) -> None:
        """Let frames out of the spool while the window has room."""
        spool = self._spool
        while spool is not None and spool.unread and self._window.room(spool.next_size):
            ticket, (hello, *parts) = spool.take()
            put = _put_of(parts)
            if put.identity in self._window:
                spool.done(ticket)
                continue
            self._window.add(Entry(put.identity, put.id, hello, parts, ticket))
            if hello in self._refused:
                self._reject(put, self._refused[hello])

    def _took(self, message: Message) -> bool:
        """Whether the message was about frames; if so it has been dealt with."""
        if isinstance(message, Acks):
            self._window.credit_bytes = message.credit_bytes
            for ack in message.acks:
                self._acknowledge(ack)
        elif isinstance(message, Welcome):
            self._window.credit_bytes = message.credit_bytes
            if message.id == self._link.hello_id:
                self._window.all_due()
        elif isinstance(message, ErrorReply):
            return self._took_error(message)
        return isinstance(message, Acks | Welcome)

    def _took_error(self, error: ErrorReply) -> bool:
        """A refused greeting of ours is raised; of an older session it rejects its frames."""
        if error.id == self._link.hello_id:
            raise remote_error(error)
        about = [entry for entry in self._window if error.id in _numbers(entry)]
        for entry in about:
            if entry.number != error.id:
                self._refused[entry.hello] = error
            if error.code != "no-hello":
                self._reject(_put_of(entry.parts), error)
        return bool(about)

    def _reject(self, put: Put, error: ErrorReply) -> None:
        self._acknowledge(answer(put, "rejected", error.code, error.message))

    def _acknowledge(self, ack: Ack) -> None:
        if ack.status == "busy":
            self._window.hold(ack.identity, time.monotonic() + max(ack.retry_ms, 10) / 1e3)
            return
        entry = self._window.answered(ack.identity)
        if entry is None:
            return  # answered before: this is the reply to a resend
        if entry.ticket is not None and self._spool is not None:
            self._spool.done(entry.ticket)
        self.counts[ack.status] += 1
        if ack.status == "rejected":
            log.warning("frame %d rejected: %s: %s", ack.seq, ack.code, ack.reason)
        if self.on_ack is not None:
            self.on_ack(ack)


def remote_error(error: ErrorReply) -> MclnfError:
    """The exception that an `ErrorReply` stands for."""
    if error.code == VersionMismatch.code:
        return VersionMismatch(error.message)
    return RemoteError(error.message, error.code)


def _numbers(entry: Entry) -> tuple[int, int]:
    return entry.number, decode([entry.hello]).id


def _put_of(parts: list[bytes]) -> Put:
    put = decode(parts)
    if not isinstance(put, PutFrame | PutSignal):
        raise ProtocolError(f"spool: expected a frame, found {put.tag}")
    return put
