"""MatrixCity blocks in both published forms, and as the city generator writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.captures.capture import Capture
from mclnf_edge.captures.detect import open_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.images import decode_depth
from mclnf_edge.types import Camera

ANGLE = 2 * math.atan(16 / 20)
"""32 px across this angle is f = 20 px."""


def same_poses(capture: Capture, poses: list[np.ndarray]) -> None:
    for record, pose in zip(capture.frames.records, poses, strict=True):
        np.testing.assert_allclose(record.T_world_camera, pose, atol=1e-9)


@pytest.fixture
def poses(look_down) -> list[np.ndarray]:
    """Three cameras 250 m up, positions in metres."""
    return [look_down(-1000.0 + 50 * i, 320.5, 250.0, yaw=30.0 * i) for i in range(3)]


@pytest.fixture
def raw(write_json, write_picture):
    """Write a raw block: rotation divided by 100, metres, a last row without meaning."""

    def write(folder: Path, poses: list[np.ndarray]) -> Path:
        frames = []
        for i, pose in enumerate(poses):
            written = pose.copy()
            written[:3, :3] /= 100.0
            written[3] = [0.0, 0.0, 0.0, 0.01]
            frames.append({"frame_index": i, "rot_mat": written.tolist()})
            write_picture(folder / f"{i:04d}.png", 10 * i)
        write_json(folder / "transforms.json", {"camera_angle_x": ANGLE, "frames": frames})
        return folder

    return write


@pytest.fixture
def split_form(tmp_path: Path, write_json, write_picture, poses):
    """Write `pose/block_A` with two training and one test frame, positions in 100 m."""

    def write() -> Path:
        folder = tmp_path / "city/pose/block_A"
        for split, chosen, block in (
            ("train", poses[:2], "train/block_1"),
            ("test", poses[2:], "test/block_1_test"),
        ):
            frames = []
            for i, pose in enumerate(chosen):
                written = pose.copy()
                written[:3, 3] /= 100.0
                written[3] = 7.0
                path = f"../../{block}/{i:04d}.png"
                write_picture(folder / path, 10 * i)
                frames.append({"file_path": path, "transform_matrix": written.tolist()})
            keys = {"fl_x": 20.0, "fl_y": 20.0, "cx": 16.0, "cy": 9.0, "w": 32, "h": 18, "k1": 0}
            content = {"camera_angle_x": ANGLE, **keys, "frames": frames}
            write_json(folder / f"transforms_{split}.json", content)
        return folder

    return write


def test_raw_block_is_in_metres(tmp_path: Path, raw, poses) -> None:
    capture = open_capture(raw(tmp_path / "small_city/aerial/train/block_1", poses))
    assert (capture.format, capture.name, len(capture)) == ("matrixcity", "block_1", 3)
    same_poses(capture, poses)
    assert capture.frames[1].name == "block_1/0001.png"
    camera = capture.frames[0].camera
    assert (camera.width, camera.height, camera.cx, camera.cy) == (32, 18, 16.0, 9.0)
    assert camera.fx == pytest.approx(20.0)
    assert camera.fy == pytest.approx(20.0)


def test_raw_test_block_comes_along_as_test(tmp_path: Path, raw, poses) -> None:
    base = tmp_path / "small_city/aerial"
    raw(base / "test/block_1_test", poses[2:])
    capture = open_capture(raw(base / "train/block_1", poses[:2]))
    assert [len(capture.split(s)) for s in ("train", "test")] == [2, 1]
    same_poses(capture.split("test"), poses[2:])
    assert {f.split for f in open_capture(base / "test/block_1_test")} == {"test"}


def test_split_form_is_in_metres(split_form, poses) -> None:
    capture = open_capture(split_form())
    assert (capture.format, capture.name) == ("matrixcity", "block_A")
    assert [len(capture.split(s)) for s in ("train", "val", "test")] == [2, 0, 1]
    same_poses(capture.split("train"), poses[:2])
    same_poses(capture.split("test"), poses[2:])
    assert capture.frames[0].camera == Camera(32, 18, 20.0, 20.0, 16.0, 9.0)
    assert capture.split("test").frames[0].name == "test/block_1_test/0000.png"


def test_one_split_file_can_be_named(split_form) -> None:
    folder = split_form()
    assert len(open_capture(folder / "transforms_train.json")) == 2
    dense = folder / "transforms_train_dense.json"
    (folder / "transforms_train.json").rename(dense)
    capture = open_capture(dense)
    assert (capture.format, len(capture)) == ("matrixcity", 2)
    assert capture.frames[0].T_world_camera[2, 3] == pytest.approx(250.0)


def test_merged_files_carry_their_own_intrinsics(split_form, write_json) -> None:
    file = split_form() / "transforms_train.json"
    content = json.loads(file.read_text())
    content["frames"][1].update(fl_x=40.0, fl_y=40.0, camera_model="SIMPLE_PINHOLE")
    write_json(file, content)
    assert [f.camera.fx for f in open_capture(file)] == [20.0, 40.0]


@pytest.mark.parametrize(
    ("part", "factor", "message"),
    [
        (np.s_[:3, :3], 0.5, "expected a rotation times 1/100 or 1, received scale 0.005"),
        (np.s_[:3, :3], 0.0, "received scale 0"),
        (np.s_[:3, :3], -1.0, "received scale -0.01"),
        (np.s_[0, :3], float("nan"), "finite"),
        (np.s_[0, 3], 1e9, "beyond"),
    ],
)
def test_unusable_matrices_are_named(
    tmp_path: Path, raw, poses, part, factor: float, message: str
) -> None:
    poses[1][part] *= factor
    with pytest.raises(CaptureError, match=message):
        open_capture(raw(tmp_path / "train/block_1", poses))


def test_sheared_matrices_are_refused(tmp_path: Path, raw, poses) -> None:
    poses[1][:3, :3] = [[1, 0.2, 0], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(CaptureError, match="frame 1: the 3x3 part is not a rotation times"):
        open_capture(raw(tmp_path / "train/block_1", poses))


@pytest.mark.parametrize("index", [None, "3", 1.5])
def test_frame_index_must_be_whole(tmp_path: Path, raw, poses, write_json, index) -> None:
    folder = raw(tmp_path / "train/block_1", poses)
    frames = [{"frame_index": index, "rot_mat": (poses[0] / 100).tolist()}]
    write_json(folder / "transforms.json", {"camera_angle_x": ANGLE, "frames": frames})
    with pytest.raises(CaptureError, match="whole 'frame_index'"):
        open_capture(folder)


# --- depth -------------------------------------------------------------------------------------


def write_exr(path: Path, centimetres: np.ndarray, channel: str = "Z") -> None:
    openexr = pytest.importorskip("OpenEXR")
    path.parent.mkdir(parents=True, exist_ok=True)
    openexr.File({}, {channel: openexr.Channel(centimetres)}).write(str(path))


@pytest.mark.parametrize(
    "place",
    [
        "small_city/aerial/train/block_1/0000.exr",
        "small_city/aerial/train/block_1_depth/0000.exr",
        "small_city_depth/aerial/train/block_1_depth/0000.exr",
    ],
)
def test_depth_is_metres_and_unknown_stays_unknown(tmp_path: Path, raw, poses, place: str) -> None:
    centimetres = np.full((18, 32), 25_000.0, np.float32)
    centimetres[0, :4] = [65504.0, np.inf, 0.0, np.nan]
    centimetres[1, 0] = 123.0
    write_exr(tmp_path / place, centimetres)
    capture = open_capture(raw(tmp_path / "small_city/aerial/train/block_1", poses))
    frame = capture.frames[0]
    assert frame.depth is not None
    depth = decode_depth(frame.depth, frame.depth_scale_m, frame.camera)
    assert np.isnan(depth[0, :4]).all()
    assert depth[1, 0] == pytest.approx(1.23)
    assert depth[5, 5] == pytest.approx(250.0)
    assert capture.frames[1].depth is None


def test_far_depth_widens_its_unit(tmp_path: Path, raw, poses) -> None:
    """2 km is 200,000 cm, over 16 bits of 1 cm: the unit becomes 3.05 cm."""
    folder = raw(tmp_path / "train/block_1", poses)
    write_exr(folder / "0000.exr", np.full((18, 32), 200_000.0, np.float32))
    frame = open_capture(folder).frames[0]
    assert frame.depth is not None
    assert frame.depth_scale_m == pytest.approx(2000.0 / 65535.0)
    assert decode_depth(frame.depth, frame.depth_scale_m, frame.camera)[0, 0] == pytest.approx(2000)


def test_broken_depth_is_refused_when_its_frame_is_read(tmp_path: Path, raw, poses) -> None:
    pytest.importorskip("OpenEXR")
    folder = raw(tmp_path / "train/block_1", poses)
    (folder / "0000.exr").write_bytes(b"no exr")
    capture = open_capture(folder)
    with pytest.raises(CaptureError, match=r"0000\.exr"):
        capture.frames[0]
    write_exr(folder / "0000.exr", np.ones((4, 4), np.float32))
    with pytest.raises(CaptureError, match="the file is 4x4"):
        capture.frames[0]


def test_without_openexr_depth_is_left_out_and_said(
    tmp_path: Path, raw, poses, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = raw(tmp_path / "train/block_1", poses)
    (folder / "0000.exr").write_bytes(b"anything")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    capture = open_capture(folder)
    assert any("OpenEXR is not installed" in note for note in capture.notes)
    assert capture.frames[0].depth is None
