"""The only place that writes files durably.

A file appears under its name whole or not at all: written beside it, fsynced, renamed, and the
directory fsynced. Every call to the file system goes through one `FileSystem`, so that a recorder
or a fault injector can stand in for it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

from mclnf_edge.errors import DiskFull, StoreError

TEMPORARY = ".tmp"
"""The suffix of a file that is still being written; found at opening, it is an orphan."""

_NO_ROOM = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE,
    errno.EMFILE, errno.ENFILE,
)  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


class FileSystem:
    """The calls that change the disk, one method each."""

    def create(self, path: Path) -> int:
        """Open a new empty file for writing; an older one of that name is emptied."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Make the file's contents durable."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close the file."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, replacing what had it."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove the name `path`."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make one directory."""
        os.mkdir(path)

    def fsync_dir(self, path: Path) -> None:
        """Make the directory's entries durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


DISK = FileSystem()


def store_error(error: OSError, doing: str) -> StoreError:
    """`error` in our terms: no room, no file descriptor left, a read-only disk and a failed fsync
    are `DiskFull`: they may pass."""
    kind = DiskFull if error.errno in _NO_ROOM else StoreError
    return kind(f"{doing}: {error.strerror or error}")


def write_durably(path: Path, data: bytes, files: FileSystem = DISK) -> None:
    """Put `data` at `path`, whole and durable on return; raises DiskFull or StoreError.

    On failure the name `path` still holds what it held before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        fd = files.create(temporary)
        try:
            _write_all(fd, data, files)
            files.fsync(fd)
        finally:
            files.close(fd)
        files.rename(temporary, path)
        files.fsync_dir(path.parent)
    except OSError as error:
        raise store_error(error, f"writing {path}") from error


def _write_all(fd: int, data: bytes, files: FileSystem) -> None:
    left = memoryview(data)
    while left:
        written = files.write(fd, left)
        if written <= 0:
            raise OSError(errno.ENOSPC, f"{len(left)} bytes could not be written")
        left = left[written:]


def make_directory(path: Path, files: FileSystem = DISK) -> None:
    """Make `path` and whatever lies above it, durably; raises DiskFull or StoreError."""
    if path.is_dir():
        return
    make_directory(path.parent, files)
    try:
        files.mkdir(path)
        files.fsync_dir(path.parent)
    except OSError as error:
        raise store_error(error, f"making the directory {path}") from error


def remove(path: Path, files: FileSystem = DISK) -> None:
    """Remove the file `path` if it is there; not yet durable on return."""
    try:
        files.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise store_error(error, f"removing {path}") from error


def safe_name(name: str) -> str:
    """A file name for `name`, which a stranger may have chosen: itself if plain, else a digest."""
    if _PLAIN.fullmatch(name):
        return name
    return "~" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]
