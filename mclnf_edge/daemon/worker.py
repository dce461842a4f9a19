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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import msgpack

from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon import painters
from mclnf_edge.daemon.posed_replies import posed_replies
from mclnf_edge.daemon.signal_replies import ENGINE as SIGNAL_ENGINE
from mclnf_edge.daemon.signal_replies import signal_reply
from mclnf_edge.daemon.warm_up import warm_up
from mclnf_edge.errors import Corrupt, DiskFull, MclnfError, StoreError
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization
from mclnf_edge.mapping.interface import TaskMapper
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Module
from mclnf_edge.mapping.residency import Residency
from mclnf_edge.store import OPEN_MODULES, MapStore, ModuleRecord, module_info
from mclnf_edge.types import ModuleSnapshot
from mclnf_edge.wire.codec import decode
from mclnf_edge.wire.messages import (
    ErrorReply,
    Message,
    Progress,
    Put,
    PutFrame,
    PutSignal,
    RenderRequest,
)

if TYPE_CHECKING:
    from mclnf_edge.inference.export import Exports
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
    thread, None while it is sound; while `compiling` it cannot be stopped and has nothing to save.
    `state` is replaced as a whole, never changed.
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
        self._trial: painters.Trial | None = None
        self._exports: Exports | None = None
        self._render_ms: painters.Times | None = None
        self.mapper = _mapper(config, init, threads, store.load_module)
        self.engine = self.painter = SIGNAL_ENGINE
        if isinstance(self.mapper, Mapper):
            budget = config.render.resident_mb * 10**6
            residency = Residency(self.mapper.modules, budget, self._load)
            self.mapper.residency = residency
            self.engine = self.mapper.optimizer.name
            self.mapper.optimizer.alive = self._alive
            if config.render.engine == "auto":
                self._render_ms = painters.remembered(config)
            self._paint()
            if config.map.onnx:
                from mclnf_edge.inference.export import Exports  # with PyTorch

                self._exports = Exports(store, config.field)
        self.error: BaseException | None = None
        self.beat, self.compiling = time.monotonic(), False
        self.ready = threading.Event()
        self.state: dict[str, Any] = {
            "modules": [], "engine": self.engine, "render_engine": self.painter, "steps": 0
        }  # fmt: skip
        self._progress = (0, Progress())
        self._drains = 0
        self.hover_m: Mapping[str, float] = {}
        self._renders: deque[RenderJob] = deque()
        self._painting = False
        self._wake = threading.Condition()
        self._disk = ThreadPoolExecutor(1, "disk")
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
        self._sized = False
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

    @property
    def rendering(self) -> bool:
        """Whether a render waits or is being made."""
        return self._painting or bool(self._renders)

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
        finally:
            if self._trial is not None:
                self._trial.stop()
            self._disk.shutdown(wait=False)

    def _prepare(self) -> None:
        """Frames are taken meanwhile; renders wait."""
        if not isinstance(self.mapper, Mapper):
            return  # signals run on torch
        log.info("preparing kernels; on a machine's first start the compiler takes minutes")
        self.beat, self.compiling = time.monotonic() + _COMPILE_S, True
        warm_up(self.config, self.mapper.threads)
        self.compiling = False
        log.info("kernels are ready")
        if self.config.render.engine == "auto" and self._render_ms is None:
            self._trial = painters.Trial(self.config)

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
        if self._exports is not None and self._exports.write_next():
            busy = True
        self._see_trial()
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
            self._keep_cell_size()
        for _ in range(ends):
            self._ended.append(self._ends.popleft())
            self.mapper.end_task(*self._ended[-1])
        now = time.monotonic()
        self._take_in_due = now + (now - began) * _STEP_SHARE / (1 - _STEP_SHARE)
        return busy

    def _keep_cell_size(self) -> None:
        """The map is one of these cells from now on, also where their size was found."""
        pool = self.mapper.pool if isinstance(self.mapper, Mapper) else None
        if pool is not None and not self._sized:
            self._stored(lambda: self.store.fix_meta({"cell_size_m": pool.cell_m}))
            self._sized = True

    def _see_trial(self) -> None:
        """Paint with what was measured to be the fastest, once it is known."""
        times = None if self._trial is None else self._trial.result()
        if times is not None:
            self._trial, self._render_ms = None, times
            self._paint()

    def _paint(self) -> None:
        """Take the engine that is asked for, or for `auto` the fastest that is known."""
        asked = self.config.render.engine
        name = painters.fastest(self._render_ms) if asked == "auto" else asked
        assert isinstance(self.mapper, Mapper)
        self.renderer, self.painter = painters.renderer(self.config, self.mapper, name)

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
        kept = self._open_work()
        if kept is not None:
            self.mapper.restore(*kept)
            self._kept = kept[1].get("frames", {})
        for state, task in self.store.tasks().values():
            if state == "closing":
                self._ends.append((task["stream"], task["task"]))
        self._keep_cell_size()
        log.info(
            "map has %d closed versions, %d modules open",
            self._versions,
            len(self.mapper.learning()),
        )

    def _open_work(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The checkpoint; None without a sound one: held frames are then learned from anew."""
        try:
            return self.store.checkpoint_load(OPEN_WORK)
        except Corrupt as error:
            log.error("%s; what was open is learned anew from the frames that are held", error)
            self.store.checkpoint_set_aside(OPEN_WORK)
            return None

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
        if self._exports is not None:
            self._exports.add(record)

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
            about = {"task": module.id, "version": module.version}
            log.error("task %s version %d not read: %s", *about.values(), error, extra=about)

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
        about = {"task": record.id, "version": record.version}
        log.error("task %s version %d quarantined: %s", *about.values(), error, extra=about)
        damaged = {**module_info(record), "state": "quarantined"}
        self._committed[f"{record.id}.{record.version}"] = damaged
        try:
            self.store.quarantine(record.id, record.version)
        except StoreError as full:  # it is found again after a restart
            log.error("task %s: %s", record.id, full, extra=about)

    def _ingest(self) -> bool:
        """Hand the ledger's next frames to the mapper, for a short while."""
        end, any_frame = time.monotonic() + _INGEST_SLICE_S, False
        self._ingested_all = False
        while time.monotonic() < end:
            over = self.mapper.held_bytes > self.config.map.frame_budget_bytes
            if over and len(self.mapper.frames) > 1 and not self._make_room():
                return any_frame  # two are taken in any case: one alone may never be learned from
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
                about = {
                    "frame": held.id, "session": held.session, "stream": held.stream,
                    "seq": held.seq,
                }  # fmt: skip
                told = "frame %d (%s/%s #%d) let go: %s"
                log.warning(told, *about.values(), error, extra=about)
                if not isinstance(error, MclnfError):
                    log.exception("frame %d", held.id, extra=about)
                who = (held.session, held.stream)
                self._stored(lambda gone=held.id: self.store.let_go({gone: 0}))  # type: ignore[misc]
                self._stored(lambda who=who: self.store.put_frames([], {who: 1}))  # type: ignore[misc]
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
            if self._exports is not None:
                self._exports.add(record)
            self.mapper.forget(closing.let_go)
            about = {"task": record.id, "version": record.version}
            log.info("task %s committed as version %d", *about.values(), extra=about)
            self._serve_renders()

    def _on_disk(self, act: Callable[[], Any]) -> Any:
        """`act()`, which may take the disk seconds; renders go on meanwhile, nothing else does.

        Raises what `act` raises, and StoreError for a disk that does not come back.
        """
        job, self.beat = self._disk.submit(act), time.monotonic()
        end = time.monotonic() + self.config.watch.hang_s
        job.add_done_callback(lambda _: self._rouse())
        while not job.done():
            with self._wake:
                if not (job.done() or self._renders):
                    self._wake.wait(1.0)
            self._serve_renders()
            if time.monotonic() > end:
                raise StoreError(f"{self.store.path}: the disk has not answered for "
                                 f"{self.config.watch.hang_s:.0f} s")  # fmt: skip
        return job.result()

    def _rouse(self) -> None:
        with self._wake:
            self._wake.notify()

    def _stored(self, act: Callable[[], Any]) -> Any:
        """Repeat a read or write until the disk takes it; renders go on meanwhile.

        Raises DiskFull when the daemon is to stop: there is no checkpoint then, the last one holds.
        """
        while True:
            try:
                result = self._on_disk(act)
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
        meta[OPEN_MODULES] = self._open_modules()
        self._checkpoint_due = time.monotonic() + self.config.watch.checkpoint_s
        try:
            self._on_disk(lambda: self.store.checkpoint_save(OPEN_WORK, arrays, meta))
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
                self._painting = True
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
            self._painting = False
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
        replies = posed_replies(
            self.mapper, self.renderer, self.painter, request, job.site,
            self.config.render.preview_px, self._versions,
        )  # fmt: skip
        for reply in replies:
            self._send(job.peer, reply)

    # -- what others see ------------------------------------------------------------------------

    def _open_modules(self) -> list[dict[str, Any]]:
        """The entries in `status` of the modules that learn."""
        state, found = "adapting" if self._drain else "open", []
        for m in self.mapper.learning():
            told = self.mapper.describe(m)
            found.append(
                {"id": m.id, "version": m.version, "state": state, "digest": ""}
                | {key: told[key] for key in ("steps", "frames", "bounds", "psnr")}
                | {"streams": sorted(self.mapper.streams_of(m))}
            )
        return found

    def _publish_state(self) -> None:
        now = time.monotonic()
        if now < self._state_due and self._progress[0] == self._drains:
            return
        self._state_due = now + _STATE_S
        mapper, asked, draining = self.mapper, self._drains, self._drain
        modules = [*self._committed.values(), *self._open_modules()]
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
            modules_open=len(mapper.learning()),
            modules_closed=self._versions,
            steps=mapper.steps,
            psnr=mapper.psnr,
            seconds_left=0.0 if finished else _seconds_left(self._rate),
        )
        self._progress = (asked, progress)
        self.state = {
            "modules": modules,
            "engine": self.engine,
            "render_engine": self.painter,
            "render_ms": self._render_ms or {},
            "steps": mapper.steps,
            "frames_held": len(mapper.frames),
            "frames_waiting": backlog,
            "psnr": mapper.psnr,
            "progress": done if mapper.learning() or finished else 0.0,
            **mapper.facts(),
            **({} if self._exports is None else self._exports.facts()),
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
