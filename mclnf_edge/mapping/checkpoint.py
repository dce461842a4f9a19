"""The open work of a mapper as named arrays and a JSON-able description, and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.modules import Cell, cell_name
from mclnf_edge.mapping.structure import Tiles

if TYPE_CHECKING:
    from mclnf_edge.mapping.mapper import Mapper

Arrays = dict[str, npt.NDArray[Any]]
_SLOT = ("features", "weights", "density", "surface", "seen")
_ROW = ("fisher", "moment", "square", "ray_fisher", "adam_steps")


def pack(mapper: Mapper) -> tuple[Arrays, dict[str, Any]]:
    """Everything the open work needs to go on; arrays are copies or never changed again."""
    arrays: Arrays = {}
    meta: dict[str, Any] = {"steps": mapper.optimizer.steps, "modules": [], "frames": {}}
    pool = mapper.pool
    if pool is None:
        return arrays, meta
    meta |= {"cell_size_m": pool.cell_m, "psnr": mapper.psnr, "ended": sorted(mapper.ended)}
    meta |= {"task_of": mapper.task_of, "random": mapper.random.bit_generator.state}
    meta |= {"dirty": mapper.dirty, "alone": mapper.alone}
    meta |= {"tiles_per_frame": mapper.tiles_per_frame}
    meta["origins"] = {str(site): origin.tolist() for site, origin in mapper.origins.items()}
    meta["gains"] = mapper.exposures.rows()
    for site, structure in mapper.structures.items():
        arrays[f"points/{site}"] = structure.points.copy()
        for cell, raster in structure.rasters.items():
            arrays["raster/" + "/".join(map(str, cell))] = raster
    if mapper.optimizer.plane_scale is not None:
        arrays["plane_scale"] = mapper.optimizer.plane_scale.copy()
    for m in mapper.learning():
        meta["modules"].append(
            {"cell": list(m.cell), "version": m.version, "steps": m.steps, "rays": m.rays,
             "seeded_with": m.seeded_with, "fresh": m.fresh, "frames": sorted(m.frames),
             "psnr": m.psnr, "asked": m.asked, "seconds": m.seconds, "tasks": sorted(m.tasks),
             "tiles": mapper.tiles[m.cell], "gone": m.gone, "rank": pool.rank_of[m.cell],
             "levelled": m.levelled}
        )  # fmt: skip
        for name in (*_SLOT, "band"):
            arrays[f"{m.id}/{name}"] = getattr(pool, name)[m.slot].copy()
        for name in _ROW:
            arrays[f"{m.id}/{name}"] = np.asarray(getattr(pool, name)[m.row]).copy()
    for f in mapper.frames.values():
        meta["frames"][str(f.id)] = [f.rays, f.anchored, *(float(v) for v in f.gain)]
        if f.tiles:
            arrays[f"tiles/{f.id}"] = _rows_of(f.tiles)
    return arrays, meta


def unpack(mapper: Mapper, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Put packed work into a mapper that has adopted the closed modules.

    Held frames are added again afterwards, from the ledger; once they are, every step is the one
    that would have come without the interruption.
    """
    if "origins" not in meta:
        return
    pool = mapper.pool_of(float(meta["cell_size_m"]))
    for site, origin in meta["origins"].items():
        mapper.origins[int(site)] = np.array(origin, np.float64)
        mapper.structure_of(int(site)).points = arrays[f"points/{site}"]
    for name, array in arrays.items():
        if name.startswith("raster/"):
            cell = cell_of(name[7:].split("/"))
            mapper.structures[cell[0] // 2].rasters[cell] = array
        elif name.startswith("tiles/"):
            mapper.returning[int(name[6:])] = _by_cell(array)
    mapper.task_of, mapper.ended = dict(meta["task_of"]), set(meta["ended"])
    mapper.optimizer.plane_scale = arrays.get("plane_scale")
    mapper.dirty, mapper.alone = meta["dirty"], meta["alone"]
    mapper.tiles_per_frame = meta["tiles_per_frame"]
    mapper.optimizer.steps, mapper.psnr = meta["steps"], meta["psnr"]
    mapper.random.bit_generator.state = meta["random"]
    mapper.exposures.load(meta["gains"])
    for item in meta["modules"]:
        _unpack_module(mapper, arrays, item)
    pool.refresh_transposed(np.array([m.row for m in mapper.learning()], np.int64))


def _unpack_module(mapper: Mapper, arrays: Arrays, item: dict[str, Any]) -> None:
    pool, cell = mapper.pool, cell_of(item["cell"])
    assert pool is not None
    closed = mapper.modules.get(cell)
    if closed is not None and closed.version >= item["version"]:
        return  # committed after this checkpoint was written
    low, inverse = (float(v) for v in arrays[f"{cell_name(cell)}/band"])
    if closed is None:
        m = mapper.modules[cell] = pool.spawn(cell, low, low + 1 / inverse)
    else:
        m, closed.state = closed, "open"
        if cell not in pool.slot_of:
            m.slot = pool.take_slot(cell)
        pool.place(cell, m.slot, low, low + 1 / inverse)
        pool.thaw(m)
    if "rank" in item:
        pool.set_rank(cell, item["rank"])
    for name in _SLOT:
        getattr(pool, name)[m.slot] = arrays[f"{m.id}/{name}"]
    for name in _ROW:
        kept, own = arrays.get(f"{m.id}/{name}"), getattr(pool, name)
        if kept is not None and kept.shape == own.shape[1:]:  # else rays were weighed otherwise
            own[m.row] = kept
    pool.guarded[m.row] = item["version"] > 1 and pool.layout.features > 0
    mapper.tiles[cell], m.gone, m.tasks = item["tiles"], item["gone"], set(item["tasks"])
    m.version, m.steps, m.rays = item["version"], item["steps"], item["rays"]
    m.seeded_with, m.fresh, m.psnr = item["seeded_with"], item.get("fresh", 0), item["psnr"]
    m.levelled = bool(item.get("levelled", False))
    m.asked, m.seconds = bool(item["asked"]), float(item["seconds"])
    m.frames, m.last_frame_at = set(item["frames"]), time.monotonic()


def cell_of(parts: list[Any]) -> Cell:
    """A cell from its three numbers as they are stored."""
    level, ix, iy = (int(v) for v in parts)
    return level, ix, iy


def _rows_of(tiles: Tiles) -> npt.NDArray[np.int32]:
    """(n, 4) rows (level, ix, iy, tile) of a frame's tiles by cell."""
    parts = [np.column_stack([np.tile(cell, (len(t), 1)), t]) for cell, t in tiles.items()]
    return np.concatenate([np.zeros((0, 4)), *parts]).astype(np.int32)


def _by_cell(rows: npt.NDArray[np.int32]) -> Tiles:
    """The inverse of `_rows_of`, in the same order."""
    cells = dict.fromkeys(cell_of(row) for row in rows[:, :3].tolist())
    return {c: np.ascontiguousarray(rows[(rows[:, :3] == c).all(1), 3]) for c in cells}
