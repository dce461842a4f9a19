"""The table of mechanisms fits the README, the source and the tests; one is really taken out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.measure import ROOT
from tools.mechanisms import BY_HAND, MECHANISMS, Mechanism
from tools.prove_promises import changed, promises, prove, taken_out, without_folders


def test_every_promise_has_a_mechanism() -> None:
    assert {m.promise for m in MECHANISMS} | set(BY_HAND) == set(promises())


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.gone)
def test_it_can_be_taken_out_and_its_tests_exist(mechanism: Mechanism) -> None:
    text = (ROOT / mechanism.file).read_text(encoding="utf-8")
    compile(changed(text, mechanism), mechanism.file, "exec")
    for test in mechanism.tests:
        file, _, name = test.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in source, test


def tree_of(folder: Path) -> Path:
    (folder / "sums.py").write_text("def total(a, b):\n    return a + b\n")
    (folder / "test_sums.py").write_text(
        "from sums import total\n\n"
        "def test_total():\n    assert total(1, 2) == 3\n\n"
        "def test_nothing():\n    assert total(0, 0) == 0\n"
    )
    return folder


@pytest.mark.parametrize(
    ("test", "outcome"), [("total", "noticed"), ("nothing", "MISSED"), ("absent", "broken")]
)
def test_what_a_test_says_without_the_mechanism(tmp_path: Path, test: str, outcome: str) -> None:
    tree = tree_of(tmp_path)
    gone = Mechanism("sums", "a", "sums.py", "a + b", "a - b", (f"test_sums.py::test_{test}",))
    assert prove(tree, gone)["outcome"] == outcome
    assert "a + b" in (tree / "sums.py").read_text()


def test_an_unclear_place_is_refused(tmp_path: Path) -> None:
    gone = Mechanism("sums", "a", "sums.py", "a * b", "", ("test_sums.py",))
    with pytest.raises(ValueError, match="0 places"), taken_out(tree_of(tmp_path), gone):
        raise AssertionError("was entered")


def test_what_a_test_said_names_no_folder_of_this_machine() -> None:
    said = "E  writing /tmp/a-1/b_2/map/ledger.db: full\nE  see tests/store/test_x.py::test_y"
    told = "E  writing ledger.db: full\nE  see tests/store/test_x.py::test_y"
    assert without_folders(said) == told
    assert without_folders("tcp://127.0.0.1:7710 and 1 / 2") == "tcp://127.0.0.1:7710 and 1 / 2"
