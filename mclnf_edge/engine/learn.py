"""Parameter updates of the fast field: Fisher-preconditioned texels, Adam for the small MLP."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import float32, njit

from mclnf_edge.engine.field import CHANNELS, HIDDEN, JIT
from mclnf_edge.engine.volume import Tape

FISHER_SIZE = (HIDDEN + 1) * 4
"""Entries of the output layer's Fisher diagonal that weigh a ray."""

F32 = npt.NDArray[np.float32]


@njit(**JIT)
def merge(queue, n, touched, grad, other_queue, m, other_touched, other_grad):
    """Add a second thread's texel gradients to the first's, leave them zero; the queue's length."""
    for i in range(m):
        k = other_queue[i]
        other_touched[k] = 0
        if touched[k] == 0:
            touched[k] = 1
            queue[n] = k
            n += 1
        for c in range(k * CHANNELS, (k + 1) * CHANNELS):
            grad[c] += other_grad[c]
            other_grad[c] = float32(0)
    return n


@njit(**JIT)
def step_texels(
    queue, n, touched, grad, owned, features, fisher, count, planes, rate, damping, sums
):
    """theta -= rate * g / sqrt(F + damping) for every queued texel; F += g^2 first.

    F is each texel's own empirical Fisher diagonal, `damping` (planes,) the plane's mean of it over
    one visit: Eq. 12's preconditioned step with F^(-1/2) in place of F^(-1). A texel seen for the
    first time moves in proportion to its gradient, one seen often settles; the sign-like first step
    of Adam was 1.4 dB worse here. `sums` (planes, 2) gathers g^2 and the number of entries.
    """
    last = planes.shape[0] - 1
    for i in range(n):
        k = queue[i]
        touched[k] = 0
        row = (k * CHANNELS) // count
        at = k * CHANNELS - row * count
        p = last
        while planes[p, 4] > at:
            p -= 1
        to = owned[row] * count + at
        for c in range(CHANNELS):
            g = grad[k * CHANNELS + c]
            grad[k * CHANNELS + c] = float32(0)
            f = fisher[k * CHANNELS + c] + g * g
            fisher[k * CHANNELS + c] = f
            sums[p, 0] += g * g
            features[to + c] -= rate * g / math.sqrt(f + damping[p])
        sums[p, 1] += CHANNELS


def adam(
    w: F32,
    g: F32,
    m: F32,
    v: F32,
    steps: F32,
    rate: float,
    decay: tuple[float, float] = (0.9, 0.99),
) -> F32:
    """Adam's new parameters (modules, n); `m`, `v` are updated, `steps` (modules,) counts from 1.

    A module without gradient in this batch stays where it is.
    """
    a, b = decay
    live = np.any(g != 0, axis=1)
    steps[live] += 1
    m[live] += (1 - a) * (g[live] - m[live])
    v[live] += (1 - b) * (g[live] ** 2 - v[live])
    t = steps[live, None]
    new: F32 = w.copy()
    new[live] -= rate * (m[live] / (1 - a**t)) / (np.sqrt(v[live] / (1 - b**t)) + 1e-12)
    return new


def ray_weights(q: F32, strength: float, clamp: float) -> F32:
    """w = 1 + strength * min(q / mean(q), clamp), divided by its mean (Eq. 3, Algorithm 1 line 13).

    The division keeps the learning rate where it was, whatever `strength` is. Both means are over
    rays with a positive score; a ray whose score is not finite has weight 1.
    """
    finite = np.isfinite(q)
    live = finite & (q > 0)
    if strength <= 0 or not live.any():
        return np.ones_like(q)
    w = 1 + strength * np.minimum(np.where(finite, q, 0) / q[live].mean(dtype=np.float64), clamp)
    weights: F32 = np.where(finite, w / w[live].mean(), 1).astype(np.float32)
    return weights


def drawn(weights: F32, random: np.random.Generator) -> F32:
    """(R,) how often each ray is taken by R // 2 draws with replacement, divided by its mean.

    Rays are drawn in proportion to `weights` (R,), which the result is on average, when their mean
    is 1; those not drawn have 0 and need no backward pass.
    """
    share = weights / weights.sum(dtype=np.float64)
    counts = random.multinomial(max(len(weights) // 2, 1), share)
    scaled: F32 = (counts / counts.mean()).astype(np.float32)
    return scaled


def residual_score(d_rgb: F32) -> F32:
    """(R,) squared error of each ray, up to a factor; `d_rgb` (R, 3) is the loss's gradient."""
    score: F32 = np.square(d_rgb).sum(1, dtype=np.float32)
    return score


def gradncp_score(tape: Tape, d_rgb: F32, samples: int) -> F32:
    """(R,) square of GradNCP's score (Tack et al. 2023): error norm times last feature norm.

    A ray's feature is that of its samples, each of the first module that knows it, composed with
    the volume rendering's weights; the output layer's bias counts as a feature of 1. Squared, since
    q is of second order in the score. Rays that meet nothing get 0.
    """
    n = len(d_rgb)
    taken = np.arange(samples) < tape.used[:n, None]
    weight = np.where(taken, tape.weight[: n * samples].reshape(n, samples), 0)
    features = tape.h2.reshape(-1, HIDDEN)[tape.first[: n * samples]].reshape(n, samples, HIDDEN)
    composed = np.einsum("rk,rkh->rh", weight, np.where(taken[..., None], features, 0))
    score: F32 = residual_score(d_rgb) * (np.square(composed).sum(1) + 1)
    return np.where(taken.any(1), score, 0).astype(np.float32)
