"""A small real daemon for tests: it keeps frames in memory and answers everything else plainly."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from types import TracebackType

import numpy as np
import zmq

from mclnf_edge.daemon.security import Keyring, check_role
from mclnf_edge.daemon.sockets import Endpoint, Incoming
from mclnf_edge.errors import MclnfError, StoreError
from mclnf_edge.wire.codec import decode, encode, error_reply
from mclnf_edge.wire.messages import (
    Ack,
    Acks,
    Closed,
    CloseTask,
    Drain,
    ErrorReply,
    FetchModule,
    Follow,
    Hello,
    Identity,
    Message,
    Progress,
    Put,
    PutFrame,
    PutSignal,
    RenderReply,
    RenderRequest,
    StatusReply,
    StatusRequest,
    Welcome,
    answer,
)
from mclnf_edge.wire.planes import pack_plane


class EchoDaemon:
    """Serves an `Endpoint` in a thread of its own until the `with` block ends.

    `kept` may be handed on to a successor, as a daemon's ledger outlives it. `busy` frames are
    answered busy once each; `lose` says how many batches of acknowledgements are never sent.
    """

    def __init__(
        self,
        bind: str = "tcp://127.0.0.1:0",
        keyring: Keyring | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        kept: dict[Identity, Put] | None = None,
        credit_bytes: int = 1 << 20,
    ) -> None:
        self.kept = {} if kept is None else kept
        self.credit_bytes = credit_bytes
        self.seen: Counter[Identity] = Counter()
        self.busy: set[int] = set()
        self.refuse: set[int] = set()
        self.refuse_session = ""
        self.lose = 0
        self.hellos: list[Hello] = []
        self.asked: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._streams: set[tuple[bytes, str, str]] = set()
        self._started, self._paused = threading.Event(), threading.Event()
        self._stop = False
        self._running = threading.Event()
        self._running.set()
        self._args = (bind, keyring, context)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> EchoDaemon:
        self._thread.start()
        assert self._started.wait(10), self.failures
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def pause(self) -> None:
        """Answer nothing until `resume`; ZeroMQ below goes on. Returns once the loop stands."""
        self._paused = threading.Event()
        self._running.clear()
        self.endpoint.wake()
        assert self._paused.wait(5)

    def resume(self) -> None:
        """Go on."""
        self._running.set()

    def stop(self) -> None:
        """End the thread and free the port; fails the test when the thread failed."""
        if self._stop:
            return
        self._stop = True
        self._running.set()
        self.endpoint.wake()
        self._thread.join(10)
        assert not self._thread.is_alive() and not self.failures, self.failures

    def _run(self) -> None:
        try:
            self.endpoint = Endpoint(*self._args)
            self.address = self.endpoint.address
            self._started.set()
            while not self._stop:
                if not self._running.is_set():
                    self._paused.set()
                    self._running.wait()
                self._turn(self.endpoint.receive(1_000))
            self.endpoint.close()
        except BaseException as error:
            self.failures.append(error)
            raise

    def _turn(self, batch: list[Incoming]) -> None:
        acks: dict[bytes, list[Ack]] = defaultdict(list)
        for incoming in batch:
            try:
                message = decode(incoming.parts)
                self.asked[message.tag] += 1
                check_role(incoming.user, message)
                if isinstance(message, PutFrame | PutSignal):
                    acks[incoming.peer].append(self._keep(incoming.peer, message))
                    continue
                replies = self._reply(incoming.peer, message)
            except MclnfError as error:
                replies = [error_reply(error, incoming.parts)]
            for reply in replies:
                self.endpoint.send(incoming.peer, encode(reply))
        for peer, answers in acks.items():
            if self.lose:
                self.lose -= 1
                continue
            reply = Acks(acks=tuple(answers), credit_bytes=self.credit_bytes, durability="memory")
            self.endpoint.send(peer, encode(reply))

    def _keep(self, peer: bytes, put: Put) -> Ack:
        session, stream, seq = put.identity
        if (peer, session, stream) not in self._streams:
            raise _NoHello(f"{session}/{stream} has not said hello on this connection")
        self.seen[put.identity] += 1
        if seq in self.busy:
            self.busy.discard(seq)
            return answer(put, "busy", "disk-full", retry_ms=20)
        if seq in self.refuse:
            return answer(put, "rejected", "rejected", "refused by the test")
        if put.identity in self.kept:
            return answer(put, "duplicate")
        self.kept[put.identity] = put
        return answer(put, "accepted")

    def _reply(self, peer: bytes, message: Message) -> list[Message]:
        number = message.id
        if isinstance(message, Hello):
            return [self._welcome(peer, message)]
        if isinstance(message, RenderRequest):
            return _render(message)
        if isinstance(message, StatusRequest):
            return [StatusReply.of({"frames": len(self.kept)}, id=number)]
        if isinstance(message, CloseTask):
            return [Closed(id=number, tasks=(message.task or "all",))]
        if isinstance(message, Follow | FetchModule):
            raise StoreError(f"{message.tag}: this daemon has no modules")
        assert isinstance(message, Drain)
        return [Progress(id=number, steps=step, done=step == 3) for step in (1, 2, 3)]

    def _welcome(self, peer: bytes, hello: Hello) -> Message:
        self.hellos.append(hello)
        if hello.session == self.refuse_session:
            return ErrorReply(id=hello.id, code="world", message="an origin this map cannot use")
        self._streams.add((peer, hello.session, hello.stream))
        seqs = [i[2] for i in self.kept if i[:2] == (hello.session, hello.stream)]
        return Welcome(
            id=hello.id,
            credit_bytes=self.credit_bytes,
            last_seq=max(seqs, default=-1),
            limits={"message_bytes": 1 << 20},
        )


class _NoHello(MclnfError):
    code = "no-hello"


def _render(request: RenderRequest) -> list[Message]:
    """A grey picture as bright as the camera is high, depth counting up, its first unknown."""
    if request.view is None:
        return [RenderReply(id=request.id, encoding="wav", data=b"RIFF", rate_hz=request.rate_hz)]
    if request.deadline_ms == 1:
        return [ErrorReply(id=request.id, code="stale", message="deadline passed")]
    width = request.width or request.view.camera.width
    height = request.height or request.view.camera.height
    rgb = np.full((height, width, 3), int(request.view.T_world_camera[2, 3]) % 256, np.uint8)
    depth = np.arange(height * width, dtype=np.float32).reshape(height, width)
    depth[0, 0] = np.nan
    finals = (False, True) if request.quality == "progressive" else (True,)
    return [
        RenderReply(
            id=request.id,
            encoding="raw",
            data=rgb.tobytes(),
            width=width,
            height=height,
            depth=pack_plane(depth, "float32") if "depth" in request.want else None,
            known=pack_plane(np.isfinite(depth) * 0.5, "float16"),
            map_version=3,
            modules=("m1",),
            final=final,
        )
        for final in finals
    ]
