"""What `render --pose` understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mclnf_edge.captures.views import parse_views
from mclnf_edge.commands import views_of
from mclnf_edge.errors import CaptureError
from mclnf_edge.types import Camera, WorldFrame

CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
KEYS = {"fl_x": 30.0, "fl_y": 31.0, "cx": 16.0, "cy": 9.0, "w": 32, "h": 18}


@pytest.fixture
def pose(look_down) -> np.ndarray:
    return look_down(500_000.125, 4_000_000.5, 120.0, yaw=33.0)


@pytest.fixture
def capture(tmp_path: Path, write_json, write_picture, look_down) -> Path:
    frames = []
    for i in range(9):
        write_picture(tmp_path / f"flight/{i:04d}.jpg", 20 * i)
        matrix = look_down(10.0 * i, 0.0, 50.0).tolist()
        extra = {"timestamp": 100.0 + i, "exposure": 0.5}
        frames.append({"file_path": f"{i:04d}.jpg", "transform_matrix": matrix, **extra})
    write_json(tmp_path / "flight/transforms.json", {**KEYS, "frames": frames})
    return tmp_path / "flight"


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("separator", [" ", ",", ", ", "\n", ";"])
def test_numbers_row_by_row(pose: np.ndarray, rows: int, separator: str) -> None:
    text = separator.join(repr(float(v)) for v in pose[:rows].ravel())
    (view,) = parse_views(text, CAMERA)
    assert np.array_equal(view.T_world_camera, pose)
    assert view.camera == CAMERA


def test_numbers_as_a_nested_list(pose: np.ndarray) -> None:
    (view,) = parse_views(str(pose.tolist()), CAMERA)
    assert np.array_equal(view.T_world_camera, pose)


def test_a_file_names_the_frame_of_its_pose(tmp_path: Path, pose: np.ndarray, write_json) -> None:
    write_json(
        tmp_path / "v.json", {**KEYS, "transform_matrix": pose.tolist(), "crs": "EPSG:32633"}
    )
    (view,) = parse_views(str(tmp_path / "v.json"))
    assert view.world == WorldFrame("EPSG:32633")


def test_numbers_need_a_camera(pose: np.ndarray) -> None:
    with pytest.raises(CaptureError, match="intrinsics are needed"):
        parse_views(" ".join(map(str, pose.ravel())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0", "received 4 numbers"),
        ("", "received 0 numbers"),
        ("nowhere.json", "no such file"),
        ("nowhere#0003", "no such file"),
        ("nan " * 12, "NaN"),
        ("2 0 0 0 0 2 0 0 0 0 2 0", "not a rotation"),
        ("1 0 0 0 0 1 0 0 0 0 -1 0", "mirrors"),
        ("1 0 0 0 0 1 0 0 0 0 1 1e12", "beyond"),
        ("1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 2", "last row"),
    ],
)
def test_unusable_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        parse_views(text, CAMERA)


def test_a_file_of_one_pose(tmp_path: Path, write_json, pose: np.ndarray) -> None:
    content: dict[str, Any] = {**KEYS, "transform_matrix": pose.tolist()}
    content.update(timestamp=12.5, stream="kite", exposure=0.25)
    (view,) = parse_views(str(write_json(tmp_path / "pose.json", content)))
    assert np.array_equal(view.T_world_camera, pose)
    assert view.camera == Camera(32, 18, 30.0, 31.0, 16.0, 9.0)
    assert (view.timestamp, view.stream, view.exposure) == (12.5, "kite", 0.25)


def test_intrinsics_in_the_file_go_before_those_beside_it(tmp_path: Path, write_json) -> None:
    matrix = {"transform_matrix": np.eye(4).tolist()}
    bare = write_json(tmp_path / "bare.json", matrix)
    assert parse_views(str(bare), CAMERA)[0].camera == CAMERA
    with pytest.raises(CaptureError, match="bare.json: pose 0: no intrinsics"):
        parse_views(str(bare))
    angle = write_json(tmp_path / "angle.json", {**matrix, "camera_angle_x": np.pi / 2})
    camera = parse_views(str(angle), CAMERA)[0].camera
    assert (camera.width, camera.height, camera.fx) == (64, 48, pytest.approx(32.0))


def test_a_file_of_many_poses(tmp_path: Path, write_json, look_down) -> None:
    frames: list[dict] = [{"transform_matrix": look_down(i, 0, 9).tolist()} for i in range(5)]
    frames[3].update(fl_x=60.0, timestamp=4.0)
    views = parse_views(str(write_json(tmp_path / "path.json", {**KEYS, "frames": frames})))
    assert [v.T_world_camera[0, 3] for v in views] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [v.camera.fx for v in views] == [30.0, 30.0, 30.0, 60.0, 30.0]
    assert [v.timestamp for v in views] == [None, None, None, 4.0, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**KEYS, "frames": []}, "holds no pose"),
        ({**KEYS, "frames": [{}]}, "pose 0: expected a 4x4 or 3x4 matrix"),
        ({**KEYS, "transform_matrix": [[1.0] * 4] * 4}, "last row"),
        ({**KEYS, "transform_matrix": np.eye(4).tolist(), "fl_x": 0}, "fx = 0"),
        ({**KEYS, "transform_matrix": np.eye(4).tolist(), "timestamp": "now"}, "'timestamp'"),
        ([], "expected a JSON object"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, write_json, content: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as error:
        parse_views(str(write_json(tmp_path / "pose.json", content)))
    assert "pose.json" in str(error.value)


@pytest.mark.parametrize("key", ["0003", "0003.jpg", "3"])
def test_a_frame_of_a_capture(capture: Path, key: str) -> None:
    (view,) = parse_views(f"{capture}#{key}")
    assert view.T_world_camera[0, 3] == 30.0
    assert (view.timestamp, view.exposure, view.stream) == (103.0, 0.5, "flight")
    assert view.camera.fx == 30.0


@pytest.mark.parametrize(("key", "count"), [("test", 1), ("train", 8), ("all", 9)])
def test_a_split_of_a_capture(capture: Path, key: str, count: int) -> None:
    assert len(parse_views(f"{capture}#{key}")) == count


@pytest.mark.parametrize("key", ["val", "0099", ""])
def test_frames_that_are_not_there(capture: Path, key: str) -> None:
    with pytest.raises(CaptureError, match="flight"):
        parse_views(f"{capture}#{key}")


def test_numbers_may_be_longer_than_a_file_name() -> None:
    numbers = " ".join(f"{x:.40f}" for x in np.eye(4).ravel())
    (view,) = views_of(numbers, None, None)
    assert len(numbers) > 255 and np.array_equal(view.T_world_camera, np.eye(4))
