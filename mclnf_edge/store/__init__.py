"""The map on disk: a durable ledger of frames, committed modules, checkpoints of open work."""

from __future__ import annotations

from mclnf_edge.store.inspection import (
    OPEN_MODULES,
    Problem,
    map_check,
    map_info,
    module_info,
    snapshot,
)
from mclnf_edge.store.ledger import FrameRow, HeldFrame, ModuleRecord, PutStatus
from mclnf_edge.store.map_store import DURABILITY, MapStore

__all__ = [
    "DURABILITY",
    "FrameRow",
    "HeldFrame",
    "MapStore",
    "OPEN_MODULES",
    "ModuleRecord",
    "Problem",
    "PutStatus",
    "map_check",
    "map_info",
    "module_info",
    "snapshot",
]
