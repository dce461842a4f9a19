"""Fisher information of samples and the weights of the FIM loss (paper Eq. 2, 3; Alg. 1).

For the Gaussian likelihood p(s | s_hat) = N(s_hat, I) a sample's score is g = -d(|s_hat - s|^2 / 2)
/ d theta, F = E[g g^T] (empirical Fisher) and a sample's information is q = g^T F^-1 g. The
variance of the likelihood scales q by a constant that the division by the batch mean removes.

A linear layer y = x w + b gives g_w = x^T d and g_b = d with d = dL/dy, so that everything below
is built from x (`Tap.inputs`) and d layer by layer; no network-wide per-sample gradient is held.
A sample may own several consecutive rows (a ray's samples): its gradient is their sum, taken
before squaring. `rows` is the number of rows per sample, 1 for points.

Letters: N samples, P parameters, M optional leading module axis, S rows per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mclnf_edge.maths import factored, kernels
from mclnf_edge.maths.fields import Field, Params, Seen

Fisher = dict[str, Tensor]
"""Diagonal of F, keyed and shaped as the parameters (modules first)."""

FULL_PARAMETERS = 4096
"""The largest network whose whole F, P x P, is formed (0.1 GB in double precision)."""

COUNTED_OF, FEWEST_COUNTED = 8, 64
"""Factors of F are counted from one sample in so many, but from no fewer samples than these."""

RAYS_AT_ONCE = 64
"""Per-sample matrices of one layer that exist at the same time when `rows` > 1."""


def half_squared_error(values: Tensor, targets: Tensor) -> Tensor:
    """|s_hat - s|^2 / 2 per sample: (..., N, d) -> (..., N), the negative log-likelihood."""
    return 0.5 * torch.sum((values - targets) ** 2, dim=-1)


def scores(field: Field, params: Params, coords: Tensor, targets: Tensor) -> Tensor:
    """Per-sample scores g (N, P), by definition: for tiny networks and tests.

    P runs over `params` in their order, each flattened.
    """

    def log_likelihood(p: Params, x: Tensor, s: Tensor) -> Tensor:
        return torch.neg(half_squared_error(field(p, x.unsqueeze(0)), s.unsqueeze(0)).sum())

    per_sample = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))
    grads: Params = per_sample(params, coords, targets)
    return torch.cat([grads[name].flatten(1) for name in params], dim=1)


def sample_scores(taps: Sequence[Seen], grads: Sequence[Tensor], rows: int = 1) -> Tensor:
    """The same from the layers' inputs and gradients, up to the sign, (..., N, P).

    P runs over the layers, weights before biases.

    Raises:
        ValueError: more than `FULL_PARAMETERS` parameters.
    """
    sizes = [(t.inputs.shape[-1] + 1) * d.shape[-1] for t, d in zip(taps, grads, strict=True)]
    if sum(sizes) > FULL_PARAMETERS:
        raise ValueError(
            f"the full Fisher matrix is for at most {FULL_PARAMETERS} parameters, received "
            f'{sum(sizes)}; use "diagonal" or "factored"'
        )
    parts = []
    for tap, d in zip(taps, grads, strict=True):
        x, d = _per_sample(tap.inputs, rows), _per_sample(d, rows)
        parts += [(x.mT @ d).flatten(-2), d.sum(-2)]
    return torch.cat(parts, dim=-1)


def full_fisher(g: Tensor, damping: float = 0.0) -> Tensor:
    """Mean of g g^T over samples plus damping * trace/P * I: (..., N, P) -> (..., P, P)."""
    matrix = g.mT @ g / g.shape[-2]
    ridge = damping * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return matrix + ridge[..., None, None] * unit


def full_information(g: Tensor, matrix: Tensor) -> Tensor:
    """q = g^T F^-1 g per sample with the whole matrix: (..., N, P), (..., P, P) -> (..., N)."""
    return torch.sum(g * torch.linalg.solve(matrix, g.mT).mT, dim=-1)


def diagonal_moment(taps: Sequence[Seen], grads: Sequence[Tensor], rows: int = 1) -> Fisher:
    """Mean over samples of the squared per-sample gradient, exact, layer by layer.

    `grads` are dL/d(tap outputs) of the loss summed over samples. For points this is
    (x^2)^T (d^2) / N; for rays each ray's x^T d is formed, `RAYS_AT_ONCE` at a time.
    """
    moment: Fisher = {}
    for tap, d in zip(taps, grads, strict=True):
        x, d = _per_sample(tap.inputs, rows), _per_sample(d, rows)
        n = x.shape[-3]
        if rows == 1:
            x2, d2 = x.squeeze(-2).square(), d.squeeze(-2).square()
            moment[f"{tap.layer}.w"] = x2.mT @ d2 / n
            moment[f"{tap.layer}.b"] = d2.mean(-2)
            continue
        blocks = [g.square().sum(-3) for g in _ray_gradients(x, d)]
        moment[f"{tap.layer}.w"] = torch.stack(blocks).sum(0) / n
        moment[f"{tap.layer}.b"] = d.sum(-2).square().mean(-2)
    return moment


def diagonal_information(
    taps: Sequence[Seen], grads: Sequence[Tensor], fisher: Fisher, damping: float, rows: int = 1
) -> Tensor:
    """q = sum_p g_p^2 / (F_p + damping * mean F) per sample, exact: (..., N)."""
    inverse = inverse_diagonal(fisher, damping)
    parts = []
    for tap, d in zip(taps, grads, strict=True):
        f_w, f_b = inverse[f"{tap.layer}.w"], inverse[f"{tap.layer}.b"]
        x, d = _per_sample(tap.inputs, rows), _per_sample(d, rows)
        if rows == 1:
            x2, d2 = x.squeeze(-2).square(), d.squeeze(-2).square()
            parts.append(((x2 @ f_w) * d2).sum(-1) + (d2 * f_b.unsqueeze(-2)).sum(-1))
            continue
        blocks = [(g.square() * f_w.unsqueeze(-3)).sum((-2, -1)) for g in _ray_gradients(x, d)]
        bias = (d.sum(-2).square() * f_b.unsqueeze(-2)).sum(-1)
        parts.append(torch.cat(blocks, dim=-1) + bias)
    return torch.stack(parts).sum(0)


def factored_information(
    taps: Sequence[Seen], grads: Sequence[Tensor], damping: float, rows: int = 1
) -> Tensor:
    """q with each weight's F replaced by the rank-one row x column product, (..., N).

    F_jk ~ r_j c_k / sum(r) with r, c the row and column sums of the batch's diagonal F, a bias
    counting as the weight of a constant input. Costs O(d_in + d_out) per point, not their product:
    each layer's squares meet vectors only. For samples with several rows x^T d is not formed: the
    sum of its squares is one of (x_s . x_t)(d_s . d_t) over pairs of rows (Gram matrices), which
    keeps the cross terms of the scores. F's factors leave them out: they are sums over rows, which
    changes the weights' ranks by less than 0.005 and saves two thirds of the cost. Of a large batch
    the factors come from one sample in up to `COUNTED_OF` alone: they are means of many samples
    either way, and the weights' rank correlation to the exact ones' stays above 0.998.
    """
    pairs = [
        (tap.inputs, d) if rows == 1 else (_per_sample(tap.inputs, rows), _per_sample(d, rows))
        for tap, d in zip(taps, grads, strict=True)
    ]
    if pairs[0][0].device.type != "cpu":
        return _factored(pairs, damping, rows)
    if rows > 1:
        return _factored(pairs, damping, rows, factored.factors)
    return factored.information(pairs, damping, _one_in(pairs[0][0].shape[-2]))


def _one_in(samples: int) -> int:
    """One sample in how many F's factors are counted from."""
    return max(1, min(COUNTED_OF, samples // FEWEST_COUNTED))


def _factored(
    pairs: Sequence[tuple[Tensor, Tensor]],
    damping: float,
    rows: int = 1,
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """`factored_information` of layers' inputs and gradients on any device.

    They are (..., N, d), and (..., N, rows, d) where a sample owns several rows. `factors` stands
    in for `_factors`.
    """
    part, of = _part if rows == 1 else _part_of_rows, factors or _factors
    samples = pairs[0][0].shape[-2 if rows == 1 else -3]
    step = _one_in(samples)
    found = [of(*_every(step, x, d, rows)) for x, d in pairs]
    ins, outs = [r.shape[-1] for r, _ in found], [c.shape[-1] for _, c in found]
    totals = torch.stack([c.sum(-1) for _, c in found], -1)  # a layer's squared scores, summed
    sizes = torch.tensor([ins, outs], dtype=totals.dtype, device=totals.device)
    ridge = totals.sum(-1, keepdim=True) * (damping / (sizes[0] * sizes[1]).sum())
    scale = (totals + ridge * sizes[0] * sizes[1]) * -(-samples // step)
    tiny = torch.finfo(torch.float32).tiny
    rest = torch.cat([r for r, _ in found], -1) + _each(ridge * sizes[1], ins)
    below = torch.cat([c for _, c in found], -1) + _each(ridge * sizes[0], outs)
    row = torch.split(1 / rest.clamp(min=tiny), ins, dim=-1)
    column = torch.split(_each(scale, outs) / below.clamp(min=tiny), outs, dim=-1)
    parts = [part(x, d, r, c) for (x, d), r, c in zip(pairs, row, column, strict=True)]
    return torch.stack(parts).sum(0)


def _every(step: int, x: Tensor, d: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of one sample in `step`, (..., their rows, d)."""
    if rows == 1:
        return x[..., ::step, :], d[..., ::step, :]
    return x[..., ::step, :, :].flatten(-3, -2), d[..., ::step, :, :].flatten(-3, -2)


def _each(per_layer: Tensor, sizes: Sequence[int]) -> Tensor:
    """(..., layers) -> (..., sum of sizes): each layer's value as often as its size says."""
    repeats = torch.tensor(sizes, device=per_layer.device)
    return per_layer.repeat_interleave(repeats, dim=-1, output_size=sum(sizes))


def _factors(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums (..., d_in + 1), the bias last, and column sums (..., d_out) of squared scores.

    Summed over the samples.
    """
    x2, d2 = x.square(), d.square()
    d_norm = d2.sum(-1)
    row = torch.cat([_times(x2.mT, d_norm), d_norm.sum(-1, keepdim=True)], -1)
    return row, _times(d2.mT, x2.sum(-1) + 1)


def _part(x: Tensor, d: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """A layer's part of each point's information, (..., N)."""
    return (_times(x.square(), row[..., :-1]) + row[..., -1:]) * _times(d.square(), column)


def _part_of_rows(x: Tensor, d: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`_part` of samples that own several rows."""
    inputs = (x * _to_rows(row[..., :-1])) @ x.mT + _to_rows(row[..., -1:])
    return torch.sum(inputs * ((d * _to_rows(column)) @ d.mT), dim=(-2, -1))


def _to_rows(factor: Tensor) -> Tensor:
    """(..., d) -> (..., 1, 1, d)."""
    return factor.unsqueeze(-2).unsqueeze(-2)


def gradncp_score(values: Tensor, targets: Tensor, features: Tensor) -> Tensor:
    """Tack et al. 2023: norm of the last layer's gradient, |s_hat - s| * |[features, 1]|, (..., N).

    `features` (..., N, h) is the last layer's input.
    """
    error = torch.linalg.vector_norm(values - targets, dim=-1)
    return torch.mul(error, (features.square().sum(-1) + 1).sqrt())


def gradncp_score_of_rays(last: Seen, d: Tensor, rows: int) -> Tensor:
    """The same for samples that own `rows` rows of the last layer, `d` (..., N rows, d_out)."""
    x, d = _per_sample(last.inputs, rows), _per_sample(d, rows)
    squares = torch.cat([g.square().sum((-2, -1)) for g in _ray_gradients(x, d)], dim=-1)
    return (squares + d.sum(-2).square().sum(-1)).sqrt()


def inverse_diagonal(fisher: Fisher, damping: float) -> Fisher:
    """1 / (F + damping * mean F), the mean over all of a module's parameters."""
    ridge = damping * _module_mean(fisher)
    tiny = torch.finfo(ridge.dtype).tiny
    return {name: 1 / (f + _like(ridge, f, name) + tiny) for name, f in fisher.items()}


def running_mean(fisher: Fisher | None, moment: Fisher, step: int) -> Fisher:
    """Mean of the moments of steps 1..`step`; None starts a task (Alg. 1, lines 8 and 16)."""
    if fisher is None:
        return moment
    return {name: f + (moment[name] - f) / step for name, f in fisher.items()}


def sample_weights(q: Tensor, lam: float, cap: float) -> Tensor:
    """Eq. 3 made scale-free: w = 1 + lam * min(q / mean q, cap), then divided by its mean.

    Over the last axis (samples); constant for the gradient. All ones where q is all zero, and 1 for
    a sample whose q is not finite. Bounds: 1/(1 + lam) <= w <= 1 + lam*cap.
    """
    if q.device.type == "cpu":
        rows = q.detach().contiguous().view(-1, q.shape[-1]).numpy()
        return torch.from_numpy(kernels.weights(rows, lam, cap)).view(q.shape)
    return _sample_weights(q, lam, cap)


def _sample_weights(q: Tensor, lam: float, cap: float) -> Tensor:
    """`sample_weights` on any device."""
    finite = torch.isfinite(q)
    q = torch.where(finite, q, 0).detach()
    mean = q.sum(-1, keepdim=True) / finite.sum(-1, keepdim=True).clamp(min=1)
    w = (q * (lam / mean.clamp(min=torch.finfo(q.dtype).tiny))).clamp(max=lam * cap) + 1
    return w / w.mean(-1, keepdim=True)


def pruning_weights(score: Tensor, keep: float) -> Tensor:
    """GradNCP's context pruning: the `keep` share of samples with the largest score, mean 1."""
    n = score.shape[-1]
    kept = max(1, round(keep * n))
    chosen = score.detach().topk(kept, dim=-1).indices
    return torch.zeros_like(score).detach().scatter(-1, chosen, n / kept)


def shuffle(w: Tensor, generator: torch.Generator) -> Tensor:
    """The same weights on other samples of the batch: the control that keeps the distribution."""
    order = torch.rand(w.shape, generator=generator, device=generator.device).argsort(-1)
    return w.gather(-1, order.to(w.device))


def precondition(gradient: Params, fisher: Fisher, damping: float) -> Params:
    """F^-1 grad with the damped diagonal: the direction of FIM-SGD (Eq. 12)."""
    inverse = inverse_diagonal(fisher, damping)
    return {name: g * inverse[name] if name in inverse else g for name, g in gradient.items()}


def kl_gaussian(values: Tensor, others: Tensor) -> Tensor:
    """KL between unit-variance Gaussians around two outputs, summed over samples."""
    return half_squared_error(values, others).sum()


def _per_sample(x: Tensor, rows: int) -> Tensor:
    """(..., N rows, d) -> (..., N, rows, d)."""
    return x.reshape(*x.shape[:-2], -1, rows, x.shape[-1])


def _ray_gradients(x: Tensor, d: Tensor) -> Iterator[Tensor]:
    """x^T d of each sample, (..., block, d_in, d_out), a block of samples at a time."""
    blocks = zip(
        torch.split(x, RAYS_AT_ONCE, dim=-3), torch.split(d, RAYS_AT_ONCE, dim=-3), strict=True
    )
    return (a.mT @ b for a, b in blocks)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(..., n, m), (..., m) -> (..., n)."""
    if matrix.ndim == 2:
        return torch.mv(matrix, vector)
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _module_mean(fisher: Mapping[str, Tensor]) -> Tensor:
    """Mean over all parameters, () or (M,) with a module axis."""
    flat = [f.flatten(-2 if name.endswith(".w") else -1) for name, f in fisher.items()]
    return torch.cat(flat, dim=-1).mean(-1)


def _like(per_module: Tensor, parameter: Tensor, name: str) -> Tensor:
    """() or (M,) shaped to broadcast against a parameter."""
    axes = 2 if name.endswith(".w") else 1
    return per_module.reshape(*per_module.shape, *[1] * axes)
