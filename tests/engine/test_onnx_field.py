"""The fields' ONNX graphs against PyTorch and against the definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mclnf_edge.engine import torch_volume
from mclnf_edge.engine.onnx_field import mlp_model, plane_model
from mclnf_edge.engine.onnx_session import PROVIDERS, Session, require
from mclnf_edge.engine.torch_field import MlpNetwork, PlaneNetwork, mlp_inputs
from mclnf_edge.errors import DeviceError
from mclnf_edge.mapping.device import share
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.maths import radiance
from tests.engine import scene as small
from tests.engine.scene import LAYOUT, REACH, SAMPLES, STEPS

MLP = MlpNetwork(48, 4)


@pytest.fixture(scope="module")
def pool() -> ModulePool:
    return small.make_pool()


def places(n: int = 2000) -> dict[str, torch.Tensor]:
    """Points of a module, beyond its box too, and directions."""
    random = torch.Generator().manual_seed(1)
    directions = torch.randn((n, 3), generator=random)
    return {
        "u": torch.rand((n, 3), generator=random) * 1.2 - 0.1,
        "above": torch.randn(n, generator=random) * 6,
        "directions": directions / directions.norm(dim=1, keepdim=True),
    }


def arrays(pool: ModulePool, slot: int) -> dict[str, Any]:
    return {"features": pool.features[slot], "weights": pool.weights[slot]}


def tensors(module: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in module.items()}
    return {**found, "features": found["features"].view(-1, 4)}


def by_torch(pool: ModulePool, slot: int, at: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `torch_field` makes of the places."""
    network, lent = PlaneNetwork(), share(pool)
    slots = torch.full((len(at["u"]),), slot)
    none = torch.zeros(0)
    known = torch_volume.Known(none, slots, none, none)
    points = torch_volume.Points(known, at["u"], at["above"], none, none, at["directions"])
    return torch_volume.look(network, lent.scene(0), points)


def test_planes_are_those_of_pytorch_open_and_closed(pool: ModulePool) -> None:
    at, opened = places(), Session(plane_model(LAYOUT), "cpu", 1)
    assert sorted(opened.inputs) == ["above", "features", "u", "weights"]
    for slot in pool.slot_of.values():
        want, module = by_torch(pool, slot, at), arrays(pool, slot)
        shut = Session(plane_model(LAYOUT, module), "cpu", 1)
        assert sorted(shut.inputs) == ["above", "u"]
        for found in (opened.values(**at, **tensors(module)), shut.values(**at)):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_pictures_of_the_graph_are_the_definition(pool: ModulePool) -> None:
    """Colour, light left and depth of rays, by the open graph, against float64."""
    scene, session = share(pool).scene(0), Session(plane_model(LAYOUT), "cpu", 1)
    ro, rd, bands = (torch.tensor(x) for x in small.rays(200))
    course = torch_volume.Course(SAMPLES, STEPS, 0.05, float(REACH))
    samples = torch_volume.place(scene, ro, rd, bands, course)
    points = torch_volume.locate(scene, (ro, rd), samples)
    values = torch.cat([
        session.values(u=points.u[rows], above=points.above[rows],
                       features=scene.features[s].view(-1, 4), weights=scene.weights[s])
        for s, rows in torch_volume.runs(points.known.slot)
    ])  # fmt: skip
    light = torch_volume.compose(values, points, samples, torch_volume.DARK)
    ray, t, width = (x.double() if x.is_floating_point() else x for x in samples)
    modules = list(small.definition(pool).values())
    want = radiance.render(modules, ro.double()[ray], rd.double()[ray], t, width)
    for name in ("rgb", "left", "depth", "known"):
        found = getattr(light, name).double()
        torch.testing.assert_close(found, getattr(want, name), rtol=2e-3, atol=2e-3)


def test_the_papers_mlp_is_its_definition() -> None:
    at, weights = places(), torch.from_numpy(MLP.random(3))
    inputs = mlp_inputs(at["u"], at["directions"]).double()
    want = MLP.field(MLP.split(weights.double()), inputs).roll(1, dims=1)
    module = {"weights": weights.numpy()}
    opened, shut = (Session(mlp_model(MLP.field, m), "cpu", 1) for m in (None, module))
    for found in (opened.values(**at, weights=weights), shut.values(**at)):
        torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-4)
    raw = MLP(weights, inputs.float()).raw
    ours = torch_volume.activated(MLP, raw)
    torch.testing.assert_close(opened.values(**at, weights=weights), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["planes", "mlp"])
def test_half_precision_differs_by_little_but_does(kind: str, pool: ModulePool) -> None:
    at = places()
    if kind == "planes":
        module = arrays(pool, 0)
        models = [plane_model(LAYOUT, module, half=half) for half in (False, True)]
    else:
        module = {"weights": MLP.random(3)}
        models = [mlp_model(MLP.field, module, half=half) for half in (False, True)]
    single, half = (Session(model, "cpu", 1).values(**at) for model in models)
    types = {t.data_type for t in onnx.load_from_string(models[1]).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    opacity = [1 - torch.exp(-v[:, 0]) for v in (single, half)]
    assert 0 < (single - half)[:, 1:].abs().max() < 2e-2
    assert 0 < (opacity[0] - opacity[1]).abs().max() < 2e-2


def test_a_file_says_what_it_holds_and_keeps_half_precision_features(pool: ModulePool) -> None:
    module = arrays(pool, 0)
    module["features"] = module["features"].astype(np.float16)
    data = plane_model(LAYOUT, module, about={"id": "cell_0_0"})
    assert data == plane_model(LAYOUT, module, about={"id": "cell_0_0"}), "not the same again"
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert {p.key: p.value for p in model.metadata_props} == {"id": "cell_0_0"}
    wide = {**module, "features": module["features"].astype(np.float32)}
    assert len(data) < 0.7 * len(plane_model(LAYOUT, wide))
    at = places()
    exact = Session(plane_model(LAYOUT, wide), "cpu", 1).values(**at)
    assert torch.equal(Session(data, "cpu", 1).values(**at), exact)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_missing_provider_is_named(provider: str) -> None:
    try:
        require(provider)
    except DeviceError as error:
        assert f"expected {PROVIDERS[provider]}, this build has" in str(error)
        with pytest.raises(DeviceError, match=PROVIDERS[provider]):
            Session(plane_model(LAYOUT), provider, 1)
        return
    pytest.skip(f"this build of ONNX Runtime has {PROVIDERS[provider]}")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_device_computes_what_the_cpu_does(provider: str, pool: ModulePool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    try:
        require(provider)
    except DeviceError as error:
        pytest.skip(str(error))
    at, model = places(), plane_model(LAYOUT, arrays(pool, 0))
    want = Session(model, "cpu", 1).values(**at)
    on = {name: x.cuda() for name, x in at.items()}
    found = Session(model, provider, 1).values(**on)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), want, rtol=1e-3, atol=1e-3)
