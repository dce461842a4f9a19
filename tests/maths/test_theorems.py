"""What is true of the paper's theorems 1 to 3, as numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mclnf_edge.maths import fisher
from mclnf_edge.maths.fields import Params, Siren

FIELD = Siren(2, 2, width=6, layers=3, omega=2.0)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_fisher(params: Params, coords: Tensor) -> Tensor:
    """F = sum_i J_i^T J_i of a unit-variance Gaussian around the output (the true Fisher)."""
    jacobian = torch.func.jacrev(FIELD)(params, coords)
    rows = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2).flatten(0, 1)
    return rows.T @ rows


def test_theorem_1_kl_minus_the_quadratic_form_falls_with_the_third_power() -> None:
    params = FIELD.init(gen(), torch.float64)
    coords = torch.rand(12, 2, generator=gen(1), dtype=torch.float64) * 2 - 1
    matrix = model_fisher(params, coords)
    direction = {
        k: torch.randn(p.shape, generator=gen(2), dtype=torch.float64) for k, p in params.items()
    }
    flat = torch.cat([d.flatten() for d in direction.values()])
    scales = torch.logspace(-2, -4, 9, dtype=torch.float64)
    gaps, quadratics = [], []
    for scale in scales:
        moved = {k: p + scale * direction[k] for k, p in params.items()}
        kl = fisher.kl_gaussian(FIELD(params, coords), FIELD(moved, coords))
        quadratics.append(0.5 * scale**2 * flat @ matrix @ flat)
        gaps.append((kl - quadratics[-1]).abs())
    x, y = scales.log(), torch.stack(gaps).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert slope >= 2.9
    assert gaps[-1] < 0.05 * quadratics[-1]


def test_score_has_mean_zero_and_its_covariance_is_minus_the_mean_hessian() -> None:
    """Eq. 9 by Gauss-Hermite quadrature over s, exact for a one-output Gaussian."""
    field = Siren(1, 1, width=3, layers=2, omega=1.5)
    params = field.init(gen(3), torch.float64)
    flat = torch.cat([p.flatten() for p in params.values()])
    x = torch.tensor([[0.3]], dtype=torch.float64)

    def log_p(theta: Tensor, s: Tensor) -> Tensor:
        split, start = {}, 0
        for name, p in params.items():
            split[name] = theta[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return -fisher.half_squared_error(field(split, x), s).sum()

    root3 = math.sqrt(3.0)
    centre = field(params, x)
    mean_score, covariance, hessian = 0.0, 0.0, 0.0
    for node, weight in ((-root3, 1 / 6), (0.0, 2 / 3), (root3, 1 / 6)):
        s = (centre + node).detach()
        g = torch.func.grad(log_p)(flat, s)
        mean_score = mean_score + weight * g
        covariance = covariance + weight * torch.outer(g, g)
        hessian = hessian + weight * torch.func.hessian(log_p)(flat, s)
    torch.testing.assert_close(mean_score, torch.zeros_like(flat))
    torch.testing.assert_close(covariance, -hessian)


def contraction(f: Tensor, hessian: Tensor, eta: float) -> float:
    """Largest factor by which one noiseless step theta - eta F^-1 H theta scales |theta|_F."""
    root = torch.linalg.cholesky(f).T
    step = torch.eye(len(f), dtype=f.dtype) - eta * torch.linalg.solve(f, hessian)
    return float(torch.linalg.matrix_norm(root @ step @ torch.linalg.inv(root), ord=2))


def test_theorem_2_contraction_in_the_f_norm_for_constant_f() -> None:
    """With H between mu and L the step contracts by max(|1 - eta mu/fmax|, |1 - eta L/fmin|)."""
    for seed in range(20):
        g = gen(seed)
        a = torch.randn(4, 4, generator=g, dtype=torch.float64)
        b = torch.randn(4, 4, generator=g, dtype=torch.float64)
        eye = torch.eye(4, dtype=torch.float64)
        f, hessian = a @ a.T + 0.5 * eye, b @ b.T + 0.3 * eye
        (f_low, *_, f_high), (mu, *_, big_l) = (
            torch.linalg.eigvalsh(f).tolist(),
            torch.linalg.eigvalsh(hessian).tolist(),
        )
        eta = f_low / big_l
        bound = max(abs(1 - eta * mu / f_high), abs(1 - eta * big_l / f_low))
        assert contraction(f, hessian, eta) <= bound + 1e-9 < 1


def test_theorem_2_as_printed_fails_for_f_2i() -> None:
    """F = 2I, L = mu = 1, eta = 0.1 meets the printed condition and breaks the printed rate.

    Eq. 16 takes lambda_min(F) where F^-1 stands: the true factor of V per step is (1 - eta/2)^2 =
    0.9025, the printed one 1 - 2 eta 2 + eta^2 4 = 0.64.
    """
    eta, mu, big_l, low, high = 0.1, 1.0, 1.0, 2.0, 2.0
    assert 0 < eta < 2 * mu / (high * big_l**2)
    printed = 1 - 2 * eta * low * mu + eta**2 * big_l**2 * high**2
    theta = {"0.w": torch.tensor([[3.0, -1.0]], dtype=torch.float64)}
    f = {"0.w": torch.full((1, 2), 2.0, dtype=torch.float64)}
    after = theta["0.w"] - eta * fisher.precondition(theta, f, 0.0)["0.w"]
    factor = (after.square().sum() / theta["0.w"].square().sum()).item()
    assert printed == pytest.approx(0.64)
    assert factor == pytest.approx(0.9025)
    assert factor > printed


def test_theorem_3_printed_weight_bound_fails_and_the_clamped_one_holds() -> None:
    """Eq. 21 bounds w by 1 + lambda lambda_max(F); a large residual breaks it, the clamp does not.

    For F = mean g g^T one sample's g^T F^-1 g can reach N whatever F's eigenvalues are.
    """
    g = torch.full((100, 1), 1e-3, dtype=torch.float64)
    g[0] = 1.0
    matrix = fisher.full_fisher(g)
    q = fisher.full_information(g, matrix)
    lam, cap = 0.5, 4.0
    assert 1 + lam * q.max() > 1 + lam * torch.linalg.eigvalsh(matrix).max()
    assert q.max() <= 100 + 1e-9
    w = fisher.sample_weights(q, lam, cap)
    assert 1 / (1 + lam) <= w.min() and w.max() <= 1 + lam * cap
