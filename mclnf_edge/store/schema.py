"""The ledger's tables, their format version, and the way from older formats to this one."""

from __future__ import annotations

FORMAT = 1
"""Raised with every change to the tables; a map of a newer format is refused by name."""

SCHEMA = (
    "CREATE TABLE map (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE streams (
        id INTEGER PRIMARY KEY,
        session TEXT NOT NULL,
        stream TEXT NOT NULL,
        hello TEXT NOT NULL,
        accepted INTEGER NOT NULL DEFAULT 0,
        duplicate INTEGER NOT NULL DEFAULT 0,
        redundant INTEGER NOT NULL DEFAULT 0,
        rejected INTEGER NOT NULL DEFAULT 0,
        last_seq INTEGER NOT NULL DEFAULT -1,
        UNIQUE (session, stream))""",
    # The payload stands last, so that the other columns are read without walking over it.
    """CREATE TABLE frames (
        id INTEGER PRIMARY KEY,
        stream_id INTEGER NOT NULL REFERENCES streams (id),
        seq INTEGER NOT NULL,
        timestamp REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('held', 'done', 'redundant')),
        bytes INTEGER NOT NULL,
        rays INTEGER NOT NULL DEFAULT 0,
        tasks TEXT NOT NULL DEFAULT '[]',
        payload BLOB,
        UNIQUE (stream_id, seq),
        CHECK ((state = 'held') = (payload IS NOT NULL)))""",
    "CREATE INDEX frames_held ON frames (id) WHERE state = 'held'",
    """CREATE TABLE tasks (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        meta TEXT NOT NULL)""",
    """CREATE TABLE modules (
        id TEXT NOT NULL,
        version INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('closed', 'quarantined')),
        digest TEXT NOT NULL,
        file TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        meta TEXT NOT NULL,
        parent INTEGER,
        committed_at REAL NOT NULL,
        PRIMARY KEY (id, version))""",
)

MIGRATIONS: dict[int, tuple[str, ...]] = {
    # Format 0 did not record which tasks a frame belongs to, nor what a module descends from.
    0: (
        "ALTER TABLE frames ADD COLUMN tasks TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE modules ADD COLUMN parent INTEGER",
    ),
}
"""By the format they start from, the statements that lead to the next one."""
