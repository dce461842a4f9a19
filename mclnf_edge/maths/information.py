"""Information that rays bring, told by the diagonal of F: when to stop asking for more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def information(sums: F32, prior: F32) -> float:
    """Nats that rays brought: 1/2 sum_p ln((e_p + S_p) / e_p).

    How far the entropy of independent Gaussian parameters has fallen from their precision `prior`
    e (P,) by rays whose squared gradients sum to `sums` S (P,), the diagonal of F times their
    number.
    """
    known = prior > 0
    return 0.5 * float(np.log1p(sums[known] / prior[known].astype(np.float64)).sum())


def last_share(before: float, after: float, growth: float) -> float:
    """What a ray brought at last, as a share of what all rays brought on average.

    `before` and `after` are the nats of n and of `growth` * n rays: (after - before) a ray over
    after a ray. 1 at first, 0 when nothing more comes; 1 where nothing came yet.
    """
    return (after - before) / after / (1 - 1 / growth) if after > 0 else 1.0
