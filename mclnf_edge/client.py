"""The client: publish frames or signals, close tasks, drain, render, ask for the status.

One thread per client. Nothing runs in the background: every call also moves answers, resends and
the spool on. Frames are identified by (session, stream, seq), so a resend never makes a second
frame. With a spool, frames that cannot be sent are kept on disk and leave it in order.
"""

from __future__ import annotations

import itertools
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mclnf_edge import __version__
from mclnf_edge.errors import ConfigError, ProtocolError, Unreachable
from mclnf_edge.outbox import Outbox, remote_error
from mclnf_edge.spool import Spool
from mclnf_edge.types import Frame, Render, View, WorldFrame
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.keys import KeyPair, check_key
from mclnf_edge.wire.link import Context, Link
from mclnf_edge.wire.messages import (
    Ack,
    Axes,
    Closed,
    CloseTask,
    Drain,
    ErrorReply,
    Hello,
    Message,
    Modality,
    Plane,
    Progress,
    Put,
    PutFrame,
    PutSignal,
    Quality,
    RenderReply,
    RenderRequest,
    ReplyEncoding,
    Signal,
    StatusReply,
    StatusRequest,
)
from mclnf_edge.wire.planes import render_of

M = TypeVar("M", bound=Message)


class Client:
    """A connection to a daemon that survives cut links, lost replies and restarts of either side.

    `counts` holds, by status, how many frames were answered. Usable as a context manager.
    """

    def __init__(
        self,
        address: str,
        *,
        session: str | None = None,
        stream: str = "camera",
        modality: Modality = "posed",
        world: WorldFrame | None = None,
        axes: Axes = "opengl",
        server_key: str | None = None,
        client_keys: KeyPair | None = None,
        spool: Path | None = None,
        spool_bytes: int = 256 * 1024 * 1024,
        timeout_s: float = 5.0,
        give_up_s: float = 30.0,
        on_ack: Callable[[Ack], None] | None = None,
        context: Context | None = None,
    ) -> None:
        """Connect on first use.

        `session` None makes a new one, so that a restarted publisher's frames are new frames.
        `timeout_s` of silence is a lost link: everything unanswered is sent again, or goes to the
        spool. Calls give up with `Unreachable` after `give_up_s`. `server_key` is the daemon's
        public Z85 key and needs `client_keys`. `on_ack` hears the final answer to each frame,
        once. Raises ConfigError, or StoreError for a spool in use.
        """
        if (server_key is None) != (client_keys is None):
            raise ConfigError("encryption needs both server_key and client_keys, received one")
        if server_key is not None:
            check_key(server_key, "server_key")
        self.session, self.stream = session or uuid.uuid4().hex, stream
        self._timeout_s, self._give_up_s, self._spooling = timeout_s, give_up_s, spool is not None
        # Numbers of different processes differ, so that a spooled message keeps its own.
        self._numbers = itertools.count(secrets.randbits(61))
        hello = Hello(
            id=next(self._numbers),
            session=self.session,
            stream=stream,
            modality=modality,
            world=world or WorldFrame(),
            axes=axes,
            client=f"mclnf-edge {__version__}",
        )
        self._link = Link(
            *(address, encode(hello)[0], hello.id, timeout_s),
            *(server_key, client_keys, context),
        )
        store = Spool(spool, spool_bytes) if spool is not None else None
        self._outbox = Outbox(self._link, store, timeout_s, on_ack)

    @property
    def counts(self) -> Counter[str]:
        """Final answers so far, by status."""
        return self._outbox.counts

    @property
    def waiting(self) -> int:
        """Frames taken but not answered yet, in flight or in the spool."""
        return self._outbox.waiting

    @property
    def last_seq(self) -> int | None:
        """The largest seq the daemon had kept of this session's stream when greeted, -1 for none.

        None before the first contact.
        """
        return self._link.welcome.last_seq if self._link.welcome is not None else None

    def submit(self, item: Frame | Signal) -> None:
        """Take a frame and send it as soon as the credit allows; its answer comes later.

        Waits for credit, at most `give_up_s`. With a spool it waits at most `timeout_s` and never
        for a lost link. Raises Unreachable (not taken), DiskFull (the spool is full, not taken),
        MessageTooLarge, FrameRejected (its seq is in flight) or BadField.
        """
        self._outbox.take(self._put(item), self._timeout_s if self._spooling else self._give_up_s)

    def publish(self, item: Frame | Signal) -> Ack | None:
        """Send one frame and wait for its answer; None when it went to the spool instead."""
        identity = (self.session, self.stream, item.seq)
        self._outbox.answers[identity] = None
        try:
            self.submit(item)
            if self._outbox.wait(lambda: identity not in self._outbox, self._give_up_s):
                return self._outbox.answers[identity]
            raise Unreachable(f"{self._link.address}: no answer to frame {item.seq}; still held")
        finally:
            del self._outbox.answers[identity]

    def publish_many(self, items: Iterable[Frame | Signal]) -> Counter[str]:
        """Send frames as fast as the credit allows and wait for every answer; counts by status."""
        before = self.counts.copy()
        for item in items:
            self.submit(item)
        self.flush()
        return self.counts - before

    def flush(self, wait_s: float | None = None) -> None:
        """Wait until every taken frame is answered; Unreachable when none is for `wait_s`."""
        patience = self._give_up_s if wait_s is None else wait_s
        while self.waiting:
            if not self._outbox.wait(self._fewer_than(self.waiting), patience):
                raise Unreachable(
                    f"{self._link.address}: {self.waiting} frames without an answer for "
                    f"{patience:.0f} s, {'kept in the spool' if self._spooling else 'still held'}"
                )

    def _fewer_than(self, waiting: int) -> Callable[[], bool]:
        return lambda: self.waiting < waiting

    def close_task(self, task: str | None = None) -> tuple[str, ...]:
        """Close this stream's task (all open ones for None) once its frames are answered."""
        self.flush()
        request = CloseTask(
            id=next(self._numbers), session=self.session, stream=self.stream, task=task
        )
        return self._ask_one(request, Closed).tasks

    def drain(
        self, on_progress: Callable[[Progress], None] | None = None, *, close: bool = True
    ) -> Progress:
        """Wait until the daemon has adapted all it accepted; its last progress report.

        The time-out counts from the last report, so a long adaptation is not cut off.
        """
        self.flush()
        for reply in self._ask(Drain(id=next(self._numbers), close=close)):
            progress = _expect(reply, Progress)
            if on_progress is not None:
                on_progress(progress)
            if progress.done:
                return progress
        raise AssertionError("replies end with the final one or an error")

    def render(
        self,
        view: View,
        *,
        width: int = 0,
        height: int = 0,
        quality: Quality = "full",
        encoding: ReplyEncoding = "png",
        want: tuple[Plane, ...] = ("depth", "known"),
        deadline_ms: int = 0,
        on_preview: Callable[[Render], None] | None = None,
    ) -> Render:
        """Render a view; with quality "progressive" `on_preview` sees the earlier pictures.

        Planes not in `want` come back all NaN. Raises RemoteError (code `stale` when the deadline
        passed), Unreachable or ProtocolError.
        """
        request = RenderRequest(
            id=next(self._numbers),
            view=view,
            width=width,
            height=height,
            quality=quality,
            encoding=encoding,
            want=want,
            deadline_ms=deadline_ms,
        )
        for reply in self._ask(request):
            rendered = _expect(reply, RenderReply)
            if rendered.final:
                return render_of(rendered)
            if on_preview is not None:
                on_preview(render_of(rendered))
        raise AssertionError("replies end with the final one or an error")

    def render_signal(
        self,
        *,
        time_s: float | None = None,
        span_s: tuple[float, float] | None = None,
        session: str = "",
        stream: str = "",
        width: int = 0,
        height: int = 0,
        rate_hz: float = 0.0,
        encoding: ReplyEncoding = "png",
    ) -> RenderReply:
        """A picture at `time_s`, or the sound of `span_s`, of a signal: encoded bytes in `data`."""
        request = RenderRequest(
            id=next(self._numbers),
            time_s=time_s,
            span_s=span_s,
            session=session,
            stream=stream,
            width=width,
            height=height,
            rate_hz=rate_hz,
            encoding=encoding,
        )
        return self._ask_one(request, RenderReply)

    def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return self._ask_one(StatusRequest(id=next(self._numbers)), StatusReply).status()

    def close(self) -> None:
        """Close at once. Unanswered frames go to the spool; without one they are lost (logged)."""
        self._outbox.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, item: Frame | Signal) -> Put:
        number = next(self._numbers)
        if isinstance(item, Frame):
            return PutFrame(id=number, session=self.session, stream=self.stream, frame=item)
        return PutSignal(id=number, session=self.session, stream=self.stream, signal=item)

    def _ask(self, request: Message) -> Iterator[Message]:
        """Send a request, again after each time-out or new connection, and yield its replies."""
        parts, heard, sent = encode(request), time.monotonic(), 0.0
        sent_over = None
        while time.monotonic() - heard < self._give_up_s:
            overdue = time.monotonic() - max(sent, heard) >= self._timeout_s
            if self._link.up and (overdue or self._link.welcome is not sent_over):
                self._link.send(parts)
                sent_over, sent = self._link.welcome, time.monotonic()
            for reply in self._outbox.pump(0.05, expecting=True):
                if reply.id == request.id:
                    heard = time.monotonic()
                    yield reply
        raise Unreachable(
            f"{self._link.address}: no answer to {request.tag} for {self._give_up_s:.0f} s"
        )

    def _ask_one(self, request: Message, kind: type[M]) -> M:
        return _expect(next(self._ask(request)), kind)


def _expect(reply: Message, kind: type[M]) -> M:
    """`reply` when it is of this kind; raises what an `ErrorReply` says."""
    if isinstance(reply, ErrorReply):
        raise remote_error(reply)
    if not isinstance(reply, kind):
        raise ProtocolError(f"expected the reply {kind.tag}, received {reply.tag}")
    return reply
