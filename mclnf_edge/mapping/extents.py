"""Where every module of a map stands, in memory or not, and which of them rays can cross."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
"""Indices of modules in an `Extents`; they hold until it changes."""

Place = tuple[int, int, int]
"""(level, ix, iy), as `modules.Cell`."""

_SIGHT_HEIGHTS = 20.0
_SLACK_M = 0.02  # kernels compute places in float32


class Extents:
    """Box and height band of every module of a map, by cell; `version` changes with them."""

    def __init__(self) -> None:
        self.version = 0
        self._row: dict[Place, int] = {}
        self._cells = np.zeros((16, 3), np.int32)
        self._box = np.zeros((16, 3), np.float32)
        self._band = np.zeros((16, 2), np.float32)

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, cell: Place) -> bool:
        return cell in self._row

    def put(self, cell: Place, box: tuple[float, float, float], band: tuple[float, float]) -> None:
        """Set a module's box (x, y, edge, with margins) and band (lowest z, 1 / height)."""
        row = self._row.setdefault(cell, len(self._row))
        if row == len(self._cells):
            for name in ("_cells", "_box", "_band"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        before = self._cells[row].tolist(), self._band[row].tolist()
        self._cells[row], self._box[row], self._band[row] = cell, box, band
        if before != (self._cells[row].tolist(), self._band[row].tolist()):
            self.version += 1

    def remove(self, cell: Place) -> None:
        """Forget a module; the last one takes its row."""
        row, last = self._row.pop(cell), len(self._row)
        if row != last:
            for array in (self._cells, self._box, self._band):
                array[row] = array[last]
            self._row[self.cells([last])[0]] = row
        self.version += 1

    def rows(self, cells: Iterable[Place]) -> Rows:
        """Those of the cells that have a module."""
        return np.array([self._row[c] for c in cells if c in self._row], np.int64)

    def cells(self, rows: Rows | list[int]) -> list[Place]:
        """The cells of rows."""
        return [(level, ix, iy) for level, ix, iy in self._cells[rows].tolist()]

    def of_site(self, site: int) -> Rows:
        """All modules of a site."""
        rows: Rows = np.flatnonzero(self._cells[: len(self), 0] // 2 == site)
        return rows

    def heights(self, rows: Rows) -> tuple[float, float]:
        """(lowest, highest) z of modules, (0, 0) for none."""
        if not len(rows):
            return 0.0, 0.0
        low, inverse = self._band[rows].T
        return float(low.min()), float((low + 1 / inverse).max())

    def corners(self, rows: Rows) -> tuple[F64, F64]:
        """Lowest and highest (n, 2) x and y of modules with their margins, and a little more."""
        box = self._box[rows].astype(np.float64)
        return box[:, :2] - _SLACK_M, box[:, :2] + box[:, 2:] + _SLACK_M

    def in_sight(self, eye: F32, site: int = 0) -> Rows:
        """Modules a camera at local `eye` (3,) may look at: within 20 times its height."""
        rows = self.of_site(site)
        box, low = self._box[rows], self._band[rows, 0]
        centre = box[:, :2] + 0.5 * box[:, 2:]
        away = np.linalg.norm(centre - eye[:2], axis=1) - box[:, 2]
        near = away < _SIGHT_HEIGHTS * np.maximum(eye[2] - low, box[:, 2])
        found: Rows = rows[near]
        return found


class Window(NamedTuple):
    """The rays through a part of a picture: a pyramid from `eye` (3,), local metres.

    `turn` (3, 3) from camera axes (OpenGL) to the site's, `pinhole` (fx, fy, cx, cy) pixels,
    `frame` (left, top, right, bottom) pixels, `band` (lowest, highest z of matter), `reach` metres.
    """

    eye: F32
    turn: F32
    pinhole: tuple[float, float, float, float]
    frame: tuple[float, float, float, float]
    band: tuple[float, float]
    reach: float


def reachable(extents: Extents, window: Window, site: int) -> list[Place]:
    """Cells of a site whose module a ray of a window can cross, nearest first; never too few.

    A module stands as a column over the height band. It is out when all its corners lie behind the
    camera or beyond one side of the pyramid, or when it is farther than the rays stay in the band.
    """
    rays, normals = _pyramid(window)
    z = np.array(window.band) + (-_SLACK_M, _SLACK_M) - float(window.eye[2])
    rows = extents.of_site(site)
    low, high = (xy - window.eye[:2] for xy in extents.corners(rows))
    away = np.linalg.norm(np.maximum(np.maximum(low, -high), 0), axis=1)
    near = away <= _farthest(rays, z, window.reach) + _SLACK_M
    rows, low, high, away = rows[near], low[near], high[near], away[near]
    inside = np.ones(len(rows), np.bool_)
    for normal in normals:  # the corner that lies farthest along a normal decides
        best = (np.where(normal[:2] > 0, high, low) * normal[:2]).sum(1) + max(z * normal[2])
        inside &= best >= 0
    order = np.argsort(away[inside], kind="stable")
    return extents.cells(rows[inside][order])


def _pyramid(window: Window) -> tuple[F64, F64]:
    """(4, 3) unit rays of a window's corners, a pixel wide of it, and (5, 3) inward normals."""
    fx, fy, cx, cy = window.pinhole
    left, top, right, bottom = window.frame
    x0, x1 = (left - 1 - cx) / fx, (right + 1 - cx) / fx
    y0, y1 = (cy - bottom - 1) / fy, (cy - top + 1) / fy
    turn = window.turn.astype(np.float64).T
    inward = np.array([[1, 0, x0], [-1, 0, -x1], [0, 1, y0], [0, -1, -y1], [0, 0, -1]]) @ turn
    rays = np.array([[x, y, -1.0] for x in (x0, x1) for y in (y0, y1)]) @ turn
    return rays / np.linalg.norm(rays, axis=1, keepdims=True), inward


def _farthest(rays: F64, z: F64, reach: float) -> float:
    """How far from the eye, at most, rays (n, 3) and those between them leave the band `z`."""
    if (rays[:, 2] >= 0).any() and (rays[:, 2] <= 0).any():
        return reach
    plane = z[0] if rays[0, 2] < 0 else z[1]
    return float(min(max((plane / rays[:, 2]).max(), 0.0), reach))


def crossed(
    extents: Extents, site: int, ro: F32, rd: F32, band: tuple[float, float], reach: float
) -> list[Place]:
    """Cells of a site whose module some ray crosses inside a height band; never too few.

    `ro` (n, 3) local origins, `rd` (n, 3) unit directions, `reach` metres. A ray's line and a
    module's square are apart when they are so along x, along y or across the line.
    """
    origin, direction = ro.astype(np.float64), rd.astype(np.float64)
    slope = np.where(np.abs(direction[:, 2]) > 1e-6, direction[:, 2], np.nan)
    ends = (np.array(band) + (-_SLACK_M, _SLACK_M) - origin[:, 2:]) / slope[:, None]
    t0 = np.fmax(np.fmin(ends[:, 0], ends[:, 1]), 0)  # a level ray has no ends
    t1 = np.fmin(np.fmax(ends[:, 0], ends[:, 1]), reach)
    t0, t1, origin, direction = (a[t0 <= t1] for a in (t0, t1, origin, direction))
    rows = extents.of_site(site)
    if not len(t0):
        return []
    a, b = (origin[:, :2] + t[:, None] * direction[:, :2] for t in (t0, t1))
    first, last = np.minimum(a, b), np.maximum(a, b)
    low, high = extents.corners(rows)
    near = ((low <= last.max(0)) & (high >= first.min(0))).all(1)
    rows, low, high = rows[near], low[near], high[near]
    across = np.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0]], axis=1)
    offset = np.abs(across @ (0.5 * (low + high)).T - (across * a).sum(1)[:, None])
    width = np.abs(across) @ (0.5 * (high - low)).T
    meets = offset <= width
    for c in range(2):
        meets &= (low[:, c] <= last[:, c, None]) & (high[:, c] >= first[:, c, None])
    return extents.cells(rows[meets.any(0)])
