"""The inner loop: Fisher-weighted steps on one task (Alg. 1, lines 9-17).

The same functions adapt modules on the device and inside meta-training: state is an argument and a
result, and with `create_graph` the new parameters stay differentiable in the old ones and in the
rates (second-order MAML). One backward pass to the layer outputs gives both the sample weights and
the weighted gradient, x^T (w d) per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mclnf_edge.maths import fisher as fi
from mclnf_edge.maths import kernels, passes
from mclnf_edge.maths.fields import Field, Params, Seen, Tap

Weighting = Literal[
    "none", "full", "diagonal", "factored", "shuffled", "residual", "gradncp", "pruned"
]
Stepping = Literal["sgd", "fim-sgd", "adam"]

Rates = float | Mapping[str, Tensor]
"""One step size, or one per parameter with a leading axis of steps: (K, ...) broadcast against the
parameter after indexing the step; steps beyond K use the last (Meta-SGD: K = 1; MAML++: (K, 1))."""

Penalty = Callable[[Params], Tensor]
"""A scalar added to the loss, such as EWC's."""

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class Rule:
    """How samples are weighted and parameters moved.

    `weighting`: the FIM loss with the whole F of each batch ("full", tiny networks), the running
    exact diagonal ("diagonal") or the cheap form of that ("factored"); controls: "shuffled" (the
    diagonal's weights on other samples), "residual" (q = squared error), "gradncp" (q = GradNCP's
    squared score); "pruned" keeps the `keep` share with the largest GradNCP score. `lam`, `cap`:
    see `fisher.sample_weights`. `damping` is relative to mean F. `trainable`: the layers that move
    (OML: the top ones), None for all.
    """

    weighting: Weighting = "none"
    stepping: Stepping = "sgd"
    lam: float = 0.1
    cap: float = 10.0
    damping: float = 0.1
    keep: float = 0.5
    trainable: frozenset[str] | None = None

    def moves(self, layer: str) -> bool:
        """Whether this layer's parameters change."""
        return self.trainable is None or layer in self.trainable


class State(NamedTuple):
    """What a task carries between steps: steps done, running diagonal F, Adam's moments."""

    step: int = 0
    fisher: fi.Fisher | None = None
    first: Params | None = None
    second: Params | None = None


class Stats(NamedTuple):
    """Of one step, before it: mean squared error per module (...,), sample weights (..., N)."""

    loss: Tensor
    weights: Tensor


def inner_step(
    field: Field,
    params: Params,
    state: State,
    batch: tuple[Tensor, Tensor],
    rates: Rates,
    rule: Rule,
    *,
    rows: int = 1,
    create_graph: bool = False,
    penalty: Penalty | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Params, State, Stats]:
    """One step of theta on mean_i w_i |s_hat_i - s_i|^2 (+ penalty).

    Args:
        field: the field family.
        params: parameters of one module, or stacked ones.
        state: this task's state; `State()` at its start.
        batch: coordinates (..., N, d_in) and targets (..., N, d_out).
        rates: step sizes.
        rule: weighting and stepping.
        rows: rows of the field's layers per sample (a ray's samples).
        create_graph: keep the result differentiable in `params` and `rates`.
        penalty: added to every module's loss.
        generator: randomness of the shuffled control.

    Returns:
        New parameters, state and the step's statistics.
    """
    if not create_graph:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
    coords, targets = batch
    direct = None if create_graph or rows > 1 else passes.network(field, params, batch)
    if direct is not None:
        values, seen, d = passes.backward(direct, params, coords, targets)
    else:
        values, seen, d = _backward(field, params, batch, rule, create_graph)
    features = seen[-1].inputs
    moving = [i for i, layer in enumerate(seen) if rule.moves(layer.layer)]
    seen, d = [seen[i] for i in moving], [d[i] for i in moving]
    memory = _remember(seen, d, state, rule, rows)
    weights = _weights(seen, d, values, targets, features, memory, rule, rows, generator)
    scale = weights * (2 / weights.shape[-1])
    if direct is not None:
        gradient = passes.weighted_gradient(seen, d, scale)
    else:
        with torch.set_grad_enabled(create_graph):  # else the state would keep every step's graph
            gradient = _weighted_gradient(seen, d, scale, rows)
    if penalty is not None:
        gradient = _add_penalty(gradient, params, penalty, create_graph)
    state = state._replace(step=state.step + 1, fisher=memory)
    with torch.set_grad_enabled(create_graph):
        moved, state = _move(params, gradient, state, rates, rule)
    if not create_graph:
        moved = {name: p.detach() for name, p in moved.items()}
    loss = 2 * fi.half_squared_error(values.detach(), targets).mean(-1)
    return moved, state, Stats(loss, weights)


def adapt(
    field: Field,
    params: Params,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Rates,
    rule: Rule,
    *,
    rows: int = 1,
    create_graph: bool = False,
    penalty: Penalty | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Params, State, Stats | None]:
    """`inner_step` over the batches of one task, from a fresh state; None for no batch at all."""
    state, stats = State(), None
    for batch in batches:
        params, state, stats = inner_step(
            field,
            params,
            state,
            batch,
            rates,
            rule,
            rows=rows,
            create_graph=create_graph,
            penalty=penalty,
            generator=generator,
        )
    return params, state, stats


def weighted_loss(
    field: Field,
    params: Params,
    batch: tuple[Tensor, Tensor],
    rule: Rule,
    *,
    rows: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean_i w_i |s_hat_i - s_i|^2 per module (...,), differentiable in `params`, w constant.

    The outer loop's loss (Alg. 1, line 23); F is that of this batch.
    """
    taps: list[Tap] = []
    values = field(params, batch[0], taps)
    half = fi.half_squared_error(values, batch[1])
    if rule.weighting == "none":
        return 2 * half.mean(-1)
    d = torch.autograd.grad(half.sum(), [t.outputs for t in taps], retain_graph=True)
    memory = _remember(taps, d, State(), rule, rows)
    features = taps[-1].inputs
    weights = _weights(taps, d, values, batch[1], features, memory, rule, rows, generator)
    return 2 * (weights * half).mean(-1)


def rate_at(rates: Rates, name: str, step: int) -> float | Tensor:
    """Step size of parameter `name` at step number `step`, from 0."""
    if isinstance(rates, float | int):
        return rates
    own = rates[name]
    return own[min(step, len(own) - 1)]


def _backward(
    field: Field, params: Params, batch: tuple[Tensor, Tensor], rule: Rule, create_graph: bool
) -> tuple[Tensor, list[Seen], list[Tensor]]:
    """Values, taps of the layers and the half squared error's gradient at their outputs."""
    taps: list[Tap] = []
    values = field(params, batch[0], taps)
    half = fi.half_squared_error(values, batch[1])
    outputs = [t.outputs for t in taps]
    d = torch.autograd.grad(half.sum(), outputs, create_graph=create_graph, retain_graph=True)
    return values, list(taps), list(d)


def _needs_fisher(rule: Rule) -> bool:
    return rule.weighting in ("diagonal", "shuffled") or rule.stepping == "fim-sgd"


def _remember(
    seen: Sequence[Seen], d: Sequence[Tensor], state: State, rule: Rule, rows: int
) -> fi.Fisher | None:
    """The running F including this batch; no gradient flows through it."""
    if not _needs_fisher(rule):
        return state.fisher
    with torch.no_grad():
        moment = fi.diagonal_moment(seen, d, rows)
        return fi.running_mean(state.fisher, moment, state.step + 1)


def _weights(
    seen: Sequence[Seen],
    d: Sequence[Tensor],
    values: Tensor,
    targets: Tensor,
    features: Tensor,
    memory: fi.Fisher | None,
    rule: Rule,
    rows: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Constant sample weights with mean 1 of the batch, (..., N)."""
    with torch.no_grad():
        if rule.weighting == "none":
            return torch.ones_like(values[..., 0])
        if rule.weighting in ("pruned", "gradncp"):
            if rows == 1:
                score = fi.gradncp_score(values, targets, features)
            else:
                score = fi.gradncp_score_of_rays(seen[-1], d[-1], rows)
        if rule.weighting == "pruned":
            return fi.pruning_weights(score, rule.keep)
        if rule.weighting == "residual":
            q = fi.half_squared_error(values, targets)
        elif rule.weighting == "gradncp":
            q = score.square()
        elif rule.weighting == "full":
            g = fi.sample_scores(seen, d, rows)
            q = fi.full_information(g, fi.full_fisher(g, rule.damping))
        elif rule.weighting == "factored":
            q = fi.factored_information(seen, d, rule.damping, rows)
        else:
            assert memory is not None
            q = fi.diagonal_information(seen, d, memory, rule.damping, rows)
        weights = fi.sample_weights(q, rule.lam, rule.cap)
        if rule.weighting != "shuffled":
            return weights
        if generator is None:
            raise ValueError("the shuffled control needs a generator")
        return fi.shuffle(weights, generator)


def _weighted_gradient(
    seen: Sequence[Seen], d: Sequence[Tensor], scale: Tensor, rows: int
) -> Params:
    """sum_i scale_i * (gradient of sample i) for every layer; `scale` (..., N)."""
    per_row = scale.repeat_interleave(rows, dim=-1).unsqueeze(-1)
    gradient: Params = {}
    for tap, d_layer in zip(seen, d, strict=True):
        scaled = d_layer * per_row
        gradient[f"{tap.layer}.w"] = tap.inputs.mT @ scaled
        gradient[f"{tap.layer}.b"] = scaled.sum(-2)
    return gradient


def _add_penalty(gradient: Params, params: Params, penalty: Penalty, create_graph: bool) -> Params:
    names = list(gradient)
    extra = torch.autograd.grad(
        penalty(params), [params[n] for n in names], create_graph=create_graph, allow_unused=True
    )
    return {
        n: gradient[n] if e is None else gradient[n] + e for n, e in zip(names, extra, strict=True)
    }


def _move(
    params: Params, gradient: Params, state: State, rates: Rates, rule: Rule
) -> tuple[Params, State]:
    """theta - rate * direction for the parameters that have a gradient."""
    if rule.stepping == "fim-sgd":
        assert state.fisher is not None
        gradient = fi.precondition(gradient, state.fisher, rule.damping)
    elif rule.stepping == "adam":
        gradient, state = _adam(gradient, state)
    moved = dict(params)
    for name, g in gradient.items():
        rate = rate_at(rates, name, state.step - 1)
        if isinstance(rate, Tensor):
            moved[name] = params[name] - rate * g
        else:  # one pass instead of two
            moved[name] = torch.sub(params[name], g, alpha=rate)
    return moved, state


def _adam(gradient: Params, state: State) -> tuple[Params, State]:
    """Bias-corrected direction of Kingma and Ba 2015; `state.step` counts this step already."""
    b1, b2 = ADAM_BETAS
    c1, c2 = 1 - b1**state.step, 1 - b2**state.step
    on_cpu = all(g.device.type == "cpu" for g in gradient.values())
    if on_cpu and not torch.is_grad_enabled():
        first, second = (
            {n: g * 0 if old is None else old[n].clone() for n, g in gradient.items()}
            for old in (state.first, state.second)
        )
        for name, g in gradient.items():  # becomes the direction
            arrays = (x.view(-1).numpy() for x in (g, first[name], second[name]))
            kernels.adam(*arrays, ADAM_BETAS, (1 / c1, 1 / c2), ADAM_EPSILON)
        return gradient, state._replace(first=first, second=second)
    first = {n: (1 - b1) * g for n, g in gradient.items()}
    second = {n: (1 - b2) * g * g for n, g in gradient.items()}
    if state.first is not None and state.second is not None:
        first = {n: b1 * state.first[n] + g for n, g in first.items()}
        second = {n: b2 * state.second[n] + g for n, g in second.items()}
    direction = {n: (first[n] / c1) / ((second[n] / c2).sqrt() + ADAM_EPSILON) for n in gradient}
    return direction, state._replace(first=first, second=second)
