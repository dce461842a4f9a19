"""The ledger: which streams, frames, tasks and modules the map has, durable when a call returns.

(session, stream, seq) is a frame's identity for ever: the row stays when its payload is let go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mclnf_edge.errors import DiskFull, MapMismatch, StoreError
from mclnf_edge.store.database import Connection, Database, Row

PutStatus = Literal["accepted", "duplicate", "redundant"]

_SEEN: dict[str, PutStatus] = {
    "held": "duplicate",
    "done": "duplicate",
    "redundant": "redundant",
}
_COUNT = {
    "accepted": "UPDATE streams SET accepted = accepted + 1 WHERE id = ?",
    "duplicate": "UPDATE streams SET duplicate = duplicate + 1 WHERE id = ?",
    "redundant": "UPDATE streams SET redundant = redundant + 1 WHERE id = ?",
}
_STREAM_KEYS = ("session", "stream", "hello", "accepted", "duplicate", "redundant", "rejected")


@dataclass(frozen=True, slots=True)
class FrameRow:
    """One frame to keep. `payload` is opaque; None only remembers that it was redundant."""

    session: str
    stream: str
    seq: int
    timestamp: float
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class HeldFrame:
    """A frame whose payload is kept; `id` rises in order of arrival."""

    id: int
    session: str
    stream: str
    seq: int
    payload: bytes
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """One committed module version as the ledger knows it; `parent` is the version it replaced."""

    id: str
    version: int
    state: Literal["closed", "quarantined"]
    digest: str
    file: str
    bytes: int
    meta: dict[str, Any]
    parent: int | None
    committed_at: float


_MODULE_COLUMNS = ", ".join(ModuleRecord.__slots__)


class Ledger:
    """Reads and writes the rows. Any thread may call any method."""

    def __init__(self, database: Database, max_bytes: int | None = None) -> None:
        self.database = database
        self._max_bytes = max_bytes

    # Map

    def fix_meta(self, meta: Mapping[str, Any]) -> None:
        """Record what the map is; raises MapMismatch where it is already something else.

        Keys that the map does not have yet are added, so the world frame may come with the first
        stream.
        """
        known = self.require_meta(meta)
        added = {key: value for key, value in meta.items() if key not in known}
        if not added:
            return
        with self.database.transaction() as connection:
            for key, value in added.items():
                connection.execute("INSERT INTO map VALUES (?, ?)", (key, json.dumps(value)))

    def require_meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """What the map is; raises MapMismatch where `meta` says something else."""
        known = self.meta()
        for key, value in meta.items():
            if key in known and known[key] != _plain(value):
                raise MapMismatch(
                    f"{self.database.path.parent}: expected {key} {known[key]!r}, "
                    f"received {value!r}"
                )
        return known

    def meta(self) -> dict[str, Any]:
        """What the map is: initialization digest, cell size, world frame, ..."""
        rows = self.database.rows("SELECT key, value FROM map")
        return {key: json.loads(value) for key, value in rows}

    # Streams and frames

    def put_stream(self, session: str, stream: str, hello: Mapping[str, Any]) -> None:
        """Remember a stream, or what it says of itself now."""
        text = json.dumps(hello)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO streams (session, stream, hello) VALUES (?, ?, ?) "
                "ON CONFLICT (session, stream) DO UPDATE SET hello = excluded.hello",
                (session, stream, text),
            )

    def streams(self) -> list[dict[str, Any]]:
        """Every stream with `hello`, its four counts and `last_seq`, in order of appearance."""
        columns = (*_STREAM_KEYS, "last_seq")
        rows = self.database.rows(f"SELECT {', '.join(columns)} FROM streams ORDER BY id")
        found = [dict(zip(columns, row, strict=True)) for row in rows]
        return [{**each, "hello": json.loads(each["hello"])} for each in found]

    def put_frames(
        self,
        frames: Sequence[FrameRow],
        rejected: Mapping[tuple[str, str], int] | None = None,
    ) -> list[PutStatus]:
        """Keep `frames` in one transaction, durable on return; the answer to each, in order.

        `rejected` adds to the counts of (session, stream). Raises DiskFull, having kept none of
        them, when the disk or the byte cap has no room; StoreError for a stream never announced.
        """
        self._check_room(sum(len(frame.payload or b"") for frame in frames))
        with self.database.transaction() as connection:
            for (session, stream), count in (rejected or {}).items():
                connection.execute(
                    "UPDATE streams SET rejected = rejected + ? WHERE session = ? AND stream = ?",
                    (count, session, stream),
                )
            return [_put_frame(connection, frame) for frame in frames]

    def _check_room(self, incoming: int) -> None:
        if self._max_bytes is None or not incoming:
            return
        used = self.database.used_bytes()
        if used + incoming > self._max_bytes:
            raise DiskFull(
                f"{self.database.path}: {incoming} bytes more than the {used} in use would pass "
                f"the cap of {self._max_bytes} bytes"
            )

    def held_frames(self, after_id: int = 0, limit: int | None = None) -> Iterator[HeldFrame]:
        """Frames whose payload is kept, oldest first, after `after_id`; one in memory at a time.

        No lock and no read transaction is held between two frames.
        """
        while limit is None or limit > 0:
            rows = self.database.rows(
                "SELECT frames.id, session, stream, seq, payload, tasks FROM frames "
                "JOIN streams ON streams.id = stream_id "
                "WHERE frames.id > ? AND state = 'held' ORDER BY frames.id LIMIT 1",
                (after_id,),
            )
            if not rows:
                return
            number, session, stream, seq, payload, tasks = rows[0]
            frame = HeldFrame(number, session, stream, seq, payload, tuple(json.loads(tasks)))
            yield frame
            after_id, limit = frame.id, None if limit is None else limit - 1

    def count_held(self, after_id: int = 0) -> int:
        """How many frames after `after_id` have their payload kept."""
        sql = "SELECT count(*) FROM frames WHERE id > ? AND state = 'held'"
        [[count]] = self.database.rows(sql, (after_id,))
        return int(count)

    def mark_frames(self, marks: Mapping[int, Mapping[str, Sequence[str]]]) -> None:
        """Record each frame's `tasks`, by frame id."""
        with self.database.transaction() as connection:
            for frame, mark in marks.items():
                tasks = json.dumps(list(mark["tasks"]))
                connection.execute("UPDATE frames SET tasks = ? WHERE id = ?", (tasks, frame))

    def let_go(self, rays: Mapping[int, int]) -> None:
        """The frames were trained into committed modules with this many rays: drop the payloads."""
        with self.database.transaction() as connection:
            _let_go(connection, rays)
        self.database.reclaim()

    # Tasks

    def put_task(self, task: str, state: str, meta: Mapping[str, Any]) -> None:
        """Remember a task's state."""
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO tasks VALUES (?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET state = excluded.state, meta = excluded.meta",
                (task, state, json.dumps(meta)),
            )

    def tasks(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Every task's (state, meta) by its id."""
        rows = self.database.rows("SELECT id, state, meta FROM tasks ORDER BY rowid")
        return {task: (state, json.loads(meta)) for task, state, meta in rows}

    # Modules

    def put_module(self, record: ModuleRecord, let_go: Mapping[int, int]) -> None:
        """Commit a module's row and let its frames go, together."""
        values = [getattr(record, name) for name in ModuleRecord.__slots__]
        values[ModuleRecord.__slots__.index("meta")] = json.dumps(record.meta)
        with self.database.transaction() as connection:
            marks = ", ".join("?" * len(values))
            connection.execute(f"INSERT INTO modules ({_MODULE_COLUMNS}) VALUES ({marks})", values)
            _let_go(connection, let_go)
        if let_go:
            self.database.reclaim()

    def modules(self) -> list[ModuleRecord]:
        """Every committed version, in order of commit."""
        rows = self.database.rows(f"SELECT {_MODULE_COLUMNS} FROM modules ORDER BY rowid")
        return [_module(row) for row in rows]

    def modules_after(self, count: int, limit: int) -> list[ModuleRecord]:
        """At most `limit` versions after the first `count`, in order of commit."""
        rows = self.database.rows(
            f"SELECT {_MODULE_COLUMNS} FROM modules ORDER BY rowid LIMIT ? OFFSET ?",
            (limit, count),
        )
        return [_module(row) for row in rows]

    def frame_bytes(self) -> int:
        """Bytes that every frame taken so far had, kept or let go."""
        return int(self.database.rows("SELECT coalesce(sum(bytes), 0) FROM frames")[0][0])

    def module(self, module: str, version: int | None = None) -> ModuleRecord:
        """One version, by default the newest that is not quarantined; raises StoreError."""
        condition = "state = 'closed' AND ? IS NULL" if version is None else "version = ?"
        rows = self.database.rows(
            f"SELECT {_MODULE_COLUMNS} FROM modules WHERE id = ? AND {condition} "
            "ORDER BY version DESC LIMIT 1",
            (module, version),
        )
        if not rows:
            what = "any sound version" if version is None else f"version {version}"
            raise StoreError(f"{self.database.path}: expected {what} of module {module!r}: none")
        return _module(rows[0])

    def has_module(self, module: str, version: int) -> bool:
        """Whether this version was committed."""
        sql = "SELECT 1 FROM modules WHERE id = ? AND version = ?"
        return bool(self.database.rows(sql, (module, version)))

    def quarantine(self, module: str, version: int) -> None:
        """Never load this version again; raises StoreError when there is none."""
        self.module(module, version)
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE modules SET state = 'quarantined' WHERE id = ? AND version = ?",
                (module, version),
            )

    def counts_of_modules(self) -> dict[str, int]:
        """Module versions by state."""
        rows = self.database.rows("SELECT state, count(*) FROM modules GROUP BY state")
        return {state: count for state, count in rows}

    def counts(self) -> dict[str, int]:
        """Frames by state, bytes of the payloads held, rays trained, module versions by state."""
        query = self.database.rows
        [[held, held_bytes]] = query(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM frames WHERE state = 'held'"
        )
        [[done, rays]] = query(
            "SELECT count(*), coalesce(sum(rays), 0) FROM frames WHERE state = 'done'"
        )
        [[redundant]] = query("SELECT coalesce(sum(redundant), 0) FROM streams")
        states = self.counts_of_modules()
        return {
            "held": held,
            "held_bytes": held_bytes,
            "done": done,
            "rays": rays,
            "redundant": redundant,
            "closed": states.get("closed", 0),
            "quarantined": states.get("quarantined", 0),
        }


def new_record(
    module: str, version: int, digest: str, file: str, size: int, meta: dict[str, Any]
) -> ModuleRecord:
    """The row of a module committed now; `meta["parent"]` names the version it replaces."""
    return ModuleRecord(
        id=module,
        version=version,
        state="closed",
        digest=digest,
        file=file,
        bytes=size,
        meta=meta,
        parent=meta.get("parent"),
        committed_at=time.time(),
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _module(row: Row) -> ModuleRecord:
    values = dict(zip(ModuleRecord.__slots__, row, strict=True))
    return ModuleRecord(**{**values, "meta": json.loads(values["meta"])})


def _put_frame(connection: Connection, frame: FrameRow) -> PutStatus:
    found = connection.execute(
        "SELECT id FROM streams WHERE session = ? AND stream = ?", (frame.session, frame.stream)
    ).fetchone()
    if found is None:
        raise StoreError(f"stream {frame.session!r}/{frame.stream!r} was never announced")
    stream = found[0]
    seen = connection.execute(
        "SELECT state FROM frames WHERE stream_id = ? AND seq = ?", (stream, frame.seq)
    ).fetchone()
    if seen is not None:
        connection.execute(_COUNT["duplicate"], (stream,))
        return _SEEN[seen[0]]
    _insert_frame(connection, stream, frame)
    status: PutStatus = "redundant" if frame.payload is None else "accepted"
    connection.execute(_COUNT[status], (stream,))
    connection.execute(
        "UPDATE streams SET last_seq = max(last_seq, ?) WHERE id = ?", (frame.seq, stream)
    )
    return status


def _insert_frame(connection: Connection, stream: int, frame: FrameRow) -> None:
    state = "redundant" if frame.payload is None else "held"
    connection.execute(
        "INSERT INTO frames (stream_id, seq, timestamp, state, bytes, payload) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (stream, frame.seq, frame.timestamp, state, len(frame.payload or b""), frame.payload),
    )


def _let_go(connection: Connection, rays: Mapping[int, int]) -> None:
    for frame, count in rays.items():
        connection.execute(
            "UPDATE frames SET state = 'done', payload = NULL, rays = rays + ? "
            "WHERE id = ? AND state != 'redundant'",
            (count, frame),
        )
