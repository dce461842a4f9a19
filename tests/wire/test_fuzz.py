"""The fuzzer's short form: `tools/fuzz_wire.py` runs a million."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mclnf_edge.errors import ProtocolError
from tests.wire.echo import EchoDaemon
from tests.wire.examples import EXAMPLES
from tools import fuzz_wire


def test_decoder_survives_twenty_thousand_malformed_messages() -> None:
    outcomes: Counter[str] = Counter()
    before = fuzz_wire.resident_mb()
    assert fuzz_wire.fuzz_decoder(0, 20_000, outcomes) == []
    assert sum(outcomes.values()) == 20_000
    # Every kind of fault is reached, or the fuzzer fuzzes only the outermost check.
    assert min(outcomes[code] for code in ("protocol", "field", "unknown-message", "version")) > 20
    assert fuzz_wire.resident_mb() - before < 30


def test_daemon_survives_malformed_messages_and_answers_honest_ones() -> None:
    outcomes: Counter[str] = Counter()
    assert fuzz_wire.fuzz_socket(0, 1_000, outcomes) == []
    assert outcomes["honest answered"] == 20 and outcomes["unread"] == 0
    # The socket says of every message what the decoder says.
    said = Counter(fuzz_wire.try_message(fuzz_wire.malformed(n) or [b""]) for n in range(1_000))
    for code in ("field", "unknown-message", "version"):
        assert outcomes[code] == said[code] > 0
    assert outcomes["protocol"] + outcomes["too many parts"] == said["protocol"]


def test_an_exception_that_is_not_a_protocol_error_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode(parts: list[bytes]) -> None:
        raise ValueError("not a named error")

    monkeypatch.setattr(fuzz_wire, "decode", decode)
    outcomes: Counter[str] = Counter()
    (failure, *_) = fuzz_wire.fuzz_decoder(0, 10, outcomes)
    assert "not a named error" in failure["error"] and outcomes == {"failure": 10}
    assert not issubclass(ValueError, ProtocolError)


def test_a_daemon_that_stops_answering_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = EchoDaemon._turn

    def deaf(self: EchoDaemon, batch: list[object]) -> None:
        turn(self, [])

    monkeypatch.setattr(EchoDaemon, "_turn", deaf)
    monkeypatch.setattr(fuzz_wire, "PATIENCE_MS", 200)
    (failure,) = fuzz_wire.fuzz_socket(0, 60, Counter())
    assert failure == {"number": 9, "error": "the connection is answered no more"}


def test_a_stopped_run_goes_on_where_its_results_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_wire, "CHUNK", 50)
    whole = fuzz_wire.run("decoder", 200, tmp_path / "whole.json")
    fuzz_wire.run("decoder", 100, tmp_path / "parts.json")
    parts = fuzz_wire.run("decoder", 200, tmp_path / "parts.json")
    assert parts["outcomes"] == whole["outcomes"] and parts["done"] == 200
    assert fuzz_wire.malformed(7) == fuzz_wire.malformed(7) != fuzz_wire.malformed(8)
    assert len(EXAMPLES) == len(fuzz_wire.SEEDS)
