"""Mega-NeRF data sets, written with torch the way its converter writes them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.captures.detect import open_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.types import Camera

torch = pytest.importorskip("torch")

ORIGIN, SCALE = [-150.0, 20.0, 30.0], 400.0
LOOKS_DOWN = [[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
"""In DRB: camera x is right, camera y (up in the picture) is forward, camera z is up."""


def metadata(position: list[float]) -> dict:
    c2w = torch.cat([torch.tensor(LOOKS_DOWN), torch.tensor(position)[:, None]], dim=1)
    intrinsics = torch.tensor([30.0, 31.0, 16.0, 9.0])
    return {"W": 32, "H": 18, "intrinsics": intrinsics, "c2w": c2w, "distortion": torch.zeros(4)}


@pytest.fixture
def folder(tmp_path: Path, write_picture) -> Path:
    """Frames 0, 1 and 3 train, 2 val; frame i stands 100 + i m up, 40 m right, 8 m forward."""
    torch.save(
        {"origin_drb": torch.tensor(ORIGIN), "pose_scale_factor": SCALE},
        tmp_path / "coordinates.pt",
    )
    for i, split in enumerate(("train", "train", "val", "train")):
        file = tmp_path / split / "metadata" / f"{i:06d}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        drb = np.array([-100.0 - i, 40.0, -8.0])
        torch.save(metadata(((drb - ORIGIN) / SCALE).tolist()), file)
        suffix = ".JPG" if i == 1 else ".jpg"
        write_picture(tmp_path / split / "rgbs" / f"{i:06d}{suffix}", 10 * i)
    return tmp_path


def test_metres_right_forward_up(folder: Path) -> None:
    capture = open_capture(folder)
    assert (capture.format, len(capture)) == ("meganerf", 4)
    for i, frame in enumerate(capture):
        assert frame.name.startswith(("train/", "val/"))
        np.testing.assert_allclose(frame.T_world_camera[:3, 3], [40, 8, 100 + i], atol=1e-4)
        np.testing.assert_allclose(frame.T_world_camera[:3, :3], np.eye(3), atol=1e-6)
    assert capture.frames[0].camera == Camera(32, 18, 30.0, 31.0, 16.0, 9.0)
    assert capture.frames[1].name == "train/000001.JPG"


def test_splits(folder: Path) -> None:
    capture = open_capture(folder)
    assert [f.seq for f in capture.split("val")] == [2]
    assert capture.split("val").frames[0].meta["measured_columns"] == "right half"
    assert [f.seq for f in capture.split("train")] == [0, 1, 3]
    assert any("right one" in note for note in capture.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c2w": torch.eye(4)}, r"'c2w' finite, of shape \(3, 4\)"),
        ({"c2w": torch.full((3, 4), float("nan"))}, "finite"),
        ({"c2w": torch.ones(3, 4)}, "not a rotation"),
        ({"c2w": "identity"}, "not numeric"),
        ({"intrinsics": torch.zeros(4)}, "fx = 0.0"),
        ({"W": 0}, "width"),
    ],
)
def test_unusable_metadata_is_named(folder: Path, change: dict, message: str) -> None:
    torch.save({**metadata([0.0, 0.0, 0.0]), **change}, folder / "train/metadata/000001.pt")
    with pytest.raises(CaptureError, match=message) as error:
        open_capture(folder)
    assert "000001" in str(error.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_absurd_scales_are_refused(folder: Path, scale: float) -> None:
    coordinates = {"origin_drb": torch.tensor(ORIGIN), "pose_scale_factor": scale}
    torch.save(coordinates, folder / "coordinates.pt")
    with pytest.raises(CaptureError, match="pose_scale_factor"):
        open_capture(folder)


def test_missing_keys_and_other_files_are_refused(folder: Path) -> None:
    torch.save({"W": 32}, folder / "train/metadata/000001.pt")
    with pytest.raises(CaptureError, match=r"no 'c2w'; it holds \['W'\]"):
        open_capture(folder)
    torch.save([1, 2], folder / "coordinates.pt")
    with pytest.raises(CaptureError, match="expected a dictionary, received list"):
        open_capture(folder)
    (folder / "coordinates.pt").write_bytes(b"no file of torch")
    with pytest.raises(CaptureError, match="cannot be loaded safely"):
        open_capture(folder)


class Trap:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_is_executed_on_loading(folder: Path) -> None:
    trace = folder / "executed"
    pickle.loads(pickle.dumps(Trap(trace)))
    assert trace.exists(), "the trap does not work"
    trace.unlink()
    torch.save({"origin_drb": Trap(trace)}, folder / "coordinates.pt")
    with pytest.raises(CaptureError, match="cannot be loaded safely"):
        open_capture(folder)
    assert not trace.exists()


def test_missing_pictures_are_refused(folder: Path) -> None:
    (folder / "val/rgbs/000002.jpg").unlink()
    with pytest.raises(CaptureError, match="1 of 4 pictures are missing"):
        open_capture(folder)
