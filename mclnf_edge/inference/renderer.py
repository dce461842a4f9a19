"""Pose + modules -> picture, depth and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.picture import TILE, UNKNOWN, Painted, Shot
from mclnf_edge.geometry import require_pinhole
from mclnf_edge.mapping.exposures import Meter
from mclnf_edge.mapping.extents import Window, reachable
from mclnf_edge.mapping.modules import ModulePool, cell_name
from mclnf_edge.mapping.optimizer import COARSE_STEPS, SAMPLES, paint
from mclnf_edge.mapping.residency import Residency
from mclnf_edge.types import Render, View

F32 = npt.NDArray[np.float32]
KNOWN = 0.5
"""Depth is given where at least this share of the light ends in seen matter."""

_UNIFORM = 0.01
_METER_PX = 48
"""Longer edge of the picture by which a view's brightness is measured."""


class Renderer:
    """Renders views of a pool. `points` is how many places the last picture looked at.

    With a `residency`, what a view needs is brought into memory before.
    """

    def __init__(
        self,
        paint: Callable[[ModulePool, Shot, int], Painted] = paint,
        residency: Residency | None = None,
    ) -> None:
        """`paint` is an engine's, by default that of the compiled kernels."""
        self.points = 0
        self._paint, self._residency = paint, residency

    def render(
        self,
        pool: ModulePool | None,
        origin: npt.NDArray[np.float64] | None,
        view: View,
        gain: F32,
        map_version: int = 0,
        site: int = 0,
    ) -> Render:
        """One view of a site, at its camera's size, its pose in the site's world frame.

        `origin` (3,) float64 is the site's; `gain` (3,) the log exposure the view is shown with.

        Light that no seen matter stops is replaced by mid-grey; `known` is the share that is.
        """
        camera = view.camera
        require_pinhole(camera)
        h, w = camera.height, camera.width
        if pool is None or origin is None or not len(pool.extents):
            return _nothing(h, w, map_version)
        eye = (view.T_world_camera[:3, 3] - origin).astype(np.float32)
        rows = pool.extents.in_sight(eye, site)
        if not len(rows):
            return _nothing(h, w, map_version)
        band = pool.extents.heights(rows)
        shot = Shot(
            eye=eye,
            turn=np.ascontiguousarray(view.T_world_camera[:3, :3], np.float32),
            pinhole=np.array([camera.fx, camera.fy, camera.cx, camera.cy], np.float32),
            size=(h, w),
            band=np.array(band, np.float32),
            reach=np.float32(60.0 * max(float(eye[2]) - band[0], pool.cell_m)),
            exposure=np.exp(gain).astype(np.float32),
            samples=SAMPLES,
            steps=COARSE_STEPS,
            uniform=np.float32(_UNIFORM),
        )
        cells = reachable(pool.extents, _window(shot), site)
        if self._residency is not None:
            self._residency.ensure(cells)
        done = self._paint(pool, shot, site)
        self.points = done.points
        done.depth[done.known < KNOWN] = np.nan
        names = tuple(sorted(cell_name(c) for c in cells))
        return Render(done.rgb, done.depth, done.known, map_version, names)

    def gain(
        self,
        pool: ModulePool | None,
        origin: npt.NDArray[np.float64] | None,
        view: View,
        meter: Meter,
        site: int = 0,
    ) -> F32:
        """Log exposure (3,) to show a view with: `meter`'s, of a small picture at exposure 0."""
        shrink = _METER_PX / max(view.camera.width, view.camera.height)
        size = (max(round(n * shrink), 1) for n in (view.camera.width, view.camera.height))
        small = replace(view, camera=view.camera.scaled(*size))
        shown = self.render(pool, origin, small, np.zeros(3, np.float32), site=site)
        known = shown.rgb[shown.known >= KNOWN]
        return meter(float(known.mean()) / 255 if len(known) else UNKNOWN)


def _window(shot: Shot) -> Window:
    """A whole picture; kernels look at whole tiles, which may stand over its right and bottom."""
    fx, fy, cx, cy = (float(v) for v in shot.pinhole)
    height, width = (float(-(-n // TILE) * TILE) for n in shot.size)
    band = float(shot.band[0]), float(shot.band[1])
    part = (0.0, 0.0, width, height)
    return Window(shot.eye, shot.turn, (fx, fy, cx, cy), part, band, float(shot.reach))


def _nothing(h: int, w: int, map_version: int) -> Render:
    grey = np.full((h, w, 3), round(UNKNOWN * 255), np.uint8)
    return Render(
        grey, np.full((h, w), np.nan, np.float32), np.zeros((h, w), np.float32), map_version
    )
