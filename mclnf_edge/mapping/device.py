"""A pool's arrays as tensors: the pool's own memory on the CPU, copies of it on another device.

The pool is the truth for all that is kept: snapshots, checkpoints, seeds. Copies and pool take
turns. The device's turn begins with `lend`, which copies what the pool has changed; the pool's turn
begins when anybody reads one of its arrays (`modules.Shared`), which calls `pull`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mclnf_edge.engine.torch_volume import TensorScene, cell_keys
from mclnf_edge.mapping.modules import ModulePool

SLOTS = ("features", "weights", "density", "surface", "seen")
ROWS = ("fisher", "moment", "square", "ray_fisher", "adam_steps")
_LEARNED = ("features", "weights")
_SMALL = ("box", "band", "owner", "guarded", "rank")
"""Copied every time; only the pool writes to them."""


class Lent:
    """What an engine works on: every array of a pool by name, and the scene of a site."""

    def __init__(self, pool: ModulePool, tensors: dict[str, Tensor], table: Tensor) -> None:
        self.pool, self.tensors, self._table = pool, tensors, table

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def scene(self, site: int) -> TensorScene:
        """What rays into a site read; `owner` is -1 for frozen modules."""
        t, layout = self.tensors, self.pool.layout
        return TensorScene(
            cell=self.pool.cell_m,
            site=site,
            keys=self._table[0],
            key_slot=self._table[1],
            box=t["box"],
            band=t["band"],
            features=t["features"],
            planes=torch.from_numpy(layout.planes).long().to(t["box"].device),
            weights=t["weights"],
            density=t["density"],
            voxels=layout.voxels,
            surface=t["surface"],
            seen=t["seen"],
            owner=t["owner"],
            rank=t["rank"],
            known_views=self.pool.known_views,
        )


def share(pool: ModulePool) -> Lent:
    """The pool's own memory."""
    names = (*SLOTS, *ROWS, *_SMALL)
    tensors = {name: torch.from_numpy(getattr(pool, name)) for name in names}
    return Lent(pool, tensors, _table(pool))


class DeviceArrays:
    """Copies of one pool's arrays on a device; see the module's head for whose turn it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}
        self._pools_turn = True
        self._newer = False
        self._learning: tuple[list[int], list[int]] = ([], [])

    def lend(self, pool: ModulePool, *, learn: bool) -> Lent:
        """The device's arrays, up to date; with `learn` the caller may change what learns.

        Raises torch.cuda.OutOfMemoryError; then it is still the pool's turn.
        """
        if pool.copies is not self:
            self._held, self._pools_turn, self._newer = {}, True, False
            pool.copies = self
        live = [s for s in pool.slot_of.values() if pool.owner[s] >= 0]
        learning = live, [int(pool.owner[s]) for s in live]
        if self._pools_turn:
            before = self._learning if self._held else ([], [])
            used = sorted(pool.slot_of.values())
            self._push(pool, SLOTS, used, sorted({*learning[0], *before[0], *pool.rewritten}))
            self._push(pool, ROWS, learning[1], sorted({*learning[1], *before[1]}))
        for name in _SMALL:
            self._held[name] = torch.from_numpy(getattr(pool, name)).to(self.device, copy=True)
        lent = Lent(pool, self._held, _table(pool).to(self.device))
        pool.rewritten.clear()
        self._learning, self._pools_turn = learning, False
        self._newer = self._newer or learn
        return lent

    def _push(
        self, pool: ModulePool, names: tuple[str, ...], used: list[int], changed: list[int]
    ) -> None:
        """Copy what `changed`; all that is `used` where the pool has grown. Slots or rows."""
        for name in names:
            array, held = _own(pool, name), self._held.get(name)
            rows = changed
            if held is None or held.shape != array.shape:
                kind = torch.from_numpy(array[:0]).dtype
                held = torch.zeros(array.shape, dtype=kind, device=self.device)
                self._held[name], rows = held, used
            if rows:
                held[rows] = torch.from_numpy(array[rows]).to(self.device)

    def pull(self, pool: ModulePool) -> None:
        """See `modules.Copies`."""
        if self._newer:
            slots, rows = self._learning
            for names, changed in ((_LEARNED, slots), (ROWS, rows)):
                for name in names if changed else ():
                    _own(pool, name)[changed] = self._held[name][changed].cpu().numpy()
        self._newer, self._pools_turn = False, True


def _own(pool: ModulePool, name: str) -> npt.NDArray[Any]:
    """A pool's array as it is: reading it this way does not begin the pool's turn."""
    array: npt.NDArray[Any] = vars(pool)[name]
    return array


def _table(pool: ModulePool) -> Tensor:
    """(2, cells + 1) sorted keys of the cells in memory and their slots; the first is no cell's."""
    nowhere = (-1, 0, 0, -1)
    rows = np.array([nowhere, *((*c, slot) for c, slot in pool.slot_of.items())], np.int64)
    level, ix, iy, slot = torch.from_numpy(rows).unbind(1)
    keys, order = cell_keys(level, ix, iy).sort()
    return torch.stack([keys, slot[order]])
