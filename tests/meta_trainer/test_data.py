"""Readers on files of every real layout, on the samples, and on broken input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import soundfile

from mclnf_edge.captures.signals import open_signal
from mclnf_edge.errors import CaptureError
from meta_trainer.data import (
    DATASETS,
    content_digest,
    default_root,
    open_folder,
    open_items,
    spread,
)


def picture(path: Path, height: int, width: int, value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((height, width, 3), value, np.uint8)
    image[:, : width // 4] = (255, 0, 0)  # blue on the left, in OpenCV's order
    assert cv2.imwrite(str(path), image)


def sound(path: Path, samples: int, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.linspace(-0.5, 0.5, samples), rate)


def clip(path: Path, frames: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 64))
    for k in range(frames):
        writer.write(np.full((64, 64, 3), 8 * k, np.uint8))
    writer.release()


def test_celeba_layout(tmp_path: Path) -> None:
    base = tmp_path / "celeba"
    for k in range(1, 5):
        picture(base / "img_align_celeba" / f"{k:06}.jpg", 218, 178)
    (base / "list_eval_partition.txt").write_text(
        "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000004.jpg 2\n"
    )
    assert [i.name for i in open_items("celeba", "test", tmp_path)] == ["000003", "000004"]
    (item,) = open_items("celeba", "train", tmp_path)
    image = item.load()
    assert image.shape == (180, 180, 3) and image.dtype == np.float32
    assert (image[0] == 0).all() and (image[:, -1] == 0).all() and image[90, 90, 0] > 0.4
    assert image[90, 10, 2] > 0.9 > 0.1 > image[90, 10, 0]
    (base / "list_eval_partition.txt").unlink()
    (base / "list_eval_partition.csv").write_text("image_id,partition\n000001.jpg,2\n")
    (base / "Img").mkdir()
    (base / "img_align_celeba").rename(base / "Img" / "img_align_celeba")
    assert [i.name for i in open_items("celeba", "test", tmp_path)] == ["000001"]


def test_imagenette_layout(tmp_path: Path) -> None:
    base = tmp_path / "imagenette2-160"
    for k in range(10):
        picture(base / "train" / "n01440764" / f"n01440764_{k}.JPEG", 160, 213)
    picture(base / "val" / "n03888257" / "x.JPEG", 300, 160)
    assert len(open_items("imagenette", "train", tmp_path)) == 9
    assert len(open_items("imagenette", "val", tmp_path)) == 1
    assert open_items("imagenette", "test", tmp_path)[0].load().shape == (160, 160, 3)


def test_ffhq_layout(tmp_path: Path) -> None:
    for number in (0, 59_500, 61_000):
        folder = tmp_path / "ffhq" / "images1024x1024" / f"{number // 1000 * 1000:05}"
        picture(folder / f"{number:05}.png", 64, 64)
        small = tmp_path / "ffhq" / "thumbnails128x128" / folder.name
        picture(small / f"{number:05}.png", 64, 64)
    for split, name in (("train", "00000"), ("val", "59500"), ("test", "61000")):
        (item,) = open_items("ffhq", split, tmp_path)  # type: ignore[arg-type]
        assert item.name == name
    assert item.load().shape == (512, 512, 3)


def test_voxceleb2_layout(tmp_path: Path) -> None:
    for speaker in range(10):
        clip(tmp_path / "voxceleb2" / "dev" / "mp4" / f"id{speaker:05}" / "abc" / "00001.mp4", 17)
    clip(tmp_path / "voxceleb2" / "test" / "mp4" / "id00099" / "abc" / "00001.mp4", 5)
    assert len(open_items("voxceleb2", "train", tmp_path)) == 9
    frames = open_items("voxceleb2", "val", tmp_path)[0].load()
    assert frames.shape == (8, 112, 112, 3)
    levels = frames.mean((1, 2, 3))
    np.testing.assert_allclose(np.diff(levels), 16 / 255, atol=0.02)
    with pytest.raises(CaptureError, match="at least 8 frames, received 5"):
        open_items("voxceleb2", "test", tmp_path)[0].load()


def test_librispeech_layout(tmp_path: Path) -> None:
    base = tmp_path / "LibriSpeech"
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        sound(base / part / "19" / "198" / "19-198-0000.flac", 20_000)
    for split in ("train", "val", "test"):
        (item,) = open_items("librispeech1", split, tmp_path)  # type: ignore[arg-type]
        samples = item.load()
        assert samples.shape == (16_000,) and abs(samples.mean()) < 1e-4
    with pytest.raises(CaptureError, match="sounds of at least 3 s, found none"):
        open_items("librispeech3", "test", tmp_path)


def test_short_sounds_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, samples in (("a", 20_000), ("b", 50_000), ("c", 47_999)):
        sound(tmp_path / f"{name}.wav", samples)
    assert [i.name for i in open_folder(tmp_path, "speech")] == ["b"]
    assert "2 of 3 sounds are shorter than 3 s" in caplog.text


def test_sounds_of_another_rate_are_resampled(tmp_path: Path) -> None:
    for rate in (8_000, 44_100):
        t = np.arange(4 * rate) / rate
        tone = 0.5 * np.sin(2 * np.pi * 440 * t)
        soundfile.write(tmp_path / f"{rate}.wav", np.stack([tone, tone], 1), rate)
        (item,) = open_folder(tmp_path / f"{rate}.wav", "speech")
        samples = item.load()
        assert samples.shape == (48_000,)
        spectrum = np.abs(np.fft.rfft(samples))
        assert spectrum.argmax() == 440 * 3 and 0.45 < np.abs(samples).max() < 0.55


def test_absent_data_set_says_where_to_get_it(tmp_path: Path) -> None:
    for name, data in DATASETS.items():
        with pytest.raises(CaptureError) as caught:
            open_items(name, "test", tmp_path)
        assert str(tmp_path / data.folder) in str(caught.value)
        assert data.help in str(caught.value)
    with pytest.raises(CaptureError, match="unknown data set 'celebb'"):
        open_items("celebb", "test", tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    for folder in ("p", "s"):
        (tmp_path / folder).mkdir()
    (tmp_path / "p" / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "s" / "bad.wav").write_bytes(b"not a sound")
    with pytest.raises(CaptureError, match=r"bad\.png"):
        open_folder(tmp_path / "p", "faces")[0].load()
    with pytest.raises(CaptureError, match=r"bad\.wav"):
        open_folder(tmp_path / "s", "speech")
    with pytest.raises(CaptureError, match="found none"):
        open_folder(tmp_path / "p", "speech")
    with pytest.raises(CaptureError, match="no such file or folder"):
        open_folder(tmp_path / "nowhere", "speech")


def test_plain_folders(tmp_path: Path) -> None:
    for k in range(9):
        picture(tmp_path / "v" / "one" / f"{k:04}.jpg", 50, 50)
    clip(tmp_path / "v" / "two.mp4", 8)
    items = open_folder(tmp_path / "v", "video")
    assert [i.name for i in items] == ["one", "two"]
    assert all(i.load().shape == (8, 112, 112, 3) for i in items)


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As written without leading zeros; hidden files are none."""
    for k in range(12):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((112, 112, 3), 20 * k, np.uint8))
    (tmp_path / "._3.png").write_bytes(b"metadata")
    (item,) = open_folder(tmp_path, "video")
    shape = replace(item.shape, frames=12)
    levels = np.round(255 * replace(item, shape=shape).load().mean((1, 2, 3)))
    assert levels.tolist() == [20.0 * k for k in range(12)]
    held = open_signal(str(tmp_path))
    assert held is not None
    assert [int(f.mean()) for f in held.frames()] == [20 * k for k in range(12)]


def test_a_wide_clip_shows_its_middle_undistorted(tmp_path: Path) -> None:
    wide = np.zeros((100, 200, 3), np.uint8)
    wide[:, 50:150] = 200
    for k in range(8):
        cv2.imwrite(str(tmp_path / f"{k}.png"), wide)
    (item,) = open_folder(tmp_path, "video")
    assert np.allclose(item.load(), 200 / 255)


def test_a_digest_follows_content(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", 50, 50)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, other = content_digest(tmp_path / "a"), content_digest(tmp_path / "a" / "1.png")
    assert content_digest(tmp_path / "b") == one != other
    picture(tmp_path / "b" / "1.png", 50, 50, 7)
    assert content_digest(tmp_path / "b") != one
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    assert content_digest(tmp_path / "a") != one
    assert content_digest(tmp_path / "a" / "2.png") == other


def test_spread_is_even() -> None:
    assert spread(75, 8, Path("x")) == [0, 9, 18, 27, 36, 45, 54, 63]


def test_samples_load_and_splits_are_apart(sample_data: Path) -> None:
    for name, count in (("faces", 99), ("photos", None), ("speech", 96), ("video", 6)):
        splits = [open_items(name, s, sample_data) for s in ("train", "val", "test")]
        paths = [{i.path for i in s} for s in splits]
        assert not paths[0] & paths[1] and not (paths[0] | paths[1]) & paths[2]
        assert count is None or len(paths[0] | paths[1]) == count
        signal = splits[2][0].load()
        low = -1 if DATASETS[name].kind == "audio" else 0
        assert np.isfinite(signal).all() and signal.min() >= low and signal.max() <= 1


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MCLNF_DATA", str(tmp_path))
    assert default_root() == tmp_path
