"""The publisher's window: pure rules of credit, resending and order."""

from __future__ import annotations

import pytest

from mclnf_edge.wire.window import Entry, SendWindow


def entry(seq: int, size: int = 100) -> Entry:
    """A frame of `size` bytes."""
    return Entry(("s", "c", seq), seq, b"hello", [bytes(size)])


def seqs(entries: list[Entry]) -> list[int]:
    """Their numbers."""
    return [one.number for one in entries]


def window(credit: int = 250) -> SendWindow:
    """An empty window with credit."""
    empty = SendWindow()
    empty.credit_bytes = credit
    return empty


def test_credit_bounds_the_unanswered_bytes() -> None:
    sending = window(250)
    assert sending.room(250) and sending.room(1_000)  # alone, whatever its size
    sending.add(entry(1))
    assert sending.room(150) and not sending.room(151)
    sending.add(entry(2))
    assert not sending.room(100)
    assert sending.answered(("s", "c", 1)) is not None
    assert sending.room(150) and len(sending) == 1


def test_without_credit_nothing_goes() -> None:
    assert not window(0).room(1)


def test_answered_twice_is_answered_once() -> None:
    sending = window()
    sending.add(entry(1))
    assert sending.answered(("s", "c", 1)) is not None
    assert sending.answered(("s", "c", 1)) is None
    assert sending.room(250)


def test_unanswered_is_due_again_after_the_time_out_only() -> None:
    sending = window()
    sending.add(entry(1))
    assert seqs(sending.due(10.0, 5.0)) == [1]
    assert seqs(sending.due(14.9, 5.0)) == []
    assert seqs(sending.due(15.0, 5.0)) == [1]


def test_busy_holds_newer_frames_back() -> None:
    sending = window(1_000)
    sending.add(entry(1))
    sending.due(0.0, 5.0)
    sending.hold(("s", "c", 1), until=2.0)
    assert not sending.room(1)
    assert seqs(sending.due(1.9, 5.0)) == [] and not sending.room(1)
    assert seqs(sending.due(2.0, 5.0)) == [1] and sending.room(1)


def test_new_connection_sends_all_again_in_order() -> None:
    sending = window(1_000)
    for seq in (3, 1, 2):
        sending.add(entry(seq))
    sending.due(0.0, 5.0)
    sending.hold(("s", "c", 1), until=99.0)
    sending.all_due()
    assert seqs(sending.due(0.1, 5.0)) == [3, 1, 2]
    assert seqs(sending.clear()) == [3, 1, 2] and len(sending) == 0


def test_same_identity_twice_is_the_callers_error() -> None:
    sending = window()
    sending.add(entry(1))
    with pytest.raises(ValueError, match="already waits"):
        sending.add(entry(1))
