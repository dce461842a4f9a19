"""Gradient of an episode's query loss in the shared start, through the method's own inner loop.

The inner loop is `Method.learn`, the one that is evaluated later. "second" differentiates through
the whole sequence of steps (MAML; for the sequential methods through all tasks), "first" takes the
gradient at the adapted parameters (first-order MAML), "reptile" the difference start - adapted
(Nichol et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mclnf_edge.maths.adaptation import Rates, weighted_loss
from mclnf_edge.maths.fields import Params
from meta_trainer.config import Learned, Order
from meta_trainer.episodes import Episode
from meta_trainer.methods.base import Batch, Learning, Method, flat, pick
from meta_trainer.methods.modular import stages


class MetaGradient(NamedTuple):
    """Query loss (), gradient per start parameter, and per learned rate."""

    loss: Tensor
    start: Params
    rates: Params


def meta_gradient(
    method: Method,
    start: Params,
    rates: Rates,
    episode: Episode,
    how: Learning,
    steps: int,
    query: int,
    order: Order,
    generator: torch.Generator,
) -> MetaGradient:
    """One episode's part of Eq. 1 or 2.

    Args:
        method: whose inner loop is differentiated.
        start: shared parameters.
        rates: step sizes; tensors among them get a gradient when `order` is "second".
        episode: the signal.
        how: field, sample weighting and batch of the inner loop.
        steps: inner steps per task.
        query: samples per task in the query loss, 0 for all.
        order: which meta-gradient.
        generator: batches.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in start.items()}
    learned = isinstance(rates, Mapping) and order == "second"
    rate_leaves: Params = {}
    if isinstance(rates, Mapping):
        rate_leaves = {n: r.detach().requires_grad_(learned) for n, r in rates.items()}
    how = replace(how, rates=rate_leaves or rates)
    graph = order == "second"
    (adapted,) = method.learn(leaves, episode, [steps], how, generator, create_graph=graph)
    if not graph:
        adapted = {name: p.detach().requires_grad_() for name, p in adapted.items()}
    data = query_batch(method, episode, query, generator)
    loss = weighted_loss(
        how.field, adapted, data, how.rule, rows=how.rows, generator=generator
    ).mean()
    if graph:
        wanted = [*leaves.values(), *rate_leaves.values()]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)
        ]
        return MetaGradient(
            loss.detach(),
            dict(zip(leaves, filled, strict=False)),
            dict(zip(rate_leaves, filled[len(leaves) :], strict=True)),
        )
    return MetaGradient(loss.detach(), _at_adapted(method, start, adapted, loss, order), {})


def query_batch(method: Method, episode: Episode, query: int, generator: torch.Generator) -> Batch:
    """`query` samples per task: stacked by module, or all tasks together for one network."""
    if not method.modules:
        return pick(*flat(episode), query * episode.tasks, generator)
    coords = stages(episode.coords, method.modules).transpose(0, 1).flatten(1, 2)
    values = stages(episode.values, method.modules).transpose(0, 1).flatten(1, 2)
    return pick(coords, values, query * episode.tasks // method.modules, generator)


def initial_rates(learned: Learned, start: Params, rate: float, steps: int) -> Rates:
    """The inner step sizes a run begins with, all equal to `rate`."""
    if learned == "meta-sgd":
        return {n: torch.full((1, *p.shape), rate) for n, p in start.items()}
    if learned == "per-step":
        return {n: torch.full((steps, *[1] * p.ndim), rate) for n, p in start.items()}
    return rate


def _at_adapted(
    method: Method, start: Params, adapted: Params, loss: Tensor, order: Order
) -> Params:
    """First-order and Reptile gradients; modules share the start, so theirs are summed or averaged.

    The loss is a mean over modules: its gradients per module add up, Reptile's differences do not.
    """
    if order == "reptile":
        ends = {n: p.detach().mean(0) if method.modules else p.detach() for n, p in adapted.items()}
        return {n: start[n].detach() - ends[n] for n in start}
    grads = torch.autograd.grad(loss, list(adapted.values()))
    named = dict(zip(adapted, grads, strict=True))
    return {n: g.sum(0) if method.modules else g for n, g in named.items()}
