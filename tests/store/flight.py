"""A short life of a map, as the daemon would lead it, and what must be true after a crash."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mclnf_edge.errors import Corrupt, DiskFull
from mclnf_edge.store import FrameRow, MapStore, map_check
from mclnf_edge.types import ModuleSnapshot
from tests.store.powerloss import (
    RecordedConnection,
    Recording,
    RecordingFiles,
    RecordingVFS,
)

SESSION, STREAM = "session", "camera"
_names = itertools.count()


def payload(seq: int, size: int = 6000) -> bytes:
    """The bytes of frame `seq`; no two frames share them."""
    return random.Random(seq).randbytes(size)


def rows(first: int, count: int) -> list[FrameRow]:
    """`count` frames from number `first` on."""
    numbers = range(first, first + count)
    return [FrameRow(SESSION, STREAM, seq, float(seq), payload(seq)) for seq in numbers]


def module(name: str, version: int = 1) -> ModuleSnapshot:
    """A small module whose contents follow from its name."""
    rng = np.random.default_rng(sum(name.encode()) + version)
    meta = {"steps": 10, "frames": 3, "bounds": [[0, 0, 0], [1, 1, 1]], "psnr": 20.0}
    arrays = {"planes": rng.normal(size=(40, 40)).astype(np.float32)}
    return ModuleSnapshot(name, version, arrays, meta)


def fly(root: Path, broken: str = "", rounds: int = 4, fail_sync: bool = False) -> Recording:
    """Live through `rounds` tasks in `root`/map and record every step and promise."""
    recording = Recording(root, broken)
    vfs = RecordingVFS(recording, f"recording{next(_names)}")
    store = MapStore.open(
        root / "map",
        meta={"cell_size_m": 40.0},
        connect=lambda path: RecordedConnection(path, vfs),
        files=RecordingFiles(recording),
    )
    recording.ack(("map", ""))
    store.put_stream(SESSION, STREAM, {})
    for turn in range(rounds):
        _one_task(store, recording, turn)
        if fail_sync and turn == 1:
            _failed_fsync(store, recording, vfs)
    store.close()
    return recording


def _one_task(store: MapStore, recording: Recording, turn: int) -> None:
    for group in range(6):
        first = turn * 100 + group * 4
        store.put_frames(rows(first, 4))
        recording.ack(("frames", range(first, first + 4)))
    store.checkpoint_save("open", {"x": np.full(300, turn, np.float32)}, {"turn": turn})
    recording.ack(("checkpoint", turn))
    held = list(store.held_frames(limit=12))
    recording.ack(("letting go", [frame.seq for frame in held]))
    store.commit_module(module(f"m{turn}"), {frame.id: 5 for frame in held})
    recording.ack(("module", f"m{turn}"))


def _failed_fsync(store: MapStore, recording: Recording, vfs: RecordingVFS) -> None:
    # The log is not empty now, so that the next fsync is a commit's and not its header's.
    store.put_frames(rows(890, 2))
    recording.ack(("frames", range(890, 892)))
    # The main file's fails too, so that closing cannot move the log there and drop it.
    vfs.fail_sync = {"ledger.db-wal", "ledger.db"}
    for first in (900, 910):  # the second is refused because the first failed
        try:
            store.put_frames(rows(first, 2))
        except DiskFull:
            continue
        raise AssertionError("frames were acknowledged after a failed fsync")
    store.reopen()
    store.put_frames(rows(920, 4))
    recording.ack(("frames", range(920, 924)))


def cut_and_look(
    recording: Recording, work: Path, cuts: int, seed: int, within: range | None = None
) -> Iterator[str]:
    """What is wrong after each of `cuts` power cuts at random steps, by default of all."""
    rng = random.Random(seed)
    for _ in range(cuts):
        cut = rng.choice(within or range(1, len(recording.ops)))
        target = work / "crash"
        recording.crash(cut, target, rng)
        found = list(faults(target / "map", recording.promises(cut)))
        shutil.rmtree(target)
        yield from (f"cut {cut}: {fault}" for fault in found)


def faults(found: Path, promises: list[Any]) -> Iterator[str]:
    """What was promised before the cut and is not so in the map that was found."""
    if not promises:
        return
    broken = [problem for problem in map_check_after_open(found) if "ckpt" not in problem]
    yield from broken
    if broken:
        return
    with MapStore.open(found, meta={"cell_size_m": 40.0}, create=False) as store:
        yield from _missing_frames(store, promises)
        versions = {record.id for record in store.modules()}
        for kind, what in promises:
            if kind == "module" and what not in versions:
                yield f"module {what} is gone"
        for name in versions:
            same = store.load_module(name).arrays["planes"] == module(name).arrays["planes"]
            if not same.all():
                yield f"module {name} is another"
        turns = [what for kind, what in promises if kind == "checkpoint"]
        if turns and _turn(store) < turns[-1]:
            yield f"checkpoint {turns[-1]} is gone"


def _turn(store: MapStore) -> int:
    try:
        loaded = store.checkpoint_load("open")
    except Corrupt:
        return -1
    return -1 if loaded is None else int(loaded[1]["turn"])


def map_check_after_open(found: Path) -> list[str]:
    """Open as the daemon does, which recovers and tidies, then check; [] when sound."""
    try:
        MapStore.open(found, create=False).close()
    except Exception as error:  # any failure to open is a finding, whatever its type
        return [f"does not open: {error}"]
    return [f"{problem.file}: {problem.message}" for problem in map_check(found)]


def _missing_frames(store: MapStore, promises: list[Any]) -> Iterator[str]:
    held = {frame.seq: frame for frame in store.held_frames()}
    committed = store.counts()["closed"]
    may_be_done = [seq for kind, what in promises if kind == "letting go" for seq in what]
    done: dict[int, int] = dict(
        store.ledger.database.rows("SELECT seq, rays FROM frames WHERE state = 'done'")
    )
    if len(done) != 12 * committed or not set(done) <= set(may_be_done):
        yield f"{committed} modules but {len(done)} frames done"
    for seq in [seq for kind, what in promises if kind == "frames" for seq in what]:
        if seq in held:
            if held[seq].payload != payload(seq):
                yield f"frame {seq} has other bytes"
        elif done.get(seq) != 5:
            yield f"frame {seq} is lost"
