"""A disk that loses power: records what the store does to it, then shows what may be left.

The store really runs; SQLite through a recording VFS, everything else through a recording
`FileSystem`. `Recording.crash` builds the directory as it may be found after a cut: of each file
what was fsynced, and of later writes any subset, each one whole, torn at a sector, or missing; of
the directory entries those up to the last fsync of the directory, and some first part of the
later ones.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from mclnf_edge.store.files import FileSystem

SECTOR = 512


@dataclass(frozen=True)
class Op:
    """One recorded step. `kind`: create, write, truncate, fsync, lost, rename, unlink, mkdir,
    fsync_dir, or ack (the store returned: `data` is what it promised)."""

    kind: str
    path: str
    data: Any = None
    offset: int = 0


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Op] = field(default_factory=list)


class Recording:
    """The steps under one root directory, and the fsyncs that are left out on purpose."""

    def __init__(self, root: Path, broken: str = "") -> None:
        self.root, self.broken = root, broken
        self.ops: list[Op] = []

    def add(self, kind: str, path: Path | str, data: Any = None, offset: int = 0) -> None:
        name = str(Path(path).relative_to(self.root))
        if kind.startswith("fsync") and self._left_out(f"{kind} {name}"):
            return
        self.ops.append(Op(kind, name, data, offset))

    def _left_out(self, fsync: str) -> bool:
        """Whether `broken` names it; a name that ends in a slash stands for every file below."""
        folder = self.broken.endswith("/")
        return fsync.startswith(self.broken) if folder else fsync == self.broken

    def ack(self, promise: Any) -> None:
        self.ops.append(Op("ack", "", promise))

    def promises(self, cut: int) -> list[Any]:
        return [op.data for op in self.ops[:cut] if op.kind == "ack"]

    def crash(self, cut: int, target: Path, rng: random.Random) -> None:
        """Write to `target` what may be found after the power went before step `cut`."""
        names, files, later = _replay(self.ops[:cut])
        for op in later[: rng.randint(0, len(later))]:
            _rename_or_so(names, op)
        target.mkdir()
        for name in sorted(names):
            inode = names[name]
            if not (target / name).parent.is_dir():
                continue  # its directory's own entry was lost
            if inode is None:
                (target / name).mkdir()
            else:
                (target / name).write_bytes(_remains(files[inode], rng))


Names = dict[str, int | None]


def _replay(ops: Sequence[Op]) -> tuple[Names, dict[int, _File], list[Op]]:
    """(durable directory entries, every file by inode, later changes of entries)."""
    live: Names = {}
    durable: Names = {}
    files: dict[int, _File] = {}
    later: list[Op] = []
    for op in ops:
        if op.kind in ("create", "mkdir", "rename", "unlink"):
            inode = len(files) if op.kind == "create" else None
            if inode is not None:
                files[inode] = _File()
            entry = Op(op.kind, op.path, op.data, -1 if inode is None else inode)
            _rename_or_so(live, entry)
            later.append(entry)
        elif op.kind == "fsync_dir":
            later = _sync_directory(op.path, later, durable)
        elif op.kind in ("write", "truncate"):
            files[_inode(live, op)].pending.append(op)
        elif op.kind == "fsync":
            _settle(files[_inode(live, op)])
        elif op.kind == "lost":
            files[_inode(live, op)].pending.clear()
    return durable, files, later


def _inode(names: Names, op: Op) -> int:
    inode = names[op.path]
    assert inode is not None, op
    return inode


def _sync_directory(folder: str, later: list[Op], durable: Names) -> list[Op]:
    """Settle the entries of `folder`; returns what is still unsettled."""
    left = []
    for op in later:
        if str(Path(op.path).parent) == folder:
            _rename_or_so(durable, op)
        else:
            left.append(op)
    return left


def _rename_or_so(names: Names, op: Op) -> None:
    if op.kind == "create":
        names[op.path] = op.offset
    elif op.kind == "mkdir":
        names[op.path] = None
    elif op.kind == "unlink":
        names.pop(op.path, None)
    elif op.data in names:
        names[op.path] = names.pop(op.data)


def _apply(content: bytearray, op: Op, data: bytes) -> None:
    if op.kind == "truncate":
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
        return
    content.extend(bytes(max(0, op.offset + len(data) - len(content))))
    content[op.offset : op.offset + len(data)] = data


def _settle(file: _File) -> None:
    for op in file.pending:
        _apply(file.durable, op, op.data or b"")
    file.pending.clear()


def _remains(file: _File, rng: random.Random) -> bytes:
    """What was fsynced, and of the later writes any subset, some of them torn."""
    content = bytearray(file.durable)
    share = rng.choice((0.0, 0.5, 0.9, 1.0))
    for op in file.pending:
        if rng.random() >= share:
            continue
        data = op.data or b""
        if len(data) > SECTOR and rng.random() < 0.3:
            data = data[: SECTOR * rng.randrange(1 + len(data) // SECTOR)]
        _apply(content, op, data)
    return bytes(content)


class RecordingFiles(FileSystem):
    """The real file system, recorded."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._paths = recording, dict[int, list[Any]]()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._paths[fd] = [path, 0]
        self._recording.add("create", path)
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        written = super().write(fd, data)
        path, offset = self._paths[fd]
        self._recording.add("write", path, bytes(data[:written]), offset)
        self._paths[fd][1] += written
        return written

    def fsync(self, fd: int) -> None:
        self._recording.add("fsync", self._paths[fd][0])

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._recording.add("rename", target, str(source.relative_to(self._recording.root)))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._recording.add("unlink", path)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._recording.add("mkdir", path)

    def fsync_dir(self, path: Path) -> None:
        self._recording.add("fsync_dir", path)


class RecordingVFS(apsw.VFS):
    """SQLite's own VFS, recorded. The next fsync of each file named in `fail_sync` fails."""

    def __init__(self, recording: Recording, name: str) -> None:
        self.recording, self.vfs_name = recording, name
        self.fail_sync: set[str] = set()
        super().__init__(name, "")

    def xOpen(self, name: Any, flags: list[int]) -> _RecordedFile:
        return _RecordedFile(self, name, flags)

    def xDelete(self, name: str, sync_dir: bool) -> None:
        super().xDelete(name, sync_dir)
        self.recording.add("unlink", name)
        if sync_dir:
            self.recording.add("fsync_dir", Path(name).parent)


class _RecordedFile(apsw.VFSFile):
    def __init__(self, vfs: RecordingVFS, name: Any, flags: list[int]) -> None:
        filename = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._path, self._vfs = Path(filename), vfs
        # As in SQLite: the first fsync of a new journal or WAL also syncs its directory.
        self._new = not self._path.exists()
        self._wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__("", name, flags)
        if self._new:
            vfs.recording.add("create", self._path)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._vfs.recording.add("write", self._path, bytes(data), offset)

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._vfs.recording.add("truncate", self._path, None, size)

    def xSync(self, flags: int) -> None:
        if self._path.name in self._vfs.fail_sync:
            self._vfs.fail_sync.discard(self._path.name)
            self._vfs.recording.add("lost", self._path)
            raise apsw.IOError("fsync failed on purpose")
        self._vfs.recording.add("fsync", self._path)
        if self._new and self._wal:
            self._vfs.recording.add("fsync_dir", self._path.parent)
            self._new = False


class RecordedConnection:
    """An apsw connection with the few methods and the errors of an sqlite3 one."""

    def __init__(self, path: Path, vfs: RecordingVFS) -> None:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        self._connection = apsw.Connection(str(path), flags=flags, vfs=vfs.vfs_name)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        try:
            rows = list(self._connection.execute(sql, tuple(parameters)))
        except apsw.Error as error:
            raise _as_sqlite3(error) from error
        return _Rows(rows)

    def executescript(self, sql: str) -> None:
        self.execute(sql)

    def close(self) -> None:
        try:
            self._connection.close()
        except apsw.Error as error:
            raise _as_sqlite3(error) from error


class _Rows:
    def __init__(self, rows: list[Any]) -> None:
        self._rows: Iterator[Any] = iter(rows)

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


def _as_sqlite3(error: apsw.Error) -> sqlite3.Error:
    known = {apsw.IOError: "disk I/O error", apsw.FullError: "database or disk is full"}
    return sqlite3.OperationalError(known.get(type(error), str(error)))
