"""Where the camera goes: survey lines over blocks, and walks along streets. City metres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mclnf_edge.types import Camera, Matrix4
from meta_trainer.city.mesh import FloatArray
from meta_trainer.city.plan import Block, Plan, Rng

Pattern = Literal["nadir", "oblique", "mixed"]


@dataclass(frozen=True)
class Shot:
    """One camera position: `T_city_camera`, seconds since take-off, height above the ground."""

    T: Matrix4
    time: float
    height: float
    block: str


def look(position: FloatArray, pitch: float, yaw: float, roll: float = 0.0) -> Matrix4:
    """Camera-to-city pose, opengl axes; pitch 0 level, -pi/2 down; yaw anticlockwise from x."""
    c, s = math.cos(yaw), math.sin(yaw)
    forward = np.array([math.cos(pitch) * c, math.cos(pitch) * s, math.sin(pitch)])
    right = np.array([s, -c, 0.0])
    up = np.cross(right, forward)
    T = np.eye(4)
    T[:3, 0] = math.cos(roll) * right + math.sin(roll) * up
    T[:3, 1] = math.cos(roll) * up - math.sin(roll) * right
    T[:3, 2] = -forward
    T[:3, 3] = position
    return T


def survey(
    plan: Plan, area: FloatArray, count: int, altitude: float, pattern: Pattern, rng: Rng
) -> list[Shot]:
    """`count` shots over `area` ((x0, y0), (x1, y1)): lawnmower lines, turned by the pattern.

    "nadir" looks down, "oblique" 30-45 degrees off the vertical across the area, "mixed" flies the
    first six tenths nadir and the rest oblique on crossing lines, a little lower.
    """
    if pattern == "mixed":
        first = round(0.6 * count)
        shots = _lines(plan, area, first, altitude, -90.0, 0, rng)
        pitch = float(rng.uniform(-60.0, -45.0))
        shots += _lines(plan, area, count - first, 0.85 * altitude, pitch, 1, rng)
    else:
        pitch = -90.0 if pattern == "nadir" else float(rng.uniform(-60.0, -45.0))
        shots = _lines(plan, area, count, altitude, pitch, int(rng.integers(2)), rng)
    return retimed(plan, shots)


def _lines(
    plan: Plan, area: FloatArray, count: int, altitude: float, pitch: float, axis: int, rng: Rng
) -> list[Shot]:
    """Boustrophedon lines along `axis`; an oblique camera looks along the flight, backed off."""
    low, high = area
    size = high - low
    lines = max(1, round(math.sqrt(count * size[1 - axis] / size[axis])))
    per_line = np.diff(np.linspace(0, count, lines + 1).round().astype(int))
    back = altitude / math.tan(math.radians(-pitch)) if pitch > -80 else 0.0
    shots = []
    for k, n in enumerate(per_line):
        way = 1.0 if k % 2 == 0 else -1.0
        across = low[1 - axis] + size[1 - axis] * (k + 0.5) / lines
        for t in (np.arange(n) + 0.5) / n:
            t = t if way > 0 else 1.0 - t
            spot = np.zeros(3)
            spot[axis] = low[axis] + t * size[axis] - way * back
            spot[1 - axis] = across
            shots.append(_shot(plan, spot, altitude, pitch, way, axis, rng))
    return shots


def _shot(
    plan: Plan, spot: FloatArray, altitude: float, pitch: float, way: float, axis: int, rng: Rng
) -> Shot:
    """A shot at a planned spot with the scatter of wind and gimbal."""
    spot = spot + np.append(rng.normal(0, 0.012 * altitude, 2), 0.0)
    height = altitude * float(1.0 + 0.015 * rng.normal())
    spot[2] = float(plan.height(spot[0], spot[1])) + height
    yaw = (0.5 * math.pi if axis else 0.0) + (0.0 if way > 0 else math.pi)
    tilt = np.radians(rng.normal(0, 1.5, 3))
    # Straight down leaves no heading; keep half a degree of it.
    angle = min(math.radians(pitch) + tilt[0], math.radians(60)) if pitch > -80 else -math.pi / 2
    pose = look(spot, angle + abs(tilt[0]) * (pitch <= -80), yaw + tilt[1], tilt[2])
    return Shot(pose, 0.0, height, block_of(plan, spot))


def retimed(plan: Plan, shots: list[Shot], speed: float = 8.0) -> list[Shot]:
    """The same shots with times from the distance flown at `speed` m/s, at least 1 s apart."""
    time, out = 0.0, []
    for k, shot in enumerate(shots):
        if k:
            gap = float(np.linalg.norm(shot.T[:3, 3] - shots[k - 1].T[:3, 3]))
            time += max(1.0, gap / speed)
        out.append(Shot(shot.T, round(time, 3), shot.height, shot.block))
    return out


def block_of(plan: Plan, spot: FloatArray) -> str:
    """Name of the surveyed block nearest to a place."""
    near = min(
        (b for b in plan.blocks if b.surveyed),
        key=lambda b: math.hypot(b.centre[0] - spot[0], b.centre[1] - spot[1]),
    )
    return near.name


def surveyed_area(plan: Plan, margin: float = 0.0) -> FloatArray:
    """Corners ((x0, y0), (x1, y1)) of the surveyed blocks, grown by `margin` metres."""
    own = [b for b in plan.blocks if b.surveyed]
    low = (min(b.x0 for b in own) - margin, min(b.y0 for b in own) - margin)
    high = (max(b.x1 for b in own) + margin, max(b.y1 for b in own) + margin)
    return np.array([low, high])


def block_area(block: Block, margin: float = 0.0) -> FloatArray:
    """Corners of one block, grown by `margin` metres."""
    return np.array(
        [[block.x0 - margin, block.y0 - margin], [block.x1 + margin, block.y1 + margin]]
    )


def long_flight(plan: Plan, count: int, altitude: float, rng: Rng) -> list[Shot]:
    """One flight over every block: lawnmower nadir, altitude steps up to twofold, then revisits.

    The last fifth flies back over randomly drawn blocks, obliquely.
    """
    area = surveyed_area(plan)
    first = round(0.8 * count)
    thirds = np.diff(np.linspace(0, first, 4).round().astype(int))
    shots: list[Shot] = []
    cuts = np.linspace(area[0, 1], area[1, 1], 4)
    for k, n in enumerate(thirds):
        part = np.array([[area[0, 0], cuts[k]], [area[1, 0], cuts[k + 1]]])
        shots += _lines(plan, part, int(n), altitude * (1.0, 0.6, 1.3)[k], -90.0, 0, rng)
    own = [b for b in plan.blocks if b.surveyed]
    while len(shots) < count:
        block = own[int(rng.integers(len(own)))]
        n = min(25, count - len(shots))
        shots += _lines(plan, block_area(block), n, 0.8 * altitude, -55.0, 1, rng)
    return retimed(plan, shots)


def street_walk(plan: Plan, block: Block, count: int, rng: Rng) -> list[Shot]:
    """`count` shots from a car roof driven round one block, looking ahead and to the sides."""
    x = [plan.streets_x[block.column, 0], plan.streets_x[block.column + 1, 0]]
    y = [plan.streets_y[block.row, 0], plan.streets_y[block.row + 1, 0]]
    ring = np.array([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])])
    lengths = np.linalg.norm(np.diff(ring, axis=0), axis=1)
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    shots = []
    for k in range(count):
        s = ends[-1] * (k + 0.5) / count
        leg = min(int(np.searchsorted(ends, s, side="right")) - 1, 3)
        way = (ring[leg + 1] - ring[leg]) / lengths[leg]
        flat = ring[leg] + way * (s - ends[leg]) + np.array([way[1], -way[0]]) * 1.0
        height = 2.6
        stand = plan.frame(float(flat[0]), float(flat[1]), math.atan2(way[1], way[0]))
        spot = np.array([stand.x, stand.y, stand.z + height])
        turn = math.radians((0.0, 55.0, -55.0)[k % 3]) + float(rng.normal(0, 0.03))
        yaw = stand.angle + turn
        shots.append(Shot(look(spot, 0.03, yaw), 0.0, height, block.name))
    return retimed(plan, shots)


def default_camera(width: int, height: int) -> Camera:
    """A pinhole camera with the field of view of the sample drones, 63 degrees across."""
    focal = 0.5 * width / math.tan(math.radians(31.5))
    return Camera(width, height, focal, focal, 0.5 * width, 0.5 * height)
