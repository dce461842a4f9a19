"""Metrics against hand-computed numbers and a second implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from mclnf_edge.maths.metrics import align, aligned, backward_transfer, forgetting, psnr, ssim


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.random((24, 32, 3))
    return a, np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)


def test_psnr_by_hand_and_by_scikit_image(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pictures
    assert psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), 0.1)) == pytest.approx(20.0)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0))
    assert psnr(np.full(8, -0.5), np.full(8, 0.5), peak=2.0) == pytest.approx(10 * math.log10(4))
    assert psnr(a, a) == math.inf


def test_bytes_and_floats_agree() -> None:
    a = np.full((4, 4, 3), 51, np.uint8)
    assert psnr(a, np.full((4, 4, 3), 0.1)) == pytest.approx(20.0)
    assert psnr(a, np.full((4, 4, 3), 255, np.uint8)) == pytest.approx(-20 * math.log10(0.8))


def test_mask_keeps_only_its_pixels(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pictures
    mask = np.zeros(a.shape[:2], bool)
    mask[:5] = True
    assert psnr(a, b, mask) == pytest.approx(psnr(a[:5], b[:5]))
    spoiled = b.copy()
    spoiled[5:] = 0
    assert psnr(a, spoiled, mask) == psnr(a, b, mask)
    assert math.isnan(psnr(a, b, np.zeros_like(mask)))
    with pytest.raises(ValueError, match="mask"):
        psnr(a, b, mask[:3])


def test_alignment_removes_an_affine_colour_change(
    pictures: tuple[np.ndarray, np.ndarray],
) -> None:
    a, noisy = pictures
    changed = a @ np.array([[0.7, 0.1, 0], [0, 0.8, 0], [0.05, 0, 0.6]]) + [0.1, 0.0, 0.2]
    assert aligned(changed, a) > 200
    assert aligned(changed, noisy) == pytest.approx(aligned(a, noisy))
    assert aligned(a, noisy) >= psnr(a, noisy)
    assert align(a, noisy).shape == a.shape
    mask = np.zeros(a.shape[:2], bool)
    mask[:12] = True
    half = a.copy()
    half[:12] = changed[:12]
    assert aligned(half, a, mask) > 200 > aligned(half, a)


def test_ssim_is_one_for_equal_falls_with_noise_and_reads_the_mask(
    pictures: tuple[np.ndarray, np.ndarray],
) -> None:
    a, b = pictures
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b) < 0.99
    half = a.copy()
    half[:, 16:] = b[:, 16:]
    mask = np.zeros(a.shape[:2], bool)
    mask[:, :8] = True
    assert ssim(half, a, mask) == pytest.approx(1.0) and ssim(half, a) < 0.999
    as_bytes = np.round(a * 255).astype(np.uint8)
    assert ssim(as_bytes, b) == pytest.approx(ssim(as_bytes / 255.0, b))


def test_ssim_of_constant_pictures_follows_the_formula() -> None:
    a, b = np.full((16, 16), 0.25), np.full((16, 16), 0.75)
    c1 = 0.01**2
    expected = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)
    assert ssim(a, b) == pytest.approx(expected)


def test_forgetting_and_backward_transfer_by_hand() -> None:
    nan = np.nan
    rounds = np.array([[30.0, nan, nan], [33.0, 28.0, nan], [25.0, 29.0, 31.0]])
    np.testing.assert_allclose(forgetting(rounds), [8.0, -1.0])
    np.testing.assert_allclose(backward_transfer(rounds), [-5.0, 1.0])
    with pytest.raises(ValueError, match="square"):
        forgetting(rounds[:2])
