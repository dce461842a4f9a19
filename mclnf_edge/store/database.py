"""The SQLite file under the ledger: how it is opened, locked, failed, reopened and reclaimed.

WAL with synchronous=FULL: a commit is durable when it returns. All threads share one connection
that writes and one that only reads, each behind a lock of its own: nobody who reads waits for a
commit on a slow disk. A failed fsync or I/O error poisons the handle: what the kernel then holds of
the file may never reach the disk, so nothing more is accepted until `reopen`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mclnf_edge.errors import Corrupt, DiskFull, MapMismatch, StoreError
from mclnf_edge.store.files import DISK, FileSystem, write_durably
from mclnf_edge.store.schema import FORMAT, MIGRATIONS, SCHEMA

log = logging.getLogger(__name__)

PAGE_BYTES = 8192
WAL_PAGES = 2048
"""After this many pages in the WAL, a commit also moves them into the main file."""
FREE_PAGES = 2048
"""As many pages stay in the main file for frames to come; more are given back."""

PRAGMAS = (
    f"page_size={PAGE_BYTES}",
    "auto_vacuum=incremental",
    "journal_mode=wal",
    "synchronous=full",
    "secure_delete=on",
    "foreign_keys=on",
    "busy_timeout=10000",
    f"wal_autocheckpoint={WAL_PAGES}",
    f"journal_size_limit={2 * WAL_PAGES * PAGE_BYTES}",
)
READ_PRAGMAS = ("query_only=on", "busy_timeout=10000")

Row = tuple[Any, ...]


class Cursor(Protocol):
    """What is used of a cursor."""

    def fetchone(self) -> Any:
        """The next row or None."""

    def fetchall(self) -> list[Any]:
        """All rows left."""


class Connection(Protocol):
    """What is used of a connection, in autocommit mode; errors are `sqlite3.Error`."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Run one statement."""

    def executescript(self, sql: str, /) -> object:
        """Run statements to their end, outside a transaction."""

    def close(self) -> None:
        """Close it."""


Connect = Callable[[Path], Connection]


def connect(path: Path) -> Connection:
    """A connection that may write, made if missing."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def connect_read_only(path: Path) -> Connection:
    """A connection that only reads, beside a running daemon or from a read-only disk."""
    frozen = not os.access(path.parent, os.W_OK) and not wal_of(path).exists()
    uri = f"{path.absolute().as_uri()}?mode=ro" + ("&immutable=1" if frozen else "")
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)


def wal_of(path: Path) -> Path:
    """The write-ahead log beside the database `path`."""
    return path.with_name(path.name + "-wal")


class Database:
    """One ledger file. Every method raises StoreError or one of its kinds, never sqlite3.Error."""

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        connect: Connect = connect,
        files: FileSystem = DISK,
    ) -> None:
        self.path, self.read_only = path, read_only
        self._connect = connect_read_only if read_only else connect
        self._files = files
        self._lock, self._read_lock = threading.Lock(), threading.Lock()
        self._failure = ""
        self._connection = self._open(READ_PRAGMAS if read_only else PRAGMAS)
        self._reader = self._connection if read_only else self._open(READ_PRAGMAS)

    def _open(self, pragmas: Sequence[str]) -> Connection:
        with self._translated("opening"):
            connection = self._connect(self.path)
            try:
                for pragma in pragmas:
                    connection.execute(f"PRAGMA {pragma}").fetchall()
                bring_to_format(connection, self.path, self.read_only)
                if pragmas is PRAGMAS:
                    # SQLite never syncs the directory for the main file's own entry.
                    self._files.fsync_dir(self.path.parent)
            except BaseException:
                connection.close()
                raise
            return connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """All or nothing, durable when the block ends; raises DiskFull when it cannot be."""
        with self._lock, self._translated("writing"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        try:
            self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            # SQLite has already rolled back by itself, which it does on the worst errors.
            log.debug("no transaction was left to roll back in %s", self.path)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """Every row of a query, of what was committed when it began."""
        with self._read_lock, self._translated("reading"):
            return self._reader.execute(sql, parameters).fetchall()

    def reclaim(self) -> bool:
        """Wipe what was let go: empty the WAL, and shrink the main file to little spare room.

        The main file's free pages are zeros already (secure_delete).

        True when nothing of it is left on disk. A reader in another process can keep the WAL for
        now; call again later. What was committed stays committed whatever happens here.
        """
        try:
            with self._lock, self._translated("reclaiming"):
                # Not by `execute`: this statement frees one page a step, and that takes one step.
                [[free]] = self._connection.execute("PRAGMA freelist_count").fetchall()
                if free > FREE_PAGES:
                    spare = free - FREE_PAGES
                    self._connection.executescript(f"PRAGMA incremental_vacuum({spare})")
                return not self._connection.execute("PRAGMA wal_checkpoint(truncate)").fetchone()[0]
        except StoreError as error:
            log.warning("%s", error)
            return False

    def size_bytes(self) -> int:
        """Bytes on disk of the main file and its WAL."""
        paths = (self.path, wal_of(self.path))
        return sum(path.stat().st_size for path in paths if path.exists())

    def used_bytes(self) -> int:
        """Bytes of the pages in use, which is what a byte cap must count."""
        [(pages, free)] = self.rows(
            "SELECT page_count, freelist_count FROM pragma_page_count, pragma_freelist_count"
        )
        return int(pages - free) * PAGE_BYTES

    def reopen(self) -> None:
        """A fresh handle after a failure; raises DiskFull while the disk still fails.

        After a failed fsync the kernel may count the WAL's pages as clean though they never
        reached the disk. Its copy in memory is therefore written again, to a new file, before
        anything may build on it.
        """
        with self._lock, self._read_lock:
            wal = wal_of(self.path)
            if wal.exists():
                write_durably(wal, wal.read_bytes(), self._files)
            self._close()
            self._failure = ""
            try:
                self._connection = self._open(PRAGMAS)
                self._reader = self._open(READ_PRAGMAS)
            except BaseException as error:
                self._failure = f"reopening: {error}"
                raise

    def close(self) -> None:
        """Close both handles."""
        with self._lock, self._read_lock:
            self._close()

    def _close(self) -> None:
        for connection in (self._reader, self._connection):  # the last one empties the WAL
            try:
                connection.close()
            except sqlite3.Error as error:
                log.warning("closing %s: %s", self.path, error)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        if self._failure:
            raise DiskFull(f"{self.path} failed before and was not reopened: {self._failure}")
        try:
            yield
        except sqlite3.Error as error:
            translated = ledger_error(error, f"{doing} {self.path}")
            if "I/O" in str(error):
                self._failure = str(translated)
            raise translated from error
        except OSError as error:
            raise DiskFull(f"{doing} {self.path}: {error}") from error


def ledger_error(error: sqlite3.Error, doing: str) -> StoreError:
    """`error` in our terms. By its text: Python 3.10 does not tell SQLite's codes."""
    text = str(error)
    kind: type[StoreError] = StoreError
    passing = ("disk is full", "disk I/O error", "readonly database", "database is locked")
    if any(part in text for part in passing):
        kind = DiskFull
    elif any(part in text for part in ("malformed", "not a database")):
        kind = Corrupt
    return kind(f"{doing}: {text}")


def bring_to_format(connection: Connection, path: Path, read_only: bool) -> None:
    """Make the tables of a new file, migrate an older one, refuse a newer one.

    Raises MapMismatch for a newer format, or an older one that may not be written.
    """
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if found == FORMAT:
        return
    if found > FORMAT or read_only:
        raise MapMismatch(f"{path}: expected map format {FORMAT}, received format {found}")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _steps(found) if tables else SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version={FORMAT}")
    connection.execute("COMMIT")


def _steps(found: int) -> list[str]:
    return [statement for step in range(found, FORMAT) for statement in MIGRATIONS[step]]
