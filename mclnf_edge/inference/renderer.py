"""Pose + modules -> picture, depth and what is known of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.picture import TILE, UNKNOWN, Shot, paint
from mclnf_edge.geometry import require_pinhole
from mclnf_edge.mapping.modules import ModulePool, cell_name
from mclnf_edge.types import Render, View

F32 = npt.NDArray[np.float32]
KNOWN = 0.5
"""Depth is given where at least this share of the light ends in seen matter."""

_COARSE_STEPS = 48
_SAMPLES = 8
_UNIFORM = 0.01


class Renderer:
    """Renders views of a pool. `points` is how many places the last picture looked at."""

    def __init__(self) -> None:
        self.points = 0

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
        picture, scene = np.empty((h, w, 3), np.uint8), pool.scene(site)
        depth, known = np.empty((h, w), np.float32), np.empty((h, w), np.float32)

        def part(row: int) -> int:
            return int(paint(scene, shot, row, row + 1, picture, depth, known))

        self.points = sum(pool.executor.map(part, range(-(-h // TILE))))
        depth[known < KNOWN] = np.nan
        names = tuple(sorted(cell_name(c) for c in cells))
        return Render(picture, depth, known, map_version, names)


def _nothing(h: int, w: int, map_version: int) -> Render:
    grey = np.full((h, w, 3), round(UNKNOWN * 255), np.uint8)
    return Render(
        grey, np.full((h, w), np.nan, np.float32), np.zeros((h, w), np.float32), map_version
    )
