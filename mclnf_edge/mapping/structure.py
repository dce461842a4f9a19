"""The shape of the ground, from the stream alone: height band, surface rasters, cells of rays.

Points triangulated between frames bound the height; a sweep gives each cell its surface raster; the
rasters say which cell each tile of each frame reaches, and what a new module starts from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from mclnf_edge.engine import surface
from mclnf_edge.engine.field import CHANNELS, SURFACE
from mclnf_edge.engine.volume import FAR, MARGIN
from mclnf_edge.mapping.frames import HeldFrame, triangulate
from mclnf_edge.mapping.modules import Cell, Module, ModulePool, cell_edge

F32 = npt.NDArray[np.float32]
Tiles = dict[Cell, npt.NDArray[np.int32]]
"""Tile indices of one frame by cell."""

Pause = Callable[[], None]
"""Called now and then in long work, so that renders need not wait for all of it."""

RASTER = 64
"""Surface columns along one cell's edge."""

_PAD = 4  # columns beyond each border, so that the smoothing has no seam
_SWEEP_VIEWS = 16
_PAINT_VIEWS = 32
_NEAR_HEIGHTS = 2.5  # ground nearer than this many flying heights belongs to inner cells
_FAR_HEIGHTS = 40.0  # beyond this there is no telling ground from sky
_WORTH_FRAMES = 0.5  # whole frames' worth of tiles before a cell gets a module of its own
_FEW_FRAMES = 8  # of fewer frames a cell needs less
_ASSUMED_HEIGHT_M = 50.0  # when neither parallax nor the publisher tells
_TRAINED_RAYS = 4096
_HIGH_GROUND = 99  # percentile of the heights in and around a cell
_POINTS = 200_000  # the newest are kept
_DEEPEST = 12.0
"""Flying heights, over the ground known so far, below which no new ground is believed."""
_GROUND_POINTS = 200  # around a camera tell the ground below it
_LEAF = 64  # points in a leaf of the search tree
_SOLID, _EMPTY = 1.0, 0.015  # starting densities per unit in and above the ground


@dataclass
class Footprint:
    """Where a frame's tiles meet the ground, by inner cell and by outer cell.

    It holds for `ground` metres of ground height and the rasters `met` on the way there (None: a
    cell that had none). `tiles` is what `assign` gave the frame when the inner cells worth a module
    were `worth`.
    """

    ground: float
    met: dict[Cell, F32 | None]
    near: Tiles
    far: Tiles
    worth: frozenset[Cell] | None = None
    tiles: Tiles = field(default_factory=dict)


@dataclass
class Structure:
    """One site's points and rasters in local metres.

    `rasters[cell]` is (RASTER, RASTER) surface height; inner cells are of level 2 * `site`.
    `footprints` are those of the frames assigned last: a long flight changes few at a time.
    """

    cell_m: float
    site: int = 0
    points: F32 = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rasters: dict[Cell, F32] = field(default_factory=dict)
    footprints: dict[int, Footprint] = field(default_factory=dict, repr=False)
    _tree: cKDTree | None = field(default=None, repr=False)

    def add_frame(
        self,
        frame: HeldFrame,
        others: list[HeldFrame],
        height_m: float | None,
        measured: F32 | None = None,
    ) -> None:
        """Triangulate a new frame against the two nearest earlier ones.

        `height_m` above ground, and points (n, 3) that its depth picture measured, count as well.
        """
        near = sorted(others, key=lambda o: float(np.linalg.norm(o.eye - frame.eye)))
        near = [o for o in near if np.linalg.norm(o.eye - frame.eye) > 0.05][:2]
        found = [triangulate(frame, other) for other in near]
        if height_m is not None:
            below = frame.eye - np.array([0, 0, height_m], np.float32)
            found.append(np.repeat(below[None], 8, axis=0))
        if measured is not None:
            found.append(measured)
        if any(len(points) for points in found):
            points = _plausible(np.concatenate(found), frame)
            if len(self.points) >= _GROUND_POINTS:  # one wrong pose must not sink the ground
                deepest = float(frame.eye[2]) - _DEEPEST * (frame.eye[2] - self.ground(frame))
                points = points[points[:, 2] > deepest]
            self.points = np.concatenate([self.points, points])
            if len(self.points) > 1.2 * _POINTS:
                self.points, self._tree = self.points[-_POINTS:], None

    def ground(self, frame: HeldFrame) -> float:
        """Typical ground height below a frame: the median of the points around it."""
        if len(self.points) < 8:
            return float(frame.eye[2]) - _ASSUMED_HEIGHT_M
        nearest = self.points[self._nearest_points(frame.eye[:2]), 2]
        return min(float(np.median(nearest)), float(frame.eye[2]) - 1.0)

    def _nearest_points(self, xy: F32) -> npt.NDArray[np.int64]:
        """Indices of the points nearest to xy (2,): from a tree of most and a scan of the rest."""
        n = len(self.points)
        if self._tree is None or not self._tree.n <= n <= 1.1 * self._tree.n + _GROUND_POINTS:
            self._tree = cKDTree(self.points[:, :2], leafsize=_LEAF, balanced_tree=False)
        old: int = self._tree.n
        away, index = self._tree.query(xy, min(_GROUND_POINTS, old))
        added = np.hypot(*(self.points[old:, :2] - xy).T)
        index = np.concatenate([np.atleast_1d(index), np.arange(old, n)])
        nearest = np.argsort(np.concatenate([np.atleast_1d(away), added]), kind="stable")
        found: npt.NDArray[np.int64] = index[nearest[:_GROUND_POINTS]]
        return found

    def band(self, cell: Cell, flying_m: float) -> tuple[float, float]:
        """(lowest, highest) z a cell's module covers: the points around it and some room."""
        edge = cell_edge(cell, self.cell_m)
        centre = (np.array(cell[1:]) + 0.5) * edge
        around = self.points[np.abs(self.points[:, :2] - centre).max(1) < edge]
        z = (around if len(around) >= 30 else self.points)[:, 2]
        if len(z) == 0:
            return -flying_m - 10.0, -flying_m + 10.0
        low, high = np.percentile(z, (3, 97))
        spread = high - low
        return (
            float(low - 0.25 * spread - 0.03 * flying_m),
            float(high + 0.5 * spread + 0.06 * flying_m),
        )

    def height_at(self, xy: F32, default: F32, met: dict[Cell, F32 | None] | None = None) -> F32:
        """(n,) inner raster heights at local points (n, 2), `default` where there is no raster.

        `met` gathers the rasters of the cells that the points lie in, None where there is none.
        """
        edge, level = self.cell_m, 2 * self.site
        out: F32 = default.copy()
        index = np.floor(xy / edge).astype(np.int64)
        for ix, iy in _distinct(index):
            raster = self.rasters.get((level, ix, iy))
            if met is not None:
                met[level, ix, iy] = raster
            if raster is not None:
                here = (index[:, 0] == ix) & (index[:, 1] == iy)
                at = ((xy[here] / edge - (ix, iy)) * RASTER).astype(np.int64).clip(0, RASTER - 1)
                out[here] = raster[at[:, 1], at[:, 0]]
        return out

    def footprint(self, frame: HeldFrame) -> Footprint:
        """Where each tile's ray meets the ground; what was found before, if nothing there changed.

        The ray is cut with the ground's height and, four times, with the rasters found there.
        """
        ground = self.ground(frame)
        known = self.footprints.get(frame.id)
        if known is not None and known.ground == ground and self._stands(known):
            return known
        d, _ = frame.tile_directions()
        flying = max(float(frame.eye[2]) - ground, 1.0)
        met: dict[Cell, F32 | None] = {}
        z = np.full(len(d), ground, np.float32)
        down = d[:, 2] < -0.02
        for _ in range(4):
            t = np.where(down, (z - frame.eye[2]) / np.minimum(d[:, 2], -0.02), 0)
            xy = frame.eye[:2] + d[:, :2] * t[:, None]
            z = 0.5 * (z + self.height_at(xy.astype(np.float32), z, met))
        xy = xy.astype(np.float32)
        away = np.linalg.norm(xy - frame.eye[:2], axis=1)
        ok = down & (away < _FAR_HEIGHTS * flying)
        close = ok & (away < _NEAR_HEIGHTS * flying)
        inner = 2 * self.site
        return Footprint(
            ground,
            met,
            near=_cells(inner, xy, close, self.cell_m),
            far=_cells(inner + 1, xy, ok, self.cell_m * FAR),
        )

    def _stands(self, footprint: Footprint) -> bool:
        """Whether the rasters that a footprint was found with are the present ones."""
        return all(self.rasters.get(cell) is raster for cell, raster in footprint.met.items())

    def assign(
        self, frames: list[HeldFrame], frozen: set[Cell], pause: Pause = lambda: None
    ) -> set[Cell]:
        """Give every tile of every frame to one cell; returns all cells worth a module.

        Cells in `frozen` always keep their tiles. A tile whose inner cell is seen too little falls
        to the outer one: a sliver of a cell has a poor surface, and stands before its neighbours.
        `pause` is called after each frame.
        """
        least = _WORTH_FRAMES * frames[0].tile_count * min(1.0, len(frames) / _FEW_FRAMES)
        near_count: Counter[Cell] = Counter()
        found: dict[int, Footprint] = {}
        for frame in frames:
            reached = found[frame.id] = self.footprint(frame)
            for cell, tiles in reached.near.items():
                near_count[cell] += len(tiles)
            pause()
        self.footprints = found
        inner = 2 * self.site
        worth = {c for c, n in near_count.items() if n >= least}
        worth |= {c for c in frozen if c[0] == inner}
        far_count: Counter[Cell] = Counter()
        for reached in found.values():
            _divide(reached, worth)
            for cell, tiles in reached.tiles.items():
                if cell[0] != inner:
                    far_count[cell] += len(tiles)
        worth |= {c for c, n in far_count.items() if n >= least or c in frozen}
        for frame in frames:
            frame.tiles = {c: t for c, t in found[frame.id].tiles.items() if c in worth}
        return worth

    def sweep(
        self, cell: Cell, frames: list[HeldFrame], low: float, high: float
    ) -> tuple[float, float]:
        """Replace a cell's raster by what its frames' pictures agree on; the band it lies in.

        Two passes: `low` to `high`, then finer within what the first one found.
        """
        edge = cell_edge(cell, self.cell_m)
        step = edge / RASTER
        views = _best(frames, cell, _SWEEP_VIEWS)
        corner = (cell[1] * edge - _PAD * step, cell[2] * edge - _PAD * step)
        pictures = np.stack([f.half for f in views])
        P = np.stack([f.projection(0.5) for f in views])
        for _ in range(2):
            levels = int(np.clip((high - low) / (0.75 * step), 16, 64))
            zs = np.linspace(low, high, levels, dtype=np.float32)
            h, _ = surface.heights(*corner, step, RASTER + 2 * _PAD, zs, pictures, P)
            gap = (high - low) / (levels - 1)
            bottom, top = np.percentile(h, (0.5, 99.5))
            low, high = max(low, float(bottom) - 2 * gap), min(high, float(top) + 2 * gap)
        self.rasters[cell] = np.ascontiguousarray(h[_PAD:-_PAD, _PAD:-_PAD])
        room = 2 * step
        return float(h.min()) - room, float(h.max()) + room

    def around(self, cell: Cell) -> tuple[F32, float, float, float]:
        """(raster, x0, y0, 1 / step) of a cell and its eight neighbours of the same level."""
        edge = cell_edge(cell, self.cell_m)
        level, ix, iy = cell
        out = np.full((3 * RASTER, 3 * RASTER), np.nan, np.float32)
        for dy in range(3):
            for dx in range(3):
                raster = self.rasters.get((level, ix + dx - 1, iy + dy - 1))
                if raster is not None:
                    out[dy * RASTER : (dy + 1) * RASTER, dx * RASTER : (dx + 1) * RASTER] = raster
        fallback = np.nanmedian(out) if np.isfinite(out).any() else 0.0
        out[~np.isfinite(out)] = fallback
        return out, (ix - 1) * edge, (iy - 1) * edge, RASTER / edge

    def _high_ground(self, cell: Cell) -> float:
        """Height in metres of the highest ground in a swept cell and its swept neighbours."""
        level, ix, iy = cell
        near = [(level, ix + dx, iy + dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        swept = [self.rasters[c] for c in near if c in self.rasters]
        return float(np.percentile(np.stack(swept), _HIGH_GROUND))

    def fit_exposures(
        self, cells: list[Cell], frames: list[HeldFrame], pause: Pause = lambda: None
    ) -> None:
        """Set the gains of frames from surface points that several of them see.

        Frames that were trained or anchored keep theirs: modules hold what they looked like.
        """
        trained = np.array([f.anchored or f.rays >= _TRAINED_RAYS for f in frames])
        if trained.all() or len(frames) < 2:
            return
        random = np.random.default_rng(0)
        images, _, P, eyes = _pictures(frames)
        values = []
        for cell in cells:
            raster, x0, y0, inverse = self.around(cell)
            edge = RASTER / inverse
            xy = random.uniform(0, edge, (max(64, 4096 // len(cells)), 2)).astype(np.float32)
            seen = np.full((len(xy), len(frames), 3), -1, np.float32)
            surface.observe(
                xy[:, 0] + np.float32(x0 + edge), xy[:, 1] + np.float32(y0 + edge),
                raster, np.float32(x0), np.float32(y0), np.float32(inverse),
                np.float32(1.0 / inverse), images, P, eyes, seen,
            )  # fmt: skip
            values.append(seen)
            pause()
        gains = surface.fit_gains(
            np.concatenate(values), trained, np.stack([f.gain for f in frames]).astype(np.float32)
        )
        for frame, gain in zip(frames, gains, strict=True):
            frame.gain = np.clip(gain, -1.5, 1.5).astype(np.float32)

    def seed(self, pool: ModulePool, module: Module, frames: list[HeldFrame]) -> None:
        """Write surface, seen counts, first density and surface colour into a module's slot."""
        raster, rx, ry, inverse = self.around(module.cell)
        s, layout = module.slot, pool.layout
        x0, y0, extent = (float(v) for v in pool.box[s])
        views = _best(frames, module.cell, _PAINT_VIEWS)
        grid = (np.float32(rx), np.float32(ry), np.float32(inverse))
        slack = np.float32(1.0 / inverse)
        images, masks, P, eyes = _pictures(views)
        gains = np.exp(np.stack([f.gain for f in views])).astype(np.float32)

        def nodes(n: int, corner: float) -> F32:
            return (np.arange(n) / (n - 1) * extent + corner).astype(np.float32)

        seen = np.zeros((len(views), SURFACE, SURFACE), np.uint8)
        at = (nodes(SURFACE, x0), nodes(SURFACE, y0))
        highest = np.float32(self._high_ground(module.cell))
        surface.visibility(*at, raster, *grid, slack, highest, masks, P, eyes, seen)
        pool.seen[s], seen = surface.count_views(seen)
        if len(layout.planes):
            fine = int(layout.planes[0, 2])
            color = np.zeros((fine, fine, 3), np.float32)
            at = (nodes(fine, x0), nodes(fine, y0))
            surface.paint(*at, raster, *grid, seen, images, P, gains, color)
            logits = np.log(color.clip(0.02, 0.98) / (1 - color.clip(0.02, 0.98)))
            plane = pool.features[s, : fine * fine * CHANNELS].reshape(fine, fine, CHANNELS)
            plane[..., :3] = logits
        pool.surface[s] = _sample(raster, nodes(SURFACE, x0 - rx), nodes(SURFACE, y0 - ry), inverse)
        cx, cy, edge = pool.bounds(module.cell)
        unit = edge / RASTER
        surface.fill_density(
            pool.density[s], layout.voxels, cx, cy, edge, float(pool.band[s, 0]),
            float(1 / pool.band[s, 1]), raster, *grid, unit, _SOLID / unit, _EMPTY / unit,
        )  # fmt: skip

    def extend(
        self, pool: ModulePool, module: Module, frames: list[HeldFrame], information: F32
    ) -> None:
        """Add to a module what frames see of it for the first time.

        Where it was seen or has Fisher `information` (features,), surface, density and colours
        stay; elsewhere they are swept and painted as for a new module, in its own height band.
        """
        s, layout = module.slot, pool.layout
        before = {name: a.copy() for name, a in pool.arrays(module).items()}
        low, inverse = (float(v) for v in pool.band[s])
        self.sweep(module.cell, frames, low, low + 1 / inverse)
        self.seed(pool, module, frames)
        known = before["seen"] > 0
        if len(layout.planes):
            fine = int(layout.planes[0, 2])
            texels = information[: fine * fine * CHANNELS].reshape(fine, fine, CHANNELS)
            learned = _grown(texels.max(-1) > 0, fine // SURFACE + 1)
            known |= _nearest(learned, *2 * (np.linspace(0, 1, SURFACE, dtype=np.float32),))
            old = _nearest(known, *2 * (np.linspace(0, 1, fine, dtype=np.float32),))
            plane = pool.features[s, : fine * fine * CHANNELS].reshape(fine, fine, CHANNELS)
            kept = before["features"][: fine * fine * CHANNELS].reshape(fine, fine, CHANNELS)
            plane[old] = kept[old]
        pool.surface[s][known] = before["surface"][known]
        pool.seen[s] = np.maximum(before["seen"], pool.seen[s])
        nx, ny, nz = layout.voxels
        columns = _nearest(known, _within(ny), _within(nx)).ravel()
        pool.density[s].reshape(-1, nz)[columns] = before["density"].reshape(-1, nz)[columns]


def auto_cell(structure: Structure, frames: list[HeldFrame]) -> float:
    """0.75 of a footprint's mean edge in metres: flying height times image size over focal."""
    edges = []
    for f in frames[:8]:
        w, h = f.size
        flying = max(float(f.eye[2]) - structure.ground(f), 1.0)
        edges.append(flying * np.sqrt(w * h / (f.K[0] * f.K[1])))
    return float(np.clip(0.75 * np.median(edges), 1.0, 2000.0))


def _plausible(points: F32, frame: HeldFrame) -> F32:
    """Points not far outside the spread of their frame's heights (four interquartile ranges)."""
    if len(points) < 8:
        return points
    low, middle, high = np.percentile(points[:, 2], (25, 50, 75))
    room = 4 * max(high - low, 0.03 * (frame.eye[2] - middle))
    good = (points[:, 2] > low - room) & (points[:, 2] < min(high + room, float(frame.eye[2])))
    kept: F32 = points[good]
    return kept


def _divide(footprint: Footprint, worth: set[Cell]) -> None:
    """Each tile to its inner cell if that is worth a module, else to its outer one."""
    inner = frozenset(footprint.near.keys() & worth)
    if footprint.worth == inner:
        return
    tiles = {c: t for c, t in footprint.near.items() if c in inner}
    taken = np.concatenate([*tiles.values(), np.zeros(0, np.int32)])
    for cell, reaching in footprint.far.items():
        left = np.setdiff1d(reaching, taken)
        if len(left):
            tiles[cell] = left.astype(np.int32)
    footprint.worth, footprint.tiles = inner, tiles


def _distinct(index: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The different rows of (n, 2) cell numbers in ascending order."""
    rows = np.unique((index[:, 0] << 32) + index[:, 1] + 2**31)
    return [((row >> 32), (row & 0xFFFFFFFF) - 2**31) for row in rows.tolist()]


def _cells(
    level: int, xy: F32, ok: npt.NDArray[np.bool_], edge: float
) -> dict[Cell, npt.NDArray[np.int32]]:
    index = np.floor(xy[ok] / edge).astype(np.int64)
    tiles = np.flatnonzero(ok).astype(np.int32)
    out: dict[Cell, npt.NDArray[np.int32]] = {}
    for ix, iy in _distinct(index):
        here = (index[:, 0] == ix) & (index[:, 1] == iy)
        out[(level, ix, iy)] = tiles[here]
    return out


def _best(frames: list[HeldFrame], cell: Cell, most: int) -> list[HeldFrame]:
    """The frames that see most of a cell; ties go to the earlier one."""
    seeing = [f for f in frames if cell in f.tiles]
    return sorted(seeing, key=lambda f: (-len(f.tiles[cell]), f.id))[:most]


def _pictures(
    frames: list[HeldFrame],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], F32, F32]:
    """Images, masks, projections and eyes, padded to the largest picture (the pad is masked)."""
    h, w = max(f.size[1] for f in frames), max(f.size[0] for f in frames)
    images = np.zeros((len(frames), h, w, 3), np.uint8)
    masks = np.zeros((len(frames), h, w), np.uint8)
    for i, f in enumerate(frames):
        images[i, : f.size[1], : f.size[0]] = f.image
        masks[i, : f.size[1], : f.size[0]] = f.mask
    return (
        images,
        masks,
        np.stack([f.projection() for f in frames]),
        np.stack([f.eye for f in frames]),
    )


def _grown(mask: npt.NDArray[np.bool_], texels: int) -> npt.NDArray[np.bool_]:
    """A mask with everything within some texels of it."""
    kernel = np.ones((2 * texels + 1, 2 * texels + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def _nearest(mask: npt.NDArray[np.bool_], rows: F32, columns: F32) -> npt.NDArray[np.bool_]:
    """The entries of a mask nearest to fractions (0 to 1) of its height and width."""
    j, i = (
        np.round(f * (n - 1)).astype(int) for f, n in zip((rows, columns), mask.shape, strict=True)
    )
    return np.asarray(mask[j][:, i])


def _within(n: int) -> F32:
    """Where n voxels across a cell lie in its module's box, as fractions."""
    out: F32 = ((MARGIN + (np.arange(n) + 0.5) / n) / (1 + 2 * MARGIN)).astype(np.float32)
    return out


def _sample(raster: F32, xs: F32, ys: F32, inverse: float) -> F32:
    """Bilinear samples of a raster at xs x ys metres from its corner."""
    u = (xs * inverse - 0.5).clip(0, raster.shape[1] - 1.001)
    v = (ys * inverse - 0.5).clip(0, raster.shape[0] - 1.001)
    i, j = u.astype(int), v.astype(int)
    a, b = u - i, (v - j)[:, None]
    low = raster[j][:, i] * (1 - a) + raster[j][:, i + 1] * a
    high = raster[j + 1][:, i] * (1 - a) + raster[j + 1][:, i + 1] * a
    out: F32 = (low * (1 - b) + high * b).astype(np.float32)
    return out
