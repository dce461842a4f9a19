"""transforms.json of nerfstudio and instant-ngp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mclnf_edge.captures.detect import open_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.geometry import pose_from
from mclnf_edge.images import encode_image
from mclnf_edge.types import Camera, WorldFrame
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.messages import PutFrame

INTRINSICS = {"fl_x": 30.0, "fl_y": 31.0, "cx": 16.5, "cy": 9.25, "w": 32, "h": 18}
ENU = {"type": "ENU", "origin_lat": 52.0, "origin_lon": 21.0, "origin_alt": 100.0, "units": "m"}


@pytest.fixture
def content(tmp_path: Path, write_picture, look_down) -> dict[str, Any]:
    frames = []
    for i in range(9):
        write_picture(tmp_path / f"images/{i:04d}.jpg", 20 * i)
        pose = look_down(10.0 * i, -5.0, 120.5, yaw=7.0 * i).tolist()
        frames.append({"file_path": f"./images/{i:04d}.jpg", "transform_matrix": pose})
    return {**INTRINSICS, "frames": frames}


@pytest.fixture
def opened(tmp_path: Path, write_json):
    def opened(content: dict[str, Any], name: str = "transforms.json"):
        return open_capture(write_json(tmp_path / name, content).parent)

    return opened


def test_a_plain_capture(content: dict, opened, tmp_path: Path, look_down) -> None:
    capture = opened(content)
    assert (capture.name, capture.format) == (tmp_path.name, "transforms")
    frame = capture.frames[3]
    assert frame.name == "images/0003.jpg"
    assert frame.image == (tmp_path / "images/0003.jpg").read_bytes()
    assert frame.encoding == "jpeg"
    assert frame.camera == Camera(32, 18, 30.0, 31.0, 16.5, 9.25)
    assert np.array_equal(frame.T_world_camera, look_down(30.0, -5.0, 120.5, yaw=21.0))
    assert capture.world == WorldFrame()
    assert len(capture.split("test")) == 1


def test_the_json_file_itself_can_be_named(content: dict, tmp_path: Path, write_json) -> None:
    content["frames"] = content["frames"][:2]
    write_json(tmp_path / "part.json", content)
    assert len(open_capture(tmp_path / "part.json")) == 2


def test_per_frame_fields(content: dict, opened) -> None:
    frame = content["frames"][0]
    frame.update(
        split="val",
        timestamp=12.5,
        gps={"lat": 1.0},
        exposure_gain=[1.1, 1.0, 0.9],
        exposure=0.25,
        height_m=81.5,
        task="yard",
        fl_x=40.0,
    )
    for i, other in enumerate(content["frames"][1:]):
        other.update(split="test" if i == 3 else "train", timestamp=13.0 + i)
    capture = opened(content)
    first = capture.frames[0]
    assert (first.split, first.timestamp, first.exposure, first.camera.fx) == (
        "val",
        12.5,
        0.25,
        40,
    )
    assert (first.height_m, first.task) == (81.5, "yard")
    assert first.meta["gps"] == {"lat": 1.0}
    assert first.meta["exposure_gain"] == [1.1, 1.0, 0.9]
    assert capture.frames[1].exposure is None
    assert [f.seq for f in capture.split("test")] == [4]


def test_exposure_gain_never_becomes_exposure(content: dict, opened) -> None:
    for frame in content["frames"]:
        frame["exposure_gain"] = [2.0, 2.0, 2.0]
    assert all(frame.exposure is None for frame in opened(content))


def test_filename_lists_make_the_split(content: dict, opened) -> None:
    paths = [frame["file_path"] for frame in content["frames"]]
    content.update(train_filenames=paths[:5], val_filenames=paths[5:6], test_filenames=paths[6:8])
    capture = opened(content)
    assert [len(capture.split(s)) for s in ("train", "val", "test")] == [5, 1, 2]
    assert "1 frames in no *_filenames list are left out" in capture.notes
    content["test_filenames"] = ["images/none.jpg"]
    with pytest.raises(CaptureError, match="listed in a split but not under 'frames'.*none.jpg"):
        opened(content)


def test_poses_are_as_written_whatever_was_applied_to_them(content: dict, opened) -> None:
    before = [f.T_world_camera for f in opened(content)]
    applied = [[0, 1, 0, 5], [1, 0, 0, 0], [0, 0, -1, 0]]
    content.update(applied_transform=applied, applied_scale=0.1, scale=0.33, offset=[0.5] * 3)
    content["orientation_override"] = "up"
    capture = opened(content)
    assert all(np.array_equal(f.T_world_camera, b) for f, b in zip(capture, before, strict=True))
    assert capture.frames[0].meta["applied_transform"] == applied
    assert "applied_scale is kept in meta, not applied" in capture.notes


def test_utm_sized_positions_keep_their_precision(content: dict, opened) -> None:
    position = [500_123.456789, 5_812_345.123456, 151.0]
    content["frames"][0]["transform_matrix"] = pose_from(np.eye(3), position).tolist()
    content["crs"] = "EPSG:32633"
    capture = opened(content)
    assert capture.frames[0].T_world_camera[:3, 3].tolist() == position
    assert capture.world == WorldFrame("EPSG:32633")


@pytest.mark.parametrize(
    ("crs", "world"),
    [
        (ENU, WorldFrame("local-enu", (52.0, 21.0, 100.0))),
        ({"type": "EPSG:2180", "origin": [5e5, 4e5, 0]}, WorldFrame("EPSG:2180", (5e5, 4e5, 0.0))),
        ({"type": "EPSG:2180"}, WorldFrame("EPSG:2180")),
    ],
)
def test_world_frames(content: dict, opened, crs: dict, world: WorldFrame) -> None:
    assert opened({**content, "crs": crs}).world == world


@pytest.mark.parametrize(
    "crs",
    [
        "WGS84",
        5,
        {"type": "ENU", "origin_lat": 52.0},
        {**ENU, "units": "ft"},
        {**ENU, "origin_lat": 520.0},
        {"type": "EPSG:2180", "origin": [1, 2]},
        {"type": "EPSG:2180", "origin": ["a", "b", "c"]},
    ],
)
def test_unusable_world_frames_are_refused(content: dict, opened, crs: Any) -> None:
    with pytest.raises(CaptureError, match="transforms.json"):
        opened({**content, "crs": crs})


def test_geographic_poses_begin_at_the_first_one(content: dict, opened) -> None:
    for i, frame in enumerate(content["frames"]):
        place = [52.2 + 1e-4 * i, 15.9, 130.0]
        frame["transform_matrix"] = pose_from(np.eye(3), place).tolist()
    capture = opened({**content, "crs": "EPSG:4979"})
    first = capture.frames[0].T_world_camera[:3, 3]
    assert capture.world == WorldFrame("EPSG:4979", tuple(first.tolist()))
    content["frames"][0]["transform_matrix"][0][3] = 5.8e6
    with pytest.raises(CaptureError, match="expected origin .latitude"):
        opened({**content, "crs": "EPSG:4979"})


def test_a_capture_is_told_its_world_once(content: dict, opened) -> None:
    utm = WorldFrame("EPSG:32633")
    assert opened(content).in_world(utm).world == utm
    with pytest.raises(CaptureError, match="says itself that it is in EPSG:2180"):
        opened({**content, "crs": "EPSG:2180"}).in_world(utm)


def test_focal_length_from_the_angle_and_size_from_the_picture(content: dict, opened) -> None:
    """instant-ngp form: 32 px across 2·atan(16/20) is f = 20 px; the principal point is centred."""
    bare = {"camera_angle_x": 2 * math.atan(16 / 20), "frames": content["frames"]}
    camera = opened(bare).frames[0].camera
    assert camera.fx == pytest.approx(20.0)
    assert camera.fy == pytest.approx(20.0)
    assert (camera.width, camera.height, camera.cx, camera.cy) == (32, 18, 16.0, 9.0)
    both = opened({**bare, "camera_angle_y": 2 * math.atan(9 / 10)}).frames[0].camera
    assert both.fy == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("keys", "model", "distortion"),
    [
        ({"k1": 0.1, "k2": -0.2, "p1": 0.01, "p2": 0.02}, "OPENCV", (0.1, -0.2, 0.01, 0.02)),
        ({"camera_model": "OPENCV", "k1": 0.1, "k3": 0.3}, "OPENCV", (0.1, 0.0, 0.0, 0.0, 0.3)),
        ({"camera_model": "OPENCV", "k1": 0.0, "p1": 0}, "PINHOLE", ()),
        ({"distortion_params": [0.1, 0.2, 0, 0, 0.3, 0.4]}, "OPENCV", (0.1, 0.2, 0.3, 0.4)),
        ({"camera_model": "OPENCV_FISHEYE", "k1": 0.1}, "OPENCV_FISHEYE", (0.1, 0.0, 0.0, 0.0)),
        ({"is_fisheye": True, "k4": 0.1}, "OPENCV_FISHEYE", (0.0, 0.0, 0.0, 0.1)),
        ({"camera_model": "SIMPLE_PINHOLE"}, "PINHOLE", ()),
    ],
)
def test_camera_models(content: dict, opened, keys: dict, model: str, distortion: tuple) -> None:
    camera = opened({**content, **keys}).frames[0].camera
    assert (camera.model, camera.distortion) == (model, distortion)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"camera_model": "EQUIRECTANGULAR"}, "'EQUIRECTANGULAR' is not supported"),
        ({"camera_model": "OPENCV", "k4": 0.1}, "k4 = 0.1 has no counterpart"),
        ({"camera_model": "PINHOLE", "k1": 0.1}, "PINHOLE with distortion"),
        ({"camera_model": "OPENCV_FISHEYE", "p1": 0.1}, "no tangential"),
        ({"latlong": True}, "'latlong' is not supported"),
        ({"distortion_params": [0.1, 0.2]}, "distortion_params as"),
        ({"fl_x": 0.0}, "fx = 0.0"),
        ({"fl_x": float("nan")}, "'fl_x'"),
        ({"fl_x": "thirty"}, "'fl_x'"),
        ({"fl_x": None}, "'fl_x'"),
        ({"w": 32.5}, "whole pixels"),
        ({"w": 0}, "width"),
        ({"h": 10**9}, "height"),
    ],
)
def test_unusable_cameras_are_refused(content: dict, opened, keys: dict, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        opened({**content, **keys})


def test_missing_focal_length_is_named(content: dict, opened) -> None:
    del content["fl_x"], content["fl_y"]
    with pytest.raises(CaptureError, match="expected 'fl_x' or 'camera_angle_x'"):
        opened(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_path": "images/0000"}, "no extension"),
        ({"file_path": "images/none.jpg"}, "1 of 9 pictures are missing"),
        ({"file_path": None}, "without 'file_path'"),
        ({"transform_matrix": None}, "4x4 or 3x4"),
        ({"transform_matrix": [[1, 2], [3, 4]]}, "4x4 or 3x4"),
        ({"transform_matrix": [[float("nan")] * 4] * 4}, "finite"),
        ({"transform_matrix": (np.eye(4) * 0.5).tolist()}, "last row"),
        ({"transform_matrix": np.diag([2.0, 2, 2, 1]).tolist()}, "not a rotation"),
        ({"split": "dev"}, "'dev'"),
        ({"timestamp": "noon"}, "'timestamp'"),
        ({"exposure": -1.0}, "positive exposure"),
        ({"height_m": "high"}, "'height_m'"),
        ({"task": 7}, "name of a task"),
    ],
)
def test_unusable_frames_are_named(content: dict, opened, change: dict, message: str) -> None:
    content["frames"][0].update(change)
    with pytest.raises(CaptureError, match=message):
        opened(content)


def test_rolling_shutter_poses_are_refused(content: dict, opened) -> None:
    frame = content["frames"][0]
    frame["transform_matrix_start"] = frame.pop("transform_matrix")
    with pytest.raises(CaptureError, match="rolling-shutter"):
        opened(content)


def test_3x4_matrices_are_completed(content: dict, opened) -> None:
    whole = content["frames"][0]["transform_matrix"]
    content["frames"][0]["transform_matrix"] = whole[:3]
    assert opened(content).frames[0].T_world_camera.tolist() == whole


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '{"frames": 3}', '{"frames": [4]}'])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(CaptureError, match="transforms.json"):
        open_capture(tmp_path)


def test_one_file_per_split(content: dict, tmp_path: Path, write_json) -> None:
    """The form of the synthetic NeRF scenes; no unit is changed outside `pose/<block>`."""
    frames = content["frames"]
    write_json(tmp_path / "transforms_train.json", {**content, "frames": frames[:6]})
    write_json(tmp_path / "transforms_test.json", {**content, "frames": frames[6:]})
    capture = open_capture(tmp_path)
    assert capture.format == "transforms"
    assert [len(capture.split(s)) for s in ("train", "test")] == [6, 3]
    assert capture.frames[3].T_world_camera[0, 3] == 30.0


def test_windows_paths(content: dict, opened) -> None:
    content["frames"][0]["file_path"] = "images\\0000.jpg"
    assert opened(content).frame("images/0000.jpg").seq == 0


def test_depth_and_mask(content: dict, opened, tmp_path: Path) -> None:
    depth = encode_image(np.full((18, 32), 1500, np.uint16), "png")
    mask = np.zeros((18, 32), np.uint8)
    mask[:, 16:] = 255
    (tmp_path / "d.png").write_bytes(depth)
    (tmp_path / "m.png").write_bytes(encode_image(mask, "png"))
    (tmp_path / "m.jpg").write_bytes(encode_image(mask, "jpeg"))
    content["frames"][0].update(depth_file_path="d.png", mask_path="m.png")
    content["frames"][1].update(mask_path="m.jpg")
    first, second = opened(content).frames[:2]
    assert (first.depth, first.depth_scale_m) == (depth, 1e-3)
    assert first.mask == encode_image(mask, "png")
    decoded = cv2.imdecode(np.frombuffer(second.mask, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(decoded, mask)
    content["depth_unit_scale_factor"] = 0.01
    assert opened(content).frames[0].depth_scale_m == 0.01


def test_instant_ngp_depth_scale(content: dict, opened, tmp_path: Path) -> None:
    (tmp_path / "d.png").write_bytes(encode_image(np.ones((18, 32), np.uint16), "png"))
    content["integer_depth_scale"] = 0.002
    content["frames"][0]["depth_path"] = "d.png"
    assert opened(content).frames[0].depth_scale_m == 0.002


@pytest.mark.parametrize("key", ["depth_file_path", "mask_path"])
def test_unusable_layers_are_refused(content: dict, opened, tmp_path: Path, key: str) -> None:
    content["frames"][0][key] = "layer.png"
    with pytest.raises(CaptureError, match="layer.png"):
        opened(content).frames[0]
    (tmp_path / "layer.png").write_bytes(encode_image(np.ones((5, 5), np.uint16), "png"))
    with pytest.raises(CaptureError, match="the file is 5x5"):
        opened(content).frames[0]
    (tmp_path / "layer.png").write_bytes(b"no picture")
    with pytest.raises(CaptureError, match="0000.jpg"):
        opened(content).frames[0]


def test_a_folder_is_called_by_its_name_wherever_it_is_opened_from(
    content: dict, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(content)
    monkeypatch.chdir(tmp_path)
    for path in (".", "transforms.json"):
        assert open_capture(Path(path)).name == tmp_path.name
    long = tmp_path / ("flight" * 30)
    (tmp_path / "images").rename(long.with_name("moved"))
    long.mkdir()
    (tmp_path / "moved").rename(long / "images")
    (tmp_path / "transforms.json").rename(long / "transforms.json")
    assert open_capture(long).name == long.name[:128]


def test_names_and_rows_are_such_as_may_be_sent(
    content: dict, opened, tmp_path: Path, write_picture
) -> None:
    odd = "images/Screenshot at 9.15\u202fAM.jpg"
    write_picture(tmp_path / odd)
    content["frames"][0]["file_path"] = odd
    content["frames"][0]["transform_matrix"][3] = [0.0, 1e-7, 0.0, 1.0000001]
    frame = opened(content).frames[0]
    assert frame.T_world_camera[3].tolist() == [0, 0, 0, 1]
    for frame in opened(content).frames:
        decode(encode(PutFrame(session="s", stream="c", frame=frame)))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(w=10**400),
        lambda c: c.update(fl_x=10**400),
        lambda c: c["frames"][0].update(transform_matrix=[[10**400] * 4] * 4),
        lambda c: (c.update(train_filenames=["a"]), c["frames"][0].update(file_path=["a"])),
        lambda c: c["frames"][0].update(file_path="images/\0.jpg"),
        lambda c: c["frames"][0].update(mask_path="images/\0.png"),
        lambda c: c["frames"][0].update(depth_file_path="images/\0.png"),
    ],
)
def test_absurd_values_are_named(content: dict, opened, change: Any) -> None:
    change(content)
    with pytest.raises(CaptureError):
        list(opened(content).frames)
