"""Every call to the disk fails once in turn, and processes are killed at random moments."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mclnf_edge.errors import DiskFull, StoreError
from mclnf_edge.store import MapStore, map_check
from mclnf_edge.store.database import connect
from mclnf_edge.store.files import FileSystem
from tests.store.flight import SESSION, STREAM, module, payload, rows

CALLS = ("create", "write", "fsync", "rename", "fsync_dir")


class FailingFiles(FileSystem):
    """The real file system, of which call number `at` to `call` fails (0: none does)."""

    def __init__(self, call: str, at: int, code: int) -> None:
        self._call, self._left, self._code = call, at, code
        for name in CALLS:
            setattr(self, name, self._guarded(name, getattr(super(), name)))

    def _guarded(self, name: str, real: Any) -> Any:
        def guarded(*arguments: Any) -> Any:
            if name == self._call:
                self._left -= 1
                if self._left == 0:
                    if self._code == 0:  # a short write, then no room for the rest
                        self._left, self._code = 1, errno.ENOSPC
                        return os.write(arguments[0], arguments[1][:7])
                    raise OSError(self._code, os.strerror(self._code))
            return real(*arguments)

        return guarded


def _live(store: MapStore) -> list[int]:
    """Work as the daemon does, trying a second time what fails; returns the kept numbers."""
    kept = []
    store.put_stream(SESSION, STREAM, {})
    for turn in range(2):
        store.put_frames(rows(turn * 10, 4))
        kept += list(range(turn * 10, turn * 10 + 4))
        held = {frame.id: 5 for frame in store.held_frames(limit=3)}
        for attempt in (1, 2):
            try:
                store.checkpoint_save("open", {}, {"turn": turn})
                store.commit_module(module(f"m{turn}"), held)
                break
            except DiskFull:
                assert attempt == 1
    return kept


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, 0])
def test_every_file_call_may_fail_once(tmp_path: Path, call: str, code: int) -> None:
    if code == 0 and call != "write":
        return
    for at in range(1, 9):
        path = tmp_path / f"map{at}"
        files = FailingFiles(call, at, code)
        try:
            store = MapStore.open(path, files=files)
        except DiskFull:
            store = MapStore.open(path, files=files)
        with store:
            kept = _live(store)
        _assert_sound(path, kept)


def _assert_sound(path: Path, kept: list[int]) -> None:
    assert map_check(path) == []
    with MapStore.open(path) as store:
        held = {frame.seq: frame.payload for frame in store.held_frames()}
        assert len(held) + store.counts()["done"] == len(kept)
        assert all(payload(seq) == data for seq, data in held.items())
        assert [record.id for record in store.modules()] == ["m0", "m1"]


def test_a_full_disk_refuses_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    with MapStore.open(tmp_path / "map") as store:
        store.put_stream(SESSION, STREAM, {})
        store.put_frames(rows(0, 2))
        pages = store.ledger.database.rows("PRAGMA page_count")[0][0]
        _allow_pages(store, pages + 2)
        with pytest.raises(DiskFull, match="full"):
            store.put_frames(rows(2, 30))
        assert [frame.seq for frame in store.held_frames()] == [0, 1]
        _allow_pages(store, 1_000_000)
        assert store.put_frames(rows(2, 30)) == ["accepted"] * 30


def _allow_pages(store: MapStore, pages: int) -> None:
    with store.ledger.database.transaction() as connection:
        connection.execute(f"PRAGMA max_page_count={pages}")


def test_a_closed_or_failed_handle_accepts_nothing(tmp_path: Path) -> None:
    store = MapStore.open(tmp_path / "map", connect=connect)
    store.put_stream(SESSION, STREAM, {})
    store.close()
    with pytest.raises(StoreError):
        store.put_frames(rows(0, 1))


WRITER = """
import sys
from pathlib import Path
from mclnf_edge.store import MapStore
from tests.store.flight import SESSION, STREAM, module, rows
with MapStore.open(Path(sys.argv[1])) as store:
    store.put_stream(SESSION, STREAM, {})
    first = max(stream["last_seq"] for stream in store.streams()) + 1
    for turn in range(10**9):
        statuses = store.put_frames(rows(first + turn * 3, 3))
        print(first + turn * 3, *statuses, flush=True)
        if turn % 4 == 3:
            held = [frame.id for frame in store.held_frames(limit=5)]
            store.commit_module(module(f"m{first + turn}"), {frame: 5 for frame in held})
"""


def test_kill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(4)
    told: list[int] = []
    digests: dict[str, str] = {}
    for _ in range(20):
        told += _killed_run(tmp_path / "map", rng.randint(1, 25))
        assert map_check_opened(tmp_path / "map") == []
        with MapStore.open(tmp_path / "map") as store:
            held = {frame.seq: frame.payload for frame in store.held_frames()}
            database = store.ledger.database
            done: dict[int, int] = dict(
                database.rows("SELECT seq, rays FROM frames WHERE state = 'done'")
            )
            found = {record.id: record.digest for record in store.modules()}
        assert set(told) <= held.keys() | done.keys() and set(done.values()) <= {5}
        assert all(payload(seq) == data for seq, data in held.items())
        assert digests.items() <= found.items()
        digests = found
    assert len(told) == len(set(told)) > 100 and digests


def map_check_opened(path: Path) -> list[Any]:
    """Problems after the next daemon has opened the map, which recovers it."""
    MapStore.open(path).close()
    return map_check(path)


def _killed_run(path: Path, groups: int) -> list[int]:
    """Numbers acknowledged by a writer that is killed some time after `groups` commits."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(groups)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    whole = [line.split() for line in lines if line.endswith("\n")]
    assert all(words[1:] == ["accepted"] * 3 for words in whole)
    return [int(words[0]) + n for words in whole for n in range(3)]
