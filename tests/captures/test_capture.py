"""Order, splits, names and lazy reading of captures, whatever their format."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.captures.capture import Record, make_capture, natural_key
from mclnf_edge.captures.detect import open_capture
from mclnf_edge.errors import CaptureError
from mclnf_edge.types import Camera, WorldFrame

CAMERA = Camera(32, 18, 30.0, 30.0, 16.0, 9.0)


@pytest.fixture
def records(tmp_path: Path, write_picture) -> list[Record]:
    names = [f"a/img_{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        write_picture(tmp_path / name, 10 * i)
    return [Record(name, tmp_path / name, CAMERA, np.eye(4)) for name in names]


def capture_of(records: list[Record]):
    return make_capture("flight", "test", WorldFrame(), records)


def test_without_timestamps_order_is_by_name_as_numbers(records: list[Record]) -> None:
    capture = capture_of(records[::-1])
    assert [f.name for f in capture.frames][:3] == ["a/img_0.png", "a/img_1.png", "a/img_2.png"]
    assert [r.timestamp for r in capture.frames.records] == [float(i) for i in range(20)]
    assert any("no timestamps" in note for note in capture.notes)


def test_with_timestamps_order_is_by_time(records: list[Record]) -> None:
    timed = [replace(r, timestamp=100.0 - i) for i, r in enumerate(records)]
    capture = capture_of(timed)
    assert capture.frames[0].name == "a/img_19.png"
    assert [f.seq for f in capture] == list(range(20))


def test_default_split_holds_out_every_eighth(records: list[Record]) -> None:
    capture = capture_of(records)
    assert [f.seq for f in capture.split("test")] == [7, 15]
    assert len(capture.split("train")) == 18
    assert len(capture.split("val")) == 0
    assert len(capture.split("all")) == len(capture) == 20
    with pytest.raises(CaptureError, match="'dev'"):
        capture.split("dev")  # type: ignore[arg-type]


def test_a_fold_holds_out_every_eighth_from_its_offset(records: list[Record]) -> None:
    capture = capture_of([replace(r, split="val") for r in records])
    fold = capture.fold(3)
    assert [f.seq for f in fold.split("test")] == [3, 11, 19]
    assert len(fold.split("train")) == 17 and len(fold) == 20
    assert {f.split for f in capture.fold(None)} == {"val"}
    with pytest.raises(CaptureError, match="0 to 7, received 8"):
        capture.fold(8)


def test_own_splits_are_kept(records: list[Record]) -> None:
    capture = capture_of([replace(r, split="val") for r in records[:3]])
    assert {f.split for f in capture} == {"val"}


def test_frames_are_found_by_name_or_place(records: list[Record]) -> None:
    capture = capture_of(records)
    for key in ("a/img_7.png", "img_7.png", "img_7", "7", 7):
        assert capture.frame(key).name == "a/img_7.png"
    for key in ("img_77", "g_7.png", 20, -1, "20"):
        with pytest.raises(CaptureError, match="of 20 frames"):
            capture.frame(key)


def test_a_name_of_digits_goes_before_a_place(records: list[Record], write_picture) -> None:
    named = [replace(r, name=f"{i + 1:04d}.png") for i, r in enumerate(records)]
    assert capture_of(named).frame("0003").seq == 2
    assert capture_of(named).frame("3").seq == 3


def test_ambiguous_names_are_refused(records: list[Record]) -> None:
    twice = [replace(records[0], name="a/x.png"), replace(records[1], name="b/x.png")]
    with pytest.raises(CaptureError, match="fits 2 of 2 frames"):
        capture_of(twice).frame("x.png")


def test_bytes_are_the_files_own_and_read_when_asked(records: list[Record]) -> None:
    capture = capture_of(records)
    assert capture.frames[4].image == records[4].image.read_bytes()
    records[4].image.unlink()
    assert capture.frames[3].encoding == "png"
    with pytest.raises(CaptureError, match="img_4.png"):
        capture.frames[4]


def test_resized_pictures_scale_the_camera_openly(records: list[Record], write_picture) -> None:
    write_picture(records[0].image, width=64, height=36)
    frame = capture_of(records).frames[0]
    assert frame.camera == CAMERA.scaled(64, 36)
    assert frame.camera.fx == 60.0
    assert frame.meta["camera_scaled_from"] == (32, 18)
    assert "camera_scaled_from" not in capture_of(records).frames[1].meta


def test_pictures_of_another_shape_are_refused(records: list[Record], write_picture) -> None:
    write_picture(records[0].image, width=32, height=32)
    with pytest.raises(CaptureError, match="given for 32x18, the picture is 32x32"):
        capture_of(records).frames[0]


def test_truncated_pictures_are_refused(records: list[Record]) -> None:
    records[0].image.write_bytes(records[0].image.read_bytes()[:-20])
    with pytest.raises(CaptureError, match="img_0.png.*cut short"):
        capture_of(records).frames[0]


def test_bombs_are_refused_before_they_are_decoded(records: list[Record]) -> None:
    """A few bytes of PNG whose header claims 30,000x16,875 pixels, the camera's shape."""
    header = struct.pack(">IIBBBBB", 30_000, 16_875, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    records[0].image.write_bytes(b"\x89PNG\r\n\x1a\n" + data + b"\0\0\0\0IEND\xaeB`\x82")
    with pytest.raises(CaptureError, match="img_0.png.*67108864 pixels"):
        capture_of(records).frames[0]


def test_files_that_are_no_pictures_are_refused(records: list[Record]) -> None:
    records[0].image.write_bytes(b"hello")
    with pytest.raises(CaptureError, match="img_0.png"):
        capture_of(records).frames[0]


def test_a_part_of_the_frames_is_still_unread(records: list[Record]) -> None:
    """Opening, splitting and slicing read no picture: all may be gone by then."""
    capture = capture_of(records)
    for record in records:
        record.image.unlink()
    assert len(capture.split("train").frames[2:5]) == 3
    with pytest.raises(CaptureError, match="img_2.png"):
        capture.frames[2:5][0]


def test_bad_poses_and_cameras_name_the_frame(records: list[Record]) -> None:
    records[5] = replace(records[5], T_world_camera=np.eye(4) * 2)
    with pytest.raises(CaptureError, match=r"flight: frame 'a/img_5.png': .*last row"):
        capture_of(records)
    records[5] = replace(records[5], T_world_camera=np.eye(4), camera=replace(CAMERA, fx=0.0))
    with pytest.raises(CaptureError, match=r"frame 'a/img_5.png': fx"):
        capture_of(records)


def test_missing_files_are_counted(records: list[Record]) -> None:
    records[2].image.unlink()
    records[9].image.unlink()
    with pytest.raises(CaptureError, match="2 of 20 pictures are missing, first 'a/img_2.png'"):
        capture_of(records)


def test_empty_captures_are_refused() -> None:
    with pytest.raises(CaptureError, match="no frames"):
        capture_of([])


def test_natural_order() -> None:
    names = ["b/2", "a/10.png", "a/9.png", "a/9b.png"]
    assert sorted(names, key=natural_key) == ["a/9.png", "a/9b.png", "a/10.png", "b/2"]


def test_unknown_folders_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="transforms.json.*Mega-NeRF.*COLMAP"):
        open_capture(tmp_path)
    with pytest.raises(CaptureError, match="no such capture"):
        open_capture(tmp_path / "nowhere")
