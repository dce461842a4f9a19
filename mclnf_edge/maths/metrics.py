"""Quality of a picture or signal against the truth, and of a task sequence over time.

Pictures are (H, W, C) or (H, W) arrays, either uint8 (0..255) or float (0..1). A boolean `mask`
(H, W) keeps only the pixels where it is True. Numpy only: the client side may import this.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def psnr(a: Array, b: Array, mask: Mask | None = None, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(peak^2 / mean squared error); inf when equal.

    `peak` is the value range of float input (2 for audio in [-1, 1]). NaN for an empty mask.

    Raises:
        ValueError: the shapes differ.
    """
    x, y = _pair(a, b, mask)
    if x.size == 0:
        return math.nan
    error = float(np.mean(np.square(x - y)))
    return math.inf if error == 0 else 10.0 * math.log10(peak * peak / error)


def align(a: Array, b: Array, mask: Mask | None = None) -> Floats:
    """`a` after the one affine colour map (C x C matrix and offset) that brings it nearest to `b`.

    Least squares over the kept pixels; the result is not clipped, so that it can never be further
    from `b` than `a` was. Returns float64 in `a`'s shape, in 0..1.
    """
    x, y = _pair(a, b, mask)
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    fit, *_ = np.linalg.lstsq(inputs, y, rcond=None)
    whole = _unit(a).reshape(-1, x.shape[1])
    return np.asarray(whole @ fit[:-1] + fit[-1], dtype=np.float64).reshape(np.shape(a))


def aligned(a: Array, b: Array, mask: Mask | None = None) -> float:
    """PSNR in dB of `align(a, b)` against `b`: exposure and white balance do not count."""
    if mask is not None and not mask.any():
        return math.nan
    return psnr(align(a, b, mask), _unit(b), mask)


SSIM_WINDOW = 11
"""Pixels a side of the window of `ssim`, which smaller pictures do not have."""


def ssim(a: Array, b: Array, mask: Mask | None = None) -> float:
    """Structural similarity (Wang et al. 2004), Gaussian window of sigma 1.5, mean over pixels.

    With a mask the similarity map is averaged over the kept pixels only. Pictures smaller than the
    11-pixel window are refused by scikit-image with a ValueError.
    """
    from skimage.metrics import structural_similarity  # slow to import, and few need it

    if np.shape(a) != np.shape(b):
        raise ValueError(f"expected pictures of one shape, received {np.shape(a)}, {np.shape(b)}")
    _, similarity = structural_similarity(  # type: ignore[no-untyped-call]
        _unit(a),
        _unit(b),
        data_range=1.0,
        channel_axis=-1 if np.ndim(a) == 3 else None,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(np.mean(similarity if mask is None else similarity[mask]))


def forgetting(quality: Floats) -> Floats:
    """How much each task fell from its best: max over i < last of R[i, j] minus R[last, j].

    `quality` (T, T) holds R[i, j], the quality (dB) on task j after learning task i; only j <= i is
    read. Returns (T - 1,): the last task cannot have been forgotten. Chaudhry et al. 2018.
    """
    rounds = _square(quality)
    last = rounds[-1]
    return np.array([rounds[j:-1, j].max() - last[j] for j in range(len(rounds) - 1)])


def backward_transfer(quality: Floats) -> Floats:
    """R[last, j] - R[j, j] per task j < last (Lopez-Paz and Ranzato 2017); negative is forgetting.

    `quality` as in `forgetting`; returns (T - 1,).
    """
    rounds = _square(quality)
    return rounds[-1, :-1] - np.diagonal(rounds)[:-1]


def _square(quality: Floats) -> Floats:
    rounds = np.asarray(quality, dtype=np.float64)
    if rounds.ndim != 2 or rounds.shape[0] != rounds.shape[1]:
        raise ValueError(f"expected a square task matrix, received shape {rounds.shape}")
    return rounds


def _unit(a: Array) -> Floats:
    """Float64 in 0..1 (bytes are divided by 255)."""
    values = np.asarray(a)
    return values.astype(np.float64) / 255.0 if values.dtype == np.uint8 else np.float64(values)


def _pair(a: Array, b: Array, mask: Mask | None) -> tuple[Floats, Floats]:
    """Both as (N, C) float64 of the kept pixels; C is 1 for (H, W) and flat input."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"expected arrays of one shape, received {np.shape(a)} and {np.shape(b)}")
    x, y = _unit(a), _unit(b)
    channels = x.shape[-1] if x.ndim >= 3 else 1
    x, y = x.reshape(-1, channels), y.reshape(-1, channels)
    if mask is None:
        return x, y
    if mask.shape != np.shape(a)[: mask.ndim] or mask.size != len(x):
        raise ValueError(f"expected a mask for shape {np.shape(a)}, received {mask.shape}")
    keep = np.asarray(mask, dtype=bool).reshape(-1)
    return x[keep], y[keep]
