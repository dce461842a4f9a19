"""Power cut at many points: every promise made before the cut holds after it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("apsw", reason="the power-loss simulator records SQLite through apsw")

from tests.store.flight import faults, fly
from tests.store.powerloss import Recording

FSYNCS = (
    "fsync map/ledger.db-wal",
    "fsync map/ledger.db",
    "fsync map/modules/",
    "fsync_dir map/modules",
    "fsync map/checkpoints/",
    "fsync_dir map/checkpoints",
    "fsync map/map.json",
    "fsync_dir map",
    "fsync_dir .",
)


def found_after(recording: Recording, work: Path, cuts: int, seed: int) -> list[str]:
    """What is wrong after each of `cuts` random power cuts, all together."""
    rng = random.Random(seed)
    wrong = []
    for _ in range(cuts):
        cut = rng.randint(1, len(recording.ops))
        target = work / "crash"
        recording.crash(cut, target, rng)
        wrong += [f"cut {cut}: {fault}" for fault in faults(target / "map", recording.promises(cut))]
        shutil.rmtree(target)
    return wrong


@pytest.mark.parametrize("fail_sync", [False, True])
def test_nothing_promised_is_lost(tmp_path: Path, fail_sync: bool) -> None:
    (tmp_path / "disk").mkdir()
    recording = fly(tmp_path / "disk", fail_sync=fail_sync)
    assert found_after(recording, tmp_path, cuts=60, seed=1) == []


@pytest.mark.parametrize("fsync", FSYNCS)
def test_every_fsync_is_needed(tmp_path: Path, fsync: str) -> None:
    (tmp_path / "disk").mkdir()
    recording = fly(tmp_path / "disk", broken=fsync, rounds=3)
    assert found_after(recording, tmp_path, cuts=120, seed=2) != []


def test_after_a_failed_fsync_the_log_must_be_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("mclnf_edge.store.database.write_durably", lambda *_: None)
    recording = fly(tmp_path / "disk", fail_sync=True)
    assert found_after(recording, tmp_path, cuts=120, seed=3) != []
