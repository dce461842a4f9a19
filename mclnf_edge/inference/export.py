"""Committed modules as ONNX files of their own: `mclnf-edge map export`, and `map.onnx`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mclnf_edge.config import FieldConfig
from mclnf_edge.engine import torch_volume
from mclnf_edge.engine.field import CHANNELS
from mclnf_edge.engine.onnx_field import Arrays
from mclnf_edge.engine.onnx_session import Session
from mclnf_edge.engine.torch_field import (
    MlpNetwork,
    Network,
    PlaneNetwork,
    find_texels,
    mlp_inputs,
    plane_inputs,
)
from mclnf_edge.errors import ConfigError, Corrupt, StoreError
from mclnf_edge.inference.onnx_painter import field_model
from mclnf_edge.mapping.engines import layout_of
from mclnf_edge.store import MapStore
from mclnf_edge.store.files import safe_name
from mclnf_edge.store.ledger import ModuleRecord

PARITY = 1e-3
"""Largest difference of opacity (over one unit of length) and colour that an export may have."""

log = logging.getLogger(__name__)
_PLACES = 4096
_ABOUT = ("cell", "cell_size_m", "origin", "bounds", "steps", "psnr")


def export_map(folder: Path, out: Path) -> Iterator[Path]:
    """Write every closed module of a map, its newest version, to `out`/<id>.<version>.onnx.

    `engine.onnx_field` says what goes in and out; the metadata place the module in the world.
    Raises StoreError or Corrupt for the map, ConfigError for one of signals or an `out` that is no
    folder.
    """
    with MapStore.open(folder, create=False, read_only=True) as store:
        if "field" not in store.meta():
            raise ConfigError(f"{folder}: expected a map of posed frames")
        field = FieldConfig(**store.meta()["field"])
        newest = {r.id: r for r in store.modules() if r.state == "closed"}
        for record in newest.values():
            try:
                yield write(store, record, field, out)
            except OSError as error:
                raise ConfigError(f"{out}: expected a folder: {error}") from error


class Exports:
    """The ONNX files of a map that is served, in its folder `onnx`: `map.onnx`.

    They are made from what was committed, one at a time; one that is missing, after a kill or a
    full disk, is made at the next start.
    """

    def __init__(self, store: MapStore, field: FieldConfig) -> None:
        self._store, self._field, self._folder = store, field, store.path / "onnx"
        self._waiting: dict[str, ModuleRecord] = {}
        self.written = self.refused = 0

    def add(self, record: ModuleRecord) -> None:
        """A committed version, newer than those before; nothing is done where its file exists."""
        if (self._folder / _name(record)).exists():
            self.written += 1
        else:
            self._waiting[record.id] = record

    def facts(self) -> dict[str, int]:
        """What `status` says of them."""
        return {"onnx_files": self.written, "onnx_refused": self.refused}

    def write_next(self) -> bool:
        """Write one file that waits, if any; one that cannot be is said, and counted as refused."""
        if not self._waiting:
            return False
        record = self._waiting.pop(next(iter(self._waiting)))
        try:
            write(self._store, record, self._field, self._folder)
            self.written += 1
        except (OSError, StoreError) as error:
            self.refused += 1
            about = {"task": record.id, "version": record.version}
            log.error("task %s version %d as ONNX: %s", *about.values(), error, extra=about)
        return True


def write(store: MapStore, record: ModuleRecord, field: FieldConfig, out: Path) -> Path:
    """Write a committed version to `out`/<id>.<version>.onnx and remove earlier versions' files.

    Raises StoreError or Corrupt, also when it is not what PyTorch makes of it, and OSError.
    """
    snapshot = store.load_module(record.id, record.version)
    about = {key: json.dumps(snapshot.meta.get(key)) for key in _ABOUT}
    named = {"id": record.id, "version": str(record.version), "digest": record.digest}
    data = export(field, snapshot.arrays, {**named, **about})
    out.mkdir(parents=True, exist_ok=True)
    path = out / _name(record)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)
    for older in range(1, record.version):
        (out / f"{safe_name(record.id)}.{older}.onnx").unlink(missing_ok=True)
    return path


def _name(record: ModuleRecord) -> str:
    return f"{safe_name(record.id)}.{record.version}.onnx"


def export(field: FieldConfig, arrays: Arrays, about: Mapping[str, str]) -> bytes:
    """A closed module as an ONNX file of its own: `engine.onnx_field` says what goes in and out.

    Raises Corrupt when ONNX Runtime does not find in it what the field in PyTorch is, at 4,096
    places in and around the module.
    """
    data = field_model(field, arrays, about)
    random = torch.Generator().manual_seed(0)
    directions = torch.randn((_PLACES, 3), generator=random)
    places = {
        "u": torch.rand((_PLACES, 3), generator=random) * 1.1 - 0.05,
        "above": torch.randn(_PLACES, generator=random) * 4,
        "directions": directions / directions.norm(dim=1, keepdim=True),
    }
    difference = _seen(Session(data, "cpu", 1).values(**places)) - _seen(
        _by_torch(field, arrays, places)
    )
    worst = float(difference.abs().max())
    if not worst < PARITY:
        raise Corrupt(f"export: expected parity below {PARITY}, received {worst:.2g}")
    return data


def _seen(values: Tensor) -> Tensor:
    """(E, 4) opacity and colour."""
    return torch.cat([1 - torch.exp(-values[:, :1]), values[:, 1:]], dim=1)


@torch.no_grad()
def _by_torch(field: FieldConfig, arrays: Arrays, at: dict[str, Tensor]) -> Tensor:
    weights = _single(arrays["weights"])
    network: Network
    if field.kind == "planes":
        network, planes = PlaneNetwork(), torch.from_numpy(layout_of(field).planes).long()
        texels = find_texels(planes, torch.zeros(len(at["u"]), dtype=torch.long), at["u"])
        features = _single(arrays["features"]).view(-1, CHANNELS)
        inputs = plane_inputs(features, texels, at["u"][:, 2], at["above"])
    else:
        network = MlpNetwork(field.mlp_width, field.mlp_hidden)
        inputs = mlp_inputs(at["u"], at["directions"])
    return torch_volume.activated(network, network(weights, inputs).raw)


def _single(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32).reshape(-1))
