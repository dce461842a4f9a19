"""The spool: durable, bounded, in order, and honest about damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mclnf_edge.errors import DiskFull, StoreError
from mclnf_edge.spool import Spool


def record(number: int, size: int = 10) -> list[bytes]:
    """A message of three parts that names its number."""
    return [b"hello", str(number).encode(), bytes(size)]


def numbers(spool: Spool) -> list[int]:
    """Take everything that is unread."""
    return [int(spool.take()[1][1]) for _ in range(spool.unread)]


def segments(folder: Path) -> list[Path]:
    """The segment files, oldest first."""
    return sorted(folder.glob("*.spool"))


def test_first_in_first_out_with_whole_parts(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([record(1), record(2)])
    spool.append([record(3, 0)])
    assert spool.next_size > 0 and len(spool) == 3
    assert spool.take()[1] == record(1)
    assert numbers(spool) == [2, 3] and spool.unread == 0 == spool.next_size
    assert len(spool) == 3  # handed out is not done
    spool.close()


def test_what_is_not_done_is_there_after_a_restart(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 8_000)  # a record or a few for each segment
    for number in range(20):
        spool.append([record(number, 200)])
    for _ in range(15):
        ticket, _ = spool.take()
        spool.done(ticket)
    spool.close()
    again = Spool(tmp_path, 8_000)
    left = numbers(again)
    assert left == list(range(left[0], 20)) and 11 <= left[0] <= 15  # whole segments went
    again.close()


def test_rewind_hands_out_again_only_what_is_not_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([record(number) for number in range(5)])
    tickets = [spool.take()[0] for _ in range(4)]
    spool.done(tickets[0])
    spool.done(tickets[2])
    spool.rewind()
    assert numbers(spool) == [1, 3, 4]
    spool.close()


def test_done_segments_leave_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 8_000)
    for number in range(100):
        spool.append([record(number, 300)])
        ticket, _ = spool.take()
        spool.done(ticket)
        assert spool.disk_bytes <= 8_000
    assert not segments(tmp_path) and spool.disk_bytes == 0
    spool.close()


def test_full_spool_takes_none_of_a_batch(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1_000)
    spool.append([record(1, 300)])
    with pytest.raises(DiskFull, match="cap of 1000 allows; 1 older records are kept"):
        spool.append([record(2, 300), record(3, 600)])
    spool.append([record(4, 300)])
    assert numbers(spool) == [1, 4]
    spool.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync"])
def test_failing_disk_takes_nothing_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    spool = Spool(tmp_path, 1_000)
    spool.append([record(1)])
    if call == "fsync":
        spool.append([record(2, 90)])  # the next needs a new segment, whose folder is synced

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskFull, match="No space left"):
            spool.append([record(3, 90)])
    spool.append([record(4)])
    spool.close()
    again = Spool(tmp_path, 1_000)
    assert numbers(again) == ([1, 2, 4] if call == "fsync" else [1, 4])
    assert again.damaged == 0
    again.close()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    spool = Spool(tmp_path)
    spool.append([record(1, 100), record(2, 100)])
    spool.close()
    again = Spool(tmp_path)
    assert numbers(again) == [1, 2]
    again.close()


def test_torn_tail_at_every_byte_loses_only_itself(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "whole")
    spool.append([record(1)])
    sound = spool.disk_bytes
    spool.append([record(2)])
    spool.close()
    data = segments(tmp_path / "whole")[0].read_bytes()
    for cut in range(len(data)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "000000000001.spool").write_bytes(data[:cut])
        torn = Spool(folder)
        assert numbers(torn) == ([1] if cut >= sound else [])
        torn.append([record(9)])
        assert numbers(torn) == [9]
        torn.close()


def test_flipped_bit_is_found_counted_and_set_aside(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([record(1)])
    sound = spool.disk_bytes
    spool.append([record(2), record(3)])
    spool.close()
    path = segments(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[sound + 20] ^= 4
    path.write_bytes(data)
    again = Spool(tmp_path)
    assert numbers(again) == [1] and again.damaged == 1
    assert path.with_suffix(".damaged").read_bytes() == data[sound:]
    again.close()


@pytest.mark.parametrize("kept", [5, 20, -1])
def test_damage_while_open_is_an_error_once(tmp_path: Path, kept: int) -> None:
    spool = Spool(tmp_path)
    spool.append([record(1)])
    path = segments(tmp_path)[0]
    data = path.read_bytes()
    path.write_bytes(data[:kept] + bytes([255]) * len(data[kept:]))
    spool.append([record(2)])
    with pytest.raises(StoreError, match="record at 0: damaged since it was written"):
        spool.take()
    assert numbers(spool) == [2] and spool.damaged == 1
    spool.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(StoreError, match="another process holds it"):
        Spool(tmp_path)
    spool.close()
    Spool(tmp_path).close()
