"""A capture as peers read it: a nerfstudio project of its train frames, and held-out views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mclnf_edge.captures import Capture
from mclnf_edge.errors import CaptureError, ConfigError
from mclnf_edge.images import decode_image, undistort
from mclnf_edge.maths.metrics import aligned, psnr, ssim
from mclnf_edge.report import write_json, write_picture
from mclnf_edge.types import Camera, Frame

RGB = npt.NDArray[np.uint8]


ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Threads that wait for one another spin, on a busy machine for most of their CPU time."""


class PeerError(ConfigError):
    """A peer cannot be run, or gave up."""


class HeldOut(NamedTuple):
    """A view that a peer is asked for and never sees.

    `pose` is the camera-to-world matrix (metres, OpenGL axes), `truth` (H, W, 3) as a pinhole
    `camera` would have seen it, `valid` (H, W) False where the original picture holds nothing.
    """

    name: str
    camera: Camera
    pose: npt.NDArray[np.float64]
    truth: RGB
    valid: npt.NDArray[np.bool_]

    def job(self) -> dict[str, Any]:
        """The view without its picture, in the words of a transforms.json."""
        return {"name": self.name, **words(self.camera, self.pose)}

    def compare(self, shown: RGB) -> dict[str, Any]:
        """A peer's picture against the truth, by the measures of `mclnf-edge eval`."""
        return {
            "frame": self.name,
            "psnr": psnr(shown, self.truth, self.valid),
            "psnr_aligned": aligned(shown, self.truth, self.valid),
            "ssim": ssim(shown, self.truth),
        }


def words(camera: Camera, pose: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Pose and pinhole intrinsics in pixels as in a transforms.json."""
    return {
        "transform_matrix": pose.tolist(),
        **{"w": camera.width, "h": camera.height, "fl_x": camera.fx, "fl_y": camera.fy},
        **{"cx": camera.cx, "cy": camera.cy},
    }


def write(capture: Capture, source: Path, out: Path) -> list[HeldOut]:
    """Write the train frames to `out` and return the held-out ones.

    Pictures become undistorted PNGs of full size; pixels without an original get a mask. The
    sparse points beside the capture (`points3d.ply`), where there are any, come along. Raises
    CaptureError when one of the splits is empty.
    """
    train, test = capture.split("train").frames, capture.split("test").frames
    if not len(train) or not len(test):
        raise CaptureError(f"{capture.name}: expected train and test frames, one split is empty")
    frames = []
    for frame in train:
        name = f"{frame.seq:04d}.png"
        picture, camera, valid = pinhole(frame)
        write_picture(out / "images" / name, picture)
        listed = {"file_path": f"images/{name}", **words(camera, frame.T_world_camera)}
        if not valid.all():
            write_picture(out / "masks" / name, np.repeat(valid[..., None] * np.uint8(255), 3, 2))
            listed["mask_path"] = f"masks/{name}"
        frames.append(listed)
    project: dict[str, Any] = {"camera_model": "PINHOLE", "orientation_override": "none"}
    if (source / "points3d.ply").exists():
        shutil.copy(source / "points3d.ply", out / "points3d.ply")
        project["ply_file_path"] = "points3d.ply"
    write_json(out / "transforms.json", project | {"frames": frames})
    return [held_out(frame) for frame in test]


def needs_points(project: Path) -> None:
    """PeerError when a project has no sparse points to start splats from."""
    if "ply_file_path" not in json.loads((project / "transforms.json").read_text("utf-8")):
        raise PeerError("splats start from sparse points: expected points3d.ply in the capture")


def pinhole(frame: Frame) -> tuple[RGB, Camera, npt.NDArray[np.bool_]]:
    """A frame's picture undistorted, its pinhole camera, and where the original has pixels."""
    return undistort(decode_image(frame.image, frame.encoding, frame.camera), frame.camera)


def held_out(frame: Frame) -> HeldOut:
    """A frame as a view that peers are asked for."""
    picture, camera, valid = pinhole(frame)
    return HeldOut(f"{frame.seq:04d}", camera, frame.T_world_camera, picture, valid)
