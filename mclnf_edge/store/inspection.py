"""Looking at a map without serving it: what it holds, what is broken, and a consistent copy."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mclnf_edge.errors import StoreError
from mclnf_edge.store.checkpoints import read_checkpoint
from mclnf_edge.store.database import ledger_error
from mclnf_edge.store.files import DISK, make_directory, store_error
from mclnf_edge.store.ledger import ModuleRecord
from mclnf_edge.store.map_store import (
    CHECKPOINTS,
    IDENTITY,
    LEDGER,
    LOCK,
    MODULES,
    MapStore,
)
from mclnf_edge.store.module_store import ModuleStore

OPEN_MODULES = "open_modules"
"""Where a checkpoint's description has the entries of the modules that learn."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something broken in a map: the file (relative to the map) and what is wrong with it."""

    file: str
    message: str


def module_info(record: ModuleRecord) -> dict[str, Any]:
    """A module's entry in `map info` and `status`."""
    described = {key: record.meta.get(key) for key in ("steps", "frames", "bounds", "psnr")}
    return {
        "id": record.id,
        "version": record.version,
        "state": record.state,
        **described,
        "digest": record.digest,
        "bytes": record.bytes,
    }


def map_info(path: Path | str) -> dict[str, Any]:
    """What a map holds: `meta`, `modules` (closed, and open at the last checkpoint), `streams`,
    `tasks` and the ledger's counts."""
    with MapStore.open(path, read_only=True) as store:
        tasks = {task: state for task, (state, _) in store.tasks().items()}
        modules = [module_info(record) for record in store.modules()]
        names = store.checkpoint_names()
        return {
            "path": str(path),
            "meta": store.meta(),
            "modules": [*modules, *_open_modules(store, names, modules)],
            "streams": store.streams(),
            "tasks": tasks,
            "checkpoints": names,
            **store.counts(),
        }


def _open_modules(
    store: MapStore, names: list[str], closed: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What learned when the last checkpoint was written, and was not committed since."""
    known = {(module["id"], module["version"]) for module in closed}
    for name in names:
        kept = store.checkpoint_load(name)
        for module in kept[1].get(OPEN_MODULES, ()) if kept else ():
            if (module["id"], module["version"]) not in known:
                yield {**module, "state": "open"}


def map_check(path: Path | str) -> list[Problem]:
    """Verify every byte that carries a checksum and every row; empty when all is sound."""
    path = Path(path)
    try:
        store = MapStore.open(path, read_only=True)
    except StoreError as error:
        return [Problem(LEDGER, str(error))]
    with store:
        problems = _check_ledger(store)
        return problems or [*_check_modules(store), *_check_checkpoints(path)]


def _check_ledger(store: MapStore) -> list[Problem]:
    database = store.ledger.database
    try:
        said = [row[0] for row in database.rows("PRAGMA integrity_check")]
        broken = database.rows("PRAGMA foreign_key_check")
        lengths = database.rows(
            "SELECT id FROM frames WHERE state = 'held' AND length(payload) != bytes"
        )
    except StoreError as error:
        return [Problem(LEDGER, str(error))]
    problems = [Problem(LEDGER, line) for line in said if line != "ok"]
    problems += [Problem(LEDGER, f"row of {row[0]} refers to nothing") for row in broken]
    return problems + [Problem(LEDGER, f"frame {row[0]}: payload cut") for row in lengths]


def _check_modules(store: MapStore) -> list[Problem]:
    modules = ModuleStore(store.path / MODULES, store.ledger)
    problems = []
    for record in store.modules():
        file = f"{MODULES}/{record.file}"
        if record.state == "quarantined":
            problems.append(Problem(file, f"module {record.id!r} is quarantined"))
            continue
        try:
            modules.verified(record)
        except StoreError as error:
            problems.append(Problem(file, str(error)))
    return problems


def _check_checkpoints(path: Path) -> list[Problem]:
    problems = []
    for file in sorted((path / CHECKPOINTS).glob("*.ckpt")):
        try:
            read_checkpoint(file)
        except StoreError as error:
            problems.append(Problem(f"{CHECKPOINTS}/{file.name}", str(error)))
    return problems


def snapshot(path: Path | str, out: Path | str) -> None:
    """Copy the map at `path` to the new directory `out`, also while a daemon serves it.

    The ledger is copied as of one moment; the modules it names never change and are linked where
    the disk allows it. A half copy lies under another name. Raises StoreError.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise StoreError(f"{out}: expected a name that is free")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in (partial, partial / MODULES, partial / CHECKPOINTS):
        make_directory(folder)
    try:
        _copy_ledger(path / LEDGER, partial / LEDGER)
        shutil.copyfile(path / IDENTITY, partial / IDENTITY)
        (partial / LOCK).touch()
        for file in (path / CHECKPOINTS).glob("*.ckpt"):
            _copy_if_there(file, partial / CHECKPOINTS / file.name)
        with MapStore.open(partial, read_only=True) as copied:
            for record in copied.modules():
                _link(path / MODULES / record.file, partial / MODULES / record.file)
        os.sync()
        DISK.rename(partial, out)
        DISK.fsync_dir(out.parent)
    except OSError as error:
        raise store_error(error, f"copying {path} to {out}") from error


def _copy_ledger(source: Path, target: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reader,
            closing(sqlite3.connect(target)) as writer,
        ):
            reader.backup(writer)
    except sqlite3.Error as error:
        raise ledger_error(error, f"copying {source}") from error


def _copy_if_there(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        return  # Its task closed meanwhile: the copied ledger still holds the frames.


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        return  # Missing in the map itself, which `map_check` of the copy will say too.
    except OSError:
        shutil.copyfile(source, target)
