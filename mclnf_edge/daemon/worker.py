"""The compute thread: feeds accepted frames to the mapper, trains, commits, renders.

One thread owns the mapper. Between two optimization steps it answers every waiting render, so a
view waits for one step at most. Frames come from the ledger alone, new or after a restart: there is
one path, and nothing that was acknowledged can be missed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import msgpack

from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon.signal_replies import ENGINE as SIGNAL_ENGINE
from mclnf_edge.daemon.signal_replies import signal_reply
from mclnf_edge.daemon.warm_up import warm_up
from mclnf_edge.errors import Corrupt, DiskFull, MclnfError, ProtocolError, StoreError
from mclnf_edge.geometry import check_camera, check_pose
from mclnf_edge.images import encode_image
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization
from mclnf_edge.mapping.interface import TaskMapper
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Module
from mclnf_edge.mapping.residency import Residency
from mclnf_edge.store import MapStore, ModuleRecord, module_info
from mclnf_edge.types import ModuleSnapshot, Render, View
from mclnf_edge.wire.codec import decode
from mclnf_edge.wire.messages import (
    ErrorReply,
    Message,
    Progress,
    Put,
    PutFrame,
    PutSignal,
    RenderReply,
    RenderRequest,
)
from mclnf_edge.wire.planes import pack_plane

if TYPE_CHECKING:
    from mclnf_edge.mapping.signals import SignalMapper

log = logging.getLogger(__name__)

OPEN_WORK = "open"
"""Name of the checkpoint of everything that still learns."""

_INGEST_SLICE_S = 2.0
"""A backlog is taken in this long before modules are seeded: more views, better surfaces."""

_STEP_SHARE = 0.3
"""Optimization steps get at least this share of the time while frames keep coming."""

_STATE_S = 0.25
_COMPILE_S = 900.0
"""The compiler may take this long before it counts as hung."""


class _Stopped(Exception):
    """The daemon was told to stop in the middle of a turn."""


def pack_frame(site: int, parts: list[bytes]) -> bytes:
    """A frame's site and message parts as one ledger payload."""
    packed: bytes = msgpack.packb([site, *parts], use_bin_type=True)
    return packed


def unpack_frame(payload: bytes) -> tuple[int, Put]:
    """The site and frame or signal of a ledger payload; raises Corrupt or ProtocolError."""
    site, *parts = msgpack.unpackb(payload, raw=False)
    message = decode(parts)
    if not isinstance(message, PutFrame | PutSignal):
        raise Corrupt(f"ledger payload: expected put-frame or put-signal, received {message.tag}")
    return int(site), message


@dataclass(frozen=True)
class RenderJob:
    """A render request, who asked, and when it came in (monotonic seconds).

    The request's pose is in the world frame of `site`.
    """

    peer: bytes
    request: RenderRequest
    arrived: float
    site: int = 0


class Worker(threading.Thread):
    """Start it, `submit` renders, `nudge` it when frames were kept, `stop` and `join` it.

    `send(peer, message)` and `done()` are called from this thread. `error` holds what ended the
    thread, None while it is sound. `state` is replaced as a whole, never changed.
    """

    def __init__(
        self,
        config: ServeConfig,
        store: MapStore,
        init: Initialization | SignalInitialization,
        send: Callable[[bytes, Message], None],
        threads: int,
    ) -> None:
        super().__init__(name="compute", daemon=True)
        self.config, self.store, self._send = config, store, send
        self.mapper = _mapper(config, init, threads, store.load_module)
        self.engine = SIGNAL_ENGINE
        if isinstance(self.mapper, Mapper):
            budget = config.render.resident_mb * 10**6
            residency = Residency(self.mapper.modules, budget, self._load)
            self.mapper.residency = residency
            self.engine = self.mapper.optimizer.name
            self.mapper.optimizer.alive = self._alive
            self.renderer = Renderer(self.mapper.optimizer.paint, residency)
        self.error: BaseException | None = None
        self.beat = time.monotonic()
        self.ready = threading.Event()
        self.state: dict[str, Any] = {"modules": [], "engine": self.engine, "steps": 0}
        self._progress = (0, Progress())
        self._drains = 0
        self.hover_m = 1e-3
        self.rejected: deque[tuple[str, str, int, str]] = deque(maxlen=256)
        self._renders: deque[RenderJob] = deque()
        self._wake = threading.Condition()
        self._work = True
        self._stopping = False
        self._drain = False
        self._ends: deque[tuple[str, str | None]] = deque()
        self._ended: list[tuple[str, str | None]] = []
        self._last_id = 0
        self._ingested_all = False
        self._versions = self._restored = 0
        self._kept: dict[str, Any] = {}
        self._checkpoint_due = time.monotonic() + config.watch.checkpoint_s
        self._rate: deque[tuple[float, float]] = deque(maxlen=40)
        self._committed: dict[str, dict[str, Any]] = {}
        self._newest: dict[str, int] = {}
        self.disk_full = False
        self._state_due = self._take_in_due = 0.0
        self.render_cpu_s, self.renders = 0.0, 0

    # -- from other threads ---------------------------------------------------------------------

    def submit(self, job: RenderJob) -> None:
        """Queue a render."""
        with self._wake:
            self._renders.append(job)
            self._wake.notify()

    @property
    def waiting(self) -> int:
        """Renders that wait."""
        return len(self._renders)

    def progress_of(self, request: int) -> Progress:
        """How far the work is; done only when it was so after drain `request` was made."""
        seen, now = self._progress
        return replace(now, done=now.done and seen >= request)

    def nudge(self) -> None:
        """Frames were kept, or something was asked: look."""
        with self._wake:
            self._work = True
            self._wake.notify()

    def drain(self, close: bool) -> int:
        """Adapt all there is; with `close`, close every task too. The request's number."""
        with self._wake:
            self._drains += 1
            self._drain = self._drain or close
            request = self._drains
        self.nudge()
        return request

    def end_task(self, stream: str, task: str | None) -> None:
        """See `Mapper.end_task`; `stream` is "session/stream". It is durable when this returns."""
        self._keep_task(stream, task, "closing")
        self._ends.append((stream, task))
        self.nudge()

    def _keep_task(self, stream: str, task: str | None, state: str) -> None:
        """`closing`: asked for since the last checkpoint; `ended`: the checkpoint knows it."""
        name = stream if task is None else f"{stream}/{task}"
        self.store.put_task(name, state, {"stream": stream, "task": task})

    def stop(self) -> None:
        """End after the current step, with a checkpoint of the open work."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    # -- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Restore, compile what is not compiled yet, then work until stopped."""
        try:
            self._restore()
            self._publish_state()
            self.ready.set()
            self._prepare()
            self._work_on()
            self._checkpoint()
        except BaseException as error:
            log.exception("compute thread failed")
            self.error = error
            self.ready.set()

    def _prepare(self) -> None:
        """Frames are taken meanwhile; renders wait."""
        if not isinstance(self.mapper, Mapper):
            return  # signals run on torch
        log.info("preparing kernels; on a machine's first start the compiler takes minutes")
        self.beat = time.monotonic() + _COMPILE_S
        warm_up(self.config, self.mapper.threads)
        log.info("kernels are ready")

    def _work_on(self) -> None:
        try:
            while not self._stopping:
                if not self._turn():
                    self._sleep()
        except _Stopped:
            log.info("told to stop in the middle of a turn; it is done again after a restart")

    def _turn(self) -> bool:
        """One round; False when there was nothing to do."""
        self.beat = time.monotonic()
        self._serve_renders()
        busy = time.monotonic() >= self._take_in_due and self._take_in()
        if self.mapper.step() is not None:
            busy = True
        else:
            self._take_in_due = 0.0
        self._commit_finished()
        self._let_go_unused()
        if time.monotonic() >= self._checkpoint_due:
            self._checkpoint()
        self._publish_state()
        return busy

    def _take_in(self) -> bool:
        """New frames, then cells, modules and seeds for them; whether there was anything to do.

        With many frames held this takes seconds for each new one, so steps get a share of the time
        before it is done again: else a flight faster than the machine would never be learned from.
        """
        began = time.monotonic()
        ends = len(self._ends)  # what is asked from here on means frames that come from here on
        busy = self._ingest()
        if not self._ingested_all:  # a task's frames come before its end
            ends = 0
        self.mapper.draining = self._drain and self._ingested_all
        if self.mapper.settle(self._pause, last=ends > 0):
            busy = True
        for _ in range(ends):
            self._ended.append(self._ends.popleft())
            self.mapper.end_task(*self._ended[-1])
        now = time.monotonic()
        self._take_in_due = now + (now - began) * _STEP_SHARE / (1 - _STEP_SHARE)
        return busy

    def _alive(self) -> None:
        self.beat = time.monotonic()

    def _pause(self) -> None:
        """Between two parts of long work; raises _Stopped when there is no time to go on."""
        self.beat = time.monotonic()
        self._serve_renders()
        if self._stopping:
            raise _Stopped

    def _sleep(self) -> None:
        with self._wake:
            if not (self._work or self._renders or self._stopping):
                self._wake.wait(0.5)
            self._work = False

    def _restore(self) -> None:
        for record in self.store.modules():
            self._adopt(record)
        kept = self.store.checkpoint_load(OPEN_WORK)
        if kept is not None:
            self.mapper.restore(*kept)
            self._kept = kept[1].get("frames", {})
        for state, task in self.store.tasks().values():
            if state == "closing":
                self._ends.append((task["stream"], task["task"]))
        log.info(
            "map has %d closed versions, %d modules open",
            self._versions,
            len(self.mapper.learning()),
        )

    def _adopt(self, record: ModuleRecord) -> None:
        """Serve a committed version from now on; a damaged one is quarantined when it is read."""
        self._restored += 1
        self._newest[record.id] = max(record.version, self._newest.get(record.id, 0))
        if record.state != "closed":
            self._committed[f"{record.id}.{record.version}"] = module_info(record)
            return
        try:
            self._take(record)
        except Corrupt as error:
            self._quarantine(record, error)
            return
        self._committed[record.id] = module_info(record)
        self._versions += 1

    def _take(self, record: ModuleRecord) -> None:
        if isinstance(self.mapper, Mapper):  # reads what it needs, when it needs it
            self.mapper.adopt(None, record.meta, record.version, record.digest)
            return
        snapshot = self.store.load_module(record.id, record.version)
        self.mapper.adopt(snapshot.arrays, snapshot.meta, record.version, record.digest)

    def _load(self, module: Module) -> None:
        """Bring a committed module into memory; a damaged one gives way to its last sound version.

        Without one its place is unknown, and may be learned anew.
        """
        mapper = self.mapper
        assert isinstance(mapper, Mapper) and mapper.pool is not None
        self.beat = time.monotonic()  # a view may need hundreds
        try:
            snapshot = self.store.load_module(module.id, module.version)
            module.slot = mapper.pool.load(module.cell, snapshot.arrays)
        except Corrupt as error:
            self._replace(mapper, module, error)
        except StoreError as error:
            log.error("task %s version %d not read: %s", module.id, module.version, error)

    def _replace(self, mapper: Mapper, module: Module, error: Corrupt) -> None:
        """Quarantine a damaged version and load the one before, where there is a sound one."""
        versions = [r for r in self.store.modules() if r.id == module.id]
        self._quarantine(next(r for r in versions if r.version == module.version), error)
        sound = [r for r in versions if r.state == "closed" and r.version < module.version]
        if not sound:
            self._committed.pop(module.id, None)
            mapper.lose(module.cell)
            return
        self._committed[module.id] = module_info(sound[-1])
        mapper.adopt(None, sound[-1].meta, sound[-1].version, sound[-1].digest)
        self._load(mapper.modules[module.cell])

    def _quarantine(self, record: ModuleRecord, error: Corrupt) -> None:
        log.error("task %s version %d quarantined: %s", record.id, record.version, error)
        damaged = {**module_info(record), "state": "quarantined"}
        self._committed[f"{record.id}.{record.version}"] = damaged
        try:
            self.store.quarantine(record.id, record.version)
        except StoreError as full:  # it is found again after a restart
            log.error("task %s: %s", record.id, full)

    def _ingest(self) -> bool:
        """Hand the ledger's next frames to the mapper, for a short while."""
        end, any_frame = time.monotonic() + _INGEST_SLICE_S, False
        self._ingested_all = False
        while time.monotonic() < end:
            if (
                self.mapper.held_bytes > self.config.map.frame_budget_bytes
                and not self._make_room()
            ):
                return any_frame
            held = self._stored(lambda: next(self.store.held_frames(self._last_id, 1), None))
            if held is None:
                self._ingested_all = True
                break
            self._last_id, any_frame = held.id, True
            try:
                site, put = unpack_frame(held.payload)
                stream, kept = f"{held.session}/{held.stream}", self._kept.pop(str(held.id), None)
                piece = put.frame if isinstance(put, PutFrame) else put.signal
                self.mapper.add(held.id, stream, piece, site=site, kept=kept)
            except Exception as error:  # a frame that cannot be used must not end the daemon
                log.warning(
                    "frame %d (%s/%s #%d) let go: %s",
                    held.id,
                    held.session,
                    held.stream,
                    held.seq,
                    error,
                )
                if not isinstance(error, MclnfError):
                    log.exception("frame %d", held.id)
                self.rejected.append((held.session, held.stream, held.seq, str(error)))
                self._stored(lambda gone=held.id: self.store.let_go({gone: 0}))  # type: ignore[misc]
            self._serve_renders()
        self.hover_m = self.mapper.hover_m
        return any_frame

    def _make_room(self) -> bool:
        """Let the oldest sufficiently trained frames go; whether any went.

        What they taught must be durable before: without a checkpoint they stay.
        """
        gone = self.mapper.shed(self.config.map.frame_budget_bytes * 3 // 4)
        if not gone or not self._checkpoint():
            return False
        self._stored(lambda: self.store.let_go(gone))
        self.mapper.forget(gone)
        return True

    def _commit_finished(self) -> None:
        for module in self.mapper.finished():
            closing = self.mapper.close(module)
            if closing.snapshot is None:
                self._stored(lambda c=closing: self.store.let_go(c.let_go))  # type: ignore[misc]
                self.mapper.forget(closing.let_go)
                continue
            number = max(closing.snapshot.version, self._newest.get(closing.snapshot.id, 0) + 1)
            whole = replace(closing, snapshot=replace(closing.snapshot, version=number))
            record = self._stored(lambda c=whole: self.store.commit_module(c.snapshot, c.let_go))  # type: ignore[misc]
            module.digest, module.version = record.digest, record.version
            self._newest[record.id] = record.version
            self._committed[record.id] = module_info(record)
            self._versions += 1
            self.mapper.forget(closing.let_go)
            log.info("task %s committed as version %d", record.id, record.version)
            self._serve_renders()

    def _stored(self, act: Callable[[], Any]) -> Any:
        """Repeat a read or write until the disk takes it; renders go on meanwhile.

        Raises DiskFull when the daemon is to stop: there is no checkpoint then, the last one holds.
        """
        while True:
            try:
                result = act()
                self.disk_full = False
                return result
            except DiskFull as error:
                if not self.disk_full:
                    log.error("disk: %s; waiting for it", error)
                self.disk_full = True
                if self._stopping:
                    raise
                self.beat = time.monotonic()
                self._serve_renders()
                time.sleep(0.5)
                try:
                    self.store.reopen()
                except StoreError:
                    continue

    def _let_go_unused(self) -> None:
        gone = self.mapper.unused()
        if gone:
            self._stored(lambda: self.store.let_go(gone))
            self.mapper.forget(gone)

    def _checkpoint(self) -> bool:
        """Keep the open work; whether the disk took it."""
        arrays, meta = self.mapper.checkpoint()
        self._checkpoint_due = time.monotonic() + self.config.watch.checkpoint_s
        try:
            self.store.checkpoint_save(OPEN_WORK, arrays, meta)
            while self._ended:
                self._keep_task(*self._ended[-1], "ended")
                self._ended.pop()
        except StoreError as error:
            log.error("checkpoint: %s", error)
            return False
        return True

    # -- renders --------------------------------------------------------------------------------

    def _serve_renders(self) -> None:
        while True:
            with self._wake:
                if not self._renders:
                    return
                job = self._renders.popleft()
            before = time.process_time()
            try:
                self._answer(job)
            except MclnfError as error:
                self._send(
                    job.peer, ErrorReply(id=job.request.id, code=error.code, message=str(error))
                )
            except Exception as error:  # one request must not end the daemon for everyone
                log.exception("render %d failed", job.request.id)
                told = f"the daemon could not render this view: {error}"
                self._send(job.peer, ErrorReply(id=job.request.id, code="internal", message=told))
            self.beat = time.monotonic()
            self.render_cpu_s += time.process_time() - before
            self.renders += 1

    def _answer(self, job: RenderJob) -> None:
        request = job.request
        waited = (time.monotonic() - job.arrived) * 1e3
        if request.deadline_ms and waited > request.deadline_ms:
            late = f"waited {waited:.0f} ms of {request.deadline_ms} ms"
            self._send(job.peer, ErrorReply(id=request.id, code="stale", message=late))
            return
        if not isinstance(self.mapper, Mapper):
            pixels, mapper = self.config.render.preview_px, cast("SignalMapper", self.mapper)
            reply = signal_reply(mapper, request, pixels, self._versions, self._alive)
            self._send(job.peer, reply)
            return
        view = _sized(request)
        small = replace(view, camera=_preview(view, self.config.render.preview_px))
        if request.quality in ("preview", "progressive"):
            self._send(job.peer, self._reply(job, small, final=request.quality == "preview"))
        if request.quality != "preview":
            self._send(job.peer, self._reply(job, view, final=True))

    def _reply(self, job: RenderJob, view: View, *, final: bool) -> RenderReply:
        start, request = time.monotonic(), job.request
        mapper = self.mapper
        assert isinstance(mapper, Mapper)
        gain = mapper.exposures.at(view.stream, view.timestamp)
        origin = mapper.origins.get(job.site)
        done = self.renderer.render(mapper.pool, origin, view, gain, self._versions, job.site)
        ms = (time.monotonic() - start) * 1e3
        return RenderReply(
            id=request.id,
            data=_encoded(done, request),
            encoding=request.encoding,
            width=view.camera.width,
            height=view.camera.height,
            depth=pack_plane(done.depth, "float32") if "depth" in request.want else None,
            known=pack_plane(done.known, "float16") if "known" in request.want else None,
            map_version=self._versions,
            modules=done.modules[:4096],
            engine=f"{self.engine}/{mapper.optimizer.device}",
            ms=ms,
            final=final,
        )

    # -- what others see ------------------------------------------------------------------------

    def _publish_state(self) -> None:
        now = time.monotonic()
        if now < self._state_due and self._progress[0] == self._drains:
            return
        self._state_due = now + _STATE_S
        mapper, asked, draining = self.mapper, self._drains, self._drain
        modules = list(self._committed.values())
        learning = mapper.learning()
        for m in learning:
            state = "adapting" if draining else "open"
            told = mapper.describe(m)
            modules.append(
                {"id": m.id, "version": m.version, "state": state, "digest": ""}
                | {key: told[key] for key in ("steps", "frames", "bounds", "psnr")}
            )
        done = mapper.progress()
        self._rate.append((now, done))
        backlog = self._stored(lambda: self.store.count_held(self._last_id))
        finished = (
            self._ingested_all and not backlog and (not mapper.frames if draining else done >= 1)
        )
        with self._wake:
            if finished and asked == self._drains:
                self._drain = False
        progress = Progress(
            done=finished,
            frames_waiting=len(mapper.frames) + backlog,
            modules_open=len(learning),
            modules_closed=self._versions,
            steps=mapper.steps,
            psnr=mapper.psnr,
            seconds_left=0.0 if finished else _seconds_left(self._rate),
        )
        self._progress = (asked, progress)
        self.state = {
            "modules": modules,
            "engine": self.engine,
            "steps": mapper.steps,
            "frames_held": len(mapper.frames),
            "frames_waiting": backlog,
            "psnr": mapper.psnr,
            "progress": done if learning or finished else 0.0,
            **mapper.facts(),
        }


def _mapper(
    config: ServeConfig,
    init: Initialization | SignalInitialization,
    threads: int,
    recall: Callable[[str, int], ModuleSnapshot],
) -> TaskMapper:
    """The mapper of what the initialization is for."""
    if isinstance(init, SignalInitialization):
        from mclnf_edge.mapping.signals import SignalMapper  # with PyTorch, which takes a second

        return SignalMapper(config, init, recall)
    compute = choose(config.compute.engine, config.compute.device, config.field.kind)
    return Mapper(config.map, config.field, config.adapt, init.mlp, threads, recall, compute)


def _seconds_left(rate: deque[tuple[float, float]]) -> float | None:
    (t0, a), (t1, b) = rate[0], rate[-1]
    if b >= 1 or t1 - t0 < 1 or b <= a:
        return None
    return float((1 - b) * (t1 - t0) / (b - a))


def _sized(request: RenderRequest) -> View:
    """The view at the size that was asked for; raises FrameRejected or ProtocolError."""
    if request.view is None:
        raise ProtocolError("render: expected a view; this map holds posed frames")
    view = request.view
    check_pose(view.T_world_camera, "view")
    camera = replace(check_camera(view.camera, "view"), model="PINHOLE", distortion=())
    if request.width or request.height:
        width = request.width or max(round(camera.width * request.height / camera.height), 1)
        height = request.height or max(round(camera.height * request.width / camera.width), 1)
        camera = camera.scaled(width, height)
    if camera.width * camera.height > 4_000_000:  # tens of seconds; a hang is taken for 60
        raise ProtocolError(
            f"render: expected at most 4 megapixels, received {camera.width}x{camera.height}"
        )
    return replace(view, camera=camera)


def _preview(view: View, pixels: int) -> Any:
    camera = view.camera
    scale = min(1.0, pixels / camera.width)
    return camera.scaled(max(round(camera.width * scale), 1), max(round(camera.height * scale), 1))


def _encoded(done: Render, request: RenderRequest) -> bytes:
    if request.encoding == "raw":
        return done.rgb.tobytes()
    if request.encoding == "jpeg":
        return encode_image(done.rgb, "jpeg")
    return encode_image(done.rgb, "png")
