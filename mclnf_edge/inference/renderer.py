"""Pose + modules -> picture, depth and what is known of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.picture import UNKNOWN, Painted, Shot
from mclnf_edge.geometry import require_pinhole
from mclnf_edge.mapping.modules import ModulePool, cell_name
from mclnf_edge.mapping.optimizer import paint
from mclnf_edge.types import Render, View

F32 = npt.NDArray[np.float32]
KNOWN = 0.5
"""Depth is given where at least this share of the light ends in seen matter."""

_COARSE_STEPS = 48
_SAMPLES = 8
_UNIFORM = 0.01


class Renderer:
    """Renders views of a pool. `points` is how many places the last picture looked at."""

    def __init__(self, paint: Callable[[ModulePool, Shot, int], Painted] = paint) -> None:
        """`paint` is an engine's, by default that of the compiled kernels."""
        self.points = 0
        self._paint = paint

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
        if pool is None or origin is None or not pool.slot_of:
            return _nothing(h, w, map_version)
        eye = (view.T_world_camera[:3, 3] - origin).astype(np.float32)
        cells = pool.in_sight(eye, site)
        if not cells:
            return _nothing(h, w, map_version)
        band = pool.height_band(cells)
        shot = Shot(
            eye=eye,
            turn=np.ascontiguousarray(view.T_world_camera[:3, :3], np.float32),
            pinhole=np.array([camera.fx, camera.fy, camera.cx, camera.cy], np.float32),
            size=(h, w),
            band=np.array(band, np.float32),
            reach=np.float32(60.0 * max(float(eye[2]) - band[0], pool.cell_m)),
            exposure=np.exp(gain).astype(np.float32),
            samples=_SAMPLES,
            steps=_COARSE_STEPS,
            uniform=np.float32(_UNIFORM),
        )
        done = self._paint(pool, shot, site)
        self.points = done.points
        done.depth[done.known < KNOWN] = np.nan
        names = tuple(sorted(cell_name(c) for c in cells))
        return Render(done.rgb, done.depth, done.known, map_version, names)


def _nothing(h: int, w: int, map_version: int) -> Render:
    grey = np.full((h, w, 3), round(UNKNOWN * 255), np.uint8)
    return Render(
        grey, np.full((h, w), np.nan, np.float32), np.zeros((h, w), np.float32), map_version
    )
