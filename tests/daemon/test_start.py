"""The initialization that a map keeps: the same values, and a restart without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.config import FieldConfig, ServeConfig
from mclnf_edge.daemon.start import START, keep, open_kept
from mclnf_edge.errors import InitError
from mclnf_edge.mapping.initialization import Initialization, init_file, load_init, save_init
from mclnf_edge.store import MapStore, map_check

CONFIG = ServeConfig()
RESTART = """
import sys
from pathlib import Path
import mclnf_edge.daemon.service
from mclnf_edge.config import ServeConfig
from mclnf_edge.daemon.start import open_kept
print(open_kept(ServeConfig(), None, Path(sys.argv[1])).digest)
assert "torch" not in sys.modules, "PyTorch was imported"
"""


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A map that began with the shipped initialization."""
    with MapStore.open(tmp_path / "map") as store:
        keep(store, load_init(None))
    return tmp_path / "map"


def test_a_restart_reads_what_the_map_began_with_and_no_pytorch(begun: Path) -> None:
    shipped, kept = load_init(None), open_kept(CONFIG, None, begun)
    assert isinstance(kept, Initialization)
    assert np.array_equal(kept.mlp, shipped.mlp) and kept.mlp.dtype == np.float32
    assert (kept.digest, kept.kind, kept.meta) == (shipped.digest, shipped.kind, shipped.meta)
    done = subprocess.run(
        [sys.executable, "-c", RESTART, str(begun)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == shipped.digest, done.stderr
    assert map_check(begun) == []


def test_another_file_is_read_itself(begun: Path, tmp_path: Path) -> None:
    shipped = load_init(None)
    save_init(tmp_path / "other.pt", shipped.mlp + 1, {"made": "elsewhere"})
    other = open_kept(CONFIG, tmp_path / "other.pt", begun)
    assert isinstance(other, Initialization)
    assert np.array_equal(other.mlp, shipped.mlp + 1) and other.digest != shipped.digest
    with pytest.raises(InitError, match="no such file"):
        open_kept(CONFIG, tmp_path / "missing.pt", begun)


def test_a_kept_one_of_another_kind_or_damaged_is_not_used(begun: Path) -> None:
    with pytest.raises(InitError, match="kind mlp"):
        open_kept(ServeConfig(field=FieldConfig(kind="mlp")), init_file(None), begun)
    for file in (begun / "checkpoints").glob(f"{START}*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    assert open_kept(CONFIG, None, begun).digest == load_init(None).digest


def test_a_map_to_come_has_none(tmp_path: Path) -> None:
    assert open_kept(CONFIG, None, tmp_path / "map").digest == load_init(None).digest
    assert not (tmp_path / "map").exists()
