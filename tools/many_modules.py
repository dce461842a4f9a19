"""Large maps in seconds: copies of one learned module, committed as any module is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mclnf_edge.mapping.mapper import Mapper
from mclnf_edge.mapping.modules import Cell, cell_name
from mclnf_edge.store import MapStore
from mclnf_edge.types import ModuleSnapshot


def learned_module(mapper: Mapper) -> ModuleSnapshot:
    """The inner module of site 0 that owns the most tiles, closed, as it would be committed."""
    inner = [m for m in mapper.learning() if m.cell[0] == 0]
    snapshot = mapper.close(max(inner, key=lambda m: mapper.tiles[m.cell])).snapshot
    assert snapshot is not None
    return snapshot


def offsets() -> Iterator[tuple[int, int]]:
    """Cells without end: the first, then around it to the north, east and south, never west."""
    yield 0, 0
    for n in itertools.count(1):  # around n columns of 2 n - 1 rows
        yield from ((n, y) for y in range(1 - n, n))
        for x in range(n + 1):
            yield from ((x, -n), (x, n))


def spread(module: ModuleSnapshot, store: MapStore, have: int, want: int) -> list[Cell]:
    """Grow a map of `have` copies to `want`, from the module's own cell on; the cells of all."""
    level, ix, iy = (int(v) for v in module.meta["cell"])
    made = []
    for number, (dx, dy) in enumerate(itertools.islice(offsets(), want)):
        cell = (level, ix + dx, iy + dy)
        made.append(cell)
        if number >= have:
            moved = np.array([dx, dy, 0]) * module.meta["cell_size_m"]
            bounds = (np.array(module.meta["bounds"]) + moved).tolist()
            meta = {**module.meta, "cell": list(cell), "bounds": bounds}
            store.commit_module(replace(module, id=cell_name(cell), meta=meta))
    return made
