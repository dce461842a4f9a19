"""The command line against a small real daemon over TCP, and everything it refuses."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from mclnf_edge.cli import _say_status, app
from mclnf_edge.commands import views_of
from mclnf_edge.daemon.security import Keyring
from mclnf_edge.evaluate import held_out
from mclnf_edge.images import encode_image
from mclnf_edge.types import Camera, Frame, WorldFrame
from mclnf_edge.wire.messages import PutFrame
from tests.wire.echo import EchoDaemon

POSE = [[1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 77], [0, 0, 0, 1]]
FLAT = " ".join(str(x) for row in POSE[:3] for x in row)


@pytest.fixture(scope="module")
def daemon() -> Iterator[EchoDaemon]:
    with EchoDaemon() as running:
        yield running


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Four frames of 32x24 pixels: two train, two test."""
    folder = tmp_path / "flight"
    (folder / "images").mkdir(parents=True)
    frames = []
    for i in range(4):
        picture = np.full((24, 32, 3), 60 * i, np.uint8)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), picture)
        split = "train" if i < 2 else "test"
        frames.append(
            {"file_path": f"images/{i}.png", "transform_matrix": POSE, "split": split, "time": i}
        )
    camera = {"w": 32, "h": 24, "fl_x": 30.0, "fl_y": 30.0, "cx": 16.0, "cy": 12.0}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    return folder


def run(*words: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result.stdout, result.stderr


def run_json(*words: object) -> Any:
    return json.loads(run(*words, "--json")[0])


def test_help_is_quick_and_names_every_command() -> None:
    def ask() -> tuple[float, str]:
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "mclnf_edge.cli", "--help"], capture_output=True, check=True
        )
        after = os.times()
        used = after.children_user + after.children_system
        # CPU seconds, so that other work on the machine does not count.
        return used - before.children_user - before.children_system, done.stdout.decode()

    timed = [ask() for _ in range(3)]
    assert min(seconds for seconds, _ in timed) < 0.5
    for command in ("serve", "publish", "render", "status", "eval", "map", "demo", "keygen"):
        assert f"\n  {command} " in timed[0][1]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("serve", "--init --map --bind --config --device"),
        ("publish", "--connect --rate --split --stream --wait --json"),
        ("render", "--pose --time --span --connect --size --out --depth --json"),
        ("status", "--connect --watch --json"),
        ("eval", "--connect --map --split --json"),
        ("demo", "--data --seconds --out --json"),
    ],
)
def test_options_that_others_rely_on(command: str, options: str) -> None:
    text = run(command, "--help")[0]
    assert [option for option in options.split() if f"  {option}" not in text] == []


def test_map_commands_take_a_folder() -> None:
    for command in ("info", "check", "snapshot"):
        assert "DIR" in run("map", command, "--help")[0]


def test_publish_sends_the_train_split_once(daemon: EchoDaemon, capture: Path) -> None:
    report = run_json("publish", capture, "--connect", daemon.address, "--stream", "left")
    assert (report["accepted"], report["duplicate"], report["rejected"]) == (2, 0, 0)
    kept = [put for (session, _, _), put in daemon.kept.items() if session == report["session"]]
    names = sorted(put.frame.name for put in kept)  # type: ignore[union-attr]
    assert names == ["images/0.png", "images/1.png"]
    assert {put.stream for put in kept} == {"left"}


def test_publish_says_what_came_of_it_and_waits(daemon: EchoDaemon, capture: Path) -> None:
    daemon.kept.clear()
    out, _ = run("publish", capture, "--connect", daemon.address, "--split", "all", "--wait")
    assert "flight: 4 accepted" in out
    kept = [put for put in daemon.kept.values() if isinstance(put, PutFrame)]
    assert [put.frame.split for put in kept] == ["train"] * 4, "what is sent is to be mapped"
    assert daemon.asked["drain"] >= 1


def test_publish_names_rejected_frames_and_fails_when_none_is_kept(
    daemon: EchoDaemon, capture: Path
) -> None:
    daemon.refuse = {0, 1}
    try:
        out, errors = run("publish", capture, "--connect", daemon.address, code=1)
    finally:
        daemon.refuse = set()
    assert "0 accepted, 2 rejected" in out and "refused by the test" in errors


def test_poses_are_told_their_world(daemon: EchoDaemon, capture: Path, tmp_path: Path) -> None:
    words = ("publish", capture, "--connect", daemon.address, "--world")
    report = run_json(*words, "EPSG:2180@5e5,4e5,0")
    assert report["world"] == {"crs": "EPSG:2180", "origin": [5e5, 4e5, 0.0]}
    assert daemon.hellos[-1].world == WorldFrame("EPSG:2180", (5e5, 4e5, 0.0))
    report = run_json(*words, "EPSG:4979")
    assert report["world"] == {"crs": "EPSG:4979", "origin": [5.0, 6.0, 77.0]}, "the first pose"
    assert "--world: world frame: expected" in run(*words, "utm", code=2)[1]
    (tmp_path / "p.json").write_text(json.dumps({"transform_matrix": POSE, "crs": "EPSG:32633",
        "w": 8, "h": 6, "fl_x": 9.0}))  # fmt: skip
    map_frame = WorldFrame("EPSG:2180")
    assert views_of(FLAT, None, None, map_frame)[0].world == map_frame
    assert views_of(FLAT, None, None)[0].world is None
    assert views_of(str(tmp_path / "p.json"), None, None, map_frame)[0].world == WorldFrame(
        "EPSG:32633"
    )
    assert views_of(f"{capture}#test", None, None, map_frame)[0].world == map_frame


def test_publish_a_video_with_poses(daemon: EchoDaemon, tmp_path: Path) -> None:
    video = cv2.VideoWriter(
        str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48)
    )
    for i in range(10):
        video.write(np.full((48, 64, 3), 20 * i, np.uint8))
    video.release()
    lines = [f"{t / 10} {t} 0 50 0 0 0 1" for t in range(0, 6)]
    (tmp_path / "poses.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "camera.json").write_text(json.dumps({"w": 64, "h": 48, "fl_x": 50.0}))
    words = ("--poses", tmp_path / "poses.txt", "--camera", tmp_path / "camera.json")
    report = run_json("publish", tmp_path / "v.avi", *words, "--connect", daemon.address)
    assert report["accepted"] == 6 and report["skipped"] == {"outside": 4}
    assert report["largest_gap_s"] == pytest.approx(0.1)


def test_render_a_pose_to_png_and_depth(daemon: EchoDaemon, tmp_path: Path) -> None:
    out, depth = tmp_path / "a.png", tmp_path / "d.npy"
    words = ("--pose", FLAT, "--size", "40x30", "--connect", daemon.address)
    report = run_json("render", *words, "--out", out, "--depth", depth)
    picture = cv2.imread(str(out))
    assert picture is not None and picture.shape == (30, 40, 3) and (picture == 77).all()
    metres = np.load(depth)
    assert metres.dtype == np.float32 and np.isnan(metres[0, 0]) and metres[0, 5] == 5.0
    assert report["files"] == [str(depth), str(out)]
    assert (report["views"][0]["width"], report["views"][0]["height"]) == (40, 30)


def test_render_depth_png_is_millimetres_or_says_otherwise(
    daemon: EchoDaemon, tmp_path: Path
) -> None:
    for size, unit_m in (("8x8", 1e-3), ("40x30", 1e-1)):
        words = ("--pose", FLAT, "--size", size, "--connect", daemon.address)
        report = run_json(
            "render", *words, "--out", tmp_path / "a.jpg", "--depth", tmp_path / "d.png"
        )
        units = cv2.imread(str(tmp_path / "d.png"), cv2.IMREAD_UNCHANGED)
        assert units is not None and units.dtype == np.uint16
        assert report["views"][0]["depth_scale_m"] == pytest.approx(unit_m)
        assert units[0, 0] == 0 and units[0, 5] * unit_m == pytest.approx(5.0, abs=unit_m)


def test_render_many_poses_to_a_folder_and_a_film(
    daemon: EchoDaemon, capture: Path, tmp_path: Path
) -> None:
    words = ("render", "--pose", f"{capture}#test", "--connect", daemon.address)
    run(*words, "--out", tmp_path / "views", "--depth", tmp_path / "depth")
    assert sorted(path.name for path in (tmp_path / "views").iterdir()) == [
        "000000.png",
        "000001.png",
    ]
    assert len(list((tmp_path / "depth").iterdir())) == 2
    run(*words, "--out", tmp_path / "fly.mp4")
    film = cv2.VideoCapture(str(tmp_path / "fly.mp4"))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == 2
    _, errors = run(*words, "--out", tmp_path / "one.png", code=2)
    assert "2 views need a name in .mp4 or a folder" in errors


def test_views_of_large_cameras_are_rendered_smaller(daemon: EchoDaemon, tmp_path: Path) -> None:
    """A daemon renders four megapixels; cameras of drones have twenty."""
    pose = tmp_path / "pose.json"
    camera = {"w": 5472, "h": 3648, "fl_x": 4000.0, "fl_y": 4000.0, "cx": 2736.0, "cy": 1824.0}
    pose.write_text(json.dumps({**camera, "transform_matrix": POSE}))
    words = ("render", "--pose", pose, "--out", tmp_path / "v.png", "--connect", daemon.address)
    (view,) = run_json(*words)["views"]
    assert view["width"] / view["height"] == pytest.approx(1.5, abs=0.01)
    assert 3.9e6 < view["width"] * view["height"] <= 4e6
    (view,) = run_json(*words, "--size", "300x200")["views"]
    assert (view["width"], view["height"]) == (300, 200)


def test_a_capture_without_held_out_frames_is_no_demo(capture: Path, tmp_path: Path) -> None:
    facts = json.loads((capture / "transforms.json").read_text())
    facts["frames"] = [f | {"split": "train"} for f in facts["frames"]]
    (capture / "transforms.json").write_text(json.dumps(facts))
    _, errors = run("demo", "--data", capture, "--out", tmp_path / "out", code=2)
    assert "no frame of split 'test'" in errors and not list((tmp_path / "out").glob("map*"))


def test_large_pictures_are_compared_smaller() -> None:
    camera = Camera(2600, 1600, 2000.0, 2000.0, 1300.0, 800.0)
    pixels = np.zeros((1600, 2600, 3), np.uint8)
    pixels[:, 1300:] = 200
    image = encode_image(pixels, "png")
    truth, small, valid = held_out(Frame(0, 0.0, image, "png", camera, np.eye(4)))
    assert truth.shape == (1182, 1920, 3) and valid.shape == (1182, 1920) and valid.all()
    assert (small.width, small.height) == (1920, 1182) and small.cx == pytest.approx(960)
    assert truth[:, :959].max() == 0 and truth[:, 961:].min() == 200


def test_render_a_span_of_sound(daemon: EchoDaemon, tmp_path: Path) -> None:
    out = tmp_path / "a.wav"
    run("render", "--span", "0.5:1.5", "--connect", daemon.address, "--out", out)
    assert out.read_bytes().startswith(b"RIFF")


def test_status_as_text_and_json(daemon: EchoDaemon) -> None:
    assert run_json("status", "--connect", daemon.address)["frames"] == len(daemon.kept)
    run("status", "--connect", daemon.address)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["publish", "nowhere"], "nowhere: no such capture folder"),
        (["publish", "nowhere", "--rate", "0"], "--rate: expected frames per second above 0"),
        (["publish", "v.mp4", "--poses", "p.txt"], "needs both --poses and --camera"),
        (["render"], "expected one of --pose, --time and --span"),
        (["render", "--pose", FLAT, "--time", "3"], "expected one of --pose, --time and --span"),
        (["render", "--pose", FLAT, "--size", "4by3"], "--size: expected WIDTHxHEIGHT"),
        (["render", "--pose", FLAT, "--size", "0x3"], "--size: expected WIDTHxHEIGHT"),
        (["render", "--pose", "1 2 3"], "received 3 numbers"),
        (["render", "--pose", "none.json"], "no such file"),
        (["render", "--span", "2:1"], "--span: expected START:END"),
        (["render", "--span", "nan:1"], "--span: expected START:END"),
        (["demo", "--seconds", "0"], "--seconds: expected more than 0"),
        (["keygen", "keys", "drone"], "a client needs --role"),
        (
            ["keygen", "keys", "drone", "--role", "root"],
            "--role: expected publish, render, follow, admin",
        ),
    ],
)
def test_wrong_use_is_one_line_and_code_2(words: list[str], message: str) -> None:
    _, errors = run(*words, code=2)
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_errors_as_json(tmp_path: Path) -> None:
    out, errors = run("publish", tmp_path / "none", "--json", code=2)
    error = json.loads(out)["error"]
    assert error["code"] == "capture" and "no such capture" in error["message"]
    assert errors.startswith("error: ")


def test_an_unknown_option_is_wrong_use() -> None:
    assert "No such option" in run("status", "--conect", "x", code=2)[1]


def test_nobody_at_the_address_is_a_failure() -> None:
    _, errors = run("status", "--connect", "tcp://127.0.0.1:9", code=1)
    assert errors.startswith("error: tcp://127.0.0.1:9: no answer to status")


def test_an_unwritable_output_is_a_failure(daemon: EchoDaemon, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ("--connect", daemon.address, "--out", tmp_path / "file" / "a.png")
    assert run("render", "--pose", FLAT, *words, code=1)[1].startswith("error: ")


def test_map_commands_on_a_map(tmp_path: Path) -> None:
    _, errors = run("map", "info", tmp_path / "none", code=1)
    assert errors.startswith("error: ") and "none" in errors
    report = json.loads(run("map", "check", tmp_path / "none", "--json", code=1)[0])
    assert not report["sound"] and len(report["problems"]) == 1


def test_keys_let_exactly_their_owner_in(capture: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    run("keygen", keys, "server")
    made = run_json("keygen", keys, "drone", "--role", "publish")
    assert made["roles"] == ["publish"]
    assert stat.S_IMODE(os.stat(keys / "drone.secret").st_mode) == 0o600
    ring = Keyring.load(keys / "server.secret", keys / "authorised-clients")
    with EchoDaemon(keyring=ring) as guarded:
        words = ("--connect", guarded.address, "--server-key", keys / "server.public")
        mine = (*words, "--client-key", keys / "drone.secret")
        assert run_json("publish", capture, *mine)["accepted"] == 2
        _, errors = run("render", "--pose", FLAT, *mine, "--out", tmp_path / "a.png", code=1)
        assert "role" in errors
    _, errors = run("keygen", keys, "drone", "--role", "render", code=2)
    assert "drone" in errors


def test_status_says_that_a_full_device_learns_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    state = {"device": "cuda", "engine": "torch", "out_of_memory": False}
    _say_status(state)
    assert "out of memory" not in capsys.readouterr().out
    _say_status({**state, "out_of_memory": True})
    told = capsys.readouterr().out
    assert "cuda is out of memory: frames are kept, nothing is learned" in told
