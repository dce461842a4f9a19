"""Layer-by-layer Fisher quantities against per-sample gradients (torch.func) in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mclnf_edge.maths import fisher
from mclnf_edge.maths.fields import Params, Siren, Tap, replicate, stack, unstack

FIELD = Siren(2, 3, width=7, layers=3, omega=5.0)
N = 24


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0) -> tuple[Params, Tensor, Tensor]:
    g = gen(seed)
    params = FIELD.init(g, torch.float64)
    coords = torch.rand(N, 2, generator=g, dtype=torch.float64) * 2 - 1
    return params, coords, torch.rand(N, 3, generator=g, dtype=torch.float64)


def taps_of(params: Params, coords: Tensor, targets: Tensor) -> tuple[list[Tap], list[Tensor]]:
    taps: list[Tap] = []
    values = FIELD({k: p.requires_grad_() for k, p in params.items()}, coords, taps)
    loss = fisher.half_squared_error(values, targets).sum()
    return taps, list(torch.autograd.grad(loss, [t.outputs for t in taps]))


def flat(params: Params) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def test_scores_equal_finite_differences() -> None:
    params, coords, targets = problem()
    g = fisher.scores(FIELD, params, coords, targets)
    eps, index = 1e-6, 11
    for name in params:
        offset = sum(p.numel() for p in list(params.values())[: list(params).index(name)])
        ends = []
        for step in (eps, -eps):
            moved = {k: p.detach().clone() for k, p in params.items()}
            moved[name].view(-1)[2] += step
            values = FIELD(moved, coords[index : index + 1])
            ends.append(-fisher.half_squared_error(values, targets[index : index + 1]))
        slope = (ends[0] - ends[1]) / (2 * eps)
        assert slope.item() == pytest.approx(g[index, offset + 2].item(), rel=1e-6, abs=1e-9)


def test_diagonal_moment_equals_squared_scores() -> None:
    params, coords, targets = problem()
    g = fisher.scores(FIELD, params, coords, targets)
    moment = fisher.diagonal_moment(*taps_of(params, coords, targets))
    torch.testing.assert_close(flat({k: moment[k] for k in params}), g.square().mean(0))


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_diagonal_information_equals_its_definition(damping: float) -> None:
    params, coords, targets = problem()
    g = fisher.scores(FIELD, params, coords, targets)
    taps, grads = taps_of(params, coords, targets)
    f = fisher.diagonal_moment(taps, grads)
    diagonal = g.square().mean(0)
    expected = (g.square() / (diagonal + damping * diagonal.mean())).sum(1)
    torch.testing.assert_close(fisher.diagonal_information(taps, grads, f, damping), expected)


def test_rays_sum_their_gradient_before_squaring() -> None:
    params, coords, targets = problem()
    rows = 4

    def ray_scores() -> Tensor:
        g = fisher.scores(FIELD, params, coords, targets)
        return g.view(N // rows, rows, -1).sum(1)

    g = ray_scores()
    taps, grads = taps_of(params, coords, targets)
    moment = fisher.diagonal_moment(taps, grads, rows)
    torch.testing.assert_close(flat({k: moment[k] for k in params}), g.square().mean(0))
    q = fisher.diagonal_information(taps, grads, moment, 0.1, rows)
    diagonal = g.square().mean(0)
    torch.testing.assert_close(q, (g.square() / (diagonal + 0.1 * diagonal.mean())).sum(1))
    apart = fisher.diagonal_moment(taps, grads)
    assert (flat(moment) - flat(apart)).abs().max() > 1e-3 * flat(apart).max()


def test_blocks_of_rays_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    taps, grads = taps_of(*problem())
    whole = fisher.diagonal_moment(taps, grads, 4)
    q = fisher.diagonal_information(taps, grads, whole, 0.1, 4)
    monkeypatch.setattr(fisher, "RAYS_AT_ONCE", 2)
    torch.testing.assert_close(fisher.diagonal_moment(taps, grads, 4), whole)
    torch.testing.assert_close(fisher.diagonal_information(taps, grads, whole, 0.1, 4), q)


@pytest.mark.parametrize("rows", [1, 4])
def test_stacked_modules_are_independent(rows: int) -> None:
    problems = [problem(s) for s in range(3)]
    params = stack([p for p, _, _ in problems])
    coords, targets = (torch.stack([p[i] for p in problems]) for i in (1, 2))
    taps, grads = taps_of(params, coords, targets)
    f = fisher.diagonal_moment(taps, grads, rows)
    q = fisher.diagonal_information(taps, grads, f, 0.05, rows)
    factored = fisher.factored_information(taps, grads, 0.05)
    for m, (p, x, s) in enumerate(problems):
        own_taps, own_grads = taps_of(p, x, s)
        own = fisher.diagonal_moment(own_taps, own_grads, rows)
        torch.testing.assert_close(unstack(f)[m], own)
        torch.testing.assert_close(
            q[m], fisher.diagonal_information(own_taps, own_grads, own, 0.05, rows)
        )
        torch.testing.assert_close(
            factored[m], fisher.factored_information(own_taps, own_grads, 0.05)
        )


def test_full_information_sums_to_the_rank() -> None:
    """The mean of g^T F^-1 g over the samples that made F is P when F is invertible."""
    g = torch.randn(200, 6, generator=gen(), dtype=torch.float64)
    q = fisher.full_information(g, fisher.full_fisher(g))
    assert q.mean().item() == pytest.approx(6.0)
    matrix = fisher.full_fisher(g, damping=0.3)
    ridge = 0.3 * (g.T @ g / 200).trace() / 6
    torch.testing.assert_close(matrix, g.T @ g / 200 + ridge * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 4])
def test_scores_from_the_layers_are_those_by_definition(rows: int) -> None:
    params, coords, targets = problem()
    g = fisher.scores(FIELD, params, coords, targets).view(N // rows, rows, -1).sum(1)
    found = fisher.sample_scores(*taps_of(params, coords, targets), rows)
    torch.testing.assert_close(found, -g)


def test_the_full_matrix_is_for_tiny_networks() -> None:
    wide = Tap("0", torch.zeros(2, 80), torch.zeros(2, 80))
    with pytest.raises(ValueError, match="at most 4096 parameters, received 6480"):
        fisher.sample_scores([wide], [wide.outputs])


def test_full_information_does_not_depend_on_the_parametrisation() -> None:
    g = torch.randn(40, 5, generator=gen(1), dtype=torch.float64)
    change = torch.randn(5, 5, generator=gen(2), dtype=torch.float64)
    h = g @ change
    torch.testing.assert_close(
        fisher.full_information(g, fisher.full_fisher(g)),
        fisher.full_information(h, fisher.full_fisher(h)),
    )


def test_factored_information_is_exact_where_f_has_rank_one_layers() -> None:
    """One layer, one sample: x^2 d^2 has rank one, so both forms agree without damping."""
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    d = torch.tensor([[0.5, 3.0, 1.0]], dtype=torch.float64)
    taps = [Tap("0", x, d)]
    f = fisher.diagonal_moment(taps, [d])
    exact = fisher.diagonal_information(taps, [d], f, 0.0)
    torch.testing.assert_close(fisher.factored_information(taps, [d], 0.0), exact)
    torch.testing.assert_close(exact, torch.tensor([9.0], dtype=torch.float64))


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_factored_information_equals_its_definition(damping: float) -> None:
    """From per-sample gradients: F of each layer, bias row included, as row x column / total."""
    params, coords, targets = problem(2)
    g = fisher.scores(FIELD, params, coords, targets)
    squares = dict(
        zip(params, g.square().split([p.numel() for p in params.values()], 1), strict=True)
    )
    ridge = damping * g.square().mean()
    expected = torch.zeros(N, dtype=torch.float64)
    for layer in {name.partition(".")[0] for name in params}:
        weight = squares[f"{layer}.w"].reshape(N, *params[f"{layer}.w"].shape)
        layer_squares = torch.cat([weight, squares[f"{layer}.b"].unsqueeze(1)], 1)
        f = layer_squares.mean(0) + ridge
        rank_one = torch.outer(f.sum(1), f.sum(0)) / f.sum()
        expected += (layer_squares / rank_one).sum((1, 2))
    found = fisher.factored_information(*taps_of(params, coords, targets), damping)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [64, 200, 333, 1000])
def test_a_large_batchs_factors_are_those_of_some_of_its_samples(n: int) -> None:
    """Of every second to eighth, however many remain."""
    x, d = torch.randn(n, 5, generator=gen(1)), torch.randn(n, 4, generator=gen(2))
    step = max(1, min(fisher.COUNTED_OF, n // fisher.FEWEST_COUNTED))
    x1 = torch.cat([x, torch.ones(n, 1)], 1)
    squares = (x1.unsqueeze(-1) * d.unsqueeze(-2)).square()
    f = squares[::step].mean(0)
    f = f + 0.1 * f.mean()
    expected = (squares / (torch.outer(f.sum(1), f.sum(0)) / f.sum())).sum((1, 2))
    torch.testing.assert_close(fisher.factored_information([Tap("", x, x)], [d], 0.1), expected)
    rays = fisher.factored_information(
        [Tap("", x.repeat_interleave(2, 0), x)], [d.repeat_interleave(2, 0) / 2], 0.1, 2
    )
    torch.testing.assert_close(rays.argsort(), expected.argsort())


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("n", [50, 333])
def test_other_devices_compute_the_same_factored_information(damping: float, n: int) -> None:
    """Two modules; an input that is always zero carries no information, and no NaN."""
    shapes = ((5, 7), (7, 3))
    pairs = [
        (torch.randn(2, n, a, generator=gen(a)), torch.randn(2, n, b, generator=gen(b)))
        for a, b in shapes
    ]
    pairs[1][0][..., 2] = 0
    taps, strided = [Tap("", x, d) for x, d in pairs], [d.mT.contiguous().mT for _, d in pairs]
    compiled = fisher.factored_information(taps, strided, damping)
    assert torch.isfinite(compiled).all()
    torch.testing.assert_close(compiled, fisher._factored(pairs, damping))


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_factored_information_of_rays_equals_its_definition(damping: float) -> None:
    """From each ray's own summed gradient and F of the rows, for two modules at once."""
    rays, rows, total = 6, 4, 0
    shapes = ((5, 7), (7, 3))
    pairs = [
        tuple(torch.randn(2, rays * rows, n, generator=gen(n), dtype=torch.float64) for n in shape)
        for shape in shapes
    ]
    squares, moments = [], []
    for x, d in pairs:
        x, d = (v.reshape(2, rays, rows, -1) for v in (x, d))
        x = torch.cat([x, torch.ones(2, rays, rows, 1, dtype=torch.float64)], -1)
        squares.append((x.mT @ d).square())
        moments.append((x.unsqueeze(-1) * d.unsqueeze(-2)).square().sum((1, 2)) / rays)
        total += squares[-1][0, 0].numel()
    ridge = damping * sum(f.sum((-2, -1)) for f in moments) / total
    expected = torch.zeros(2, rays, dtype=torch.float64)
    for g, moment in zip(squares, moments, strict=True):
        f = moment + ridge.reshape(2, 1, 1)
        rank_one = f.sum(2, keepdim=True) * f.sum(1, keepdim=True) / f.sum((1, 2), keepdim=True)
        expected += (g / rank_one.unsqueeze(1)).sum((-2, -1))
    taps = [Tap("", x, x) for x, _ in pairs]
    found = fisher.factored_information(taps, [d for _, d in pairs], damping, rows)
    torch.testing.assert_close(found, expected)


def test_rays_of_one_row_are_points() -> None:
    pairs = [(torch.randn(9, 5, generator=gen(1)), torch.randn(9, 4, generator=gen(2)))]
    alone = [(x.unsqueeze(-2), d.unsqueeze(-2)) for x, d in pairs]
    torch.testing.assert_close(fisher._factored(alone, 0.1, 2), fisher._factored(pairs, 0.1))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_factored_information_ranks_samples_like_the_exact_one() -> None:
    taps, grads = taps_of(*problem(4))
    exact = fisher.diagonal_information(taps, grads, fisher.diagonal_moment(taps, grads), 1e-3)
    assert rank_correlation(exact, fisher.factored_information(taps, grads, 1e-3)) > 0.9


def test_factored_information_ranks_rays_like_the_exact_one() -> None:
    taps, grads = taps_of(*problem(4))
    exact = fisher.diagonal_information(
        taps, grads, fisher.diagonal_moment(taps, grads, 2), 1e-3, 2
    )
    assert rank_correlation(exact, fisher.factored_information(taps, grads, 1e-3, 2)) > 0.9


def test_weights_are_bounded_normalised_constant_and_ignore_scale() -> None:
    q = torch.rand(64, generator=gen(), dtype=torch.float64) ** 8
    q.requires_grad_()
    w = fisher.sample_weights(q, lam=0.5, cap=3.0)
    assert not w.requires_grad
    assert w.mean().item() == pytest.approx(1.0)
    assert w.min() >= 1 / 1.5 and w.max() <= 1 + 0.5 * 3
    torch.testing.assert_close(w, fisher.sample_weights(q * 1e6, 0.5, 3.0))
    torch.testing.assert_close(fisher.sample_weights(q, 0.0, 3.0), torch.ones(64).double())
    torch.testing.assert_close(fisher.sample_weights(0 * q, 1.0, 3.0), torch.ones(64).double())
    order = q.argsort()
    assert (w[order].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_devices_compute_the_same_weights(dtype: torch.dtype) -> None:
    q = torch.rand(3, 50, dtype=dtype) ** 8
    q[0, 4], q[1, 7], q[2] = float("inf"), float("nan"), 0
    compiled = fisher.sample_weights(q, 0.5, 3.0)
    torch.testing.assert_close(compiled, fisher._sample_weights(q, 0.5, 3.0))


def test_weights_by_hand() -> None:
    w = fisher.sample_weights(torch.tensor([1.0, 1.0, 10.0]), lam=1.0, cap=2.0)
    torch.testing.assert_close(w, torch.tensor([1.25, 1.25, 3.0]) * 3 / 5.5)


def test_one_per_cent_outliers_cannot_own_the_batch() -> None:
    q = torch.ones(1000)
    q[:10] = 1e9
    q[10] = float("inf")
    q[11] = float("nan")
    w = fisher.sample_weights(q, lam=1.0, cap=4.0)
    assert torch.isfinite(w).all()
    assert w[:10].sum() / w.sum() < 0.05


def test_gradncp_score_is_the_last_layers_gradient_norm() -> None:
    params, coords, targets = problem()
    taps, grads = taps_of(params, coords, targets)
    values = FIELD(params, coords)
    score = fisher.gradncp_score(values, targets, taps[-1].inputs)
    g = fisher.scores(FIELD, params, coords, targets)
    last = sum(params[n].numel() for n in ("2.w", "2.b"))
    torch.testing.assert_close(score, g[:, -last:].norm(dim=1))


def test_pruning_keeps_the_largest_and_shuffling_keeps_the_distribution() -> None:
    score = torch.tensor([0.1, 5.0, 3.0, 0.2])
    torch.testing.assert_close(fisher.pruning_weights(score, 0.5), torch.tensor([0.0, 2, 2, 0]))
    w = torch.rand(3, 50, generator=gen())
    mixed = fisher.shuffle(w, gen(1))
    torch.testing.assert_close(mixed.sort(-1).values, w.sort(-1).values)
    assert not torch.equal(mixed, w)


def test_running_mean_is_the_mean_of_all_moments() -> None:
    moments = [{"0.w": torch.rand(2, 2, generator=gen(i))} for i in range(5)]
    state = None
    for step, moment in enumerate(moments, start=1):
        state = fisher.running_mean(state, moment, step)
    assert state is not None
    torch.testing.assert_close(state["0.w"], torch.stack([m["0.w"] for m in moments]).mean(0))


def test_preconditioning_divides_by_the_damped_diagonal_of_each_module() -> None:
    single = {"0.w": torch.tensor([[1.0, 3.0]]), "0.b": torch.tensor([2.0, 2.0])}
    gradient = {"0.w": torch.ones(1, 2), "0.b": torch.ones(2)}
    out = fisher.precondition(gradient, single, damping=0.5)
    torch.testing.assert_close(out["0.w"], torch.tensor([[0.5, 0.25]]))
    both = fisher.precondition(replicate(gradient, 2), stack([single, single]), 0.5)
    torch.testing.assert_close(both["0.b"][1], out["0.b"])
