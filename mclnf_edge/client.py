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
from typing import Any, Literal, TypeVar

from mclnf_edge import __version__
from mclnf_edge.errors import ConfigError, ProtocolError, Unreachable
from mclnf_edge.outbox import TICK_S, Outbox, remote_error
from mclnf_edge.spool import Spool
from mclnf_edge.types import Frame, Modality, Render, Signal, View, WorldFrame
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.keys import load_public, load_secret
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
    Plane,
    Progress,
    Put,
    PutFrame,
    PutSignal,
    Quality,
    RenderReply,
    RenderRequest,
    ReplyEncoding,
    StatusReply,
    StatusRequest,
    Welcome,
)
from mclnf_edge.wire.planes import render_of

M = TypeVar("M", bound=Message)
PictureEncoding = Literal["png", "jpeg", "raw"]
OnAck = Callable[[Ack], None]
PLANES: tuple[Plane, ...] = ("depth", "known")


class Client:
    """A connection to a daemon that survives cut links, lost replies and restarts of either side.

    `counts` holds, by status, how many frames were answered. Usable as a context manager.
    """

    def __init__(
        self,
        address: str,
        *,
        server_key: Path | None = None,
        client_key: Path | None = None,
        timeout_s: float = 5.0,
        give_up_s: float = 30.0,
        spool: Path | None = None,
        spool_bytes: int = 256 * 1024 * 1024,
        context: Context | None = None,
    ) -> None:
        """Connect on first use.

        `server_key` is the daemon's .public file, `client_key` this client's .secret file: both or
        neither. `timeout_s` of silence about frames is a lost link: what is unanswered is sent
        again, or goes to the folder `spool`. Calls give up with `Unreachable` after `give_up_s`.
        Raises ConfigError, or StoreError for a spool in use.
        """
        if (server_key is None) != (client_key is None):
            raise ConfigError("encryption needs both server_key and client_key, received one")
        public = load_public(server_key) if server_key is not None else None
        keys = load_secret(client_key) if client_key is not None else None
        self.session, self.stream, self._closed = "", "", False
        self._timeout_s, self._give_up_s, self._spooling = timeout_s, give_up_s, spool is not None
        # Numbers of different processes differ, so that a spooled message keeps its own.
        self._numbers = itertools.count(secrets.randbits(61))
        store = Spool(spool, spool_bytes) if spool is not None else None
        self._link = Link(address, timeout_s, public, keys, context)
        self._outbox = Outbox(self._link, store, timeout_s)

    @property
    def counts(self) -> Counter[str]:
        """Final answers so far, by status."""
        return self._outbox.counts

    @property
    def waiting(self) -> int:
        """Frames taken but not answered yet, in flight or in the spool."""
        return self._outbox.waiting

    def hello(
        self,
        *,
        session: str | None = None,
        stream: str = "camera",
        modality: Modality = "posed",
        world: WorldFrame | None = None,
        axes: Axes = "opengl",
    ) -> Welcome | None:
        """Announce the stream that is published next; `publish` does it with the defaults.

        `session` None makes a new one, so that a restarted publisher's frames are new frames; with
        the old one, `Welcome.last_seq` says where to go on. None when nobody answered in
        `timeout_s` and a spool takes the frames. Raises Unreachable, or RemoteError when refused.
        """
        if self._link.hello:
            self.flush()
        self.session, self.stream = session or uuid.uuid4().hex, stream
        hello = Hello(
            id=next(self._numbers),
            session=self.session,
            stream=stream,
            modality=modality,
            world=world or WorldFrame(),
            axes=axes,
            client=f"mclnf-edge {__version__}",
        )
        self._link.greet(encode(hello)[0], hello.id)
        patience = self._timeout_s if self._spooling else self._give_up_s
        if not self._outbox.wait(lambda: self._link.up, patience) and not self._spooling:
            raise self._unreachable("hello", patience)
        return self._link.welcome

    def submit(self, item: Frame | Signal) -> None:
        """Take a frame and send it as soon as the credit allows; its answer comes later.

        Waits for credit, at most `give_up_s`. With a spool it waits at most `timeout_s` and never
        for a lost link. Raises Unreachable (not taken), DiskFull (the spool is full, not taken),
        MessageTooLarge, FrameRejected (its seq is in flight) or BadField.
        """
        if not self._link.hello:
            self.hello(modality="posed" if isinstance(item, Frame) else _modality(item))
        self._outbox.take(self._put(item), self._timeout_s if self._spooling else self._give_up_s)

    def publish(
        self, frames: Iterable[Frame], rate_hz: float | None = None, on_ack: OnAck | None = None
    ) -> Counter[str]:
        """Send frames, at `rate_hz` or as fast as the credit allows; returns counts by status.

        Waits for every answer; `on_ack` hears each final one, once. With a spool, frames that are
        still in it at the end are counted as `spooled`; without one Unreachable is raised.
        """
        return self._publish(frames, rate_hz, on_ack)

    def publish_signals(
        self, signals: Iterable[Signal], rate_hz: float | None = None, on_ack: OnAck | None = None
    ) -> Counter[str]:
        """`publish` for images, video frames or audio chunks without pose."""
        return self._publish(signals, rate_hz, on_ack)

    def _publish(
        self, items: Iterable[Frame | Signal], rate_hz: float | None, on_ack: OnAck | None
    ) -> Counter[str]:
        before, start = self.counts.copy(), time.monotonic()
        self._outbox.on_ack = on_ack
        try:
            for number, item in enumerate(items):
                if rate_hz is not None:
                    self._outbox.wait(lambda: False, start + number / rate_hz - time.monotonic())
                self.submit(item)
            self.flush()
        except Unreachable:
            if not self._spooling:
                raise
        finally:
            self._outbox.on_ack = None
        return self.counts - before + Counter(spooled=self.waiting)

    def flush(self) -> None:
        """Wait until every taken frame is answered; Unreachable when none is for `give_up_s`."""
        while self.waiting:
            if not self._link.hello:
                self.hello()  # only a spool of an earlier run can be waiting
            if not self._outbox.wait(self._fewer_than(self.waiting), self._give_up_s):
                raise self._unreachable(f"{self.waiting} frames", self._give_up_s)

    def _fewer_than(self, waiting: int) -> Callable[[], bool]:
        return lambda: self.waiting < waiting

    def close_task(self, task: str | None = None) -> tuple[str, ...]:
        """Close this stream's task (all open ones for None) once its frames are answered."""
        self.flush()
        if not self._link.hello:
            raise ConfigError("close_task: expected a stream (hello or publish first), found none")
        request = CloseTask(
            id=next(self._numbers), session=self.session, stream=self.stream, task=task
        )
        return self._ask_one(request, Closed).tasks

    def drain(self, close: bool = True) -> Iterator[Progress]:
        """Progress reports until the daemon has adapted all it accepted; the last has `done`.

        The time-out counts from the last report, so a long adaptation is not cut off. Take every
        report before the next call.
        """
        self.flush()
        for reply in self._ask(Drain(id=next(self._numbers), close=close)):
            progress = _expect(reply, Progress)
            yield progress
            if progress.done:
                return

    def render(
        self,
        view: View,
        width: int = 0,
        height: int = 0,
        quality: Quality = "full",
        want: tuple[Plane, ...] = PLANES,
        *,
        encoding: PictureEncoding = "png",
        deadline_ms: int = 0,
    ) -> Render:
        """Render a view, 0 x 0 pixels meaning its own size.

        Planes not in `want` come back all NaN. Raises RemoteError (code `stale` when the deadline
        passed), Unreachable or ProtocolError. Of "progressive" only the last picture is returned.
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
        *_, last = self._renders(request)
        return last

    def render_progressive(
        self,
        view: View,
        width: int = 0,
        height: int = 0,
        want: tuple[Plane, ...] = PLANES,
        *,
        encoding: PictureEncoding = "png",
    ) -> Iterator[Render]:
        """A preview first, then the full picture. Take every picture before the next call."""
        request = RenderRequest(
            id=next(self._numbers),
            view=view,
            width=width,
            height=height,
            quality="progressive",
            encoding=encoding,
            want=want,
        )
        return self._renders(request)

    def _renders(self, request: RenderRequest) -> Iterator[Render]:
        for reply in self._ask(request):
            rendered = _expect(reply, RenderReply)
            yield render_of(rendered)
            if rendered.final:
                return

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
        want: tuple[Plane, ...] = (),
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
            want=want,
        )
        return self._ask_one(request, RenderReply)

    def status(self) -> dict[str, Any]:
        """The daemon's state."""
        return self._ask_one(StatusRequest(id=next(self._numbers)), StatusReply).status()

    def close(self) -> None:
        """Close at once. Unanswered frames go to the spool; without one they are lost (logged)."""
        if not self._closed:
            self._closed = True
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
        """Send a request, again over each new connection, and yield its replies without end."""
        parts, heard, sent_over = encode(request), time.monotonic(), 0
        self._outbox.pump(0)
        while time.monotonic() - heard < self._give_up_s:
            if self._link.connection != sent_over and self._link.send(parts):
                sent_over = self._link.connection
            for reply in self._outbox.pump(TICK_S):
                if reply.id == request.id:
                    heard = time.monotonic()
                    yield reply
        raise self._unreachable(request.tag, self._give_up_s)

    def _unreachable(self, what: str, seconds: float) -> Unreachable:
        fault = f" ({self._link.fault})" if self._link.fault else ""
        return Unreachable(f"{self._link.address}: no answer to {what} for {seconds:.3g} s{fault}")

    def _ask_one(self, request: Message, kind: type[M]) -> M:
        return _expect(next(self._ask(request)), kind)


def _expect(reply: Message, kind: type[M]) -> M:
    """`reply` when it is of this kind; raises what an `ErrorReply` says."""
    if isinstance(reply, ErrorReply):
        raise remote_error(reply)
    if not isinstance(reply, kind):
        raise ProtocolError(f"expected the reply {kind.tag}, received {reply.tag}")
    return reply


def _modality(signal: Signal) -> Modality:
    """What a stream that begins with `signal` carries: sound by its encoding, else a video."""
    if signal.encoding in ("s16le", "f32le"):
        return "audio"
    return "video" if signal.rate_hz else "image"
