"""Cuts of signals into tasks: every sample once, in the right place, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meta_trainer.episodes import audio_episode, grid, image_episode, video_episode


def picture(h: int = 12, w: int = 16) -> np.ndarray:
    return np.random.default_rng(0).random((h, w, 3)).astype(np.float32)


def test_strips_of_the_papers_picture() -> None:
    image = picture(180, 180)
    e = image_episode("a", image)
    assert e.coords.shape == (4, 8100, 2) and e.values.shape == (4, 8100, 3)
    strip = e.values[1].reshape(180, 45, 3).numpy() + 0.5
    np.testing.assert_allclose(strip, image[:, 45:90], atol=1e-6)
    xs = e.coords[:, :, 1]
    assert (xs[0] < -0.5).all() and (xs[3] > 0.5).all()


@pytest.mark.parametrize("cut", ["strips", "interleaved"])
def test_rebuilding_gives_the_signal_back(cut: str) -> None:
    for make, signal in ((image_episode, picture()), (video_episode, np.stack([picture()] * 8))):
        e = make("a", signal, cut=cut)
        np.testing.assert_allclose(e.rebuild(e.values), signal, atol=1e-6)
        flat = e.order.flatten()
        assert torch.equal(flat.sort().values, torch.arange(len(flat)))
        axes = signal.ndim - 1
        torch.testing.assert_close(e.coords.flatten(0, 1), grid(signal.shape[:axes])[flat])


def test_interleaved_pictures_have_half_the_resolution() -> None:
    image = picture()
    e = image_episode("a", image, cut="interleaved")
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        part = e.values[k].reshape(6, 8, 3).numpy() + 0.5
        np.testing.assert_allclose(part, image[i::2, j::2], atol=1e-6)


def test_audio_and_video_run_along_time() -> None:
    sound = np.linspace(-0.9, 0.9, 403).astype(np.float32)
    e = audio_episode("s", sound)
    assert e.values.shape == (4, 100, 1) and e.peak == 2.0
    np.testing.assert_allclose(e.rebuild(e.values), sound[:400], atol=1e-6)
    assert (e.coords.flatten().diff() > 0).all()
    clip = np.stack([picture() * k / 9 for k in range(9)])
    v = video_episode("v", clip)
    assert v.shape == (8, 12, 16, 3) and v.coords.shape == (4, 2 * 12 * 16, 3)
    assert (v.coords[0, :, 0] < v.coords[1, :, 0].min()).all()


def test_tasks_with_coordinates_of_their_own() -> None:
    sound = np.linspace(-0.9, 0.9, 403).astype(np.float32)
    clip = np.stack([picture() * k / 9 for k in range(9)])
    for cutter, signal, part in (
        (audio_episode, sound, (100,)),
        (image_episode, picture(), (12, 4)),
        (video_episode, clip, (2, 12, 16)),
    ):
        whole, own = cutter("x", signal), cutter("x", signal, cut="own")
        assert torch.equal(own.values, whole.values) and torch.equal(own.order, whole.order)
        for of_task, of_whole in zip(own.coords, whole.coords, strict=True):
            torch.testing.assert_close(of_task, grid(part))
            # The same places, stretched: a straight line on every axis.
            low, high = of_whole.amin(0), of_whole.amax(0)
            ends = grid(part).amin(0), grid(part).amax(0)
            again = ends[0] + (of_whole - low) / (high - low) * (ends[1] - ends[0])
            torch.testing.assert_close(of_task, again, atol=1e-5, rtol=0)


def test_grid_by_hand() -> None:
    expected = [[-0.5, -2 / 3], [-0.5, 0], [-0.5, 2 / 3], [0.5, -2 / 3], [0.5, 0], [0.5, 2 / 3]]
    torch.testing.assert_close(grid((2, 3)), torch.tensor(expected))


def test_impossible_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="4 tasks"):
        image_episode("a", picture(), tasks=5, cut="interleaved")
    with pytest.raises(ValueError, match="audio"):
        audio_episode("a", np.zeros(100, np.float32), cut="interleaved")
    with pytest.raises(ValueError, match="2 frames"):
        video_episode("v", np.zeros((2, 4, 4, 3), np.float32))
