"""The thread of a mirror that copies what another daemon commits, in its order, over a thin link.

The follower's list of modules is always a beginning of the leader's, so how many it has says where
to go on, after a cut link as after a restart. Modules come in chunks, one request at a time: what
has arrived of a module stays over a cut link, and a chunk whose digest is wrong is asked for again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any, TypeVar

from mclnf_edge.config import FollowConfig
from mclnf_edge.errors import Corrupt, DiskFull, MapMismatch, ProtocolError, RemoteError, StoreError
from mclnf_edge.store import MapStore
from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.link import Link
from mclnf_edge.wire.messages import (
    Committed,
    ErrorReply,
    FetchModule,
    Follow,
    Message,
    ModuleChunk,
)
from mclnf_edge.wire.mirroring import Listed, unpack_list

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
_TICK_S = 0.05
_AGAIN_S = 0.5


class Stopped(Exception):
    """The follower was told to end."""


@dataclass
class Traffic:
    """What following has cost and brought since the process started."""

    connected: bool = False
    refused: int = 0
    frame_bytes: int = 0
    total: int = 0


class Follower(threading.Thread):
    """Start it, `stop` and `join` it. `error` is what ended it, None while it is sound."""

    def __init__(self, store: MapStore, link: Link, config: FollowConfig) -> None:
        """`link` is used by this thread alone once it has started."""
        super().__init__(name="follower", daemon=True)
        self._store, self._link, self._config = store, link, config
        self._ending = threading.Event()
        self._numbers = itertools.count(secrets.randbits(61))
        self.known = sum(store.counts_of_modules().values())
        self.traffic = Traffic(total=self.known)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Copy until stopped."""
        try:
            while not self._ending.is_set():
                if not self._round():
                    self._ending.wait(self._config.poll_s)
        except Stopped:
            pass
        except BaseException as error:
            log.exception("following %s failed", self._link.address)
            self.error = error
        finally:
            self._link.close()

    def stop(self) -> None:
        """End after the message that is waited for, or at once."""
        self._ending.set()

    def report(self) -> dict[str, Any]:
        """For `status`: how far the copy is and what went over the link."""
        traffic, link = self.traffic, self._link
        return {
            "leader": link.address,
            "connected": traffic.connected,
            "modules": self.known,
            "modules_there": traffic.total,
            "received_bytes": link.received_bytes,
            "sent_bytes": link.sent_bytes,
            "frame_bytes": traffic.frame_bytes,
            "refused": traffic.refused,
        }

    # -- one round ------------------------------------------------------------------------------

    def first_word(self) -> None:
        """Learn what the leader's map is, before the thread starts; waits for the leader.

        Raises MapMismatch when it is not the map that was followed so far, RemoteError when it
        refuses.
        """
        self._listed()

    def _round(self) -> bool:
        """Copy what the next list names; False when there was nothing new."""
        try:
            listed = self._listed()
            for module in listed:
                self._copy(module)
        except DiskFull as error:
            log.error("mirror: %s; trying again", error)
            self._ending.wait(_AGAIN_S)
            self._reopen()
            return False
        except RemoteError as error:
            if error.code not in (Corrupt.code, StoreError.code):
                raise
            log.warning("mirror: %s", error)  # the next list says that it is quarantined there
            return False
        return bool(listed)

    def _reopen(self) -> None:
        try:
            self._store.reopen()
        except StoreError as error:
            log.error("mirror: %s", error)

    def _listed(self) -> list[Listed]:
        reply, about, modules = self._sound_list()
        if self.known:
            ours = self._store.modules_after(self.known - 1, 1)[0]
            if ours.digest != reply.last:
                raise MapMismatch(
                    f"{self._store.path}: expected module number {self.known} of the followed map "
                    f"to be {ours.id} version {ours.version} with digest {ours.digest}, received "
                    f"{reply.last or 'none'}: it follows another map"
                )
        self._store.fix_meta({**about, "map_id": self._store.meta()["map_id"],
                              "follows": about.get("map_id")})  # fmt: skip
        self.traffic.total, self.traffic.frame_bytes = reply.total, reply.frame_bytes
        return modules

    def _sound_list(self) -> tuple[Committed, dict[str, Any], list[Listed]]:
        """The next list; one that was damaged on its way is asked for again."""
        while True:
            reply = self._ask(Follow(id=next(self._numbers), after=self.known), Committed)
            try:
                return reply, *unpack_list(reply.body)
            except ProtocolError as error:
                self._refuse(str(error))

    def _copy(self, module: Listed) -> None:
        """Fetch a module and commit it."""
        if module.state == "quarantined":
            self._store.mirror_lost(
                module.id, module.version, module.digest, module.bytes, module.meta
            )
        else:
            data = self._fetch(module)
            if hashlib.sha256(data).hexdigest() != module.digest:
                raise RemoteError(f"{module.id}: the file is not the one that was listed", "store")
            self._store.mirror_module(module.id, module.version, data, module.meta)
        self.known += 1
        log.info("mirrored %s version %d, %d bytes", module.id, module.version, module.bytes)

    def _fetch(self, module: Listed) -> bytes:
        """The module's file; every chunk's digest is checked before it counts."""
        data = bytearray()
        while len(data) < module.bytes:
            asked = FetchModule(
                id=next(self._numbers),
                module=module.id,
                version=module.version,
                offset=len(data),
                length=min(self._config.chunk_bytes, module.bytes - len(data)),
            )
            reply = self._ask(asked, ModuleChunk)
            if _is_sound(asked, reply):
                data += reply.data
            else:
                self._refuse(f"{module.id}: the chunk at {asked.offset} is not what was sent")
        return bytes(data)

    def _refuse(self, what: str) -> None:
        self.traffic.refused += 1
        log.warning("damaged on its way, asking again: %s", what)
        self._pause(_AGAIN_S)

    # -- the link -------------------------------------------------------------------------------

    def _ask(self, request: Message, kind: type[M]) -> M:
        """The answer to a request, which is sent again over each new connection; never gives up.

        Raises RemoteError for an error, Stopped.
        """
        parts, sent_over, patience = encode(request), 0, self._config.timeout_s
        since, received = time.monotonic(), self._link.received_bytes
        while True:
            self._pause(0)
            self._link.maintain(expecting=False)
            if self._link.connection != sent_over and self._link.send(parts):
                sent_over = self._link.connection
            for reply in self._link.receive(_TICK_S):
                if reply.id == request.id:
                    self.traffic.connected = True
                    return _expect(reply, kind)
            if self._link.received_bytes != received:
                since, received = time.monotonic(), self._link.received_bytes
            if time.monotonic() - since > patience:
                self.traffic.connected = False
                log.warning("%s: silent for %.0f s", self._link.address, patience)
                self._link.reopen()
                since, patience = time.monotonic(), min(2 * patience, 8 * self._config.timeout_s)

    def _pause(self, seconds: float) -> None:
        if self._ending.wait(seconds):
            raise Stopped


def _is_sound(asked: FetchModule, reply: ModuleChunk) -> bool:
    wanted = (asked.offset, asked.length, hashlib.sha256(reply.data).hexdigest())
    return (reply.offset, len(reply.data), reply.sha256) == wanted


def _expect(reply: Message, kind: type[M]) -> M:
    if isinstance(reply, ErrorReply):
        raise RemoteError(f"the leader: {reply.message}", reply.code)
    if not isinstance(reply, kind):
        raise ProtocolError(f"expected the reply {kind.tag}, received {reply.tag}")
    return reply
