"""Scores that stand for a ray's information, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba")

from mclnf_edge.config import ServeConfig  # noqa: E402
from mclnf_edge.engine import learn  # noqa: E402
from mclnf_edge.engine.field import HIDDEN  # noqa: E402
from mclnf_edge.engine.volume import make_tape  # noqa: E402
from mclnf_edge.mapping.optimizer import Optimizer  # noqa: E402


def test_gradncp_is_the_norm_of_the_last_layers_gradient() -> None:
    """Of a ray with one sample of weight 1 in one module: the outer product of error and (h, 1)."""
    random = np.random.default_rng(0)
    rays, samples = 5, 3
    tape = make_tape(rays, samples)
    tape.h2[:] = random.normal(size=tape.h2.shape)
    tape.weight[:] = np.nan  # of samples that were not evaluated, nothing may be read
    for ray in range(rays - 1):
        tape.used[ray] = 1
        tape.first[ray * samples] = 4 * ray
        tape.weight[ray * samples] = 1.0
    error = random.normal(size=(rays, 3)).astype(np.float32)
    score = learn.gradncp_score(tape, error, samples)
    for ray in range(rays - 1):
        h = np.append(tape.h2.reshape(-1, HIDDEN)[4 * ray], 1.0)
        gradient = np.outer(error[ray], h)
        assert score[ray] == pytest.approx((gradient**2).sum(), rel=1e-5)
    assert score[-1] == 0


def test_residual_score_is_the_squared_error() -> None:
    error = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.5]], np.float32)
    np.testing.assert_allclose(learn.residual_score(error), [9.0, 0.25])


@pytest.mark.parametrize("weighting", ["none", "output-layer", "drawn", "residual", "shuffled"])
def test_weights_keep_the_mean_and_the_control_only_moves_them(weighting: str) -> None:
    config = ServeConfig()
    error = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    optimizer = Optimizer(replace(config.adapt, weighting=weighting), 1)
    information = np.square(error).sum(1)
    optimizer.information = lambda pool, scene, d_rgb: information  # type: ignore[method-assign]
    weights = optimizer.weigh(None, None, error)  # type: ignore[arg-type]
    assert weights.mean() == pytest.approx(1.0)
    plain = learn.ray_weights(information, config.adapt.fisher_lambda, config.adapt.weight_clamp)
    if weighting == "none":
        assert (weights == 1).all()
    elif weighting == "shuffled":
        np.testing.assert_array_equal(np.sort(weights), np.sort(plain))
        assert (weights != plain).any()
    elif weighting == "drawn":
        again = optimizer.weigh(None, None, error)  # type: ignore[arg-type]
        np.testing.assert_array_equal(again, weights)
        optimizer.steps += 1
        assert (optimizer.weigh(None, None, error) != weights).any()  # type: ignore[arg-type]
        assert 0.4 < (weights == 0).mean() < 0.8
    else:
        np.testing.assert_allclose(weights, plain, rtol=1e-6)
