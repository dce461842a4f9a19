"""Maps of pictures, videos and sounds: what is cut where, what is learned, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mclnf_edge.captures import open_signal
from mclnf_edge.config import ServeConfig, SignalsConfig
from mclnf_edge.errors import CaptureError, Corrupt, FrameRejected
from mclnf_edge.evaluate_signals import snr
from mclnf_edge.images import encode_image
from mclnf_edge.inference.signals import render_picture, render_sound
from mclnf_edge.mapping.initialization import (
    SignalInitialization,
    load_signal_init,
    open_init,
)
from mclnf_edge.mapping.signal_modules import psnr_of
from mclnf_edge.mapping.signals import SignalMapper
from mclnf_edge.maths.metrics import psnr
from mclnf_edge.sounds import decode_sound, encode_s16, encode_wav, read_sound
from mclnf_edge.types import ModuleSnapshot, Signal

STEPS = 24
KEY = "s/picture#0"


def picture(shift: float = 0.0) -> npt.NDArray[np.uint8]:
    """(40, 48, 3): smooth waves of three colours."""
    y, x = np.mgrid[0:40, 0:48] / 40.0
    waves = [np.sin(4 * x + shift), np.cos(5 * y - shift), np.sin(3 * (x + y) + shift)]
    return np.rint(127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)


def piece(rgb: npt.NDArray[np.uint8], seq: int = 0) -> Signal:
    return Signal(seq, float(seq), encode_image(rgb, "png"), "png", rgb.shape)


def no_recall(module: str, version: int) -> ModuleSnapshot:
    raise Corrupt(f"{module} version {version}")


@pytest.fixture(scope="module")
def init() -> SignalInitialization:
    return load_signal_init(Path("image"))


def mapper_of(init: SignalInitialization, **changes: Any) -> SignalMapper:
    rule = replace(SignalsConfig(steps=STEPS, samples_per_step=128), **changes)
    return SignalMapper(ServeConfig(signals=rule), init, no_recall)


def learn(mapper: SignalMapper, steps: int = 10_000) -> None:
    while steps and mapper.step() is not None:
        steps -= 1


def test_a_picture_is_learned_in_four_strips_and_read_back(init: SignalInitialization) -> None:
    mapper, truth = mapper_of(init), picture()
    mapper.add(1, "s/picture", piece(truth), kept=None)
    assert [m.place for m in mapper.learning()] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert not render_picture(mapper, KEY, 0.0).known.any()
    learn(mapper)
    shown = render_picture(mapper, KEY, 0.0)
    assert shown.known.all() and shown.rgb.shape == truth.shape
    assert psnr(shown.rgb, truth) > 20
    doubled = render_picture(mapper, KEY, 0.0, (96, 80)).rgb
    assert doubled.shape == (80, 96, 3)
    means = doubled.reshape(40, 2, 48, 2, 3).mean((1, 3))
    assert psnr(np.rint(means).astype(np.uint8), truth) > 20


def test_the_shipped_start_is_ahead_of_a_random_one(init: SignalInitialization) -> None:
    import torch

    scores = []
    for params in (init.params, init.field.init(torch.Generator().manual_seed(1))):
        mapper = mapper_of(replace(init, params=params), steps=8)
        mapper.add(1, "s/picture", piece(picture()), kept=None)
        learn(mapper)
        scores.append(psnr(render_picture(mapper, KEY, 0.0).rgb, picture()))
    assert scores[0] > scores[1] + 1


def test_a_second_picture_leaves_the_first_as_it_is(init: SignalInitialization) -> None:
    mapper = mapper_of(init)
    mapper.add(1, "s/picture", piece(picture()), kept=None)
    learn(mapper)
    before = render_picture(mapper, KEY, 0.0).rgb
    mapper.add(2, "s/picture", piece(picture(2.0), seq=1), kept=None)
    learn(mapper)
    np.testing.assert_array_equal(render_picture(mapper, KEY, 0.0).rgb, before)
    assert psnr(render_picture(mapper, "s/picture#1", 1.0).rgb, picture(2.0)) > 20


def test_a_checkpoint_in_the_middle_goes_on_to_the_same_values(init: SignalInitialization) -> None:
    whole, first, second = mapper_of(init), mapper_of(init), mapper_of(init)
    for mapper in (whole, first):
        mapper.add(1, "s/picture", piece(picture()), kept=None)
    learn(whole)
    learn(first, 50)
    arrays, meta = first.checkpoint()
    second.restore(arrays, meta)
    second.add(1, "s/picture", piece(picture()), kept=meta["frames"]["1"])
    learn(second)
    assert second.steps == whole.steps == 4 * STEPS
    np.testing.assert_array_equal(
        render_picture(second, KEY, 0.0).rgb, render_picture(whole, KEY, 0.0).rgb
    )


def test_closed_modules_are_taken_in_by_another_mapper(init: SignalInitialization) -> None:
    mapper, other = mapper_of(init), mapper_of(init)
    mapper.add(1, "s/picture", piece(picture()), kept=None)
    learn(mapper)
    shown = render_picture(mapper, KEY, 0.0).rgb
    mapper.draining = True
    gone: dict[int, int] = {}
    for module in mapper.finished():
        closing = mapper.close(module)
        assert closing.snapshot is not None
        gone |= closing.let_go
        other.adopt(closing.snapshot.arrays, closing.snapshot.meta, 1, "digest")
    assert set(gone) == {1} and not mapper.learning()
    np.testing.assert_array_equal(render_picture(other, KEY, 0.0).rgb, shown)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"encoding": "s16le", "shape": (10, 1)}, "this map holds image"),
        ({"shape": (40, 48)}, "shape"),
        ({"data": b"not a picture"}, "expected JPEG"),
        ({"shape": (41, 48, 3)}, "41"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(
    init: SignalInitialization, changes: dict[str, Any], told: str
) -> None:
    mapper = mapper_of(init)
    with pytest.raises(FrameRejected, match=told):
        mapper.add(1, "s/picture", replace(piece(picture()), **changes), kept=None)
    assert not mapper.frames and not mapper.modules


def test_sound_survives_its_file_and_a_cut_one_is_named(tmp_path: Path) -> None:
    sound = np.sin(np.arange(800, dtype=np.float32) / 7) * np.float32(0.5)
    path = tmp_path / "a.wav"
    path.write_bytes(encode_wav(sound, 8000))
    read, rate = read_sound(path)
    assert rate == 8000 and read.shape == (800, 1)
    np.testing.assert_allclose(read[:, 0], sound, atol=2e-5)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CaptureError, match="truncated"):
        read_sound(path)
    with pytest.raises(FrameRejected, match="expected 1600 bytes"):
        decode_sound(encode_s16(sound)[:-2], "s16le", (800, 1))


def test_wav_of_floats_is_read(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `meta` is not installed")
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (300, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 22_050, subtype="FLOAT")
    got, rate = read_sound(tmp_path / "a.wav")
    assert rate == 22_050 and np.array_equal(got, samples)


def test_flac_is_read_and_a_cut_one_is_named(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    sound = np.sin(np.arange(8000, dtype=np.float32) / 7) * np.float32(0.5)
    path = tmp_path / "a.flac"
    soundfile.write(path, sound, 16000)
    signal = open_signal(str(path))
    assert signal is not None and (signal.modality, signal.rate_hz) == ("audio", 16000.0)
    np.testing.assert_allclose(signal.samples(), sound, atol=4e-5)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CaptureError, match="a.flac"):
        read_sound(path)


def test_a_folder_is_pictures_or_frames_as_the_map_is(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode_image(picture(2.0 * i), "png"))
    folder = open_signal(str(tmp_path))
    assert folder is not None and folder.modality == "video"
    assert [p.timestamp for p in folder.pieces()] == [0.0, 1 / 25]
    assert folder.as_held("video") == folder and folder.as_held(None) == folder
    stills = folder.as_held("image")
    assert [(p.timestamp, p.encoding) for p in stills.pieces()] == [(0.0, "png"), (1.0, "png")]
    one = open_signal(str(tmp_path / "1.png"))
    assert one is not None and one.as_held("image") == one


def test_snr_is_the_ratio_of_powers() -> None:
    truth = np.ones(100, np.float32)
    assert snr(truth * np.float32(0.9), truth) == pytest.approx(20, abs=1e-3)
    assert snr(np.zeros(100, np.float32), truth) == pytest.approx(0)
    assert snr(truth, np.zeros(100, np.float32)) is None


def test_the_shipped_start_of_sounds_learns_speech_sooner_than_a_random_one(
    sample_data: Path,
) -> None:
    """After 64 steps a module of unseen speech is closer to it by 1 dB at least."""
    init = open_init(Path("audio"))
    assert isinstance(init, SignalInitialization) and init.modality == "audio"
    path = sorted((sample_data / "speech" / "val").glob("*.wav"))[3]
    signal = open_signal(str(path))
    assert signal is not None
    truth = signal.samples()
    random = replace(init, params=init.field.init(torch.Generator().manual_seed(1)))
    found = []
    for start in (init, random):
        mapper = SignalMapper(ServeConfig(signals=SignalsConfig(steps=64)), start, no_recall)
        for i, part in enumerate(signal.pieces()):
            mapper.add(i, "a/a", part, kept=None)
        learn(mapper)
        key = next(iter(mapper.signals))
        shown = render_sound(mapper, key, (0.0, len(truth) / signal.rate_hz))[0]
        found.append(psnr(shown, truth, peak=2.0))
    assert found[0] > found[1] + 1


def test_sounds_beyond_reason_are_refused_and_divergence_has_a_number() -> None:
    for values in ([1e20, 0.0], [3e38, 3e38], [17.0, 0.0]):
        data = np.array(values, "<f4").tobytes()
        with pytest.raises(FrameRejected, match="at most 16 times full scale"):
            decode_sound(data, "f32le", (1, 2))
    assert decode_sound(np.array([2.0, 1.0], "<f4").tobytes(), "f32le", (1, 2)) == [1.5]
    for mse in (math.nan, math.inf, 1e300):
        assert psnr_of(mse, "image") == -120
