"""`serve`: the socket loop. Receives, checks, keeps, acknowledges; hands the rest to the worker.

This thread never computes. A frame is acknowledged in the reply to the group commit that made it
durable; renders, drains and states come back from the worker through `_outbox`.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import mclnf_edge
from mclnf_edge.config import ComputeConfig, ServeConfig
from mclnf_edge.daemon import logs
from mclnf_edge.daemon.leader import chunk, committed
from mclnf_edge.daemon.security import Keyring, check_role
from mclnf_edge.daemon.sockets import ROUND, Endpoint, Incoming
from mclnf_edge.daemon.start import open_cached
from mclnf_edge.daemon.worker import RenderJob, Worker, pack_frame
from mclnf_edge.errors import (
    ConfigError,
    DeviceError,
    DiskFull,
    FrameRejected,
    MclnfError,
    ProtocolError,
    StoreError,
)
from mclnf_edge.geometry import check_camera, check_pose
from mclnf_edge.images import check_decodes
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.initialization import (
    Initialization,
    SignalInitialization,
)
from mclnf_edge.mapping.pieces import decode_piece
from mclnf_edge.mapping.sites import Place, Sites
from mclnf_edge.store import DURABILITY, FrameRow, MapStore
from mclnf_edge.types import Matrix4, Modality
from mclnf_edge.wire.codec import decode, encode, error_reply
from mclnf_edge.wire.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Acks,
    Closed,
    CloseTask,
    Drain,
    ErrorReply,
    FetchModule,
    Follow,
    Hello,
    Message,
    Put,
    PutFrame,
    PutSignal,
    RenderRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    answer,
    opengl_frame,
)
from mclnf_edge.world_frames import check_world

log = logging.getLogger(__name__)

_PROGRESS_S = 0.5
_GIVE_WAY_S = 0.3
_NO_ROOM = "the device has no room to learn; what was accepted is kept for a start that has"
_BUSY_MS = 1000
_MAX_ACKS = 1024
_MAX_RENDERS = 256
_MAX_DRAINERS = 256
_MAX_STREAMS = 1024
_ACTIVE_S = 60.0


class _NoHello(ProtocolError):
    code = "no-hello"


class WrongModality(ProtocolError):
    """A stream or piece of another modality than the map's."""

    code = "modality"


@dataclass
class _Stream:
    """A stream that greeted on some connection: its axes, and what takes its poses to a site."""

    axes: str
    place: Place
    last_pose: Matrix4 | None = None
    heard: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Put:
    """A frame on its way into the ledger; `before` is the pose its stream had then."""

    peer: bytes
    message: Put
    row: FrameRow
    stream: _Stream
    before: Matrix4 | None


@dataclass
class _Drainer:
    peer: bytes
    id: int
    request: int
    due: float


def serve(
    config: ServeConfig,
    init: Path | None,
    map_dir: Path,
    bind: str,
    device: str | None,
    on_ready: Callable[[str], None],
) -> int:
    """Serve the map in `map_dir` at `bind` until SIGTERM or SIGINT; the process's exit code.

    `on_ready(address)` is called once the map is restored and frames are taken. Raises InitError,
    MapMismatch, StoreError, ConfigError or DeviceError before that; afterwards nothing is raised:
    0 means drained and stopped, 1 that the compute thread failed or hung.
    """
    config = computing(config, device)
    keyring = prepare(config)
    start = open_cached(config, init)
    if isinstance(start, SignalInitialization) and config.compute.device == "cuda":
        raise ConfigError(
            f"--device cuda: maps of {start.modality} learn on the CPU; use cpu or auto"
        )
    meta = _map_meta(config, start)
    with MapStore.open(
        map_dir, meta=meta, max_journal_bytes=config.map.journal_budget_bytes
    ) as store:
        endpoint = Endpoint(bind, keyring)
        try:
            return Service(config, store, endpoint, Worker, start).run(on_ready)
        finally:
            endpoint.close()


def computing(config: ServeConfig, device: str | None) -> ServeConfig:
    """The settings with what the command line says of the device.

    Raises ConfigError or DeviceError where engine, device and field do not go together.
    """
    if device is not None:
        config = replace(config, compute=ComputeConfig(config.compute.engine, device))  # type: ignore[arg-type]
    choose(config.compute.engine, config.compute.device, config.field.kind)
    return config


def prepare(config: ServeConfig) -> Keyring | None:
    """Start the log and read the keys; raises ConfigError."""
    logs.configure(config.watch.log)
    if config.security.keys is None:
        return None
    return Keyring.load(config.security.secret_file, config.security.authorised_file)


class Service:
    """The loop's state: who greeted, what waits for a commit, who waits for a drain."""

    def __init__(
        self, config: ServeConfig, store: MapStore, endpoint: Endpoint, worker: Any, init: Any
    ) -> None:
        self.config, self.store, self.endpoint = config, store, endpoint
        self.modality: Modality = (
            init.modality if isinstance(init, SignalInitialization) else "posed"
        )
        self.worker: Worker = worker(config, store, init, self._post, _threads())
        self._outbox: deque[tuple[bytes, Message]] = deque()
        self._streams: dict[tuple[bytes, str, str], _Stream] = {}
        self._rejected: dict[tuple[str, str], int] = defaultdict(int)
        self._drainers: list[_Drainer] = []
        self._sites = Sites(store.meta())
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._notify = _Notifier()
        self._full = False
        self._commits = self._frames = 0
        self._frame_bytes = store.frame_bytes()

    def run(self, on_ready: Callable[[str], None]) -> int:
        """Restore, announce, loop, stop."""
        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, self._on_signal)
        try:
            self.worker.start()
            while not self.worker.ready.wait(1.0):
                self._notify.send("EXTEND_TIMEOUT_USEC=10000000")
            if self.worker.error is not None:
                raise self.worker.error
            on_ready(self.endpoint.address)
            self._notify.send("READY=1")
            while not self._stop.is_set():
                batch = self.endpoint.receive(100)
                self._turn(batch)
                if len(batch) == ROUND:
                    self._give_way()
                if not self._healthy():
                    return self._give_up()
            return self._shut_down()
        finally:
            for handled, handler in previous.items():
                signal.signal(handled, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        self.endpoint.wake()

    # -- one round ------------------------------------------------------------------------------

    def _turn(self, batch: list[Incoming]) -> None:
        puts: list[_Put] = []
        acks: dict[bytes, list[Ack]] = defaultdict(list)
        frames: list[tuple[Incoming, Put]] = []
        after: list[tuple[Incoming, Message]] = []
        for incoming in batch:  # no request waits until others' pictures are checked
            with self._answering(incoming):
                message = decode(incoming.parts)
                check_role(incoming.user, message)
                self._check(message)
                if isinstance(message, PutFrame | PutSignal):
                    frames.append((incoming, message))
                elif isinstance(message, (CloseTask, Drain)):
                    after.append((incoming, message))
                else:
                    self._handle(incoming.peer, message)
        for incoming, put in frames:
            with self._answering(incoming):
                self._take(incoming, put, puts, acks)
        if puts or self._rejected:
            self._commit(puts, acks)
        for incoming, message in after:  # they mean the frames that were sent before them
            with self._answering(incoming):
                self._handle(incoming.peer, message)
        for peer, answers in acks.items():
            for i in range(0, len(answers), _MAX_ACKS):
                part = tuple(answers[i : i + _MAX_ACKS])
                self._send(
                    peer, Acks(acks=part, credit_bytes=self._credit(), durability=DURABILITY)
                )
        self._flush()
        self._tell_drainers()

    def _give_way(self) -> None:
        """Under a flood nothing is read while a view is made: checking pictures takes a core.

        Frames wait at their publishers meanwhile, for `_GIVE_WAY_S` at most.
        """
        end = time.monotonic() + _GIVE_WAY_S
        while self.worker.rendering and time.monotonic() < end and not self._stop.is_set():
            self.endpoint.rest(20)
            self._flush()

    @contextmanager
    def _answering(self, incoming: Incoming) -> Iterator[None]:
        """What goes wrong with a message is told to its sender, and the loop goes on."""
        try:
            yield
        except MclnfError as error:
            self.endpoint.send(incoming.peer, encode(error_reply(error, incoming.parts)))
            told = "from %s: %s: %s", incoming.user.name, error.code, error
            log.warning(*told, extra={"code": error.code})

    def _check(self, message: Message) -> None:
        """Raise a ProtocolError for what this daemon does not take from anybody."""

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
                row = self._signal_row(put)
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
        check_decodes(frame.image, frame.encoding, frame.camera)
        payload = None
        site, pose = stream.place(pose)
        if not self._hovers(stream, pose):
            stream.last_pose = pose
            kept = replace(put, frame=replace(frame, T_world_camera=pose))
            payload = pack_frame(site, encode(kept))
        return FrameRow(put.session, put.stream, frame.seq, frame.timestamp, payload)

    def _signal_row(self, put: PutSignal) -> FrameRow:
        """A piece of a signal, checked; without payload when it is not to be learned from."""
        if self.modality == "posed":
            raise WrongModality("put-signal: this map holds posed frames, use put-frame")
        signal = put.signal
        decode_piece(signal, self.modality)
        payload = pack_frame(0, encode(put)) if signal.split == "train" else None
        return FrameRow(put.session, put.stream, signal.seq, signal.timestamp, payload)

    def _hovers(self, stream: _Stream, pose: Matrix4) -> bool:
        """Whether a picture adds no parallax to the last one that was taken."""
        last = stream.last_pose
        if last is None:
            return False
        moved = float(np.linalg.norm(pose[:3, 3] - last[:3, 3]))
        turned = float(np.dot(pose[:3, 2], last[:3, 2]))
        return moved < self.worker.hover_m and turned > float(np.cos(np.radians(1.0)))

    def _commit(self, puts: list[_Put], acks: dict[bytes, list[Ack]]) -> None:
        """One transaction for all frames of the round; they are answered after it is durable."""
        try:
            if self._full:
                self.store.reopen()
            statuses = self.store.put_frames([put.row for put in puts], self._rejected)
            if self._full:
                log.info("disk: room again")
            self._full = False
            self._rejected.clear()
        except DiskFull as error:
            if not self._full:
                log.error("disk: %s; publishers are told busy", error)
            self._full = True
            for put in reversed(puts):
                put.stream.last_pose = put.before  # sent again, it must not look like hovering
            for put in puts:
                busy = answer(put.message, "busy", error.code, str(error), _BUSY_MS)
                acks[put.peer].append(busy)
            return
        for put, status in zip(puts, statuses, strict=True):
            acks[put.peer].append(answer(put.message, status))
            if status == "accepted":
                self._frame_bytes += len(put.row.payload or b"")
        self._commits += 1
        self._frames += len(puts)
        if "accepted" in statuses:
            self.worker.nudge()

    def _handle(self, peer: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._send(peer, self._greet(peer, message))
        elif isinstance(message, RenderRequest):
            self._queue_render(peer, message)
        elif isinstance(message, StatusRequest):
            self._send(peer, StatusReply.of(self._status(), id=message.id))
        elif isinstance(message, CloseTask):
            self._send(peer, self._end_task(message))
        elif isinstance(message, Drain):
            if len(self._drainers) >= _MAX_DRAINERS:
                raise ProtocolError(f"drain: {_MAX_DRAINERS} requests wait already")
            request = self.worker.drain(message.close)
            self._drainers.append(_Drainer(peer, message.id, request, 0.0))
        elif isinstance(message, Follow):
            self._send(peer, committed(self.store, message, self._frame_bytes))
        elif isinstance(message, FetchModule):
            self._send(peer, chunk(self.store, message))
        else:
            raise ProtocolError(f"{message.tag}: expected a request")

    def _queue_render(self, peer: bytes, message: RenderRequest) -> None:
        if self.worker.waiting >= _MAX_RENDERS:
            raise ProtocolError(f"render: {_MAX_RENDERS} requests wait already; ask again later")
        site, now = 0, time.monotonic()
        if message.view is not None:
            place = self._known_sites().find(message.view.world)
            site, pose = place(check_pose(message.view.T_world_camera, "view"))
            message = replace(message, view=replace(message.view, T_world_camera=pose))
        self.worker.submit(RenderJob(peer, message, now, site))

    def _known_sites(self) -> Sites:
        """The map's sites, the last that were read while the ledger cannot be: renders go on."""
        with suppress(StoreError):
            self._sites = Sites(self.store.meta())
        return self._sites

    def _end_task(self, message: CloseTask) -> Closed:
        """The task that was named, else every module that is open now."""
        self.worker.end_task(f"{message.session}/{message.stream}", message.task)
        if message.task is not None:
            return Closed(id=message.id, tasks=(message.task,))
        modules = self.worker.state["modules"]
        learning = tuple(m["id"] for m in modules if m["state"] in ("open", "adapting"))
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
        publishers = len({key[0] for key, s in self._streams.items() if s.heard > since}) or 1
        return max(self.config.wire.credit_bytes // publishers, 256 * 1024)

    # -- answers --------------------------------------------------------------------------------

    def _post(self, peer: bytes, message: Message) -> None:
        """Called by the worker: queue an answer and wake the loop."""
        self._outbox.append((peer, message))
        self.endpoint.wake()

    def _flush(self) -> None:
        while self._outbox:
            self._send(*self._outbox.popleft())

    def _send(self, peer: bytes, message: Message) -> None:
        self.endpoint.send(peer, encode(message))

    def _tell_drainers(self) -> None:
        now = time.monotonic()
        for drainer in list(self._drainers):
            if now < drainer.due:
                continue
            if self.worker.state.get("out_of_memory"):
                self._send(
                    drainer.peer, ErrorReply(id=drainer.id, code=DeviceError.code, message=_NO_ROOM)
                )
                self._drainers.remove(drainer)
                continue
            progress = self.worker.progress_of(drainer.request)
            drainer.due = now + _PROGRESS_S
            told = self.endpoint.send(drainer.peer, encode(replace(progress, id=drainer.id)))
            if progress.done or not told:
                self._drainers.remove(drainer)

    def _status(self) -> dict[str, Any]:
        state = self.worker.state
        streams = [
            {
                k: s[k]
                for k in (
                    "session",
                    "stream",
                    "accepted",
                    "duplicate",
                    "redundant",
                    "rejected",
                    "last_seq",
                )
            }
            for s in self.store.streams()
        ]
        return {
            "device": "cpu",
            **state,
            "version": mclnf_edge.__version__,
            "streams": streams,
            "memory_mb": _resident_mb(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "cpu_s": time.process_time(),
            "render_cpu_s": self.worker.render_cpu_s,
            "renders": self.worker.renders,
            "uptime_s": time.monotonic() - self._started,
            "journal_bytes": self.store.journal_bytes(),
            "commits": self._commits,
            "frames_kept": self._frames,
            "frame_bytes": self._frame_bytes,
            "dropped": dict(self.endpoint.dropped),
            "disk_full": self._full or self.worker.disk_full,
            "health": {
                "compute_beat_s": time.monotonic() - self.worker.beat,
                "disk_full": self._full or self.worker.disk_full,
            },
        }

    # -- life -----------------------------------------------------------------------------------

    def _healthy(self) -> bool:
        stalled = time.monotonic() - self.worker.beat
        if self.worker.error is not None or not self.worker.is_alive():
            log.critical("compute thread ended: %r", self.worker.error)
            return False
        if stalled > self.config.watch.hang_s:
            log.critical("compute thread stalled for %.0f s", stalled)
            return False
        self._notify.watchdog()
        return True

    def _give_up(self) -> int:
        """A daemon that answers but cannot learn is worse than none: end, to be started again."""
        logging.shutdown()
        if self.worker.is_alive():  # stuck in native code: nothing else ends it
            os._exit(1)
        return 1

    def _shut_down(self) -> int:
        self._notify.send("STOPPING=1")
        self.worker.stop()
        self.worker.join(self.config.watch.drain_s)
        if self.worker.is_alive():
            log.error("compute thread did not stop within %.0f s", self.config.watch.drain_s)
            return self._give_up()
        self._flush()
        log.info(
            "stopped after %.0f s, %d frames kept", time.monotonic() - self._started, self._frames
        )
        return 0 if self.worker.error is None else 1


class _Notifier:
    """systemd's notification socket, when there is one (Type=notify)."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET")
        self._due = 0.0

    def send(self, state: str) -> None:
        """Tell the supervisor; a missing one is no fault."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd notification: %s", error)

    def watchdog(self) -> None:
        """Feed the watchdog once a second; only the loop that proved progress calls this."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + 1.0
            self.send("WATCHDOG=1")


def _map_meta(config: ServeConfig, init: Initialization | SignalInitialization) -> dict[str, Any]:
    """What the map on disk must agree with."""
    if isinstance(init, SignalInitialization):
        return {"modality": init.modality, "init": init.digest, "signal": init.as_meta()}
    meta: dict[str, Any] = {
        "modality": "posed", "init": init.digest, "field": asdict(config.field)
    }  # fmt: skip
    if config.map.cell_size_m != "auto":
        meta["cell_size_m"] = config.map.cell_size_m
    return meta


def _threads() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), 8))


def _resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6
