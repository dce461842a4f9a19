"""The inner step against autograd, torch.optim and finite differences in float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mclnf_edge.maths import fisher
from mclnf_edge.maths.adaptation import Rule, State, Weighting, adapt, inner_step
from mclnf_edge.maths.adaptation import weighted_loss as outer_loss
from mclnf_edge.maths.fields import Params, Siren, stack, unstack

FIELD = Siren(2, 3, width=6, layers=3, omega=4.0)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(seed: int = 0) -> Params:
    return FIELD.init(gen(seed), torch.float64)


def batch(seed: int = 0, n: int = 16) -> tuple[Tensor, Tensor]:
    g = gen(100 + seed)
    coords = torch.rand(n, 2, generator=g, dtype=torch.float64) * 2 - 1
    return coords, torch.rand(n, 3, generator=g, dtype=torch.float64)


def weighted_loss(params: Params, data: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    return (weights * (FIELD(params, data[0]) - data[1]).square().sum(-1)).mean()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_step_is_the_gradient_of_the_weighted_loss(weighting: Weighting) -> None:
    params, data = start(), batch()
    rule = Rule(weighting, lam=0.7, cap=3.0)
    moved, _, stats = inner_step(FIELD, params, State(), data, 0.05, rule, generator=gen(5))
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    weighted_loss(leaves, data, stats.weights).backward()
    for name in params:
        torch.testing.assert_close(moved[name] - params[name], -0.05 * leaves[name].grad)
    assert stats.weights.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(
        stats.loss, weighted_loss(params, data, torch.ones(16, dtype=torch.float64))
    )
    assert (weighting == "none") == bool((stats.weights == 1).all())


def test_rays_share_one_weight_and_one_gradient() -> None:
    """A field that averages four rows into a sample, as a renderer sums along a ray."""

    class Ray:
        def init(self, *args: Any) -> Params:
            return FIELD.init(*args)

        def __call__(self, params: Params, coords: Tensor, taps: Any = None) -> Tensor:
            rows = FIELD(params, coords.flatten(0, 1), taps)
            return rows.view(*coords.shape[:2], 3).mean(1)

    params, (coords, targets) = start(), batch(n=24)
    rays, goal = coords.view(6, 4, 2), targets[:6]
    rule = Rule("diagonal", lam=0.7, cap=3.0)
    moved, _, stats = inner_step(Ray(), params, State(), (rays, goal), 0.1, rule, rows=4)
    assert stats.weights.shape == (6,)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    (stats.weights * (Ray()(leaves, rays) - goal).square().sum(-1)).mean().backward()
    for name in params:
        torch.testing.assert_close(moved[name] - params[name], -0.1 * leaves[name].grad)
    scores = fisher.scores(Ray(), params, rays, goal)
    f = scores.square().mean(0)
    q = (scores.square() / (f + 0.1 * f.mean())).sum(1)
    torch.testing.assert_close(stats.weights, fisher.sample_weights(q, 0.7, 3.0))


@pytest.mark.parametrize("weighting", ["none", "full", "diagonal", "factored"])
def test_stacked_modules_adapt_as_single_ones(weighting: Weighting) -> None:
    rule = Rule(weighting, lam=0.5)
    starts, data = [start(i) for i in range(3)], [batch(i) for i in range(3)]
    together = (torch.stack([x for x, _ in data]), torch.stack([s for _, s in data]))
    stacked, _, _ = adapt(FIELD, stack(starts), [together] * 4, 0.05, rule)
    for got, p, own in zip(unstack(stacked), starts, data, strict=True):
        expected, _, _ = adapt(FIELD, p, [own] * 4, 0.05, rule)
        for name in p:
            torch.testing.assert_close(got[name], expected[name])


def test_fisher_is_the_running_mean_over_the_steps_of_a_task() -> None:
    params, state, moments = start(), State(), []
    for k in range(3):
        data = batch(k)
        moments.append(fisher.scores(FIELD, params, *data).square().mean(0))
        params, state, _ = inner_step(FIELD, params, state, data, 0.05, Rule("diagonal"))
    assert state.fisher is not None and state.step == 3
    flat = torch.cat([state.fisher[n].flatten() for n in params])
    torch.testing.assert_close(flat, torch.stack(moments).mean(0))


def test_frozen_layers_stay_and_the_top_moves_as_if_alone() -> None:
    params, data = start(), batch()
    moved, _, _ = adapt(FIELD, params, [data] * 3, 0.1, Rule(trainable=frozenset({"2"})))
    for name in params:
        assert torch.equal(moved[name], params[name]) == (not name.startswith("2"))
    one, _, _ = adapt(FIELD, params, [data], 0.1, Rule(trainable=frozenset({"2"})))
    full, _, _ = adapt(FIELD, params, [data], 0.1, Rule())
    torch.testing.assert_close(one["2.w"], full["2.w"])


def test_adam_equals_torch_optim() -> None:
    params = start()
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=1e-2)
    for k in range(5):
        optimizer.zero_grad()
        weighted_loss(leaves, batch(k), torch.ones(16, dtype=torch.float64)).backward()
        optimizer.step()
    got, _, _ = adapt(FIELD, params, [batch(k) for k in range(5)], 1e-2, Rule(stepping="adam"))
    for name in params:
        torch.testing.assert_close(got[name], leaves[name].detach())
        assert not torch.equal(got[name], params[name])


@pytest.mark.parametrize("stepping", ["sgd", "adam", "fim-sgd"])
def test_state_of_a_task_keeps_no_graph(stepping: Any) -> None:
    """Otherwise a long adaptation holds every step's activations."""
    params, state, _ = inner_step(
        FIELD, start(), State(), batch(), 0.01, Rule("diagonal", stepping=stepping)
    )
    kept = [params, *(held for held in (state.fisher, state.first, state.second) if held)]
    assert not any(t.requires_grad for held in kept for t in held.values())


def test_fim_sgd_is_equation_12_with_the_damped_diagonal() -> None:
    params, data = start(), batch()
    moved, _, _ = adapt(FIELD, params, [data], 1e-3, Rule(stepping="fim-sgd", damping=0.2))
    plain, _, _ = adapt(FIELD, params, [data], 1.0, Rule())
    f = fisher.scores(FIELD, params, *data).square().mean(0)
    scale = 1e-3 / (f + 0.2 * f.mean())
    gradient = torch.cat([(params[n] - plain[n]).flatten() for n in params])
    got = torch.cat([(params[n] - moved[n]).flatten() for n in params])
    torch.testing.assert_close(got, scale * gradient)


def test_penalty_joins_the_gradient() -> None:
    params, data = start(), batch()
    anchor = start(7)

    def penalty(p: Params) -> Tensor:
        return sum(((p[n] - anchor[n]) ** 2).sum() for n in p) * torch.tensor(0.5)

    plain, _, _ = adapt(FIELD, params, [data], 0.1, Rule())
    pulled, _, _ = adapt(FIELD, params, [data], 0.1, Rule(), penalty=penalty)
    for n in params:
        torch.testing.assert_close(pulled[n] - plain[n], -0.1 * (params[n] - anchor[n]))


@pytest.mark.parametrize("stepping", ["sgd", "adam"])
def test_meta_gradient_of_three_steps_by_finite_differences(stepping: Any) -> None:
    """At lambda = 0: derivative of the loss after three steps in start and rate."""
    data, query = [batch(k) for k in range(3)], batch(9)
    ones = torch.ones(16, dtype=torch.float64)
    params = {k: p.requires_grad_() for k, p in start().items()}
    rates = {n: torch.full((1, 1), 0.02, dtype=torch.float64) for n in params}
    for r in rates.values():
        r.requires_grad_()
    rule = Rule(stepping=stepping)

    def after(p: Params, r: dict[str, Tensor], graph: bool) -> Tensor:
        moved, _, _ = adapt(FIELD, p, data, r, rule, create_graph=graph)
        return weighted_loss(moved, query, ones)

    names = list(params)
    grads = torch.autograd.grad(after(params, rates, True), [*params.values(), rates["1.w"]])
    for n, g in [*zip(names, grads[:-1], strict=True), ("rate", grads[-1])]:
        ends = []
        for eps in (1e-6, -1e-6):
            p = {k: v.detach().clone() for k, v in params.items()}
            r = {k: v.detach().clone() for k, v in rates.items()}
            (r["1.w"] if n == "rate" else p[n]).view(-1)[0] += eps
            ends.append(after(p, r, False).item())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(g.flatten()[0].item(), rel=2e-4)


def test_meta_gradient_with_weights_and_fisher_held_fixed_by_finite_differences() -> None:
    """With lambda > 0 the weights are constants: replay them and differentiate the rest."""
    data, query, rate = [batch(k) for k in range(3)], batch(9), 0.02
    ones = torch.ones(16, dtype=torch.float64)
    params = {k: p.requires_grad_() for k, p in start().items()}
    moved, state, recorded = params, State(), []
    for d in data:
        moved, state, stats = inner_step(
            FIELD, moved, state, d, rate, Rule("diagonal", lam=0.8), create_graph=True
        )
        recorded.append(stats.weights)
    grads = torch.autograd.grad(weighted_loss(moved, query, ones), list(params.values()))

    def replay(p: Params) -> float:
        for d, w in zip(data, recorded, strict=True):
            leaves = {k: v.detach().requires_grad_() for k, v in p.items()}
            g = torch.autograd.grad(weighted_loss(leaves, d, w), list(leaves.values()))
            p = {k: v - rate * x for (k, v), x in zip(leaves.items(), g, strict=True)}
        return weighted_loss(p, query, ones).item()

    for n, g in zip(params, grads, strict=True):
        ends = []
        for eps in (1e-6, -1e-6):
            p = {k: v.detach().clone() for k, v in params.items()}
            p[n].view(-1)[1] += eps
            ends.append(replay(p))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(g.flatten()[1].item(), rel=1e-4)


def test_rates_per_step_use_the_last_beyond_their_number() -> None:
    params, data = start(), batch()
    rates = {n: torch.tensor([[0.1], [0.0]], dtype=torch.float64) for n in params}
    once, _, _ = adapt(FIELD, params, [data], 0.1, Rule())
    thrice, _, _ = adapt(FIELD, params, [data] * 3, rates, Rule())
    for n in params:
        torch.testing.assert_close(thrice[n], once[n])


def test_shuffled_control_without_randomness_is_refused() -> None:
    with pytest.raises(ValueError, match="generator"):
        adapt(FIELD, start(), [batch()], 0.1, Rule("shuffled"))


def test_weighted_loss_is_what_one_step_descends() -> None:
    params, data = start(), batch()
    rule = Rule("diagonal", lam=0.6, cap=4.0)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    outer_loss(FIELD, leaves, data, rule).backward()
    moved, _, _ = inner_step(FIELD, params, State(), data, 0.1, rule)
    for name in params:
        torch.testing.assert_close(moved[name] - params[name], -0.1 * leaves[name].grad)
    plain = outer_loss(FIELD, params, data, Rule())
    torch.testing.assert_close(plain, weighted_loss(params, data, torch.ones(16).double()))
