"""Pose files: TUM and CSV, named axes, interpolation, growth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mclnf_edge.captures.poses import PoseFile
from mclnf_edge.errors import CaptureError

HALF = math.sqrt(0.5)


@pytest.fixture
def written(tmp_path: Path):
    def write(*lines: str) -> Path:
        file = tmp_path / "poses.txt"
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


def test_tum_lines_are_opencv_cameras_in_enu(written) -> None:
    """The identity quaternion looks along world z (up), with world y down in the picture."""
    poses = PoseFile(written("# time x y z qx qy qz qw", "", "10.5 1 2 3 0 0 0 1"))
    pose = poses.at(10.5)
    assert pose[:3, 3].tolist() == [1.0, 2.0, 3.0]
    assert (pose[:3, :3] @ [0, 0, -1]).tolist() == [0.0, 0.0, 1.0]
    assert (pose[:3, :3] @ [0, -1, 0]).tolist() == [0.0, 1.0, 0.0]
    opengl = PoseFile(poses.path, camera_axes="opengl").at(10.5)
    assert np.array_equal(opengl[:3, :3], np.eye(3))


@pytest.mark.parametrize(
    ("header", "line", "time_s"),
    [
        ("time,x,y,z,qx,qy,qz,qw", "12.5,1,2,3,0,0,0,1", 12.5),
        ("t_ms , X, Y, Z, qx, qy, qz, qw", "12500, 1, 2, 3, 0, 0, 0, 1", 12.5),
        ("timestamp_ns,tx,ty,tz,qw,qx,qy,qz", "12500000000,1,2,3,1,0,0,0", 12.5),
        ("id,z,y,x,time_us,qx,qy,qz,qw,note", "7,3,2,1,12500000,0,0,0,1,ok", 12.5),
        ("time,east,north,up,qx,qy,qz,qw", "12.5,1,2,3,0,0,0,1", 12.5),
        ("time,north,east,down,qx,qy,qz,qw", f"12.5,2,1,-3,{HALF},{HALF},0,0", 12.5),
    ],
)
def test_csv_columns_are_found_by_name(written, header: str, line: str, time_s: float) -> None:
    """All lines say the same: at (1, 2, 3) in ENU with the camera's axes along the world's."""
    poses = PoseFile(written("\ufeff" + header, line), camera_axes="opengl")
    assert poses.times == [pytest.approx(time_s)]
    np.testing.assert_allclose(poses.poses[0][:3, 3], [1, 2, 3])
    np.testing.assert_allclose(poses.poses[0][:3, :3], np.eye(3), atol=1e-15)


def test_world_axes_can_be_asked_for(written) -> None:
    file = written("1 2 1 -3 0 0 0 1")
    assert PoseFile(file, world_axes="NED").at(1.0)[:3, 3].tolist() == [1.0, 2.0, 3.0]
    named = written("time,north,east,down,qx,qy,qz,qw", "1,2,1,-3,0,0,0,1")
    with pytest.raises(CaptureError, match="columns name NED axes, ENU was asked for"):
        PoseFile(named, world_axes="ENU")
    file = written("1 2 1 -3 0 0 0 1")
    with pytest.raises(CaptureError, match="world axes: expected one of ENU, NED, DRB"):
        PoseFile(file, world_axes="XYZ")
    with pytest.raises(CaptureError, match="camera axes: expected one of opengl, opencv"):
        PoseFile(file, camera_axes="left")


def test_interpolation_between_two_poses(written) -> None:
    """A quarter of the way through a quarter turn about z is 22.5 degrees."""
    lines = "0 0 0 10 0 0 0 1", f"1 4 8 10 0 0 {HALF} {HALF}"
    pose = PoseFile(written(*lines), camera_axes="opengl").at(0.25)
    np.testing.assert_allclose(pose[:3, 3], [1, 2, 10])
    c, s = math.cos(math.pi / 8), math.sin(math.pi / 8)
    np.testing.assert_allclose(pose[:3, :3], [[c, -s, 0], [s, c, 0], [0, 0, 1]], atol=1e-12)


def test_gaps_are_stated_and_not_bridged(written) -> None:
    poses = PoseFile(written(*(f"{t} 0 0 0 0 0 0 1" for t in (0, 1, 4, 5))))
    assert poses.largest_gap_s() == 3.0
    assert poses.covered() == "0.000 to 5.000 s"
    assert [poses.gap_at(t) for t in (0.5, 1.0, 2.0)] == [1.0, 0.0, 3.0]
    assert math.isinf(poses.gap_at(-0.1))
    assert math.isinf(poses.gap_at(5.1))
    assert poses.at(2.0, max_gap_s=3.0)[0, 3] == 0.0
    with pytest.raises(CaptureError, match=r"3\.000 s apart, allowed 1\.5 s"):
        poses.at(2.0)
    with pytest.raises(CaptureError, match=r"covers 0\.000 to 5\.000 s"):
        poses.at(6.0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1 2 3"], "poses.txt:1: expected a TUM line"),
        (["0 0 0 0 0 0 0 1", "1 0 0 0 0 0 0"], "poses.txt:2: expected time, position"),
        (["0 0 0 0 0 0 0 1", "1 0 0 zero 0 0 0 1"], "poses.txt:2"),
        (["0 0 0 0 0 0 0 1", "0 0 0 0 0 0 0 1"], "poses.txt:2: times must increase"),
        (["0 nan 0 0 0 0 0 1"], "poses.txt:1: .*NaN"),
        (["0 0 0 1e12 0 0 0 1"], "beyond"),
        (["0 0 0 0 0 0 0 0"], "unit quaternion"),
        (["0 0 0 0 0 0 0 nan"], "unit quaternion"),
        (["0 0 0 0 1 1 1 1"], "unit quaternion"),
        (["nan 0 0 0 0 0 0 1"], "is not in seconds"),
        (["1500000000000000000 0 0 0 0 0 0 1"], "is not in seconds; name a CSV column"),
        (["time,x,y,qx,qy,qz,qw", "0,0,0,0,0,0,1"], "poses.txt:1: expected columns time"),
        (["x,y,z,qx,qy,qz,qw", "0,0,0,0,0,0,1"], "expected columns time"),
        (["0,0,0,0,0,0,0,1"], "expected columns time"),
        (["# only words"], "no poses"),
    ],
)
def test_unusable_lines_are_named(written, lines: list[str], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        PoseFile(written(*lines))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="none.txt: cannot read poses"):
        PoseFile(tmp_path / "none.txt")


def test_a_growing_file_is_followed_line_by_line(tmp_path: Path) -> None:
    """A line still without its newline is not half a number: it waits."""
    file = tmp_path / "live.txt"
    file.write_text("")
    poses = PoseFile(file, growing=True)
    assert poses.covered() == "no time yet"
    with file.open("a") as out:
        out.write("0 0 0 0 0 0 0 1\n1 1")
        out.flush()
        assert poses.refresh() == 1
        out.write("5 0 0 0 0 0 1\n")
    assert poses.refresh() == 1
    assert poses.times == [0.0, 1.0]
    assert poses.poses[1][0, 3] == 15.0
    assert poses.refresh() == 0
