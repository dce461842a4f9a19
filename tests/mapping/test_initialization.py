"""Initialization files: the shipped one loads, everything unsafe or foreign is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.config import ServeConfig
from mclnf_edge.engine.field import MLP_SIZE, random_mlp
from mclnf_edge.errors import InitError
from mclnf_edge.mapping.initialization import (
    MAX_BYTES,
    init_file,
    load_init,
    open_init,
    save_init,
)
from mclnf_edge.mapping.mapper import Mapper


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "init.pt"
    save_init(path, random_mlp(3), {"seed": 3})
    return path


def changed(path: Path, **changes: Any) -> Path:
    """The file with some entries replaced."""
    torch.save(torch.load(path, weights_only=True) | changes, path)
    return path


def test_shipped_init_loads_and_says_what_it_saw() -> None:
    init = load_init(None)
    assert init.mlp.shape == (MLP_SIZE,) and init.mlp.dtype == np.float32
    assert not np.array_equal(init.mlp, random_mlp(0))
    assert init.meta["real_captures"] == []
    assert {"config", "flights", "statement", "versions"} <= init.meta.keys()
    assert init.meta["config"]["seed"] >= 0
    config = ServeConfig()
    np.testing.assert_array_equal(
        Mapper(config.map, config.field, config.adapt, init.mlp).mlp, init.mlp
    )


def test_round_trip_keeps_parameters_meta_and_digest(written: Path) -> None:
    init = load_init(written)
    np.testing.assert_array_equal(init.mlp, random_mlp(3))
    assert init.meta == {"seed": 3}
    assert init.digest == hashlib.sha256(written.read_bytes()).hexdigest()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("plain", [True, False])
def test_pickle_trap_is_refused_and_not_executed(tmp_path: Path, plain: bool) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    if plain:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"format": "mclnf-edge-init", "mlp": Trap(sprung)}, path)
    with pytest.raises(InitError, match="not a safe initialization"):
        load_init(path)
    assert not sprung.exists()
    with path.open("rb") as file:  # the trap is real: loading it carelessly springs it
        pickle.load(file) if plain else torch.load(file, weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("change", [{"modality": "image"}, {"kind": "siren"}, {"modality": None}])
def test_another_modality_or_kind_is_refused(written: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InitError, match="expected modality posed, kind planes"):
        load_init(changed(written, **change))


@pytest.mark.parametrize(
    "mlp",
    [
        torch.zeros(MLP_SIZE - 1),
        torch.zeros(1, MLP_SIZE),
        torch.full((MLP_SIZE,), float("nan")),
        torch.full((MLP_SIZE,), float("inf")),
        [0.0] * MLP_SIZE,
        None,
    ],
    ids=["short", "matrix", "nan", "inf", "list", "none"],
)
def test_wrong_parameters_are_refused(written: Path, mlp: Any) -> None:
    with pytest.raises(InitError, match=f"expected {MLP_SIZE} finite parameters"):
        load_init(changed(written, mlp=mlp))


@pytest.mark.parametrize("config", ["{", "[]", 7])
def test_unreadable_description_is_refused(written: Path, config: Any) -> None:
    with pytest.raises(InitError, match="config"):
        load_init(changed(written, config=config))


def test_another_version_is_refused(written: Path) -> None:
    with pytest.raises(InitError, match="version"):
        load_init(changed(written, version=2))


def test_missing_empty_truncated_and_huge_files_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(InitError, match="no such file"):
        load_init(tmp_path / "none.pt")
    with pytest.raises(InitError, match="no such file"):
        load_init(tmp_path)
    content = written.read_bytes()
    for size in (0, 1, len(content) // 2):
        written.write_bytes(content[:size])
        with pytest.raises(InitError, match="not a safe initialization"):
            load_init(written)
    written.write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(InitError, match=f"at most {MAX_BYTES} bytes"):
        load_init(written)


def test_foreign_torch_file_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], {"format": "other"}, torch.zeros(MLP_SIZE)):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(InitError, match="expected a mclnf-edge-init file or"):
            load_init(tmp_path / "foreign.pt")


def test_mapper_refuses_parameters_of_another_size() -> None:
    config = ServeConfig()
    with pytest.raises(InitError, match=f"expected {MLP_SIZE} parameters"):
        Mapper(config.map, config.field, config.adapt, np.zeros(7, np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"mlp": torch.zeros(MLP_SIZE, dtype=torch.bfloat16)},
        {"mlp": torch.zeros(MLP_SIZE).to_sparse()},
        {"mlp": torch.zeros(MLP_SIZE, requires_grad=True)},
        {"version": torch.zeros(3)},
        {"modality": ["posed"]},
        {"kind": {}},
    ],
)
def test_odd_parts_are_refused_by_name(written: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InitError):
        open_init(changed(written, **change))


def test_flipped_bytes_are_refused_or_harmless(written: Path) -> None:
    content = written.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(content)
        data[random.integers(0, 1500)] ^= 1 << random.integers(0, 8)
        written.write_bytes(data)
        with contextlib.suppress(InitError):
            open_init(written)


def test_signal_inits_with_odd_parts_are_refused(tmp_path: Path) -> None:
    shipped = torch.load(init_file(Path("image")), weights_only=True)
    for change in ({"rates": "x"}, {"rates": float("nan")}, {"modality": ["image"]}):
        torch.save(shipped | change, tmp_path / "odd.pt")
        with pytest.raises(InitError):
            open_init(tmp_path / "odd.pt")
