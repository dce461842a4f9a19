"""The cached initialization: the same values, and a start without PyTorch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.config import FieldConfig, ServeConfig
from mclnf_edge.daemon.start import cache_dir, open_cached
from mclnf_edge.errors import InitError
from mclnf_edge.mapping.initialization import Initialization, init_file, load_init, save_init

CONFIG = ServeConfig()
AGAIN = """
import sys
import mclnf_edge.daemon.service
from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon.start import open_cached
print(open_cached(ServeConfig(), None).digest)
assert "torch" not in sys.modules, "PyTorch was imported"
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_second_start_reads_the_cache_and_needs_no_pytorch() -> None:
    shipped, first = load_init(None), open_cached(CONFIG, None)
    assert [p.name for p in cache_dir().iterdir()] == [f"init-{shipped.digest}"]
    second = open_cached(CONFIG, None)
    for start in (first, second):
        assert isinstance(start, Initialization)
        assert np.array_equal(start.mlp, shipped.mlp) and start.mlp.dtype == np.float32
        assert (start.digest, start.kind, start.meta) == (
            shipped.digest, shipped.kind, shipped.meta,
        )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == shipped.digest, done.stderr


def test_another_file_is_read_itself(tmp_path: Path) -> None:
    shipped = load_init(None)
    open_cached(CONFIG, None)
    for change in (1, 2):  # the same name, other content
        save_init(tmp_path / "other.pt", shipped.mlp + change, {"made": "elsewhere"})
        other = open_cached(CONFIG, tmp_path / "other.pt")
        assert isinstance(other, Initialization)
        assert np.array_equal(other.mlp, shipped.mlp + change)
    with pytest.raises(InitError, match="no such file"):
        open_cached(CONFIG, tmp_path / "missing.pt")


def test_one_of_another_kind_or_damaged_is_not_used() -> None:
    digest = open_cached(CONFIG, None).digest
    with pytest.raises(InitError, match="kind mlp"):
        open_cached(ServeConfig(field=FieldConfig(kind="mlp")), init_file(None))
    entry = cache_dir() / f"init-{digest}"
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    assert open_cached(CONFIG, None).digest == digest
    assert entry.read_bytes() != bytes(data), "the damaged copy is replaced"


def test_without_a_place_for_it_starts_are_only_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_cached(CONFIG, None).digest == load_init(None).digest


def test_nobodys_cache_lies_with_the_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_dir().parent == Path(tempfile.gettempdir())
