"""`serve`: the socket loop. Receives and decodes; views go to the worker, the ledger's to the desk.

This thread never computes and never waits for the disk. What worker and desk answer comes back
through `_outbox`.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import mclnf_edge
from mclnf_edge import resident
from mclnf_edge.config import ComputeConfig, ServeConfig
from mclnf_edge.daemon import logs
from mclnf_edge.daemon.desk import Desk, answering
from mclnf_edge.daemon.security import Keyring, check_role
from mclnf_edge.daemon.sockets import ROUND, Endpoint, Incoming
from mclnf_edge.daemon.start import open_cached
from mclnf_edge.daemon.worker import RenderJob, Worker
from mclnf_edge.errors import ConfigError, DeviceError, ProtocolError, StoreError
from mclnf_edge.geometry import check_pose
from mclnf_edge.mapping.engines import choose
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization
from mclnf_edge.mapping.sites import Sites
from mclnf_edge.store import MapStore
from mclnf_edge.types import Modality
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.messages import (
    ErrorReply,
    Message,
    RenderRequest,
    StatusReply,
    StatusRequest,
)

log = logging.getLogger(__name__)

_PROGRESS_S = 0.5
_GIVE_WAY_S = 0.3
_PATIENCE_S = 0.1
"""The desk is waited for this long before more is read: publishers then wait at their end."""
_NO_ROOM = "the device has no room to learn; what was accepted is kept for a start that has"
_MAX_RENDERS = 256
_DESCRIPTORS = 65_536


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
        config = _of_its_cells(config, store.meta())
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
    """Start the log, allow open files and read the keys; raises ConfigError."""
    logs.configure(config.watch.log)
    _take_descriptors()
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
        self.desk = Desk(config, store, self.worker, self.modality, self._post, endpoint.wake)
        self._sites, self._seen = Sites(store.meta()), store.streams()
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._notify = _Notifier()

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
            self.desk.start()
            on_ready(self.endpoint.address)
            self._notify.send("READY=1")
            while not self._stop.is_set():
                batch = self.endpoint.receive(100)
                self._turn(batch)
                if len(batch) == ROUND:
                    self._give_way()
                if not self._healthy():
                    self._leave(1)  # worse than none: it answers but does not learn or keep
            return self._shut_down()
        finally:
            for handled, handler in previous.items():
                signal.signal(handled, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        self.endpoint.wake()

    # -- one round ------------------------------------------------------------------------------

    def _turn(self, batch: list[Incoming]) -> None:
        for incoming in batch:
            with answering(incoming, self._send):
                message = decode(incoming.parts)
                check_role(incoming.user, message)
                self._check(message)
                if isinstance(message, RenderRequest):
                    self._queue_render(incoming.peer, message)
                elif isinstance(message, StatusRequest):
                    self._send(incoming.peer, StatusReply.of(self._status(), id=message.id))
                else:
                    self.desk.put(incoming, message)
        end = time.monotonic() + _PATIENCE_S
        while self.desk.busy and time.monotonic() < end:
            self.endpoint.rest(20)
            self._flush()
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

    def _check(self, message: Message) -> None:
        """Raise a ProtocolError for what this daemon does not take from anybody."""

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

    # -- answers --------------------------------------------------------------------------------

    def _post(self, peer: bytes, message: Message) -> None:
        """Called by the worker: queue an answer and wake the loop."""
        self._outbox.append((peer, message))
        self.endpoint.wake()

    def _flush(self) -> None:
        while self._outbox:
            self._send(*self._outbox.popleft())

    def _send(self, peer: bytes, message: Message) -> None:
        try:
            parts = encode(message)
        except ProtocolError as error:  # a reply too large to be sent ends nobody's daemon
            log.warning("%s: %s", message.tag, error)
            told = ErrorReply(id=getattr(message, "id", 0), code=error.code, message=str(error))
            parts = encode(told)
        self.endpoint.send(peer, parts)

    def _tell_drainers(self) -> None:
        now = time.monotonic()
        for drainer in list(self.desk.drainers):
            if now < drainer.due:
                continue
            if self.worker.state.get("out_of_memory"):
                self._send(
                    drainer.peer, ErrorReply(id=drainer.id, code=DeviceError.code, message=_NO_ROOM)
                )
                self.desk.drainers.remove(drainer)
                continue
            progress = self.worker.progress_of(drainer.request)
            drainer.due = now + _PROGRESS_S
            told = self.endpoint.send(drainer.peer, encode(replace(progress, id=drainer.id)))
            if progress.done or not told:
                self.desk.drainers.remove(drainer)

    def _status(self) -> dict[str, Any]:
        state = self.worker.state
        with suppress(StoreError):  # else what was read last: a failing disk is no reason to hide
            self._seen = self.store.streams()
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
            for s in self._seen
        ]
        return {
            "device": "cpu",
            **state,
            "version": mclnf_edge.__version__,
            "streams": streams,
            "memory_mb": resident.now_mb(),
            "peak_memory_mb": resident.peak_mb(),
            "cpu_s": time.process_time(),
            "render_cpu_s": self.worker.render_cpu_s,
            "renders": self.worker.renders,
            "uptime_s": time.monotonic() - self._started,
            "journal_bytes": self.store.journal_bytes(),
            "commits": self.desk.commits,
            "frames_kept": self.desk.frames,
            "frame_bytes": self.desk.frame_bytes,
            "dropped": dict(self.endpoint.dropped),
            "disk_full": self.desk.full or self.worker.disk_full,
            "health": {
                "compute_beat_s": time.monotonic() - self.worker.beat,
                "disk_wait_s": self.desk.stalled_s,
                "disk_full": self.desk.full or self.worker.disk_full,
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
        if self.desk.error is not None or not self.desk.is_alive():
            log.critical("the thread at the ledger ended: %r", self.desk.error)
            return False
        if self.desk.stalled_s > self.config.watch.hang_s:
            log.critical("the disk has not answered for %.0f s", self.desk.stalled_s)
            return False
        self._notify.watchdog()
        return True

    def _leave(self, code: int) -> NoReturn:
        """End at once: a thread that is stuck in native code or in the disk cannot be ended.

        What was acknowledged is on disk.
        """
        logging.shutdown()
        os._exit(code)

    def _shut_down(self) -> int:
        self._notify.send("STOPPING=1")
        end = time.monotonic() + self.config.watch.drain_s
        for thread in (self.desk, self.worker):
            thread.stop()
        for thread in (self.desk, self.worker):
            if thread is self.worker and self.worker.compiling:
                log.info("stopped while kernels are compiled, %d frames kept", self.desk.frames)
                self._flush()
                self._leave(0)
            thread.join(max(end - time.monotonic(), 0.0))
            if thread.is_alive():
                seconds = self.config.watch.drain_s
                log.error("thread %s did not stop within %.0f s", thread.name, seconds)
                self._leave(1)
        self._flush()
        uptime = time.monotonic() - self._started
        log.info("stopped after %.0f s, %d frames kept", uptime, self.desk.frames)
        return 0 if self.worker.error is None and self.desk.error is None else 1


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


def _take_descriptors() -> None:
    """Allow as many open files as the system lets this process have: strangers may connect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _of_its_cells(config: ServeConfig, meta: Mapping[str, Any]) -> ServeConfig:
    """The settings with the map's own cell size, where that was once found or chosen."""
    size = meta.get("cell_size_m", config.map.cell_size_m)
    return replace(config, map=replace(config.map, cell_size_m=size))


def _threads() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), 8))
