"""Steps without a graph against the same steps through autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mclnf_edge.maths import kernels, passes
from mclnf_edge.maths.adaptation import Rule, State, Weighting, inner_step
from mclnf_edge.maths.fields import Field, NerfMlp, Siren, stack

FIELDS: dict[str, Field] = {
    "siren": Siren(2, 3, 24),
    "sound": Siren(1, 1, 24, first_omega=300.0),
    "mlp": NerfMlp(24, 4, 2),
}


def start(name: str, modules: int) -> tuple[Field, dict[str, torch.Tensor], tuple]:  # type: ignore[type-arg]
    field = FIELDS[name]
    d_in, d_out = {"siren": (2, 3), "sound": (1, 1), "mlp": (6, 4)}[name]
    draw = [torch.Generator().manual_seed(m) for m in range(max(modules, 1))]
    params = stack([field.init(g) for g in draw]) if modules else field.init(draw[0])
    lead = (modules,) if modules else ()
    coords = torch.rand(*lead, 301, d_in, generator=draw[0]) * 2 - 1
    return field, params, (coords, torch.rand(*lead, 301, d_out, generator=draw[0]))


@pytest.mark.parametrize("modules", [0, 3])
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "weighting", ["none", "diagonal", "factored", "residual", "gradncp", "pruned"]
)
def test_steps_are_those_of_autograd(
    name: str, modules: int, weighting: Weighting, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, params, batch = start(name, modules)
    assert passes.network(field, params, batch) is field, "the direct way is taken"
    monkeypatch.setattr(passes, "VALUES_AT_ONCE", 24 * 100)  # several pieces, the last one shorter
    rule = Rule(weighting, lam=0.3)
    got = inner_step(field, params, State(), batch, 1e-2, rule)
    monkeypatch.setattr(passes, "network", lambda *_: None)
    want = inner_step(field, params, State(), batch, 1e-2, rule)
    for n, p in want[0].items():
        moved = (p - params[n]).abs().max()
        assert (got[0][n] - p).abs().max() <= 2e-3 * moved + 1e-7, n
    torch.testing.assert_close(got[2].loss, want[2].loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[2].weights, want[2].weights, rtol=2e-3, atol=1e-4)


def test_it_stands_aside_where_it_does_not_fit() -> None:
    field, params, batch = start("siren", 0)
    double = {n: p.double() for n, p in params.items()}
    assert passes.network(field, double, (batch[0].double(), batch[1].double())) is None
    stacked = stack([params, params])
    assert passes.network(field, stacked, batch) is None, "one batch for two modules"


def test_sine_and_slope_are_those_of_float64() -> None:
    random = np.random.default_rng(0)
    y = random.uniform(-300, 300, (500, 16)).astype(np.float32)
    bias, slope = random.uniform(-1, 1, 16).astype(np.float32), np.empty_like(y)
    omega = np.float32(30)
    angle = (omega * (y + bias)).astype(np.float64)
    kernels.sine(y, bias, omega, slope)
    assert np.abs(y - np.sin(angle)).max() < 1e-6
    assert np.abs(slope - 30 * np.cos(angle)).max() < 3e-5
    wrong = np.array([[np.nan, np.inf]], np.float32)
    kernels.sine(wrong, np.zeros(2, np.float32), omega, np.empty_like(wrong))
    assert np.isnan(wrong).all()
