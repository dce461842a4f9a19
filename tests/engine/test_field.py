"""The field kernels against their definition in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mclnf_edge.engine import field
from mclnf_edge.engine.field import B3, HIDDEN, INPUTS, MLP_SIZE, OUTPUTS, TRANSPOSED_SIZE, Layout
from mclnf_edge.maths.radiance import PlaneField
from tests.engine.scene import LAYOUT, join, split

N = 64


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Random parameters, points (some outside the cube) and the kernels' forward pass over them."""
    random = np.random.default_rng(1)
    features = random.normal(0, 0.5, LAYOUT.features).astype(np.float32)
    weights = field.random_mlp(2) * np.float32(1.5)
    weights[B3 : B3 + 4] += random.normal(0, 0.3, 4).astype(np.float32)
    u = random.uniform(-0.1, 1.1, (N, 3)).astype(np.float32)
    u[:4] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0.25]]
    above = random.uniform(-25, 25, N).astype(np.float32)
    x, o = np.zeros(N * INPUTS, np.float32), np.zeros(N * OUTPUTS, np.float32)
    h1, h2 = np.zeros(N * HIDDEN, np.float32), np.zeros(N * HIDDEN, np.float32)
    for e in range(N):
        field.encode(features, 0, LAYOUT.planes, u, e, above[e], x)
        field.mlp(weights, 0, x, h1, h2, o, e)
    return {
        "features": features, "weights": weights, "u": u, "above": above, "x": x, "h1": h1,
        "h2": h2, "o": o, "coords": torch.tensor(np.column_stack([u, above])).double(),
    }  # fmt: skip


def kernel_values(o: Any) -> Any:
    """RGB and density per unit (N, 4) of the kernels' raw outputs."""
    o = o.reshape(N, OUTPUTS).astype(np.float64)
    return np.column_stack([1 / (1 + np.exp(-o[:, 1:4])), np.exp(o[:, 0].clip(-10, 6))])


def test_values(parts: dict[str, Any]) -> None:
    values = PlaneField()(split(parts["features"], parts["weights"]), parts["coords"])
    assert np.allclose(kernel_values(parts["o"]), values.numpy(), rtol=2e-4, atol=2e-5)
    assert values.std(0).min() > 0.01, "the values must differ for this to say anything"


def test_gradients_of_every_parameter(parts: dict[str, Any]) -> None:
    do = np.zeros(OUTPUTS, np.float32)
    random = np.random.default_rng(3)
    grad = np.zeros(LAYOUT.features, np.float32)
    d_weights = np.zeros(MLP_SIZE, np.float32)
    transposed = np.zeros(TRANSPOSED_SIZE, np.float32)
    field.transpose(parts["weights"], transposed, np.array([0]))
    dx, zero = np.zeros(INPUTS, np.float32), np.zeros(HIDDEN, np.float32)
    d1, d2 = np.zeros(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
    touched = np.zeros(LAYOUT.features // 4, np.uint8)
    queue, n = np.zeros(len(touched), np.int64), 0
    wanted = random.normal(0, 1, (N, 4)).astype(np.float32)
    for e in range(N):
        do[:4] = wanted[e]
        field.mlp_backward(transposed, 0, d_weights, 0, parts["x"], parts["h1"], parts["h2"], e,
                           do, dx, d1, d2, zero)  # fmt: skip
        n = field.encode_backward(grad, 0, LAYOUT.planes, parts["u"], e, dx, touched, queue, n)

    def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
        """The four raw outputs, from the definition's values."""
        v = PlaneField()(p, parts["coords"])
        raw = torch.cat([v[:, 3:].log(), torch.logit(v[:, :3])], dim=1)
        return (raw * torch.tensor(wanted).double()).sum()

    true_features, true_weights = join(
        torch.func.grad(outputs)(split(parts["features"], parts["weights"]))
    )
    assert np.allclose(grad, true_features, rtol=1e-3, atol=2e-3 * np.abs(true_features).max())
    assert np.allclose(d_weights, true_weights, rtol=1e-3, atol=1e-4 * np.abs(true_weights).max())
    assert np.linalg.norm(grad - true_features) < 1e-3 * np.linalg.norm(true_features)
    assert sorted(queue[:n]) == np.flatnonzero(touched).tolist()
    beyond = np.abs(grad).reshape(-1, 4).sum(1)[touched == 0]
    assert not beyond.any(), "a texel with a gradient was not queued"


def test_layout_has_no_gap_and_no_overlap() -> None:
    layout = Layout.of(fine=64, vertical=16, voxels=8)
    end = 0
    for _, _, nu, nv, offset in layout.planes:
        assert offset == end
        end = offset + nu * nv * field.CHANNELS
    assert end == layout.features
    assert layout.voxels == (8, 8, 8)
