"""Pose + modules -> picture, depth and what is known of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.picture import DARK, TILE, Shot, paint
from mclnf_edge.geometry import require_pinhole
from mclnf_edge.mapping.modules import ModulePool, cell_name
from mclnf_edge.types import Render, View

F32 = npt.NDArray[np.float32]
UNKNOWN = 0.5
"""What stands where no module knows anything: mid-grey."""

_COARSE_STEPS = 48
_SAMPLES = 8
_UNIFORM = 0.01


class Renderer:
    """Renders views of a pool."""

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
            samples=_SAMPLES,
            steps=_COARSE_STEPS,
            uniform=np.float32(_UNIFORM),
        )
        out = np.empty((h * w, 6), np.float32)
        scene = pool.scene(site)
        list(pool.executor.map(lambda i: paint(scene, shot, i, i + 1, out), range(-(-h // TILE))))
        left = np.where(out[:, 0] < DARK, 0, out[:, 0])
        stopped = 1 - out[:, 0]
        some = np.maximum(stopped, 1e-3)
        known = np.where(stopped > 1e-3, out[:, 5] / some, 0) * (1 - left)
        k, scale = known[:, None], np.exp(gain).astype(np.float32)
        rgb = k * (out[:, 1:4] * (scale / some[:, None])) + (1 - k) * UNKNOWN
        z = out[:, 4] / some
        z[known < 0.5] = np.nan
        picture = (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(h, w, 3)
        names = tuple(sorted(cell_name(c) for c in cells))
        return Render(picture, z.reshape(h, w), known.reshape(h, w), map_version, names)


def _nothing(h: int, w: int, map_version: int) -> Render:
    grey = np.full((h, w, 3), round(UNKNOWN * 255), np.uint8)
    return Render(
        grey, np.full((h, w), np.nan, np.float32), np.zeros((h, w), np.float32), map_version
    )
