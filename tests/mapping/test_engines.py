"""Whole maps by the engine in PyTorch, beside those of the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.config import ComputeConfig, FieldConfig, MapConfig, ServeConfig
from mclnf_edge.engine.torch_field import PlaneNetwork
from mclnf_edge.errors import ConfigError, DeviceError, InitError
from mclnf_edge.mapping import device, engines
from mclnf_edge.mapping.engines import KERNELS, Compute, choose, open_start
from mclnf_edge.mapping.initialization import SHIPPED, load_init, save_init
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import _with_surface
from mclnf_edge.mapping.torch_engine import TorchEngine
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.types import ModuleSnapshot
from tests.mapping import flights

TORCH = Compute("torch", "cpu")
SMALL_MLP = FieldConfig(kind="mlp", mlp_width=48, mlp_hidden=3, voxels=16)


@pytest.fixture(scope="module")
def learned() -> dict[str, Mapper]:
    """The same flight learned with either engine."""
    found = {}
    for compute in (KERNELS, TORCH):
        found[compute.engine] = flights.mapper(flights.flight().frames, compute=compute)
        flights.learn(found[compute.engine])
    return found


def closed(m: Mapper) -> list[ModuleSnapshot]:
    """Close every module."""
    snapshots = [m.close(module).snapshot for module in m.learning()]
    return [s for s in snapshots if s is not None]


def test_a_map_is_as_good_with_either_engine(
    learned: dict[str, Mapper], record_property: Any
) -> None:
    kernels, ours = (flights.score(learned[name], flights.flight()) for name in ("numba", "torch"))
    record_property("psnr", {"numba": round(kernels, 2), "torch": round(ours, 2)})
    print(f"numba {kernels:.2f} dB, torch {ours:.2f} dB")
    assert learned["numba"].steps == learned["torch"].steps > 10
    assert ours > kernels - 0.3 and ours > flights.flight().mean_psnr() + 3


@pytest.mark.parametrize("made_by", ["numba", "torch"])
def test_a_map_of_one_engine_is_shown_by_the_other(
    learned: dict[str, Mapper], made_by: str
) -> None:
    """Committed modules, adopted by both engines, give almost the same picture."""
    shown = []
    modules = closed(learned[made_by])
    assert modules
    for compute in (KERNELS, TORCH):
        again = flights.mapper_of_nothing(compute)
        for s in modules:
            again.adopt(s.arrays, s.meta, s.version, "")
        shown.append(flights.render(again, flights.flight().views[0]))
    a, b = shown
    assert psnr(a.rgb, b.rgb) > 38
    both = np.isfinite(a.depth) & np.isfinite(b.depth)
    assert both.mean() > 0.5 and np.median(np.abs(a.depth - b.depth)[both]) < 0.1
    assert np.abs(a.known - b.known).mean() < 0.02


def use(m: Mapper, *, copied: bool) -> TorchEngine:
    """Let a mapper go on with an engine that shares the pool's memory or works on copies."""
    engine = TorchEngine(m.adapt, PlaneNetwork(), "cpu", copied=copied)
    m.optimizer = engine
    return engine


def flown(copied: bool) -> tuple[Mapper, list[ModuleSnapshot]]:
    """Half of a flight, its checkpoint restored elsewhere, the other half, and the end of it."""
    frames = flights.flight().frames
    m = flights.mapper(frames[:5], compute=TORCH)
    use(m, copied=copied)
    flights.learn(m, 6)
    again = flights.mapper_of_nothing(TORCH)
    use(again, copied=copied)
    again.restore(*m.checkpoint())
    kept = m.checkpoint()[1]["frames"]
    for i, frame in enumerate(frames):
        again.add(i, flights.STREAM, frame, kept=kept.get(str(i)))
    again.draining = True
    again.settle()
    flights.learn(again, 6)
    flights.render(again, flights.flight().views[0])
    again.settle()
    first = again.learning()[0]
    done = again.close(first).snapshot
    assert done is not None
    flights.learn(again, 6)
    return again, [done, *closed(again)]


def test_copies_on_a_device_are_never_stale() -> None:
    """Seeds, checkpoints, renders and closings between steps: bit for bit as in shared memory."""
    (_, shared), (m, copied) = flown(copied=False), flown(copied=True)
    assert m.pool is not None and isinstance(m.pool.copies, device.DeviceArrays)
    assert len(shared) == len(copied) > 1
    for a, b in zip(shared, copied, strict=True):
        assert a.id == b.id
        for name, array in a.arrays.items():
            np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)


def test_closed_modules_stay_while_others_learn_on_copies() -> None:
    """What is committed is what the device shows, and no step changes it."""
    m = flights.mapper(flights.flight().frames, compute=TORCH)
    use(m, copied=True)
    flights.learn(m, 5)
    module = m.learning()[0]
    snapshot = m.close(module).snapshot
    assert snapshot is not None and m.pool is not None and m.learning()
    flights.learn(m, 5)
    lent = m.optimizer.lend(m.pool)  # type: ignore[attr-defined]
    committed = _with_surface(snapshot.arrays)
    for name in ("features", "weights", "density", "surface", "seen"):
        want = committed[name].astype(lent[name].numpy().dtype)
        np.testing.assert_array_equal(lent[name][module.slot].numpy(), want.reshape(-1).reshape(
            lent[name][module.slot].shape), err_msg=name)  # fmt: skip


def test_modules_that_come_and_go_are_shown_from_copies() -> None:
    """Out of memory and back into other slots, as `residency` does between two views."""
    made = flights.mapper(flights.flight().frames, compute=TORCH)
    flights.learn(made, 5)
    snapshots = closed(made)
    m = flights.mapper_of_nothing(TORCH)
    use(m, copied=True)
    for s in snapshots:
        m.adopt(s.arrays, s.meta, s.version, "")
    view, pool = flights.flight().views[0], m.pool
    assert pool is not None and len(pool.slot_of) > 1
    first, slots = flights.render(m, view), dict(pool.slot_of)
    np.testing.assert_array_equal(first.rgb, flights.render(made, view).rgb)
    for cell in slots:
        pool.unload(cell)
    for module in m.modules.values():
        arrays = next(s.arrays for s in snapshots if s.id == module.id)
        module.slot = pool.load(module.cell, arrays)
    assert pool.slot_of != slots
    np.testing.assert_array_equal(flights.render(m, view).rgb, first.rgb)


def full_above(rays: int) -> Callable[..., Any]:
    """A scene evaluation that finds no memory for more rays than that."""
    from mclnf_edge.engine import torch_volume

    place = torch_volume.place

    def placed(scene: Any, ro: Any, *rest: Any) -> Any:
        if len(ro) > rays:
            raise torch.cuda.OutOfMemoryError(f"no room for {len(ro)} rays")
        return place(scene, ro, *rest)

    return placed


def test_a_full_device_gets_fewer_rays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m = flights.mapper(flights.flight().frames, compute=TORCH)
    monkeypatch.setattr("mclnf_edge.engine.torch_volume.place", full_above(600))
    report = m.step()
    assert report is not None and report.rays == 512 and m.facts()["rays_per_step"] == 512
    assert "512 rays a step from now on (no room for 1024 rays)" in caplog.text
    assert m.step() is not None and not m.facts()["out_of_memory"]


def test_a_device_without_any_room_ends_learning_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m = flights.mapper(flights.flight().frames[:4], compute=TORCH)
    assert m.step() is not None
    monkeypatch.setattr("mclnf_edge.engine.torch_volume.place", full_above(100))
    assert m.step() is None and m.facts()["out_of_memory"] and "learning stops" in caplog.text
    for i, frame in enumerate(flights.flight().frames[4:]):
        m.add(100 + i, flights.STREAM, frame)
    assert m.settle() and m.step() is None and m.frames


def test_a_picture_that_finds_no_room_is_made_on_the_cpu(
    learned: dict[str, Mapper], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    m, view = learned["torch"], flights.flight().views[0]
    want = flights.render(m, view)
    engine = use(m, copied=True)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no room for copies")

    assert engine._arrays is not None
    monkeypatch.setattr(engine._arrays, "lend", full)
    np.testing.assert_array_equal(flights.render(m, view).rgb, want.rgb)
    assert "rendered on the CPU (no room for copies)" in caplog.text


def test_the_papers_mlp_is_a_maps_field() -> None:
    """It learns, closes, is adopted and shown; its checkpoint goes on."""
    flight = flights.flight()
    adapt = replace(flights.ADAPT, rays_per_step=512, lr_mlp=0.01)

    def empty() -> Mapper:
        settings = MapConfig(cell_size_m=flights.CELL_M)
        return Mapper(settings, SMALL_MLP, adapt, None, 1, compute=TORCH)

    m = empty()
    for i, frame in enumerate(flight.frames):
        m.add(i, flights.STREAM, frame)
    m.draining = True
    assert m.settle()
    begin = flights.score(m, flight)
    flights.learn(m, 60)
    reached = flights.score(m, flight)
    print(f"MLP: {begin:.2f} -> {reached:.2f} dB; mean colour {flight.mean_psnr():.2f} dB")
    assert reached > begin + 2
    again = empty()
    again.restore(*m.checkpoint())
    np.testing.assert_array_equal(flights.render(again, flight.views[0]).rgb,
                                  flights.render(m, flight.views[0]).rgb)  # fmt: skip
    third = empty()
    for s in closed(m):
        assert s.meta["kind"] == "mlp" and s.arrays["features"].shape == (0,)
        third.adopt(s.arrays, s.meta, s.version, "")
    assert psnr(flights.render(third, flight.views[0]).rgb,
                flights.render(m, flight.views[0]).rgb) > 50  # fmt: skip


def test_a_long_render_says_that_it_goes_on() -> None:
    """A picture of many parts, so that the daemon does not take it for a hang."""
    m = flights.mapper(flights.flight().frames[:4], compute=TORCH)
    told: list[int] = []
    m.optimizer.alive = lambda: told.append(1)
    view = flights.flight().views[0]
    flights.render(m, replace(view, camera=view.camera.scaled(256, 192)))
    assert len(told) == 256 * 192 / 8192


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (("auto", "cpu", "planes"), KERNELS),
        (("numba", "auto", "planes"), KERNELS),
        (("torch", "cpu", "planes"), TORCH),
        (("auto", "cpu", "mlp"), TORCH),
    ],
)
def test_engine_and_device_are_chosen(asked: tuple[str, str, str], found: Compute) -> None:
    assert choose(*asked) == found


@pytest.mark.parametrize("has_cuda", [False, True])
def test_cuda_is_taken_where_it_is(has_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    if has_cuda:
        assert choose("auto", "auto", "planes") == choose("torch", "cuda", "mlp")
        assert choose("auto", "cuda", "planes") == Compute("torch", "cuda")
        return
    assert choose("auto", "auto", "planes") == KERNELS
    with pytest.raises(DeviceError, match="--device cuda: PyTorch finds no CUDA device here"):
        choose("auto", "cuda", "planes")


@pytest.mark.parametrize("asked", [("numba", "cpu", "mlp"), ("numba", "cuda", "planes")])
def test_what_does_not_go_together_is_refused(asked: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="expected .*auto or torch"):
        choose(*asked)


def test_an_initialization_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = ServeConfig(field=SMALL_MLP, compute=ComputeConfig("torch", "cpu"))
    with pytest.raises(InitError, match=r"expected kind mlp \(field.kind\), received planes"):
        open_start(config, Path(next(iter(SHIPPED))))
    start = open_start(config, None)
    save_init(tmp_path / "mlp.pt", start.mlp, {}, "mlp")  # type: ignore[union-attr]
    again = open_start(config, tmp_path / "mlp.pt")
    np.testing.assert_array_equal(again.mlp, start.mlp)  # type: ignore[union-attr]
    with pytest.raises(InitError, match=r"expected kind planes \(field.kind\), received mlp"):
        open_start(ServeConfig(), tmp_path / "mlp.pt")
    other = replace(SMALL_MLP, mlp_width=32)
    with pytest.raises(InitError, match=r"parameters \(field.kind mlp\), received"):
        Mapper(config.map, other, config.adapt, load_init(tmp_path / "mlp.pt").mlp, compute=TORCH)


@pytest.mark.parametrize("compute", [KERNELS, TORCH], ids=lambda c: c.engine)
def test_rays_without_a_finite_colour_spoil_no_other_module(compute: Compute) -> None:
    m = flights.mapper(flights.flight().frames, compute=compute)
    pool, modules = m.pool, m.learning()
    assert pool is not None and len(modules) > 1
    worst, *others = sorted(modules, key=lambda module: m.tiles[module.cell])
    pool.weights[worst.slot] = np.nan
    pool.refresh_transposed(np.array([worst.row]))
    before = pool.weights.copy()
    for _ in range(5):
        report = m.step()
        assert report is not None and np.isfinite(report.weights).all()
    for module in others:
        now = pool.weights[module.slot]
        assert np.isfinite(now).all() and np.isfinite(pool.features[module.slot]).all()
        assert not np.array_equal(now, before[module.slot]), "the others learn on"
    assert m.psnr is not None and np.isfinite(m.psnr)
