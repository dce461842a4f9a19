"""The daemon as a process on pictures: published, killed, gone on with, rendered, refused."""

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
