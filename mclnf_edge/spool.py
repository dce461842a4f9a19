"""A bounded first-in first-out store of messages on disk, for while the link is down.

Records are appended to numbered segment files and fsynced before `append` returns; each carries a
checksum. A segment is deleted once all its records are done. When the byte cap is reached the
*new* record is refused: what was taken is never thrown away. What is done is remembered in memory
only: after a restart a few records may be handed out again, which their identity makes harmless.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mclnf_edge.errors import DiskFull, StoreError

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sII")
"""Magic, payload bytes, CRC-32 of the payload."""
_MAGIC = b"MSP1"
_LENGTH = struct.Struct("<I")


@dataclass(slots=True)
class _Record:
    segment: int
    offset: int
    size: int
    done: bool = False


class Spool:
    """The spool in one folder; one process at a time may hold it."""

    def __init__(self, folder: Path, max_bytes: int = 256 * 1024 * 1024) -> None:
        """Open or make the spool and check every record.

        Raises StoreError when another process holds it. A torn tail is cut off, a damaged segment
        is set aside as *.damaged; both are logged and counted in `damaged`.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self._segment_bytes = max(1, max_bytes // 8)
        self.damaged = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StoreError(f"spool {folder}: another process holds it") from error
        self._kept: deque[_Record] = deque()
        self._next = 0  # index into _kept of the next record to hand out
        self._sizes: dict[int, int] = {}
        self._open = -1
        for path in sorted(folder.glob("*.spool")):
            self._load(path)

    @property
    def unread(self) -> int:
        """Records not yet handed out."""
        return len(self._kept) - self._next

    @property
    def next_size(self) -> int:
        """Bytes of the next record to hand out, 0 when there is none."""
        return self._kept[self._next].size if self.unread else 0

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, at most `max_bytes`."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        """Records that are not done."""
        return sum(not record.done for record in self._kept)

    def append(self, messages: Sequence[Sequence[bytes]]) -> None:
        """Take several messages, durably and in order, with one fsync.

        Raises DiskFull when the cap or the disk does not allow it: then none of them is taken.
        """
        payloads = [_pack(parts) for parts in messages]
        if not payloads:
            return
        size = sum(map(len, payloads))
        if self.disk_bytes + size > self.max_bytes:
            raise DiskFull(
                f"spool {self.folder}: {size} bytes more than the cap of {self.max_bytes} allows; "
                f"{len(self)} older records are kept, the new one was not taken"
            )
        segment = self._segment_for(size)
        offset = self._sizes[segment]
        self._write(b"".join(payloads), offset)
        for payload in payloads:
            self._kept.append(_Record(segment, self._sizes[segment], len(payload)))
            self._sizes[segment] += len(payload)

    def take(self) -> tuple[object, list[bytes]]:
        """A ticket for `done` and the next record not yet handed out.

        Raises IndexError when `unread` is 0, StoreError when the record was damaged meanwhile:
        once, the next call hands out the next record.
        """
        record = self._kept[self._next]
        with self._path(record.segment).open("rb") as file:
            file.seek(record.offset)
            parts = _unpack(file.read(record.size))
        self._next += 1
        if parts is None:
            self.damaged += 1
            self.done(record)
            where = f"{self._path(record.segment)}: record at {record.offset}"
            raise StoreError(f"{where}: damaged since it was written, given up")
        return record, parts

    def done(self, ticket: object) -> None:
        """The record of this ticket need not be kept any longer."""
        assert isinstance(ticket, _Record)
        ticket.done = True
        while self._kept and self._kept[0].done and self._next:
            segment = self._kept.popleft().segment
            self._next -= 1
            if not self._kept or self._kept[0].segment != segment:
                self._drop(segment)

    def rewind(self) -> None:
        """Hand out again, from the oldest, every record that is not done."""
        self._kept = deque(record for record in self._kept if not record.done)
        self._next = 0

    def close(self) -> None:
        """Release the folder; what is not done stays for the next opening."""
        self._close_segment()
        os.close(self._lock)

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:012d}.spool"

    def _segment_for(self, size: int) -> int:
        """The segment to append to, a new one when the newest would grow too large."""
        newest = max(self._sizes, default=0)
        if self._open >= 0 and self._sizes[newest] + size <= self._segment_bytes:
            return newest
        self._close_segment()
        segment = newest + 1
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._open = os.open(self._path(segment), flags, 0o600)
            self._sync_folder()
        except OSError as error:
            self._close_segment()
            with contextlib.suppress(OSError):
                self._path(segment).unlink()
            raise DiskFull(f"spool {self.folder}: {error}") from error
        self._sizes[segment] = 0
        return segment

    def _write(self, data: bytes, offset: int) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._open, data[written:], offset + written)
            os.fdatasync(self._open)
        except OSError as error:
            # What an fsync that failed has kept is unknown: this handle takes nothing more.
            with contextlib.suppress(OSError):
                os.ftruncate(self._open, offset)
            self._close_segment()
            raise DiskFull(f"spool {self.folder}: {error}; the record was not taken") from error

    def _load(self, path: Path) -> None:
        """Index the records of one segment of an earlier process."""
        segment, data, offset = int(path.stem), path.read_bytes(), 0
        while offset < len(data):
            size = _record_size(data, offset)
            if size is None or _unpack(data[offset : offset + size]) is None:
                break
            self._kept.append(_Record(segment, offset, size))
            offset += size
        self._sizes[segment] = len(data)
        if offset < len(data):
            self.damaged += 1
            log.warning("%s: %d bytes after %d are not whole", path, len(data) - offset, offset)
            self._set_aside(path, segment, offset)

    def _set_aside(self, path: Path, segment: int, sound: int) -> None:
        """Keep a copy of a damaged tail for people, and cut the segment to its sound part."""
        tail = path.read_bytes()[sound:]
        path.with_suffix(".damaged").write_bytes(tail)
        os.truncate(path, sound)
        self._sizes[segment] = sound
        if not sound:
            self._drop(segment)

    def _drop(self, segment: int) -> None:
        if segment == max(self._sizes):
            self._close_segment()
        self._path(segment).unlink()
        del self._sizes[segment]

    def _close_segment(self) -> None:
        if self._open >= 0:
            os.close(self._open)
            self._open = -1

    def _sync_folder(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _pack(parts: Sequence[bytes]) -> bytes:
    payload = b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))
    return _HEAD.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _record_size(data: bytes, offset: int) -> int | None:
    if offset + _HEAD.size > len(data):
        return None
    magic, length, _ = _HEAD.unpack_from(data, offset)
    size = _HEAD.size + int(length)
    return size if magic == _MAGIC and offset + size <= len(data) else None


def _unpack(record: bytes) -> list[bytes] | None:
    """The parts of one record, None when its checksum does not match."""
    if len(record) < _HEAD.size:
        return None
    _, length, checksum = _HEAD.unpack_from(record)
    payload = record[_HEAD.size :]
    if len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    parts, offset = [], 0
    while offset < len(payload):
        (size,) = _LENGTH.unpack_from(payload, offset)
        offset += _LENGTH.size
        parts.append(payload[offset : offset + size])
        offset += size
    return parts
