"""A capture as a sequence of spatial tasks: which cells, which rays, which held-out pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mclnf_edge.geometry import pixel_rays
from mclnf_edge.mapping.frames import HeldFrame
from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell
from mclnf_edge.types import Camera, Matrix4

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Heights = Callable[[F32], F32]
"""Local points (n, 2) -> surface height (n,), NaN where none is known."""

TASKS = 4
_MARCH = 128


def tiles_of(frames: Sequence[HeldFrame]) -> tuple[dict[Cell, int], dict[Cell, float]]:
    """Of every inner cell: its tiles over all frames, and their mean place in the stream."""
    count: dict[Cell, int] = {}
    place: dict[Cell, float] = {}
    for i, frame in enumerate(frames):
        for cell, tiles in frame.tiles.items():
            if cell[0] == 0:
                count[cell] = count.get(cell, 0) + len(tiles)
                place[cell] = place.get(cell, 0.0) + i * len(tiles)
    return count, {cell: place[cell] / n for cell, n in count.items()}


def cut(count: Mapping[Cell, int], place: Mapping[Cell, float], tasks: int) -> list[list[Cell]]:
    """The cells in the order of `place`, in `tasks` runs with about as many tiles each.

    Fewer runs when a cell is larger than a run.
    """
    order = sorted(count, key=lambda cell: (place[cell], cell))
    total, before = sum(count.values()), 0
    runs: list[list[Cell]] = [[] for _ in range(tasks)]
    for cell in order:
        middle = (before + 0.5 * count[cell]) / total
        runs[int(middle * tasks)].append(cell)
        before += count[cell]
    return [run for run in runs if run]


def targets(mapper: Mapper, cells: Sequence[Cell]) -> tuple[I32, I32, I32]:
    """(frame index, tile, row of the learning module) of all tiles that belong to `cells`."""
    parts = [
        np.stack([np.full_like(tiles, i), tiles, np.full_like(tiles, mapper.modules[cell].row)])
        for i, frame in enumerate(mapper.frames.values())
        for cell, tiles in frame.tiles.items()
        if cell in cells
    ]
    frame, tile, row = np.concatenate(parts, axis=1)
    return frame, tile, row


def first_hit(
    heights: Heights, eye: F32, directions: F32, high: float, low: float
) -> tuple[F32, npt.NDArray[np.bool_]]:
    """Where rays (n, 3) from `eye` first meet the surface, (n, 2), and whether they do.

    Each ray is followed from z = `high` down to `low` in equal steps, the crossing is linear
    between two of them.
    """
    down = directions[:, 2] < -1e-3
    slope = np.where(down, directions[:, 2], -1.0)
    top = min(high, float(eye[2]))
    hit = np.zeros(len(directions), bool)
    xy = np.zeros((len(directions), 2), np.float32)
    above = np.full(len(directions), np.inf, np.float32)
    before = np.repeat(eye[None, :2], len(directions), axis=0)
    for z in np.linspace(top, low, _MARCH):
        at = (eye[:2] + directions[:, :2] * ((z - eye[2]) / slope)[:, None]).astype(np.float32)
        over = z - heights(at)
        crossed = down & ~hit & (over <= 0)
        known = np.isfinite(above)
        last = np.where(known, above, 0)
        share = np.where(known, last / np.maximum(last - over, 1e-9), 1.0)
        xy[crossed] = (before + (at - before) * share[:, None])[crossed]
        hit |= crossed
        above, before = np.where(np.isnan(over), np.inf, over), at
    return xy, hit


def task_map(
    mapper: Mapper,
    runs: Sequence[Sequence[Cell]],
    camera: Camera,
    T_world_camera: Matrix4,
    inset: float = 0.0,
) -> I32:
    """(H, W) number of the task in which each pixel's surface lies, -1 for none.

    The surface is the one swept from the train frames, the same for every method. Pixels nearer
    than `inset` (a share of a cell's edge) to a cell that is not of their task count as none.
    """
    assert mapper.pool is not None
    structure, edge = mapper.structures[0], mapper.pool.cell_m
    columns, rows = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    pixels = np.stack([columns.ravel(), rows.ravel()], axis=1)
    _, directions = pixel_rays(camera, T_world_camera, pixels)
    eye = (T_world_camera[:3, 3] - mapper.origins[0]).astype(np.float32)
    cells = [cell for run in runs for cell in run]
    low, high = mapper.pool.height_band(cells)

    def heights(xy: F32) -> F32:
        return structure.height_at(xy, np.full(len(xy), np.nan, np.float32))

    xy, hit = first_hit(heights, eye, directions, high, low)
    index = np.floor(xy / edge).astype(np.int64)
    out = np.full(len(xy), -1, np.int32)
    for number, run in enumerate(runs):
        own = {cell[1:] for cell in run}
        for ix, iy in own:
            here = hit & (index[:, 0] == ix) & (index[:, 1] == iy)
            here[here] = distance(xy[here] / edge, own) >= inset
            out[here] = number
    return out.reshape(camera.height, camera.width)


def distance(at: F32, own: set[tuple[int, int]]) -> F32:
    """(n,) how far points (n, 2) inside cells of `own` are from other cells, in cell edges.

    Counted straight across the four sides; at most 1.
    """
    index = np.floor(at).astype(np.int64)
    share, out = at - index, np.ones(len(at), np.float32)
    for axis, step in ((0, -1), (0, 1), (1, -1), (1, 1)):
        beside = index.copy()
        beside[:, axis] += step
        foreign = np.array([tuple(cell) not in own for cell in beside.tolist()], bool)
        gap = share[:, axis] if step < 0 else 1 - share[:, axis]
        out[foreign] = np.minimum(out, gap)[foreign]
    return out
