"""The initialization that a map began with is kept in it: a restart needs no PyTorch to read it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from mclnf_edge.config import ServeConfig
from mclnf_edge.errors import StoreError
from mclnf_edge.mapping.engines import open_start
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization, init_file
from mclnf_edge.store import MapStore, read_checkpoint_of

START = "start"
log = logging.getLogger(__name__)


def open_kept(
    config: ServeConfig, path: Path | None, map_dir: Path
) -> Initialization | SignalInitialization:
    """`open_start`, from the map in `map_dir` where that one began with the very file at `path`.

    Raises InitError as it does.
    """
    kept, file = _kept(map_dir), init_file(path)
    same = kept is not None and file.is_file() and kept.digest == _digest(file)
    if kept is not None and same and kept.kind == config.field.kind:
        return kept
    return open_start(config, path)


def keep(store: MapStore, start: Initialization | SignalInitialization) -> None:
    """Have the map hold what it begins with; those of signals are read with PyTorch anyway."""
    if not isinstance(start, Initialization) or _kept(store.path) is not None:
        return
    about = {"digest": start.digest, "kind": start.kind, "meta": start.meta}
    try:
        store.checkpoint_save(START, {"mlp": start.mlp}, about)
    except StoreError as error:  # a full disk: it only makes the next start slower
        log.warning("the initialization is not kept: %s", error)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _kept(map_dir: Path) -> Initialization | None:
    try:
        found = read_checkpoint_of(map_dir, START)
    except StoreError as error:
        log.warning("the kept initialization is not used: %s", error)
        return None
    if found is None:
        return None
    arrays, about = found
    return Initialization(arrays["mlp"], about["digest"], about["meta"], about["kind"])
