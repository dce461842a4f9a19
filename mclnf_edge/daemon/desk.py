"""The thread at the ledger: greets streams, keeps frames and acknowledges them, ends tasks.

Every request that writes to the map on disk is answered here, in the order it came, so that a disk
that takes seconds holds up no view and no status. A frame is acknowledged in the reply to the group
commit that made it durable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import numpy as np

import mclnf_edge
from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon.leader import chunk, committed
from mclnf_edge.daemon.sockets import ROUND, Incoming
from mclnf_edge.daemon.worker import Worker, pack_frame
from mclnf_edge.errors import DiskFull, FrameRejected, MclnfError, ProtocolError
from mclnf_edge.geometry import check_camera, check_pose
from mclnf_edge.mapping.frames import check_frame
from mclnf_edge.mapping.pieces import decode_piece
from mclnf_edge.mapping.sites import Place, Sites
from mclnf_edge.store import DURABILITY, FrameRow, MapStore
from mclnf_edge.types import Matrix4, Modality
from mclnf_edge.wire.codec import encode, error_reply
from mclnf_edge.wire.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Acks,
    Closed,
    CloseTask,
    Drain,
    FetchModule,
    Follow,
    Hello,
    Message,
    Put,
    PutFrame,
    PutSignal,
    Welcome,
    answer,
    opengl_frame,
)
from mclnf_edge.world_frames import check_world

log = logging.getLogger(__name__)

Reply = Callable[[bytes, Message], None]

_BUSY_MS = 1000
_SLOW_S = 1.0
"""A disk that takes longer is slow: frames that come meanwhile are sent back."""
_MAX_WAITING = 1024
_MAX_ACKS = 1024
_MAX_DRAINERS = 256
_MAX_STREAMS = 1024
_ACTIVE_S = 60.0


class _NoHello(ProtocolError):
    code = "no-hello"


class WrongModality(ProtocolError):
    """A stream or piece of another modality than the map's."""

    code = "modality"


class SlowDisk(ProtocolError):
    """The disk takes too long for this request to wait for it."""

    code = "slow-disk"


@dataclass
class _Stream:
    """A stream that greeted on some connection: its axes, and what takes its poses to a site."""

    axes: str
    place: Place
    last_pose: Matrix4 | None = None
    heard: float = field(default_factory=time.monotonic)
    form: tuple[tuple[int, ...], float] | None = None
    """Size (height, width; none of sound) and rate in Hz of the pieces of a video or sound."""

    def go_on(self, size: tuple[int, ...], rate_hz: float) -> None:
        """Check a piece against those before it on this connection; raises FrameRejected."""
        self.form = self.form or (size, rate_hz)
        if self.form != (size, rate_hz):
            told, received = (
                f"{'x'.join(map(str, reversed(size)))} at {hz:g} Hz".removeprefix(" at ")
                for size, hz in (self.form, (size, rate_hz))
            )
            raise FrameRejected(f"signal: expected {told} as before, received {received}")


@dataclass(frozen=True)
class _Put:
    """A frame on its way into the ledger; `before` is the pose its stream had then."""

    peer: bytes
    message: Put
    row: FrameRow
    stream: _Stream
    before: Matrix4 | None


@dataclass
class Drainer:
    """Who waits for a drain: request `id` of `peer`, the worker's request, when it is told next."""

    peer: bytes
    id: int
    request: int
    due: float = 0.0


Asked = tuple[Incoming, Message]


class Desk(threading.Thread):
    """Start it, `put` requests, `stop` and `join` it; `error` is what ended it.

    `reply(peer, message)` and `done()`, after each round, are called from this thread.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: MapStore,
        worker: Worker,
        modality: Modality,
        reply: Reply,
        done: Callable[[], None],
    ) -> None:
        super().__init__(name="desk", daemon=True)
        self.config, self.store, self.worker, self.modality = config, store, worker, modality
        self._reply, self._done = reply, done
        self.error: BaseException | None = None
        self.drainers: list[Drainer] = []
        self.full = False
        self.commits = self.frames = 0
        self.frame_bytes = store.frame_bytes()
        self._streams: dict[tuple[bytes, str, str], _Stream] = {}
        self._rejected: dict[tuple[str, str], int] = defaultdict(int)
        self._waiting: deque[Asked] = deque()
        self._waiting_bytes = 0
        self._moved: float | None = None
        self._wake = threading.Condition()
        self._stopping = False

    # -- from the socket's thread ---------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being answered."""
        return self._moved is not None or bool(self._waiting)

    @property
    def stalled_s(self) -> float:
        """How long ago the round that is under way last moved on, 0 for none."""
        moved = self._moved
        return 0.0 if moved is None else time.monotonic() - moved

    def put(self, incoming: Incoming, message: Message) -> None:
        """Queue a request; while the disk is slow a frame is told busy at once.

        Raises SlowDisk for any other request that would wait behind too many.
        """
        slow = self.stalled_s > _SLOW_S or self._waiting_bytes > self.config.wire.credit_bytes
        if slow and isinstance(message, PutFrame | PutSignal):
            why = f"{self._waiting_bytes} bytes wait, the disk is silent for {self.stalled_s:.1f} s"
            busy = answer(message, "busy", SlowDisk.code, why, _BUSY_MS)
            acks = Acks(acks=(busy,), credit_bytes=self._credit(), durability=DURABILITY)
            self._reply(incoming.peer, acks)
            return
        if len(self._waiting) >= _MAX_WAITING:
            raise SlowDisk(f"{message.tag}: {_MAX_WAITING} requests wait for the disk already")
        with self._wake:
            self._waiting.append((incoming, message))
            self._waiting_bytes += _bytes(incoming)
            self._wake.notify()

    def stop(self) -> None:
        """End when all that waits was answered."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # -- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Answer until stopped."""
        try:
            while batch := self._next():
                self._round(batch)
                self._moved = None
                self._done()
        except BaseException as error:
            log.exception("the thread at the ledger failed")
            self.error = error
            self._done()

    def _next(self) -> list[Asked]:
        """The next requests, as many as one commit takes; none when it is time to end."""
        with self._wake:
            while not self._waiting and not self._stopping:
                self._wake.wait()
            self._moved = time.monotonic()
            batch = [self._waiting.popleft() for _ in range(min(ROUND, len(self._waiting)))]
            self._waiting_bytes -= sum(_bytes(incoming) for incoming, _ in batch)
            return batch

    def _round(self, batch: Sequence[Asked]) -> None:
        puts: list[_Put] = []
        acks: dict[bytes, list[Ack]] = defaultdict(list)
        frames = [(i, m) for i, m in batch if isinstance(m, PutFrame | PutSignal)]
        after = [(i, m) for i, m in batch if isinstance(m, CloseTask | Drain)]
        for incoming, message in batch:  # no request waits until others' pictures are checked
            if not isinstance(message, PutFrame | PutSignal | CloseTask | Drain):
                self._answer(incoming, message)
        for incoming, put in frames:
            with answering(incoming, self._reply):
                self._take(incoming, put, puts, acks)
            self._moved = time.monotonic()  # a large picture takes its time: that is no slow disk
        if puts or self._rejected:
            self._commit(puts, acks)
        for incoming, message in after:  # they mean the frames that were sent before them
            self._answer(incoming, message)
        for peer, answers in acks.items():
            for i in range(0, len(answers), _MAX_ACKS):
                part = tuple(answers[i : i + _MAX_ACKS])
                told = Acks(acks=part, credit_bytes=self._credit(), durability=DURABILITY)
                self._reply(peer, told)

    def _answer(self, incoming: Incoming, message: Message) -> None:
        with answering(incoming, self._reply):
            self._handle(incoming.peer, message)
        self._moved = time.monotonic()

    def _handle(self, peer: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._reply(peer, self._greet(peer, message))
        elif isinstance(message, CloseTask):
            self._reply(peer, self._end_task(message))
        elif isinstance(message, Drain):
            if len(self.drainers) >= _MAX_DRAINERS:
                raise ProtocolError(f"drain: {_MAX_DRAINERS} requests wait already")
            self.drainers.append(Drainer(peer, message.id, self.worker.drain(message.close)))
        elif isinstance(message, Follow):
            self._reply(peer, committed(self.store, message, self.frame_bytes))
        elif isinstance(message, FetchModule):
            self._reply(peer, chunk(self.store, message))
        else:
            raise ProtocolError(f"{message.tag}: expected a request")

    # -- frames ---------------------------------------------------------------------------------

    def _take(
        self,
        incoming: Incoming,
        put: Put,
        puts: list[_Put],
        acks: dict[bytes, list[Ack]],
    ) -> None:
        """Check a frame; queue it for the commit, or answer at once when it may not be used."""
        stream = self._streams.get((incoming.peer, put.session, put.stream))
        if stream is None:
            raise _NoHello(f"{put.session}/{put.stream} has not said hello on this connection")
        stream.heard, before = time.monotonic(), stream.last_pose
        try:
            if isinstance(put, PutSignal):
                row = self._signal_row(stream, put)
            else:
                row = self._frame_row(stream, put)
        except FrameRejected as error:
            self._rejected[(put.session, put.stream)] += 1
            acks[incoming.peer].append(answer(put, "rejected", error.code, str(error)))
            session, stream_name, seq = put.identity
            about = {"session": session, "stream": stream_name, "seq": seq, "code": error.code}
            log.warning("frame %s/%s #%d rejected: %s", *put.identity, error, extra=about)
            return
        puts.append(_Put(incoming.peer, put, row, stream, before))

    def _frame_row(self, stream: _Stream, put: PutFrame) -> FrameRow:
        """A posed frame, checked, its pose in its site's frame; raises FrameRejected."""
        if self.modality != "posed":
            raise WrongModality(f"put-frame: this map holds {self.modality}, use put-signal")
        frame = opengl_frame(put.frame, stream.axes)  # type: ignore[arg-type]
        check_camera(frame.camera, "frame.camera")
        pose = check_pose(frame.T_world_camera, "frame.T_world_camera")
        check_frame(frame)
        payload = None
        site, pose = stream.place(pose)
        if frame.split == "train" and not self._hovers(_name(put), stream, pose):
            stream.last_pose = pose
            kept = replace(put, frame=replace(frame, T_world_camera=pose))
            payload = pack_frame(site, encode(kept))
        return FrameRow(put.session, put.stream, frame.seq, frame.timestamp, payload)

    def _signal_row(self, stream: _Stream, put: PutSignal) -> FrameRow:
        """A piece of a signal, checked; without payload when it is not to be learned from.

        Raises FrameRejected, also for one that does not go on with the stream's video or sound.
        """
        if self.modality == "posed":
            raise WrongModality("put-signal: this map holds posed frames, use put-frame")
        signal = put.signal
        decode_piece(signal, self.modality)
        if self.modality != "image":
            stream.go_on(signal.shape[:2] if self.modality == "video" else (), signal.rate_hz)
        payload = pack_frame(0, encode(put)) if signal.split == "train" else None
        return FrameRow(put.session, put.stream, signal.seq, signal.timestamp, payload)

    def _hovers(self, name: str, stream: _Stream, pose: Matrix4) -> bool:
        """Whether a picture adds no parallax to the last one that was taken of stream `name`."""
        last = stream.last_pose
        if last is None:
            return False
        moved = float(np.linalg.norm(pose[:3, 3] - last[:3, 3]))
        turned = float(np.dot(pose[:3, 2], last[:3, 2]))
        near = moved < self.worker.hover_m.get(name, 1e-3)
        return near and turned > float(np.cos(np.radians(1.0)))

    def _commit(self, puts: list[_Put], acks: dict[bytes, list[Ack]]) -> None:
        """One transaction for all frames of the round; they are answered after it is durable."""
        try:
            if self.full:
                self.store.reopen()
            statuses = self.store.put_frames([put.row for put in puts], self._rejected)
            if self.full:
                log.info("disk: room again")
            self.full = False
            self._rejected.clear()
        except DiskFull as error:
            if not self.full:
                log.error("disk: %s; publishers are told busy", error)
            self.full = True
            for put in reversed(puts):
                put.stream.last_pose = put.before  # sent again, it must not look like hovering
            for put in puts:
                busy = answer(put.message, "busy", error.code, str(error), _BUSY_MS)
                acks[put.peer].append(busy)
            return
        for put, status in zip(puts, statuses, strict=True):
            acks[put.peer].append(answer(put.message, status))
            if status == "accepted":
                self.frame_bytes += len(put.row.payload or b"")
        self.commits += 1
        self.frames += len(puts)
        if "accepted" in statuses:
            self.worker.nudge()

    # -- streams and tasks ----------------------------------------------------------------------

    def _end_task(self, message: CloseTask) -> Closed:
        """The task that was named, else every module of the stream that is open now."""
        name = _name(message)
        self.worker.end_task(name, message.task)
        if message.task is not None:
            return Closed(id=message.id, tasks=(message.task,))
        modules = self.worker.state["modules"]
        learning = tuple(m["id"] for m in modules if name in m.get("streams", ()))
        return Closed(id=message.id, tasks=learning)

    def _greet(self, peer: bytes, hello: Hello) -> Welcome:
        if hello.modality != self.modality:
            raise WrongModality(
                f"hello: this map holds {self.modality}, received modality {hello.modality}"
            )
        world, place = check_world(hello.world), Sites({}).find(None)
        if self.modality == "posed":
            sites = Sites(self.store.meta())
            self.store.fix_meta(sites.add(world))
            place = sites.find(world)
        self.store.put_stream(
            hello.session, hello.stream, {**asdict(hello), "world": asdict(world)}
        )
        for key in [k for k in self._streams if k[1:] == (hello.session, hello.stream)]:
            del self._streams[key]  # the same stream on a new connection
        if len(self._streams) >= _MAX_STREAMS:  # it greets again when it is heard again
            del self._streams[min(self._streams, key=lambda key: self._streams[key].heard)]
        self._streams[(peer, hello.session, hello.stream)] = _Stream(hello.axes, place)
        last = [
            s
            for s in self.store.streams()
            if (s["session"], s["stream"]) == (hello.session, hello.stream)
        ]
        told = (
            "stream %s/%s: hello from %s",
            hello.session,
            hello.stream,
            hello.client or "a client",
        )
        log.info(*told, extra={"session": hello.session, "stream": hello.stream})
        return Welcome(
            id=hello.id,
            server=f"mclnf-edge {mclnf_edge.__version__}",
            modality=self.modality,
            credit_bytes=self._credit(),
            last_seq=last[0]["last_seq"] if last and last[0]["last_seq"] is not None else -1,
            limits={"message_bytes": MAX_MESSAGE_BYTES},
            durability=DURABILITY,
        )

    def _credit(self) -> int:
        """Each publisher's share of the bytes that may be unanswered; idle ones have none."""
        since = time.monotonic() - _ACTIVE_S
        publishers = len({key[0] for key, s in list(self._streams.items()) if s.heard > since}) or 1
        return max(self.config.wire.credit_bytes // publishers, 256 * 1024)


@contextmanager
def answering(incoming: Incoming, reply: Reply) -> Iterator[None]:
    """What goes wrong with a message is told to its sender, and the daemon goes on."""
    try:
        yield
    except MclnfError as error:
        reply(incoming.peer, error_reply(error, incoming.parts))
        told = "from %s: %s: %s", incoming.user.name, error.code, error
        log.warning(*told, extra={"code": error.code})


def _name(message: Put | CloseTask) -> str:
    """What the mapper calls a stream."""
    return f"{message.session}/{message.stream}"


def _bytes(incoming: Incoming) -> int:
    return sum(map(len, incoming.parts))
