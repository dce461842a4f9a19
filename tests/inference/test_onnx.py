"""Pictures and files by ONNX Runtime: maps beside the engines that learned them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from mclnf_edge.cli import app
from mclnf_edge.config import FieldConfig, MapConfig, RenderConfig
from mclnf_edge.engine import torch_field, torch_volume
from mclnf_edge.engine.onnx_session import Session
from mclnf_edge.errors import ConfigError, Corrupt, DeviceError
from mclnf_edge.inference import export as exporting
from mclnf_edge.inference.export import Exports, export, export_map
from mclnf_edge.inference.onnx_painter import OnnxPainter
from mclnf_edge.inference.renderer import Renderer
from mclnf_edge.mapping.engines import KERNELS, Compute
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.store import MapStore, ModuleRecord
from mclnf_edge.types import ModuleSnapshot, Render
from tests.mapping import flights

TORCH = Compute("torch", "cpu")
MLP = FieldConfig(kind="mlp", mlp_width=48, mlp_hidden=3, voxels=16)


def learn(field: FieldConfig, compute: Compute) -> Mapper:
    adapt = replace(flights.ADAPT, rays_per_step=512)
    init = flights.INIT if field.kind == "planes" else None
    m = Mapper(MapConfig(cell_size_m=flights.CELL_M), field, adapt, init, 1, compute=compute)
    for i, frame in enumerate(flights.flight().frames):
        m.add(i, flights.STREAM, frame)
    m.draining = True
    assert m.settle()
    flights.learn(m, 20)
    return m


@pytest.fixture(scope="module", params=["planes/numba", "planes/torch", "mlp/torch"])
def learned(request: pytest.FixtureRequest) -> Iterator[Mapper]:
    kind, _, engine = request.param.partition("/")
    field = flights.FIELD if kind == "planes" else MLP
    yield learn(field, KERNELS if engine == "numba" else TORCH)


def picture(m: Mapper, renderer: Renderer) -> Render:
    view = flights.flight().views[0]
    return renderer.render(m.pool, m.origins[0], view, np.zeros(3, np.float32))


def test_pictures_are_those_of_the_engine_that_learned(
    learned: Mapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the field in PyTorch taken away; the kernels space their samples differently."""
    want = picture(learned, Renderer(learned.optimizer.paint))
    painter = OnnxPainter(learned.field, learned.optimizer, 1)

    def taken_away(*_: Any, **__: Any) -> None:
        raise AssertionError("the field in PyTorch was called")

    monkeypatch.setattr(torch_field.PlaneNetwork, "__call__", taken_away)
    monkeypatch.setattr(torch_field.MlpNetwork, "__call__", taken_away)
    for name in ("find_texels", "plane_inputs", "mlp_inputs", "look"):
        monkeypatch.setattr(torch_volume, name, taken_away)
    found = picture(learned, Renderer(painter.paint))
    assert painter.name == "onnx"
    same = learned.optimizer.name == "torch"
    assert psnr(found.rgb, want.rgb) > (50 if same else 35)
    assert np.abs(found.known - want.known).mean() < (1e-3 if same else 0.02)
    if same:
        with pytest.raises(AssertionError, match="field in PyTorch"):
            picture(learned, Renderer(learned.optimizer.paint))


def test_half_precision_shows_nearly_the_same(learned: Mapper) -> None:
    """On a CPU ONNX Runtime may take the casts away and show the same."""
    single, half = (
        OnnxPainter(learned.field, learned.optimizer, 1, RenderConfig(precision=precision))
        for precision in ("single", "half")
    )
    assert (single.name, half.name) == ("onnx", "onnx-half")
    want, found = (picture(learned, Renderer(painter.paint)) for painter in (single, half))
    assert psnr(found.rgb, want.rgb) > 40
    assert np.abs(found.known - want.known).mean() < 2e-3


def test_tensorrt_needs_cuda(learned: Mapper) -> None:
    with pytest.raises(DeviceError, match="render.engine tensorrt: expected cuda, received cpu"):
        OnnxPainter(learned.field, learned.optimizer, 1, name="tensorrt")


def closed(m: Mapper) -> list[ModuleSnapshot]:
    snapshots = [m.close(module).snapshot for module in m.learning()]
    return [s for s in snapshots if s is not None]


def flat(m: Mapper) -> ModuleSnapshot:
    """One module as it would be committed, whether it is closed by now or not."""
    pool = m.pool
    assert pool is not None
    cell, slot = next(iter(pool.slot_of.items()))
    arrays = {name: a.copy() for name, a in pool.arrays(m.modules[cell]).items()}
    return ModuleSnapshot(m.modules[cell].id, 1, arrays, {"cell": list(cell)})


def test_committed_modules_become_files_that_stand_alone(learned: Mapper, tmp_path: Path) -> None:
    snapshots = closed(learned)
    meta = {"modality": "posed", "init": "none", "field": asdict(learned.field)}
    with MapStore.open(tmp_path / "map", meta=meta) as store:
        for s in snapshots:
            store.commit_module(s, {})
        written = list(export_map(tmp_path / "map", tmp_path / "out"))
    assert sorted(p.name for p in written) == sorted(f"{s.id}.1.onnx" for s in snapshots)
    model = onnx.load(str(written[0]))
    onnx.checker.check_model(model, full_check=True)
    about = {p.key: p.value for p in model.metadata_props}
    assert json.loads(about["cell_size_m"]) == flights.CELL_M and about["version"] == "1"
    places = {"u": torch.rand(9, 3), "above": torch.zeros(9), "directions": torch.eye(3)[[2] * 9]}
    assert Session(written[0].read_bytes(), "cpu", 1).values(**places).isfinite().all()


def test_a_served_maps_files_follow_its_versions(
    learned: Mapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written once, made again where missing, replaced by the next version, refused if wrong."""
    snapshot = flat(learned)
    with MapStore.open(tmp_path / "map", meta={"modality": "posed", "init": "none"}) as store:
        files = tmp_path / "map" / "onnx"

        def served(*records: ModuleRecord) -> tuple[list[str], dict[str, int]]:
            exports = Exports(store, learned.field)
            for record in records:
                exports.add(record)
            for _ in range(3):
                exports.write_next()
            return sorted(p.name for p in files.glob("*")), exports.facts()

        first = store.commit_module(snapshot, {})
        one, two = f"{snapshot.id}.1.onnx", f"{snapshot.id}.2.onnx"
        assert served(first) == ([one], {"onnx_files": 1, "onnx_refused": 0})
        made = (files / one).stat().st_mtime_ns
        assert served(first)[1]["onnx_files"] == 1
        assert (files / one).stat().st_mtime_ns == made, "it was there"
        second = store.commit_module(replace(snapshot, version=2), {})
        assert served(first, second)[0] == [two]
        (files / two).unlink()
        monkeypatch.setattr(exporting, "PARITY", 0.0)
        assert served(second) == ([], {"onnx_files": 0, "onnx_refused": 1})


def test_a_file_that_differs_is_refused(learned: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = learned.pool
    assert pool is not None
    slot = next(iter(pool.slot_of.values()))
    arrays = {"features": pool.features[slot], "weights": pool.weights[slot]}
    export(learned.field, arrays, {})
    wrong = {**arrays, "weights": arrays["weights"] + np.float32(0.01)}
    made = exporting.field_model(learned.field, wrong)
    monkeypatch.setattr(exporting, "field_model", lambda *_: made)
    with pytest.raises(Corrupt, match=r"expected parity below 0.001, received"):
        export(learned.field, arrays, {})


def test_the_command_says_what_it_wrote_and_what_it_cannot(tmp_path: Path) -> None:
    words = ["map", "export", str(tmp_path / "none"), str(tmp_path / "out")]
    failed = CliRunner().invoke(app, words)
    assert failed.exit_code != 0 and not (tmp_path / "out").exists()
    with MapStore.open(tmp_path / "map", meta={"modality": "image", "init": "none"}):
        pass
    with pytest.raises(ConfigError, match="expected a map of posed frames"):
        list(export_map(tmp_path / "map", tmp_path / "out"))
