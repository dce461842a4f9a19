"""Update rules against their definitions; gradients of several threads against those of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.engine import learn
from mclnf_edge.engine.field import CHANNELS
from tests.engine import scene as small
from tests.engine.scene import LAYOUT

RAYS = 64


def test_texels_move_by_their_preconditioned_gradient() -> None:
    random = np.random.default_rng(0)
    rows, slots, count = 2, 3, LAYOUT.features
    planes = LAYOUT.planes
    slot_of_row = np.array([2, 0], np.int32)
    features = random.normal(0, 1, (slots, count)).astype(np.float32)
    fisher = random.uniform(0, 1, (rows, count)).astype(np.float32)
    damping = random.uniform(0.1, 1, len(planes)).astype(np.float32)
    texels = count // CHANNELS
    queue = random.permutation(rows * texels)[:500].astype(np.int64)
    touched = np.zeros(rows * texels, np.uint8)
    touched[queue] = 1
    hit = touched.reshape(rows, texels).astype(bool).repeat(CHANNELS, axis=1)
    grad = np.where(hit, random.normal(0, 1, (rows, count)), 0).astype(np.float32)
    plane = np.searchsorted(planes[:, 4], np.arange(count), side="right") - 1
    want_fisher = fisher.astype(np.float64) + grad.astype(np.float64) ** 2
    want = features.astype(np.float64)
    want[slot_of_row] -= 0.05 * grad / np.sqrt(want_fisher + damping[plane])
    squares = [(grad.astype(np.float64) ** 2)[:, plane == p].sum() for p in range(len(planes))]
    sums = np.zeros((len(planes), 2), np.float32)
    learn.step_texels(
        queue, len(queue), touched, grad.reshape(-1), slot_of_row, features.reshape(-1),
        fisher.reshape(-1), count, planes, np.float32(0.05), damping, sums,
    )  # fmt: skip
    assert np.allclose(features, want, atol=1e-6)
    assert np.allclose(fisher, want_fisher, rtol=1e-5)
    assert np.allclose(sums[:, 0], squares, rtol=1e-4)
    assert sums[:, 1].tolist() == [hit[:, plane == p].sum() for p in range(len(planes))]
    assert not touched.any() and not grad.any(), "what was used must be cleared for the next step"


def test_adam_is_torchs_adam() -> None:
    random = np.random.default_rng(1)
    start = random.normal(0, 1, (3, 50)).astype(np.float32)
    ours, m, v, steps = start.copy(), np.zeros_like(start), np.zeros_like(start), np.zeros(3)
    steps = steps.astype(np.float32)
    theirs = [torch.nn.Parameter(torch.tensor(row)) for row in start]
    optimizers = [torch.optim.Adam([p], lr=0.01, betas=(0.9, 0.99), eps=1e-12) for p in theirs]
    for k in range(6):
        g = random.normal(0, 1, start.shape).astype(np.float32)
        g[1] *= k % 2  # this module has no gradient in every other batch
        ours = learn.adam(ours, g, m, v, steps, 0.01)
        for p, optimizer, row in zip(theirs, optimizers, g, strict=True):
            if row.any():
                p.grad = torch.tensor(row)
                optimizer.step()
    want = torch.stack([p.detach() for p in theirs]).numpy()
    assert np.allclose(ours, want, atol=1e-5)
    assert steps.tolist() == [6, 3, 6]


def test_merged_threads_give_the_gradient_of_one() -> None:
    ro, rd, bands = small.rays(RAYS)
    d_rgb = np.random.default_rng(2).normal(0, 1, (RAYS, 3)).astype(np.float32)
    one, two = small.make_pool(1), small.make_pool(2)
    scene, tape = small.forward(one, ro, rd, bands)
    n = small.backward(one, scene, tape, d_rgb, 0, RAYS)
    scene, tape = small.forward(two, ro, rd, bands)
    a = small.backward(two, scene, tape, d_rgb, 0, 30, i=0)
    b = small.backward(two, scene, tape, d_rgb, 30, RAYS, i=1)
    length = learn.merge(
        two.queue[0], a, two.touched[0], two.gradient[0].reshape(-1),
        two.queue[1], b, two.touched[1], two.gradient[1].reshape(-1),
    )  # fmt: skip
    assert a < n and b < n and length == n
    assert set(two.queue[0][:length].tolist()) == set(one.queue[0][:n].tolist())
    scale = np.abs(one.gradient[0]).max()
    assert np.allclose(two.gradient[0], one.gradient[0], atol=1e-5 * scale)
    assert not two.gradient[1].any() and not two.touched[1].any()
    both = two.weight_gradient[0] + two.weight_gradient[1]
    scale = np.abs(one.weight_gradient[0]).max()
    assert np.allclose(both, one.weight_gradient[0], atol=1e-5 * scale)


@pytest.mark.parametrize("strength", [0.1, 1.0, 50.0])
def test_weights_have_mean_one_and_keep_the_order(strength: float) -> None:
    q = np.random.default_rng(3).gamma(0.3, 1.0, 2048).astype(np.float32)
    q[::7] = 0
    w = learn.ray_weights(q, strength, 10.0)
    live = q > 0
    assert w[live].mean() == pytest.approx(1, abs=1e-4)
    order = np.argsort(q[live])
    assert (np.diff(w[live][order]) >= 0).all() and w.max() > w[live].min()
    raw = 1 + strength * np.minimum(q / q[live].mean(), 10.0)
    assert np.allclose(w, raw / raw[live].mean(), rtol=1e-4)
    assert w.max() / w.min() <= 1 + 10 * strength + 1e-3


def test_rays_are_drawn_in_proportion_to_their_weights() -> None:
    w = learn.ray_weights(np.random.default_rng(4).gamma(0.3, 1.0, 512).astype(np.float32), 1, 10.0)
    draws = np.stack([learn.drawn(w, np.random.default_rng((5, k))) for k in range(4000)])
    assert draws.mean(1) == pytest.approx(1, abs=1e-5)
    assert 0.5 < (draws == 0).mean() < 0.75, "exp(-1/2), were the weights even"
    assert set(np.unique(draws[0]).tolist()) <= {2.0 * k for k in range(20)}
    error = (draws.mean(0) - w) / np.sqrt(2 * w / len(draws))  # of sums of 0, 2, 4 ...
    assert np.abs(error).max() < 5 and 0.8 < error.std() < 1.2
    assert learn.drawn(np.ones(1, np.float32), np.random.default_rng(0)).tolist() == [1.0]


def test_a_ray_without_gradient_queues_nothing() -> None:
    ro, rd, bands = small.rays(RAYS)
    d_rgb = np.random.default_rng(2).normal(0, 1, (RAYS, 3)).astype(np.float32)
    alone, among = small.make_pool(), small.make_pool()
    scene, tape = small.forward(alone, ro, rd, bands)
    n = small.backward(alone, scene, tape, d_rgb, 0, RAYS // 2)
    d_rgb[RAYS // 2 :] = 0
    scene, tape = small.forward(among, ro, rd, bands)
    assert small.backward(among, scene, tape, d_rgb, 0, RAYS) == n > 0
    np.testing.assert_array_equal(among.gradient[0], alone.gradient[0])
    np.testing.assert_array_equal(among.weight_gradient[0], alone.weight_gradient[0])


def test_weights_without_information_are_one() -> None:
    assert (learn.ray_weights(np.zeros(8, np.float32), 0.1, 10.0) == 1).all()
    assert (learn.ray_weights(np.ones(8, np.float32), 0.0, 10.0) == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_ray_without_finite_score_has_weight_one(bad: Any) -> None:
    q = np.array([1, 2, bad, 3], np.float32)
    w = learn.ray_weights(q, 1.0, 10.0)
    assert np.isfinite(w).all() and w[2] == 1
    assert np.allclose(w[[0, 1, 3]], learn.ray_weights(q[[0, 1, 3]], 1.0, 10.0))
