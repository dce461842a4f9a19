"""Pose files beside a video: TUM or CSV, read as they grow, interpolated at frame times."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from mclnf_edge.errors import CaptureError, FrameRejected
from mclnf_edge.geometry import (
    check_pose,
    convert_axes,
    interpolate_pose,
    pose_from,
    quaternion_to_matrix,
)
from mclnf_edge.types import Matrix4

MAX_GAP_S: Final = 1.5
"""Default for the largest gap between two poses that is bridged: a 1 Hz log with jitter passes."""

_LATEST_S: Final = 1e11
_TIME_UNITS: Final = {"": 1.0, "_s": 1.0, "_ms": 1e-3, "_us": 1e-6, "_ns": 1e-9}
_TIME_NAMES: Final = ("t", "time", "timestamp")
_POSITIONS: Final = (
    (("x", "y", "z"), None),
    (("tx", "ty", "tz"), None),
    (("east", "north", "up"), "ENU"),
    (("north", "east", "down"), "NED"),
)
_QUATERNION: Final = ("qx", "qy", "qz", "qw")


class _Layout(NamedTuple):
    """Where the eight numbers stand in a line, and what they are measured in."""

    separator: str | None
    columns: tuple[int, ...]
    time_unit_s: float
    world_axes: str


class PoseFile:
    """The poses of one file, camera-to-world in opengl and ENU axes, and what has been added to it.

    TUM lines are `t x y z qx qy qz qw`. A CSV file starts with a header naming its columns: `time`,
    `timestamp` or `t` (seconds; suffix _ms, _us or _ns for others), a position `x y z` or
    `east north up` or `north east down`, and `qx qy qz qw`; other columns are ignored. The
    quaternion turns camera axes (`camera_axes`: opencv or opengl) into world axes (`world_axes`:
    ENU, NED or DRB; position columns that name their axes decide it). A `growing` file may be empty
    at first, and a last line without its newline is left for the next `refresh`.
    """

    def __init__(
        self,
        path: Path,
        camera_axes: str = "opencv",
        world_axes: str | None = None,
        *,
        growing: bool = False,
    ) -> None:
        """Read what the file holds now; CaptureError names the line that cannot be used."""
        self.path, self.growing = path, growing
        self.times: list[float] = []
        self.poses: list[Matrix4] = []
        self._camera_axes, self._world_axes = camera_axes, world_axes
        self._layout: _Layout | None = None
        self._offset = self._line = 0
        self.refresh()
        if not self.times and not growing:
            raise CaptureError(f"{path}: no poses")

    def refresh(self) -> int:
        """Read lines added since the last time and return how many poses came."""
        before = len(self.times)
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError as error:
            raise CaptureError(f"{self.path}: cannot read poses ({error})") from None
        complete = added[: added.rfind(b"\n") + 1] if self.growing else added
        for line in complete.decode("utf-8", "replace").splitlines():
            self._line += 1
            self._take(line.strip().lstrip("\ufeff"))
        self._offset += len(complete)
        return len(self.times) - before

    def covered(self) -> str:
        """The file's span of time in words."""
        return f"{self.times[0]:.3f} to {self.times[-1]:.3f} s" if self.times else "no time yet"

    def largest_gap_s(self) -> float:
        """The longest time between two poses that follow each other; 0 for a single pose."""
        gaps = (b - a for a, b in zip(self.times, self.times[1:], strict=False))
        return max(gaps, default=0.0)

    def gap_at(self, time_s: float) -> float:
        """Seconds between the two poses around a time; 0 at a pose, infinite outside the file."""
        at = bisect_left(self.times, time_s)
        if at < len(self.times) and self.times[at] == time_s:
            return 0.0
        if at in (0, len(self.times)):
            return math.inf
        return self.times[at] - self.times[at - 1]

    def at(self, time_s: float, max_gap_s: float = MAX_GAP_S) -> Matrix4:
        """The pose at a time: position interpolated linearly, rotation by slerp.

        Raises CaptureError outside the file's times and in a gap longer than `max_gap_s`.
        """
        gap = self.gap_at(time_s)
        if gap > max_gap_s:
            raise CaptureError(
                f"{self.path}: no pose at {time_s:.3f} s: the poses around it are {gap:.3f} s "
                f"apart, allowed {max_gap_s} s; the file covers {self.covered()}"
            )
        at = bisect_left(self.times, time_s)
        if gap == 0.0:
            return self.poses[at]
        share = (time_s - self.times[at - 1]) / gap
        return interpolate_pose(self.poses[at - 1], self.poses[at], share)

    def _take(self, line: str) -> None:
        where = f"{self.path}:{self._line}"
        if not line or line.startswith("#"):
            return
        if self._layout is None:
            self._layout = _tum_or_csv(line, self._world_axes, where)
            if self._layout.separator is not None:
                return
        time_s, pose = self._parse(line, self._layout, where)
        if self.times and time_s <= self.times[-1]:
            raise CaptureError(
                f"{where}: times must increase: {time_s:.6f} s after {self.times[-1]:.6f} s"
            )
        self.times.append(time_s)
        self.poses.append(pose)

    def _parse(self, line: str, layout: _Layout, where: str) -> tuple[float, Matrix4]:
        words = line.split(layout.separator)
        try:
            values = [float(words[column]) for column in layout.columns]
        except (ValueError, IndexError):
            raise CaptureError(
                f"{where}: expected time, position and quaternion in numbers, got {line[:80]!r}"
            ) from None
        time_s = values[0] * layout.time_unit_s
        if not abs(time_s) < _LATEST_S:
            raise CaptureError(
                f"{where}: time {time_s:g} s is not in seconds; name a CSV column timestamp_ms, "
                "timestamp_us or timestamp_ns"
            )
        try:
            pose = pose_from(quaternion_to_matrix(values[4:]), values[1:4])
            pose = convert_axes(pose, self._camera_axes, layout.world_axes)
            return time_s, check_pose(pose, where)
        except FrameRejected as error:
            raise CaptureError(f"{where}: {error}") from None


def _tum_or_csv(line: str, world_axes: str | None, where: str) -> _Layout:
    if "," in line:
        return _csv_layout([w.strip().lower() for w in line.split(",")], world_axes, where)
    if len(line.split()) != 8:
        raise CaptureError(
            f"{where}: expected a TUM line (t x y z qx qy qz qw) or a CSV header, received "
            f"{line[:80]!r}"
        )
    return _Layout(None, tuple(range(8)), 1.0, world_axes or "ENU")


def _csv_layout(names: list[str], world_axes: str | None, where: str) -> _Layout:
    times = {name + suffix: unit for name in _TIME_NAMES for suffix, unit in _TIME_UNITS.items()}
    time = _first(names, lambda name: name in times)
    position = next((p for p in _POSITIONS if set(p[0]) <= set(names)), None)
    if time is None or position is None or not set(_QUATERNION) <= set(names):
        raise CaptureError(
            f"{where}: expected columns time (or timestamp_ns, ...), x, y, z (or east, north, up; "
            f"north, east, down) and qx, qy, qz, qw; received {', '.join(names)[:120]}"
        )
    columns, named_axes = position
    if world_axes and named_axes and world_axes != named_axes:
        raise CaptureError(f"{where}: columns name {named_axes} axes, {world_axes} was asked for")
    order = tuple(names.index(name) for name in (time, *columns, *_QUATERNION))
    return _Layout(",", order, times[time], named_axes or world_axes or "ENU")


def _first(names: list[str], wanted: Callable[[str], bool]) -> str | None:
    return next((name for name in names if wanted(name)), None)
