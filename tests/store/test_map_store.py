"""The map store as the daemon uses it: identity, durability, letting go, damage, limits."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.errors import Corrupt, DiskFull, MapMismatch, StoreError
from mclnf_edge.store import FrameRow, MapStore, map_check, map_info, snapshot
from mclnf_edge.store.database import ledger_error
from mclnf_edge.store.files import safe_name, store_error
from mclnf_edge.types import ModuleSnapshot

META = {"init_digest": "abc", "cell_size_m": 40.0, "world": {"crs": "local-enu", "origin": None}}


@pytest.fixture
def store(tmp_path: Path) -> MapStore:
    """An empty map with one stream announced."""
    store = MapStore.open(tmp_path / "map", meta=META)
    store.put_stream("s", "camera", {"client": "test"})
    return store


def row(seq: int, payload: bytes | None = b"jpeg", stream: str = "camera") -> FrameRow:
    """A frame of the announced stream."""
    return FrameRow("s", stream, seq, seq / 10, payload)


def module(name: str = "m", version: int = 1) -> ModuleSnapshot:
    """A small module."""
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4).T, "n": np.array(7)}
    meta = {"kind": "fast", "steps": 8, "frames": 2, "bounds": [[0, 0, 0], [1, 1, 1]], "psnr": 20.5}
    return ModuleSnapshot(name, version, arrays, meta)


def test_each_identity_is_kept_once(store: MapStore) -> None:
    assert store.put_frames([row(5), row(5), row(3), row(9, None)]) == [
        "accepted",
        "duplicate",
        "accepted",
        "redundant",
    ]
    assert store.put_frames([row(9, None), row(9), row(3)], {("s", "camera"): 4}) == [
        "redundant",
        "redundant",
        "duplicate",
    ]
    [stream] = store.streams()
    counted = [stream[key] for key in ("accepted", "duplicate", "redundant", "rejected")]
    assert counted == [2, 4, 1, 4] and stream["last_seq"] == 9
    assert [frame.seq for frame in store.held_frames()] == [5, 3]


def test_a_restarted_publisher_is_another_stream(store: MapStore) -> None:
    store.put_frames([row(0)])
    store.put_stream("later", "camera", {})
    assert store.put_frames([FrameRow("later", "camera", 0, 0.0, b"x")]) == ["accepted"]


def test_an_unannounced_stream_keeps_nothing(store: MapStore) -> None:
    with pytest.raises(StoreError, match="never announced"):
        store.put_frames([row(1), row(1, stream="other")])
    assert store.counts()["held"] == 0


def test_held_frames_come_in_order_and_survive(store: MapStore, tmp_path: Path) -> None:
    store.put_frames([row(seq, bytes([seq]) * 9000) for seq in (4, 2, 7)])
    first = next(iter(store.held_frames()))
    store.mark_frames({first.id: {"tasks": ["a", "b"]}})
    store.close()
    with MapStore.open(tmp_path / "map", meta=META) as again:
        held = list(again.held_frames())
        assert [(f.seq, f.payload[:1], f.tasks) for f in held] == [
            (4, b"\x04", ("a", "b")),
            (2, b"\x02", ()),
            (7, b"\x07", ()),
        ]
        assert [f.seq for f in again.held_frames(after_id=held[0].id, limit=1)] == [2]
        assert again.count_held() == 3 and again.count_held(after_id=held[0].id) == 2
        again.let_go({held[1].id: 7})
        assert again.count_held() == 2 and again.count_held(after_id=held[0].id) == 1


def test_a_module_comes_back_as_committed(store: MapStore) -> None:
    store.commit_module(module())
    store.commit_module(module(version=2))
    loaded = store.load_module("m")
    assert loaded.version == 2 and loaded.meta == module().meta
    for name, array in module().arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
    with pytest.raises(StoreError, match="never changes"):
        store.commit_module(module())
    with pytest.raises(StoreError, match="any sound version"):
        store.load_module("other")


@pytest.mark.parametrize("way", ["commit", "let go"])
def test_no_byte_of_a_let_go_frame_stays_on_disk(store: MapStore, tmp_path: Path, way: str) -> None:
    secret, kept = os.urandom(24) * 900, os.urandom(24) * 900
    store.put_frames([row(1, secret), row(2, kept), row(3, secret[24:])])
    assert _on_disk(tmp_path / "map", secret[:24]) and _on_disk(tmp_path / "map", kept[:24])
    rays = {frame.id: 30 for frame in store.held_frames() if frame.seq != 2}
    if way == "commit":
        store.commit_module(module(), rays)
    else:
        store.let_go(rays)
    assert not _on_disk(tmp_path / "map", secret[:24])
    assert _on_disk(tmp_path / "map", kept[:24])
    assert store.put_frames([row(1, secret)]) == ["duplicate"]
    counts = store.counts()
    assert (counts["held"], counts["done"], counts["rays"]) == (1, 2, 60)


def _on_disk(folder: Path, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_space_comes_back(store: MapStore) -> None:
    for first in range(0, 800, 100):
        store.put_frames([row(seq, os.urandom(60_000)) for seq in range(first, first + 100)])
    assert store.journal_bytes() > 48_000_000
    store.let_go({frame.id: 1 for frame in store.held_frames()})
    assert store.journal_bytes() < 20_000_000


def test_the_byte_cap_answers_disk_full_and_keeps_the_handle(tmp_path: Path) -> None:
    store = MapStore.open(tmp_path / "map", max_journal_bytes=3_000_000)
    store.put_stream("s", "camera", {})
    seq = 0
    with pytest.raises(DiskFull, match="cap of 3000000"):
        for seq in range(1000):
            store.put_frames([row(seq, os.urandom(60_000))])
    assert 30 < seq < 50
    store.let_go({frame.id: 1 for frame in store.held_frames()})
    assert store.put_frames([row(seq, os.urandom(60_000))]) == ["accepted"]


def test_one_daemon_at_a_time(store: MapStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another daemon"):
        MapStore.open(tmp_path / "map", meta=META)
    with MapStore.open(tmp_path / "map", read_only=True) as reader:
        assert reader.counts()["held"] == 0
    store.close()
    MapStore.open(tmp_path / "map", meta=META).close()


@pytest.mark.parametrize("key", ["init_digest", "cell_size_m", "world"])
def test_a_map_of_something_else_is_refused(store: MapStore, tmp_path: Path, key: str) -> None:
    store.close()
    for read_only in (False, True):
        with pytest.raises(MapMismatch, match=f"expected {key}"):
            MapStore.open(tmp_path / "map", meta={**META, key: "another"}, read_only=read_only)
    MapStore.open(tmp_path / "map", meta={"more": 1}).close()
    with pytest.raises(MapMismatch, match="more"):
        MapStore.open(tmp_path / "map", meta={"more": 2})


def test_a_ledger_from_another_map_is_refused(store: MapStore, tmp_path: Path) -> None:
    store.commit_module(module())
    store.close()
    MapStore.open(tmp_path / "other", meta=META).close()
    shutil.copy(tmp_path / "other" / "ledger.db", tmp_path / "map" / "ledger.db")
    with pytest.raises(MapMismatch, match="map_id"):
        MapStore.open(tmp_path / "map", meta=META)
    assert map_check(tmp_path / "map")
    (tmp_path / "map" / "ledger.db").unlink()
    with pytest.raises(Corrupt, match="missing"):
        MapStore.open(tmp_path / "map", meta=META)
    assert len(list((tmp_path / "map" / "modules").iterdir())) == 1


def test_a_newer_format_is_refused_by_name(store: MapStore, tmp_path: Path) -> None:
    store.close()
    connection = sqlite3.connect(tmp_path / "map" / "ledger.db")
    connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(MapMismatch, match="format 7"):
        MapStore.open(tmp_path / "map")


def test_format_0_migrates(store: MapStore, tmp_path: Path) -> None:
    store.put_frames([row(1)])
    store.commit_module(module())
    store.close()
    (tmp_path / "map" / "map.json").unlink()
    connection = sqlite3.connect(tmp_path / "map" / "ledger.db")
    connection.executescript(
        "ALTER TABLE frames DROP COLUMN tasks; ALTER TABLE modules DROP COLUMN parent;"
        "DELETE FROM map WHERE key = 'map_id'; PRAGMA user_version=0"
    )
    connection.close()
    with MapStore.open(tmp_path / "map", meta=META) as migrated:
        assert [frame.tasks for frame in migrated.held_frames()] == [()]
        assert migrated.modules()[0].parent is None
        assert migrated.load_module("m").arrays["n"] == 7
    assert map_check(tmp_path / "map") == []


def test_flipped_bits_and_cut_files_are_named(store: MapStore, tmp_path: Path) -> None:
    files = [tmp_path / "map" / "modules" / store.commit_module(module(n)).file for n in "abc"]
    _flip(files[0], -1)
    files[1].write_bytes(files[1].read_bytes()[:-3])
    assert {p.file for p in map_check(tmp_path / "map")} == {
        f"modules/{path.name}" for path in files[:2]
    }
    for name in "ab":
        with pytest.raises(Corrupt, match=f"{name}.1.safetensors"):
            store.load_module(name)
    assert store.load_module("c").version == 1
    store.quarantine("a", 1)
    store.close()
    with MapStore.open(tmp_path / "map") as again:
        states = {record.id: record.state for record in again.modules()}
    assert states == {"a": "quarantined", "b": "quarantined", "c": "closed"}


def test_a_quarantined_version_gives_way_to_its_parent(store: MapStore) -> None:
    store.commit_module(module())
    store.commit_module(module(version=2))
    store.quarantine("m", 2)
    assert store.load_module("m").version == 1


def test_a_damaged_ledger_is_named(store: MapStore, tmp_path: Path) -> None:
    store.put_frames([row(seq, os.urandom(30_000)) for seq in range(20)])
    store.close()
    ledger = tmp_path / "map" / "ledger.db"
    whole = bytearray(ledger.read_bytes())
    for page in range(2, 6):
        whole[page * 8192 : page * 8192 + 200] = bytes(200)
    ledger.write_bytes(bytes(whole))
    assert [problem.file for problem in map_check(tmp_path / "map")][:1] == ["ledger.db"]
    ledger.write_bytes(b"not a database, not even nearly" * 600)
    with pytest.raises(Corrupt, match="ledger.db"):
        MapStore.open(tmp_path / "map")


def test_orphans_of_a_cut_off_commit_go(store: MapStore, tmp_path: Path) -> None:
    kept = store.commit_module(module()).file
    store.close()
    modules = tmp_path / "map" / "modules"
    for name in ("x.1.safetensors", "y.1.safetensors.tmp"):
        (modules / name).write_bytes(b"half")
    MapStore.open(tmp_path / "map").close()
    assert [path.name for path in modules.iterdir()] == [kept]


def test_checkpoints_fall_back_to_the_older_generation(store: MapStore, tmp_path: Path) -> None:
    assert store.checkpoint_load("open") is None
    for turn in range(3):
        store.checkpoint_save("open", {"x": np.full(50, turn)}, {"turn": turn})
    assert store.checkpoint_load("open")[1] == {"turn": 2}  # type: ignore[index]
    slots = sorted((tmp_path / "map" / "checkpoints").iterdir())
    _flip(slots[0], -1)
    assert store.checkpoint_load("open")[1] == {"turn": 1}  # type: ignore[index]
    assert [problem.file for problem in map_check(tmp_path / "map")] == [
        f"checkpoints/{slots[0].name}"
    ]
    _flip(slots[1], 60)
    with pytest.raises(Corrupt, match="no generation"):
        store.checkpoint_load("open")
    store.checkpoint_drop("open")
    assert store.checkpoint_load("open") is None and store.checkpoint_names() == []


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def test_names_of_strangers_stay_in_the_folder(store: MapStore, tmp_path: Path) -> None:
    names = ["../../out", "a/b", "", ".", "..", "x" * 300, "ä\0", "plain", "~" + "0" * 40]
    for name in names:
        store.commit_module(module(name))
        store.checkpoint_save(name, {}, {})
        assert store.load_module(name).id == name
    assert len({safe_name(name) for name in names}) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == {"map"}
    assert store.checkpoint_names() == sorted(names)


def test_info_has_the_promised_keys(store: MapStore, tmp_path: Path) -> None:
    record = store.commit_module(module())
    [info] = map_info(tmp_path / "map")["modules"]
    assert info == {
        **{key: module().meta[key] for key in ("steps", "frames", "bounds", "psnr")},
        **{"id": "m", "version": 1, "state": "closed"},
        **{"digest": record.digest, "bytes": record.bytes},
    }


def test_a_snapshot_is_a_sound_map_of_its_own(store: MapStore, tmp_path: Path) -> None:
    store.commit_module(module())
    store.put_frames([row(1)])
    store.checkpoint_save("open", {"x": np.ones(3)}, {})
    snapshot(tmp_path / "map", tmp_path / "copy")
    store.put_frames([row(2)])
    store.commit_module(module(version=2))
    assert map_check(tmp_path / "copy") == []
    with MapStore.open(tmp_path / "copy", meta=META) as copy:
        assert [frame.seq for frame in copy.held_frames()] == [1]
        assert copy.load_module("m").version == 1 and copy.checkpoint_names() == ["open"]
        assert copy.put_frames([row(1)]) == ["duplicate"]
    with pytest.raises(StoreError, match="free"):
        snapshot(tmp_path / "map", tmp_path / "copy")


def test_a_directory_that_is_no_map_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(MapMismatch, match="other files"):
        MapStore.open(tmp_path)
    for create, read_only in ((False, False), (True, True)):
        with pytest.raises(StoreError, match="expected a map"):
            MapStore.open(tmp_path / "none", create=create, read_only=read_only)
    assert map_check(tmp_path)[0].file == "ledger.db"
    assert {path.name for path in tmp_path.iterdir()} == {"photo.jpg"}


def test_a_thousand_modules_are_ready_within_three_seconds(tmp_path: Path) -> None:
    with MapStore.open(tmp_path / "map") as store:
        fast = store.ledger.database
        store.commit_module(module())
        [one] = store.modules()
        data = (tmp_path / "map" / "modules" / one.file).read_bytes()
        with fast.transaction() as connection:
            for n in range(1000):
                (tmp_path / "map" / "modules" / f"k{n}.1.safetensors").write_bytes(data)
                connection.execute(
                    "INSERT INTO modules SELECT ?, version, state, digest, ?, bytes, meta, parent, "
                    "committed_at FROM modules WHERE id = 'm'",
                    (f"k{n}", f"k{n}.1.safetensors"),
                )
    start = time.perf_counter()
    with MapStore.open(tmp_path / "map") as store:
        assert len([r for r in store.modules() if r.state == "closed"]) == 1001
    assert time.perf_counter() - start < 3


def test_an_emptied_ledger_is_no_reason_to_tidy_modules_away(
    store: MapStore, tmp_path: Path
) -> None:
    store.commit_module(module())
    store.close()
    for part in tmp_path.glob("map/ledger.db*"):
        part.write_bytes(b"")
    for _ in range(2):  # SQLite has made fresh tables by then
        with pytest.raises(Corrupt, match="empty, though"):
            MapStore.open(tmp_path / "map", meta=META)
    assert len(list((tmp_path / "map" / "modules").iterdir())) == 1


def test_a_missing_folder_of_checkpoints_is_made_again(store: MapStore, tmp_path: Path) -> None:
    store.close()
    (tmp_path / "map" / "checkpoints").rmdir()
    with MapStore.open(tmp_path / "map", meta=META) as again:
        again.checkpoint_save("open", {}, {"turn": 1})
        assert again.checkpoint_names() == ["open"]


def test_what_may_pass_is_waited_for(tmp_path: Path, store: MapStore) -> None:
    """No descriptor left, or another program at the ledger, ends no daemon."""
    assert type(store_error(OSError(errno.EMFILE, "too many"), "reading")) is DiskFull
    assert type(ledger_error(sqlite3.OperationalError("database is locked"), "a")) is DiskFull
    store.checkpoint_save("open", {}, {})
    (path,) = (tmp_path / "map" / "checkpoints").glob("open.a.ckpt")
    path.unlink()
    path.mkdir()  # cannot be read as a file
    with pytest.raises(StoreError):
        store.checkpoint_save("open", {}, {})
