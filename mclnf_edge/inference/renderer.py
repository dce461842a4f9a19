"""Pose + modules -> picture, depth and what is known of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mclnf_edge.geometry import pixel_rays
from mclnf_edge.mapping.modules import ModulePool, Workspace, cell_name, trace
from mclnf_edge.types import Render, View

F32 = npt.NDArray[np.float32]
UNKNOWN = 0.5
"""What stands where no module knows anything: mid-grey."""

_COARSE_STEPS = 48
_SAMPLES = 8
_CHUNK = 4096


class Renderer:
    """Renders views of a pool; keeps its buffers between calls."""

    def __init__(self) -> None:
        self._work = Workspace(_CHUNK, _SAMPLES)

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
        h, w = camera.height, camera.width
        if pool is None or origin is None or not pool.slot_of:
            return _nothing(h, w, map_version)
        columns, rows = np.meshgrid(np.arange(w), np.arange(h))
        pixels = np.stack([columns.ravel(), rows.ravel()], axis=1)
        _, directions = pixel_rays(camera, view.T_world_camera, pixels)
        length = np.linalg.norm(directions, axis=1)
        rd = np.ascontiguousarray(directions / length[:, None], np.float32)
        eye = (view.T_world_camera[:3, 3] - origin).astype(np.float32)
        cells = pool.in_sight(eye, site)
        low, high = pool.height_band(cells)
        if not cells:
            return _nothing(h, w, map_version)
        reach = 60.0 * max(float(eye[2]) - low, pool.cell_m)
        bands = np.tile(np.array([[low, high]], np.float32), (_CHUNK, 1))
        rgb, depth = np.empty((h * w, 3), np.float32), np.empty(h * w, np.float32)
        known = np.empty(h * w, np.float32)
        scale = np.exp(gain).astype(np.float32)
        tape = self._work.tape
        for a in range(0, h * w, _CHUNK):
            part = rd[a : a + _CHUNK]
            ro = np.ascontiguousarray(np.broadcast_to(eye, part.shape))
            trace(pool, self._work, ro, part, bands, steps=_COARSE_STEPS, uniform=0.01, seed=0,
                  jitter=False, reach=reach, site=site)  # fmt: skip
            n = len(part)
            matter = 1 - tape.left[:n]
            share = np.where(matter > 1e-3, tape.known[:n] / np.maximum(matter, 1e-3), 0)
            known[a : a + n] = share * matter
            shown = tape.rgb[:n] * scale / np.maximum(matter, 1e-3)[:, None]
            k = known[a : a + n, None]
            rgb[a : a + n] = k * shown + (1 - k) * UNKNOWN
            depth[a : a + n] = tape.depth[:n] / np.maximum(matter, 1e-3)
        z = depth / length  # along the optical axis
        z[known < 0.5] = np.nan
        picture = (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(h, w, 3)
        names = tuple(sorted(cell_name(c) for c in cells))
        return Render(picture, z.reshape(h, w), known.reshape(h, w), map_version, names)


def _nothing(h: int, w: int, map_version: int) -> Render:
    grey = np.full((h, w, 3), round(UNKNOWN * 255), np.uint8)
    return Render(
        grey, np.full((h, w), np.nan, np.float32), np.zeros((h, w), np.float32), map_version
    )
