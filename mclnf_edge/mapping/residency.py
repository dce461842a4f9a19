"""Which closed modules are in memory: a budget, the least recently used ones give way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.mapping.extents import Window, reachable
from mclnf_edge.mapping.frames import TILE, HeldFrame
from mclnf_edge.mapping.modules import Cell, Module, ModulePool
from mclnf_edge.mapping.rays import Targets

log = logging.getLogger(__name__)


class Residency:
    """Loads closed modules when they are needed and drops those that were not for longest.

    `load(module)` brings a committed module into the pool, if it can. Modules that learn, that are
    not committed yet, that are pinned or needed right now are never dropped: where they are too
    many, memory passes the budget for so long, and a line in the log says so.
    """

    def __init__(
        self, modules: dict[Cell, Module], budget_bytes: int, load: Callable[[Module], None]
    ) -> None:
        self._modules, self.budget_bytes, self._load = modules, budget_bytes, load
        self._used: dict[Cell, int] = {}
        self._clock = 0
        self._over = False
        self._crossings: dict[int, tuple[object, list[Cell]]] = {}
        self._attached: ModulePool | None = None
        self.pinned: set[Cell] = set()

    def attach(self, pool: ModulePool) -> None:
        """Keep this pool within the budget from now on."""
        self._attached = pool
        pool.reserve(self.most)
        pool.make_room = self._make_room

    @property
    def _pool(self) -> ModulePool:
        assert self._attached is not None
        return self._attached

    @property
    def most(self) -> int:
        """How many modules fit beside the arrays of those that learn."""
        left = self.budget_bytes - self._pool.learning_bytes
        return max(left // self._pool.slot_bytes, 1)

    def facts(self) -> dict[str, Any]:
        """For `status`: modules in memory, megabytes of their arrays, and the budget."""
        pool = self._attached
        return {
            "resident": 0 if pool is None else len(pool.slot_of),
            "resident_mb": 0.0 if pool is None else pool.memory_bytes() / 1e6,
            "resident_budget_mb": self.budget_bytes / 1e6,
        }

    def ensure(self, cells: Iterable[Cell]) -> None:
        """Have all modules of these cells in memory; one that cannot be read is unknown."""
        self._clock += 1
        cells = list(cells)
        self._used.update(dict.fromkeys(cells, self._clock))
        self._trim()
        for cell in cells:
            if cell in self._pool.extents and cell not in self._pool.slot_of:
                self._load(self._modules[cell])

    def hold(
        self, frames: Sequence[HeldFrame], targets: Targets, reach: Mapping[int, float]
    ) -> None:
        """Pin and load what rays of training steps can cross, in place of what was pinned.

        `targets` says which tiles of which frames they go through, `reach` how far by site.
        """
        found: set[Cell] = set()
        drawn = {}
        for site, (index, tile, _) in targets.items():
            which, first = np.unique(index, return_index=True)  # ascending, frame by frame
            for i, tiles in zip(which, np.split(tile, first[1:]), strict=True):
                window = _window(frames[i], tiles, reach[site])
                drawn[frames[i].id] = self._crossing(frames[i].id, window, site)
                found.update(drawn[frames[i].id][1])
        self._crossings = drawn
        self.pinned = found
        self.ensure(sorted(found))

    def _crossing(self, frame_id: int, window: Window, site: int) -> tuple[object, list[Cell]]:
        """The cells of a frame's window, those found before where nothing has changed."""
        key = (self._pool.extents.version, window.frame, window.band, window.reach)
        known = self._crossings.get(frame_id)
        if known is not None and known[0] == key:
            return known
        return key, reachable(self._pool.extents, window, site)

    def _trim(self) -> None:
        """Come back to the budget after something needed more."""
        while len(self._pool.slot_of) > self.most and self._drop_oldest():
            pass
        self._over = self._over and len(self._pool.slot_of) > self.most

    def _make_room(self) -> None:
        """Called by the pool before it gives a slot away."""
        while len(self._pool.slot_of) >= self.most:
            if not self._drop_oldest():
                if not self._over:
                    log.warning(
                        "more modules are needed at once than the %d that fit in "
                        "render.resident_mb: memory passes it for so long", self.most,
                    )  # fmt: skip
                self._over = True
                return

    def _drop_oldest(self) -> bool:
        """Drop the module that was needed longest ago; False when none may go."""
        idle = [c for c in self._pool.slot_of if self._may_go(c)]
        if not idle:
            return False
        oldest = min(idle, key=lambda c: self._used.get(c, 0))
        self._pool.unload(oldest)
        self._modules[oldest].slot = -1
        self._used.pop(oldest, None)
        return True

    def _may_go(self, cell: Cell) -> bool:
        module = self._modules.get(cell)
        needed = self._used.get(cell, 0) == self._clock or cell in self.pinned
        return module is not None and module.row < 0 and bool(module.digest) and not needed


def _window(frame: HeldFrame, tiles: npt.NDArray[np.int32], reach: float) -> Window:
    """The part of a frame's picture that holds some of its tiles."""
    width, height = frame.size
    across, down = width // TILE, height // TILE
    column, line = tiles % across, tiles // across
    left, right = column.min() / across * width, (column.max() + 1) / across * width
    top, bottom = line.min() / down * height, (line.max() + 1) / down * height
    part = (float(left), float(top), float(right), float(bottom))
    return Window(frame.eye, frame.rotation, frame.K, part, frame.band, reach)
