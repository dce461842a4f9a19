"""The daemon as a process on pictures, sound, video: published, gone on with, rendered, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mclnf_edge.client import Client
from mclnf_edge.errors import RemoteError
from mclnf_edge.images import encode_image
from mclnf_edge.sounds import encode_wav, read_sound
from mclnf_edge.types import Frame
from tests.daemon.conftest import Daemon
from tests.daemon.test_mirror import followed
from tests.daemon.test_serve import files_of
from tests.mapping.flights import Flight
from tests.mapping.test_signals import picture

CONFIG = """
signals: {steps: 32, samples_per_step: 256}
watch: {checkpoint_s: 0.5}
"""


def command(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mclnf_edge.cli", *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_pictures_are_mapped_across_a_restart_and_compared(tmp_path: Path, flight: Flight) -> None:
    daemon = Daemon(tmp_path, "--init", "image")
    daemon.config.write_text(CONFIG)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for i, file in enumerate(files):
        file.write_bytes(encode_image(picture(2.0 * i), "png"))
    daemon.start()
    try:
        code, out, _ = command("publish", str(files[0]), "--connect", daemon.address, "--json")
        assert code == 0 and json.loads(out)["accepted"] == 1
        assert daemon.stop() == 0
        daemon.start()
        to = ("--connect", daemon.address)
        code, _, _ = command("publish", str(files[1]), "--wait", *to)
        assert code == 0
        for file in files:
            code, out, _ = command("eval", str(file), "--json", *to)
            report = json.loads(out)
            assert code == 0 and report["psnr"] > 20 and report["ssim"] > 0.5
            assert {m["state"] for m in report["modules"]} == {"closed"}
        folder = tmp_path / "both"
        folder.mkdir()
        for file in files:
            (folder / file.name).write_bytes(file.read_bytes())
        code, out, _ = command("publish", str(folder), "--wait", "--json", *to)
        assert code == 0 and json.loads(out)["modality"] == "image"
        code, out, _ = command("eval", str(folder), "--json", *to)
        views = json.loads(out)["views"]
        assert [v["time_s"] for v in views] == [0.0, 1.0] and min(v["psnr"] for v in views) > 20
        shown = tmp_path / "shown.png"
        words = ("--time", "0", "--stream", "two", "--size", "96x80", "--out", str(shown))
        code, _, _ = command("render", *words, *to)
        assert code == 0 and cv2.imread(str(shown)).shape == (80, 96, 3)
        refused(daemon, flight.frames[0])
        mirrored(daemon, tmp_path / "mirror")
        assert daemon.stop() == 0
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
    assert command("map", "check", str(daemon.map))[0] == 0
    code, _, told = command("serve", "--map", str(daemon.map), "--bind", "tcp://127.0.0.1:0")
    assert code == 1 and "expected modality 'image', received 'posed'" in told


def mirrored(leader: Daemon, folder: Path) -> None:
    """A ground station shows what its leader shows, bit for bit."""
    folder.mkdir()
    mirror = Daemon(folder, "--follow", leader.address).start()
    try:
        followed(mirror, len(files_of(leader.map)))
        assert files_of(mirror.map) == files_of(leader.map)
        shown = []
        for daemon in (leader, mirror):
            with Client(daemon.address, give_up_s=20) as client:
                assert client.status()["modality"] == "image"
                shown.append(client.render_signal(time_s=0.0, stream="two").data)
        assert (
            shown[0] == shown[1]
            and cv2.imdecode(np.frombuffer(shown[0], np.uint8), cv2.IMREAD_COLOR).std() > 10
        )
        assert mirror.stop() == 0
    finally:
        mirror.kill()
    assert command("map", "check", str(mirror.map))[0] == 0


def refused(daemon: Daemon, frame: Frame) -> None:
    """What belongs into another map, and streams that do not exist."""
    with Client(daemon.address, give_up_s=20) as client:
        with pytest.raises(RemoteError, match="this map holds image") as caught:
            client.publish([frame])
        assert caught.value.code == "modality"
    with Client(daemon.address, give_up_s=20) as client:
        with pytest.raises(RemoteError, match="expected the name of one stream"):
            client.render_signal(time_s=0.0, stream="nobody")
        with pytest.raises(RemoteError, match="expected time_s"):
            client.render_signal(span_s=(0.0, 1.0), stream="one", encoding="wav")


def test_a_posed_map_refuses_a_picture(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(encode_image(np.asarray(picture()), "png"))
    code, _, told = command("publish", str(file), "--connect", daemon.address)
    assert code == 1 and "this map holds posed, received modality image" in told


def test_a_sound_is_mapped_and_a_span_rendered(tmp_path: Path) -> None:
    daemon, file, shown = (
        Daemon(tmp_path, "--init", "audio"),
        tmp_path / "a.wav",
        tmp_path / "b.wav",
    )
    daemon.config.write_text(CONFIG.replace("steps: 32", "steps: 64"))
    t = np.arange(4 * 16_000) / 16_000
    file.write_bytes(encode_wav(np.asarray(0.3 * np.sin(2 * np.pi * 200 * t), np.float32), 16_000))
    daemon.start()
    try:
        to = ("--connect", daemon.address)
        code, out, told = command("publish", str(file), "--wait", "--json", *to)
        assert (code, json.loads(out)["modality"]) == (0, "audio"), told
        words = ("--span", "1:2.5", "--rate", "48000", "--out", str(shown))
        code, _, told = command("render", *words, *to)
        assert code == 0, told
        samples, rate = read_sound(shown)
        assert (samples.shape, rate) == ((72_000, 1), 48_000)
        code, out, _ = command("eval", str(file), "--json", *to)
        report = json.loads(out)
        silence = -10 * np.log10(0.3**2 / 2 / 4)
        assert code == 0 and report["psnr"] > silence + 10
        assert {m["state"] for m in report["modules"]} == {"closed"} and len(report["modules"]) > 1
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert command("map", "check", str(daemon.map))[0] == 0


def test_a_video_is_mapped_and_a_moment_rendered_at_any_size(tmp_path: Path) -> None:
    daemon, folder = Daemon(tmp_path, "--init", "video"), tmp_path / "clip"
    daemon.config.write_text(CONFIG)
    folder.mkdir()
    for i in range(10):  # without leading zeros
        (folder / f"{i}.png").write_bytes(encode_image(picture(0.1 * i), "png"))
    daemon.start()
    try:
        to = ("--connect", daemon.address)
        code, out, told = command("publish", str(folder), "--wait", "--json", *to)
        assert (code, json.loads(out)["modality"]) == (0, "video"), told
        code, out, _ = command("eval", str(folder), "--json", *to)
        report = json.loads(out)
        assert code == 0 and report["psnr"] > 20 and len(report["views"]) == 10
        still, film = tmp_path / "still.png", tmp_path / "film.mp4"
        words = ("--time", "0.1", "--size", "200x120", "--out", str(still))
        code, _, told = command("render", *words, *to)
        assert code == 0 and cv2.imread(str(still)).shape == (120, 200, 3), told
        code, _, told = command("render", "--span", "0:0.36", "--out", str(film), *to)
        assert code == 0 and cv2.VideoCapture(str(film)).get(cv2.CAP_PROP_FRAME_COUNT) >= 9, told
        small = cv2.imread(str(folder / "3.png"))[::2]
        (tmp_path / "mixed").mkdir()
        for name, pixels in (("0", small), ("1", small), ("2", small[:, ::2])):
            cv2.imwrite(str(tmp_path / "mixed" / f"{name}.png"), pixels)
        code, out, told = command("publish", str(tmp_path / "mixed"), "--json", *to)
        assert json.loads(out)["accepted"] == 2 and json.loads(out)["rejected"] == 1
        assert "expected 48x20 at 25 Hz as before, received 24x20 at 25 Hz" in told
        assert daemon.stop() == 0
    finally:
        daemon.kill()
    assert command("map", "check", str(daemon.map))[0] == 0
