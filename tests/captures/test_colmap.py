"""COLMAP sparse models, binary and text, laid out by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.captures.colmap import MODEL_NAMES
from mclnf_edge.captures.detect import open_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.geometry import matrix_to_quaternion
from mclnf_edge.types import Camera

FLIP = np.diag([1.0, -1.0, -1.0])
PINHOLE = ("PINHOLE", 32, 18, [30.0, 31.0, 16.0, 9.0])


def world_to_camera(pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COLMAP's (w, x, y, z) and translation of an opengl camera-to-world pose."""
    rotation = (pose[:3, :3] @ FLIP).T
    x, y, z, w = matrix_to_quaternion(rotation)
    return np.array([w, x, y, z]), -rotation @ pose[:3, 3]


def write_text(folder: Path, camera: tuple, poses: list[np.ndarray]) -> None:
    model, width, height, params = camera
    folder.mkdir(parents=True, exist_ok=True)
    numbers = " ".join(map(repr, params))
    (folder / "cameras.txt").write_text(f"# comment\n3 {model} {width} {height} {numbers}\n")
    lines = ["# Image list with two lines of data per image:"]
    for i, pose in enumerate(poses):
        q, t = world_to_camera(pose)
        values = " ".join(repr(float(v)) for v in (*q, *t))
        lines += [f"{i + 1} {values} 3 a b/{i}.png", "" if i % 2 else "1.5 2.5 -1 3.0 4.0 7"]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def write_binary(folder: Path, camera: tuple, poses: list[np.ndarray]) -> None:
    model, width, height, params = camera
    number = MODEL_NAMES.index(model) if isinstance(model, str) else model
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack("<QiiQQ", 1, 3, number, width, height)
    (folder / "cameras.bin").write_bytes(head + struct.pack(f"<{len(params)}d", *params))
    data = struct.pack("<Q", len(poses))
    for i, pose in enumerate(poses):
        q, t = world_to_camera(pose)
        data += struct.pack("<i7di", i + 1, *q, *t, 3) + f"a b/{i}.png".encode() + b"\0"
        data += struct.pack("<Q", i) + i * struct.pack("<ddq", 1.0, 2.0, -1)
    (folder / "images.bin").write_bytes(data)


WRITERS = {"text": write_text, "binary": write_binary}


@pytest.fixture
def poses(look_down, tmp_path: Path, write_picture) -> list[np.ndarray]:
    for i in range(4):
        write_picture(tmp_path / f"images/a b/{i}.png", 10 * i)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[0.8, -0.6], [0.6, 0.8]]
    return [look_down(5.0 * i, -7.0, 60.0, yaw=40.0 * i) @ tilt for i in range(4)]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("folder", ["sparse/0", "sparse", "."])
def test_poses_come_back(tmp_path: Path, poses, form: str, folder: str) -> None:
    WRITERS[form](tmp_path / folder, PINHOLE, poses)
    capture = open_capture(tmp_path)
    assert (capture.format, len(capture)) == ("colmap", 4)
    for frame, pose in zip(capture, poses, strict=True):
        np.testing.assert_allclose(frame.T_world_camera, pose, atol=1e-12)
    assert capture.frames[2].name == "a b/2.png"
    assert capture.frames[0].camera == Camera(32, 18, 30.0, 31.0, 16.0, 9.0)


def test_centre_and_axes_by_hand(tmp_path: Path, write_picture) -> None:
    """Identity world-to-camera rotation, t = (1, 2, 3): centre (-1, -2, -3), looking along +z."""
    write_picture(tmp_path / "images/x.png")
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 32 18 30 30 16 9\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 1 2 3 1 x.png\n\n")
    pose = open_capture(tmp_path).frames[0].T_world_camera
    assert pose[:3, 3].tolist() == [-1.0, -2.0, -3.0]
    assert (pose[:3, :3] @ [0, 0, -1]).tolist() == [0.0, 0.0, 1.0]
    assert (pose[:3, :3] @ [0, 1, 0]).tolist() == [0.0, -1.0, 0.0]


def test_the_model_folder_itself_can_be_named(tmp_path: Path, poses) -> None:
    write_binary(tmp_path / "sparse/0", PINHOLE, poses)
    assert len(open_capture(tmp_path / "sparse/0")) == 4


def test_binary_goes_before_text(tmp_path: Path, poses) -> None:
    write_text(tmp_path / "sparse/0", PINHOLE, poses)
    write_binary(tmp_path / "sparse/0", PINHOLE, poses[:2])
    assert len(open_capture(tmp_path)) == 2


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("model", "params", "expected", "distortion"),
    [
        ("SIMPLE_PINHOLE", [30, 16, 9], "PINHOLE", ()),
        ("SIMPLE_RADIAL", [30, 16, 9, 0.1], "OPENCV", (0.1, 0, 0, 0)),
        ("SIMPLE_RADIAL", [30, 16, 9, 0.0], "PINHOLE", ()),
        ("RADIAL", [30, 16, 9, 0.1, 0.2], "OPENCV", (0.1, 0.2, 0, 0)),
        ("OPENCV", [30, 30, 16, 9, 0.1, 0.2, 0.3, 0.4], "OPENCV", (0.1, 0.2, 0.3, 0.4)),
        ("OPENCV_FISHEYE", [30, 30, 16, 9, 0.1, 0, 0, 0.4], "OPENCV_FISHEYE", (0.1, 0, 0, 0.4)),
        (
            "FULL_OPENCV",
            [30, 30, 16, 9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
            "OPENCV",
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        ),
        ("RADIAL_FISHEYE", [30, 16, 9, 0.1, 0.2], "OPENCV_FISHEYE", (0.1, 0.2, 0, 0)),
    ],
)
def test_camera_models(
    tmp_path: Path, poses, form: str, model: str, params: list, expected: str, distortion: tuple
) -> None:
    WRITERS[form](tmp_path, (model, 32, 18, params), poses)
    camera = open_capture(tmp_path).frames[0].camera
    assert camera == Camera(32, 18, 30.0, 30.0, 16.0, 9.0, expected, distortion)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "name"), [("FOV", "FOV"), (77, "number 77"), (-1, "number -1")])
def test_unknown_models_are_named(tmp_path: Path, poses, model, name: str) -> None:
    write_binary(tmp_path, (model, 32, 18, [30, 30, 16, 9, 0.1]), poses)
    with pytest.raises(CaptureError, match=f"camera model {name} has no exact"):
        open_capture(tmp_path)


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
def test_any_truncation_is_refused(tmp_path: Path, poses, name: str) -> None:
    write_binary(tmp_path, PINHOLE, poses)
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(CaptureError, match=f"{name}: truncated"):
            open_capture(tmp_path)


def test_absurd_counts_end_at_the_end_of_the_file(tmp_path: Path, poses) -> None:
    write_binary(tmp_path, PINHOLE, poses)
    file = tmp_path / "images.bin"
    file.write_bytes(struct.pack("<Q", 2**64 - 1) + file.read_bytes()[8:])
    with pytest.raises(CaptureError, match="truncated"):
        open_capture(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cameras.txt", "3 PINHOLE 32\n", "cameras.txt:1: expected CAMERA_ID"),
        ("cameras.txt", "3 PINHOLE 32 18 30 31 16\n", "takes 4 parameters, received 3"),
        ("cameras.txt", "3 PINHOLE 32 18 0 0 16 9\n", "fx = 0.0"),
        ("cameras.txt", "3 PINHOLE 32 18 nan 30 16 9\n", "fx = nan"),
        ("cameras.txt", "4 PINHOLE 32 18 30 30 16 9\n", "missing camera 3"),
        ("cameras.txt", "3 EUCM 32 18 30 30 16 9 0 0\n", "camera model EUCM"),
        ("images.txt", "1 1 0 0 0 0 0\n\n", "images.txt:1: expected IMAGE_ID"),
        ("images.txt", "1 2 0 0 0 0 0 0 3 a b/0.png\n\n", "images.txt:1: expected a unit quat"),
        ("images.txt", "1 nan 0 0 0 0 0 0 3 a b/0.png\n\n", "unit quaternion"),
        ("images.txt", "1 1 0 0 0 inf 0 0 3 a b/0.png\n\n", "images.txt:1: .*NaN or infinite"),
        ("images.txt", "# nothing\n", "holds no frames"),
    ],
)
def test_unusable_text_is_named(tmp_path: Path, poses, file: str, text: str, message: str) -> None:
    write_text(tmp_path, PINHOLE, poses)
    (tmp_path / file).write_text(text)
    with pytest.raises(CaptureError, match=message):
        open_capture(tmp_path)
