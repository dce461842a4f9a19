"""The engine in PyTorch against the definition and against the compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.config import AdaptConfig
from mclnf_edge.engine import learn, torch_learn, torch_volume, volume
from mclnf_edge.engine.torch_field import PlaneNetwork
from mclnf_edge.engine.torch_volume import Course, Samples
from mclnf_edge.mapping import optimizer
from mclnf_edge.mapping.device import share
from mclnf_edge.mapping.modules import ModulePool
from mclnf_edge.mapping.optimizer import Fit, Optimizer
from mclnf_edge.mapping.rays import Rays
from mclnf_edge.mapping.torch_engine import Batch, TorchEngine
from mclnf_edge.maths import radiance
from tests.engine import scene as small
from tests.engine.scene import REACH, SAMPLES, STEPS

RAYS = 200
NETWORK = PlaneNetwork()


@pytest.fixture(scope="module")
def pool() -> ModulePool:
    return small.make_pool()


def doubles(scene: torch_volume.TensorScene) -> torch_volume.TensorScene:
    """The scene in float64."""
    return torch_volume.TensorScene(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in scene)
    )


def test_the_field_is_its_definition(pool: ModulePool) -> None:
    """Colour, light left, depth and known share of rays, in float64, at the same samples."""
    scene = doubles(share(pool).scene(0))
    ro, rd, bands = (torch.tensor(x).double() for x in small.rays(RAYS))
    traced = torch_volume.trace(
        scene, NETWORK, (ro, rd, bands), Course(SAMPLES, STEPS, 0.05, float(REACH))
    )
    ray, t, width = traced.samples
    want = radiance.render(list(small.definition(pool).values()), ro[ray], rd[ray], t, width)
    assert len(ray) > RAYS // 2
    for name, value in (("rgb", want.rgb), ("depth", want.depth), ("known", want.known)):
        found = getattr(traced.light, name)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(traced.light.left, want.left, rtol=1e-4, atol=1e-4)


def test_what_too_few_frames_saw_is_not_known(pool: ModulePool) -> None:
    """By the kernels, by PyTorch and by definition."""
    seen = pool.seen.copy()
    pool.seen[:] = seen + 1
    pool.known_views = 2
    ro, rd, bands = small.rays(RAYS)
    _, tape = small.forward(pool, ro, rd, bands, jitter=False)
    rays = [torch.tensor(x).double() for x in (ro, rd, bands)]
    scene = doubles(share(pool).scene(0))
    traced = torch_volume.trace(
        scene, NETWORK, tuple(rays), Course(SAMPLES, STEPS, 0.05, float(REACH))
    )
    ray, t, width = traced.samples
    modules = list(small.definition(pool).values())
    want = radiance.render(modules, rays[0][ray], rays[1][ray], t, width, 2).known
    anyone = radiance.render(modules, rays[0][ray], rays[1][ray], t, width).known
    pool.seen[:], pool.known_views = seen, 1
    torch.testing.assert_close(traced.light.known, want, rtol=1e-4, atol=1e-4)
    assert np.allclose(tape.known[ray.numpy()], want, atol=2e-3)
    assert (want < anyone - 0.1).sum() > RAYS // 4


def test_rays_are_sampled_as_the_kernels_do(pool: ModulePool) -> None:
    """Without jitter: the same rays meet modules, at the same distances, and look the same."""
    rays = small.rays(RAYS)
    _, tape = small.forward(pool, *rays, jitter=False)
    course = Course(SAMPLES, STEPS, 0.05, float(REACH))
    inputs = tuple(torch.tensor(x) for x in rays)
    traced = torch_volume.trace(share(pool).scene(0), NETWORK, inputs, course)  # type: ignore[arg-type]
    met = np.flatnonzero(tape.used)
    assert traced.samples.ray.tolist() == met.tolist()
    t = tape.t.reshape(RAYS, SAMPLES)[met]
    np.testing.assert_allclose(traced.samples.t, t, atol=2e-3)
    np.testing.assert_allclose(traced.rgb, tape.rgb, atol=2e-3)
    np.testing.assert_allclose(traced.light.depth, tape.depth[met], atol=2e-2)


def batch_at(pool: ModulePool, rays: Any, tape: Any, n: int) -> Batch:
    """A batch at the `n` distances a ray that the kernels drew."""
    met = np.flatnonzero(tape.used[:RAYS])
    t, width = (torch.tensor(x[: RAYS * n].reshape(-1, n)[met]) for x in (tape.t, tape.width))
    width[torch.arange(n) >= torch.tensor(tape.used[met])[:, None]] = 1.0  # kernels ended before
    lent = share(pool)
    ro, rd = (torch.tensor(x) for x in rays[:2])
    samples = Samples(torch.tensor(met), t, width)
    traced = torch_volume.evaluate(lent.scene(0), NETWORK, (ro, rd), samples, learn=True)
    return Batch(lent, lent.scene(0), traced)


def test_gradients_are_those_of_the_kernels() -> None:
    pool, rays = small.make_pool(), small.rays(RAYS)
    scene, tape = small.forward(pool, *rays)
    random = np.random.default_rng(2)
    d_rgb = random.normal(0, 1, (RAYS, 3)).astype(np.float32)
    weights = random.uniform(0.5, 2, RAYS).astype(np.float32)
    weights[::3], d_rgb[1::3] = 0, 0  # not drawn, and masked
    n = small.backward(pool, scene, tape, d_rgb * weights[:, None], 0, RAYS)
    batch = batch_at(pool, rays, tape, SAMPLES)
    step = torch_learn.gradients(
        batch.traced, batch.slopes(torch.tensor(d_rgb)), torch.tensor(weights)
    )
    rows = pool.owner[step.slots]
    scale = np.abs(pool.weight_gradient[0]).max()
    np.testing.assert_allclose(step.weights, pool.weight_gradient[0][rows], atol=2e-5 * scale)
    texels = small.LAYOUT.features // 4
    at = pool.owner[step.texel // texels] * texels + (step.texel % texels).numpy()
    assert set(at.tolist()) == set(pool.queue[0][:n].tolist())
    want = pool.gradient[0].reshape(-1, 4)[at]
    np.testing.assert_allclose(step.gradient, want, atol=2e-5 * np.abs(want).max())


def spearman(a: Any, b: Any) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_steps_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, weights and every array after two whole steps at the same samples, all of them."""
    monkeypatch.setattr(optimizer, "TRAINED_SAMPLES", volume.ALL)
    adapt = AdaptConfig(rays_per_step=RAYS)
    ours, theirs = small.make_pool(), small.make_pool()
    kernels, engine = Optimizer(adapt, 1), TorchEngine(adapt, NETWORK, "cpu")
    for k in range(2):  # the second with a running diagonal and moments
        ro, rd, bands = small.rays(RAYS, k)
        d_rgb = np.random.default_rng(k).normal(0, 1e-3, (RAYS, 3)).astype(np.float32)
        rays = Rays(ro, rd, d_rgb, np.ones(RAYS, np.float32))
        scene, _ = kernels._trace(theirs, rays, bands, float(REACH), 0)
        batch = batch_at(ours, rays, kernels.work.tape, kernels.work.samples)
        ncp = engine._gradncp(batch, d_rgb), kernels._gradncp(scene, d_rgb)
        np.testing.assert_allclose(*ncp, rtol=1e-3, atol=1e-3 * ncp[1].max())
        want = kernels.information(theirs, scene, d_rgb)
        found = engine.information(ours, batch, d_rgb)
        assert (want > 0).sum() > RAYS // 2 and spearman(found, want) >= 0.99
        np.testing.assert_allclose(found, want, rtol=1e-2, atol=1e-3 * want.max())
        weights = learn.ray_weights(want, 0.1, 10.0)
        kernels._update(theirs, scene, d_rgb, weights, 0.5)
        engine._update(ours, batch, d_rgb, weights, 0.5)
    assert kernels.plane_scale is not None and engine.plane_scale is not None
    np.testing.assert_allclose(engine.plane_scale, kernels.plane_scale, rtol=1e-3)
    for name in ("features", "fisher", "weights", "moment", "ray_fisher", "adam_steps"):
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3 * np.abs(b).max(), err_msg=name)
    assert not np.array_equal(ours.features, small.make_pool().features)


def test_frozen_modules_are_rendered_and_not_touched(pool: ModulePool) -> None:
    frozen = small.make_pool()
    ro, rd, bands = small.rays(RAYS)
    rays = Rays(ro, rd, np.zeros_like(ro), np.ones(RAYS, np.float32))
    engine = TorchEngine(AdaptConfig(rays_per_step=RAYS), NETWORK, "cpu")

    def step() -> Fit:
        fit = engine.step(
            frozen, rays, np.ones_like(ro), bands, site=0, reach=float(REACH), decay=0.0
        )
        assert fit is not None and fit.mse > 0.01
        return fit

    frozen.owner[1:] = -1
    learning = frozen.features[0].copy()
    step()
    assert not np.array_equal(frozen.features[0], learning)
    frozen.owner[0] = -1
    frozen.features[0], frozen.weights[0] = pool.features[0], pool.weights[0]
    fit = step()
    assert (fit.weights == 1).all()
    for name in ("features", "weights"):
        np.testing.assert_array_equal(getattr(frozen, name), getattr(pool, name))


def test_a_step_is_the_same_again_and_rays_past_everything_change_nothing() -> None:
    """Randomness comes from the step's number alone."""
    ro, rd, bands = small.rays(RAYS)
    rays = Rays(ro, rd, np.full_like(ro, 0.5), np.ones(RAYS, np.float32))
    found = []
    for _ in range(2):
        own, engine = small.make_pool(), TorchEngine(AdaptConfig(), NETWORK, "cpu")
        how: Any = {"site": 0, "reach": float(REACH), "decay": 0.0}
        engine.step(own, rays, np.ones_like(ro), bands, **how)
        up = rays._replace(directions=np.tile(np.float32([0, 0, 1]), (RAYS, 1)))
        before = own.features.copy()
        fit = engine.step(own, up, np.ones_like(ro), bands, **how)
        assert fit is not None and not fit.shown.any()
        np.testing.assert_array_equal(own.features, before)
        found.append(own)
    np.testing.assert_array_equal(found[0].features, found[1].features)
    np.testing.assert_array_equal(found[0].weights, found[1].weights)


def test_a_place_without_modules_in_memory_is_dark() -> None:
    own = small.make_pool()
    for cell in list(own.slot_of):
        own.owner[own.slot_of[cell]] = -1
        own.unload(cell)
    ro, rd, _ = small.rays(20)
    engine = TorchEngine(AdaptConfig(), NETWORK, "cpu")
    assert not engine.show(own, 0, ro, rd).any()
