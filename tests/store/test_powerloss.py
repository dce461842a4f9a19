"""Power cut at many points: every promise made before the cut holds after it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("apsw", reason="the power-loss simulator records SQLite through apsw")

from tests.store.flight import cut_and_look, fly

FSYNCS = (
    "fsync map/ledger.db-wal",
    "fsync map/ledger.db",
    "fsync map/modules/",
    "fsync_dir map/modules",
    "fsync map/checkpoints/",
    "fsync_dir map/checkpoints",
    "fsync map/map.json.tmp",
    "fsync_dir map",
    "fsync_dir .",
)


@pytest.mark.parametrize("fail_sync", [False, True])
def test_nothing_promised_is_lost(tmp_path: Path, fail_sync: bool) -> None:
    (tmp_path / "disk").mkdir()
    recording = fly(tmp_path / "disk", fail_sync=fail_sync)
    assert list(cut_and_look(recording, tmp_path, cuts=40, seed=1)) == []


def test_a_cut_right_after_a_promise_finds_it_kept(tmp_path: Path) -> None:
    """Where an fsync that the store forgets shows most: at every promise, three times each."""
    (tmp_path / "disk").mkdir()
    recording = fly(tmp_path / "disk")
    promises = [at for at, op in enumerate(recording.ops) if op.kind == "ack"]
    for at in promises:
        step = range(at + 1, at + 2)
        assert list(cut_and_look(recording, tmp_path, cuts=3, seed=at, within=step)) == []


@pytest.mark.parametrize("fsync", FSYNCS)
def test_every_fsync_is_needed(tmp_path: Path, fsync: str) -> None:
    (tmp_path / "disk").mkdir()
    recording = fly(tmp_path / "disk", broken=fsync, rounds=3)
    assert next(cut_and_look(recording, tmp_path, cuts=400, seed=2), None)


def test_after_a_failed_fsync_the_log_must_be_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("mclnf_edge.store.database.write_durably", lambda *_: None)
    recording = fly(tmp_path / "disk", fail_sync=True)
    lost = next(at for at, op in enumerate(recording.ops) if op.kind == "lost")
    found = cut_and_look(recording, tmp_path, cuts=200, seed=3, within=range(lost, lost + 120))
    assert next(found, None)
