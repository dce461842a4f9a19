"""A map on disk: one directory with its ledger, modules and checkpoints, served by one daemon.

map.json       what this directory is: the map's own random id
lock           held while a daemon serves the map
ledger.db      streams, frames with their payloads, tasks, modules (SQLite, WAL)
modules/       committed modules, one immutable safetensors file a version
checkpoints/   open work
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mclnf_edge.errors import Corrupt, MapMismatch, StoreError
from mclnf_edge.store.checkpoints import Arrays, Checkpoints
from mclnf_edge.store.database import Connect, Database, connect
from mclnf_edge.store.files import (
    DISK,
    TEMPORARY,
    FileSystem,
    make_directory,
    remove,
    write_durably,
)
from mclnf_edge.store.ledger import FrameRow, HeldFrame, Ledger, ModuleRecord, PutStatus
from mclnf_edge.store.module_store import ModuleStore
from mclnf_edge.types import ModuleSnapshot

log = logging.getLogger(__name__)

DURABILITY = "wal-full"
"""What "accepted" stands for: in SQLite's WAL, fsynced (synchronous=FULL), on this machine."""

IDENTITY, LEDGER, LOCK = "map.json", "ledger.db", "lock"
MODULES, CHECKPOINTS = "modules", "checkpoints"


class MapStore:
    """An open map. Any thread may call any method; `open` makes one."""

    def __init__(self, path: Path, ledger: Ledger, files: FileSystem, lock: int | None) -> None:
        self.path, self.ledger, self._lock = path, ledger, lock
        self._files = files
        self._modules = ModuleStore(path / MODULES, ledger, files)
        self._checkpoints = Checkpoints(path / CHECKPOINTS, files)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        meta: Mapping[str, Any] | None = None,
        create: bool = True,
        read_only: bool = False,
        max_journal_bytes: int | None = None,
        connect: Connect = connect,
        files: FileSystem = DISK,
    ) -> MapStore:
        """Open the map at `path`, made if missing and `create`.

        `meta` (JSON-able: init digest, cell size, world frame, ...) must agree with the map's in
        every key that both have. Leftovers of a cut-off commit are removed and modules whose file
        is missing or of another size are quarantined; digests are checked at load. Frames are
        refused with DiskFull once the ledger's pages in use pass `max_journal_bytes`.

        Raises StoreError (no map, served by another daemon), MapMismatch, Corrupt or DiskFull.
        """
        path = Path(path)
        if read_only:
            _require_map(path)
            database = Database(path / LEDGER, read_only=True)
            return cls._checked(cls(path, Ledger(database), files, None), meta)
        if not (path / IDENTITY).exists():
            _create(path, create, files)
        lock = _locked(path)
        try:
            _refuse_lost_ledger(path)
            make_directory(path / CHECKPOINTS, files)
            database = Database(path / LEDGER, connect=connect, files=files)
            store = cls(path, Ledger(database, max_journal_bytes), files, lock)
            cls._checked(store, meta)
            store._tidy()
        except BaseException:
            os.close(lock)
            raise
        return store

    @staticmethod
    def _checked(store: MapStore, meta: Mapping[str, Any] | None) -> MapStore:
        """`store`, closed again if it is not the map that `meta` and map.json say."""
        try:
            identity = {"map_id": read_map_id(store.path), **(meta or {})}
            _refuse_empty_ledger(store)
            if store.ledger.database.read_only:
                store.ledger.require_meta(identity)
            else:
                store.ledger.fix_meta(identity)
        except BaseException:
            store.ledger.database.close()
            raise
        return store

    def _tidy(self) -> None:
        for folder in (self.path, self.path / CHECKPOINTS):
            for orphan in folder.glob("*" + TEMPORARY):
                remove(orphan, self._files)
        for orphan in self._modules.remove_orphans():
            log.info("removed %s: its commit was cut short", orphan)
        for record in self._modules.quarantine_wrong_sizes():
            log.error("quarantined module %s version %d: wrong size", record.id, record.version)

    def close(self) -> None:
        """Close the ledger and let another daemon in."""
        self.ledger.database.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> MapStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reopen(self) -> None:
        """Go on after DiskFull; raises DiskFull while the disk still fails."""
        self.ledger.database.reopen()

    def fix_meta(self, meta: Mapping[str, Any]) -> None:
        """Add to what the map is; raises MapMismatch where it already is something else."""
        self.ledger.fix_meta(meta)

    def meta(self) -> dict[str, Any]:
        """What the map is."""
        return self.ledger.meta()

    # Streams and frames

    def put_stream(self, session: str, stream: str, hello: Mapping[str, Any]) -> None:
        """Remember a stream; its frames can be put from then on."""
        self.ledger.put_stream(session, stream, hello)

    def streams(self) -> list[dict[str, Any]]:
        """See `Ledger.streams`."""
        return self.ledger.streams()

    def put_frames(
        self, frames: Sequence[FrameRow], rejected: Mapping[tuple[str, str], int] | None = None
    ) -> list[PutStatus]:
        """See `Ledger.put_frames`: durable on return."""
        return self.ledger.put_frames(frames, rejected)

    def held_frames(self, after_id: int = 0, limit: int | None = None) -> Iterator[HeldFrame]:
        """See `Ledger.held_frames`."""
        return self.ledger.held_frames(after_id, limit)

    def count_held(self, after_id: int = 0) -> int:
        """See `Ledger.count_held`."""
        return self.ledger.count_held(after_id)

    def mark_frames(self, marks: Mapping[int, Mapping[str, Sequence[str]]]) -> None:
        """See `Ledger.mark_frames`."""
        self.ledger.mark_frames(marks)

    def let_go(self, rays: Mapping[int, int]) -> None:
        """See `Ledger.let_go`."""
        self.ledger.let_go(rays)

    def put_task(self, task: str, state: str, meta: Mapping[str, Any]) -> None:
        """Remember a task's state."""
        self.ledger.put_task(task, state, meta)

    def tasks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Every task's (state, meta) by its id."""
        return self.ledger.tasks()

    def counts_of_modules(self) -> dict[str, int]:
        """See `Ledger.counts_of_modules`."""
        return self.ledger.counts_of_modules()

    def counts(self) -> dict[str, int]:
        """See `Ledger.counts`, and `journal_bytes`."""
        return {**self.ledger.counts(), "journal_bytes": self.journal_bytes()}

    def frame_bytes(self) -> int:
        """See `Ledger.frame_bytes`."""
        return self.ledger.frame_bytes()

    def journal_bytes(self) -> int:
        """Bytes on disk of the ledger and its WAL."""
        return self.ledger.database.size_bytes()

    def reclaim(self) -> bool:
        """Try again to wipe what was let go; True when nothing of it is left on disk."""
        return self.ledger.database.reclaim()

    # Modules and checkpoints

    def commit_module(
        self, snapshot: ModuleSnapshot, let_go: Mapping[int, int] | None = None
    ) -> ModuleRecord:
        """See `ModuleStore.commit`."""
        return self._modules.commit(snapshot, let_go or {})

    def mirror_module(
        self, module: str, version: int, data: bytes, meta: Mapping[str, Any]
    ) -> ModuleRecord:
        """Commit a version whose file was copied from another map."""
        return self._modules.keep(module, version, data, dict(meta), {})

    def mirror_lost(
        self, module: str, version: int, digest: str, size: int, meta: Mapping[str, Any]
    ) -> None:
        """See `ModuleStore.keep_lost`."""
        self._modules.keep_lost(module, version, digest, size, dict(meta))

    def read_module(self, module: str, version: int, offset: int, length: int) -> bytes:
        """See `ModuleStore.read`."""
        return self._modules.read(self.ledger.module(module, version), offset, length)

    def modules_after(self, count: int, limit: int) -> list[ModuleRecord]:
        """See `Ledger.modules_after`."""
        return self.ledger.modules_after(count, limit)

    def load_module(self, module: str, version: int | None = None) -> ModuleSnapshot:
        """See `ModuleStore.load`."""
        return self._modules.load(module, version)

    def quarantine(self, module: str, version: int) -> None:
        """Never load this version again."""
        self.ledger.quarantine(module, version)

    def modules(self) -> list[ModuleRecord]:
        """Every committed version, in order of commit."""
        return self.ledger.modules()

    def checkpoint_save(
        self, name: str, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """See `Checkpoints.save`."""
        self._checkpoints.save(name, arrays, meta)

    def checkpoint_load(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """See `Checkpoints.load`."""
        return self._checkpoints.load(name)

    def checkpoint_set_aside(self, name: str) -> None:
        """See `Checkpoints.set_aside`."""
        self._checkpoints.set_aside(name)

    def checkpoint_drop(self, name: str) -> None:
        """Forget a checkpoint."""
        self._checkpoints.drop(name)

    def checkpoint_names(self) -> list[str]:
        """The names that have a sound checkpoint."""
        return self._checkpoints.names()


def read_map_id(path: Path) -> str:
    """The id in the map's map.json; raises Corrupt."""
    try:
        return str(json.loads((path / IDENTITY).read_bytes())["map_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path / IDENTITY}: expected a JSON object with map_id: {error}") from error


def _require_map(path: Path) -> None:
    if not (path / IDENTITY).exists() or not (path / LEDGER).exists():
        raise StoreError(f"{path}: expected a map directory with {IDENTITY} and {LEDGER}")


def _create(path: Path, create: bool, files: FileSystem) -> None:
    """Make an empty map. map.json is last: without it there is no map yet, and nothing to lose."""
    if not create:
        raise StoreError(f"{path}: expected a map directory with {IDENTITY}")
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: expected a directory, received a file")
    older = (path / LEDGER).exists()
    if not older and path.is_dir() and any(p.name not in _OWN for p in path.iterdir()):
        raise MapMismatch(f"{path}: expected a map or an empty directory, received other files")
    for folder in (path, path / MODULES, path / CHECKPOINTS):
        make_directory(folder, files)
    text = json.dumps({"what": "mclnf-edge map", "map_id": uuid.uuid4().hex})
    write_durably(path / IDENTITY, text.encode(), files)


_OWN = {MODULES, CHECKPOINTS, LOCK, IDENTITY + TEMPORARY}


def _locked(path: Path) -> int:
    """The lock file, locked; raises StoreError when another daemon has it."""
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StoreError(f"{path}: another daemon serves this map") from error
    return fd


def _refuse_empty_ledger(store: MapStore) -> None:
    """The same for a ledger that was emptied: it does not know its map."""
    path = store.path
    knows = "map_id" in store.ledger.meta() or store.ledger.modules()
    if not knows and any((path / MODULES).glob("*.safetensors")):
        raise Corrupt(f"{path / LEDGER}: empty, though {path / MODULES} holds modules")


def _refuse_lost_ledger(path: Path) -> None:
    """A map with modules but no ledger is damaged, not new: nothing of it may be tidied away."""
    if not (path / LEDGER).exists() and any((path / MODULES).glob("*.safetensors")):
        raise Corrupt(f"{path / LEDGER}: missing, though {path / MODULES} holds modules")
