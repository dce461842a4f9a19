"""Video files posed by a pose file, and live sources, on a video written here."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mclnf_edge.captures.poses import PoseFile
from mclnf_edge.captures.video import VideoSource, open_video
from mclnf_edge.errors import CaptureError
from mclnf_edge.images import decode_image
from mclnf_edge.types import Camera

CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
FPS, COUNT = 10, 30


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds at 10 pictures a second; picture i is grey 8 i."""
    path = tmp_path_factory.mktemp("video") / "flight.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (64, 48))
    assert writer.isOpened(), "OpenCV cannot write MJPG here"
    for i in range(COUNT):
        writer.write(np.full((48, 64, 3), 8 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture
def poses(tmp_path: Path):
    """A pose file of a camera that moves 10 m/s east."""

    def write(*times: float) -> Path:
        file = tmp_path / "poses.txt"
        file.write_text("".join(f"{t} {10 * t} 0 50 1 0 0 0\n" for t in times))
        return file

    return write


def test_every_picture_gets_the_pose_of_its_time(video: Path, poses) -> None:
    source = open_video(video, poses(0, 1, 2, 3), CAMERA)
    frames = list(source)
    assert [f.seq for f in frames] == list(range(COUNT))
    assert frames[7].name == "flight/000007"
    for i, frame in enumerate(frames):
        assert frame.timestamp == pytest.approx(i / FPS, abs=1e-3)
        assert frame.T_world_camera[0, 3] == pytest.approx(10 * frame.timestamp)
        shade = decode_image(frame.image, frame.encoding, frame.camera).mean()
        assert shade == pytest.approx(8 * i, abs=3)
        assert frame.split == "train"
    np.testing.assert_allclose(frames[0].T_world_camera[:3, :3], np.eye(3), atol=1e-12)
    assert not source.skipped
    assert source.poses.largest_gap_s() == 1.0


def test_pictures_without_a_pose_are_counted(video: Path, poses) -> None:
    """Poses at 0.5, 1 and 2.5 s: 5 before, 14 in the gap of 1.5 s, 4 after the last."""
    source = open_video(video, poses(0.5, 1, 2.5), CAMERA, max_gap_s=1.0)
    frames = list(source)
    assert [round(f.timestamp, 3) for f in frames] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.5]
    assert source.skipped == {"outside": 9, "gap": 14}
    assert len(list(source)) == 7
    assert source.skipped == {"outside": 9, "gap": 14}


def test_the_clock_of_the_poses_is_an_offset_away(video: Path, poses) -> None:
    source = open_video(video, poses(1000, 1001, 1002, 1003), CAMERA, offset_s=1000.0)
    assert next(iter(source)).timestamp == pytest.approx(1000.0)
    with pytest.raises(CaptureError, match=r"no picture has a pose.*cover 1000\.000 to 1003\.000"):
        list(open_video(video, poses(1000, 1001, 1002, 1003), CAMERA))


@pytest.mark.parametrize(("rate_hz", "count"), [(5.0, 15), (3.0, 9), (1.0, 3), (50.0, 30)])
def test_pictures_are_thinned_to_a_rate(video: Path, poses, rate_hz: float, count: int) -> None:
    frames = list(open_video(video, poses(0, 1, 2, 3), CAMERA, rate_hz=rate_hz))
    assert len(frames) == count
    assert frames[1].timestamp - frames[0].timestamp >= 1 / rate_hz - 0.02 or rate_hz > FPS


def test_the_camera_follows_the_size_of_the_video(video: Path, poses) -> None:
    frame = next(iter(open_video(video, poses(0, 3), CAMERA.scaled(128, 96), max_gap_s=4.0)))
    assert frame.camera == CAMERA
    with pytest.raises(CaptureError, match="says 64x64, the video is 64x48: not the same shape"):
        list(open_video(video, poses(0, 3), Camera(64, 64, 50.0, 50.0, 32.0, 32.0), max_gap_s=4.0))


def test_unusable_sources_are_named(tmp_path: Path, video: Path, poses) -> None:
    with pytest.raises(CaptureError, match="no such video file"):
        open_video(tmp_path / "none.mp4", poses(0, 1), CAMERA)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(CaptureError, match="broken.mp4: OpenCV cannot open"):
        list(open_video(broken, poses(0, 1), CAMERA))
    with pytest.raises(CaptureError, match="above 0, received 0"):
        open_video(video, poses(0, 1), CAMERA, rate_hz=0.0)
    with pytest.raises(CaptureError, match="cannot read poses"):
        open_video(video, tmp_path / "none.txt", CAMERA)


def test_a_truncated_video_gives_what_it_has(tmp_path: Path, video: Path, poses) -> None:
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    frames = list(open_video(cut, poses(0, 1, 2, 3), CAMERA))
    assert 0 < len(frames) < COUNT


def test_numbers_and_addresses_are_live(poses) -> None:
    assert open_video("0", poses(0, 1), CAMERA).source == 0
    address = open_video("rtsp://localhost:1/x", poses(0, 1), CAMERA)
    assert address.poses.growing
    assert address.name == "live"


def test_a_live_source_waits_for_its_poses(video: Path, tmp_path: Path) -> None:
    """The pose file, empty at first, grows while the pictures are held back."""
    file = tmp_path / "live.txt"
    file.write_text("")
    start = time.time()
    source = VideoSource(str(video), CAMERA, PoseFile(file, growing=True), max_gap_s=30.0)
    frames = iter(source)
    file.write_text("".join(f"{start + dt:.6f} {dt} 0 50 1 0 0 0\n" for dt in (-1.0, 10.0, 20.0)))
    kept = list(frames)
    assert len(kept) == COUNT
    assert all(start <= f.timestamp <= start + 10.0 for f in kept)
    for frame in kept:
        assert frame.T_world_camera[0, 3] == pytest.approx(frame.timestamp - start, abs=1e-3)


def test_live_pictures_whose_pose_never_comes_are_late(video: Path, tmp_path: Path) -> None:
    file = tmp_path / "live.txt"
    file.write_text("")
    source = VideoSource(str(video), CAMERA, PoseFile(file, growing=True), max_gap_s=0.2)
    with pytest.raises(CaptureError, match="no picture has a pose"):
        list(source)
    assert source.skipped == {"late": COUNT}
