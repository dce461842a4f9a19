"""Committed modules: immutable safetensors files, each with its digest in the ledger.

The file is written, fsynced, renamed and its directory fsynced before the ledger has a row for
it, so a row always has its whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mclnf_edge.errors import Corrupt, StoreError
from mclnf_edge.store.files import DISK, FileSystem, remove, safe_name, store_error, write_durably
from mclnf_edge.store.ledger import Ledger, ModuleRecord, new_record
from mclnf_edge.types import ModuleSnapshot

SUFFIX = ".safetensors"


class ModuleStore:
    """The modules of one map, in one folder."""

    def __init__(self, folder: Path, ledger: Ledger, files: FileSystem = DISK) -> None:
        self.folder, self._ledger, self._files = folder, ledger, files

    def commit(self, snapshot: ModuleSnapshot, let_go: Mapping[int, int]) -> ModuleRecord:
        """Commit one version for ever and let its frames go (frame id -> rays), all or nothing.

        Raises StoreError when this version is committed already, DiskFull when there is no room.
        """
        if self._ledger.has_module(snapshot.id, snapshot.version):
            raise StoreError(
                f"{self.folder}: version {snapshot.version} of module {snapshot.id!r} is "
                "committed already and never changes"
            )
        json.dumps(snapshot.meta, allow_nan=False)
        arrays = {name: np.ascontiguousarray(a) for name, a in snapshot.arrays.items()}
        data = save(arrays, metadata={"id": snapshot.id, "version": str(snapshot.version)})
        file = f"{safe_name(snapshot.id)}.{snapshot.version}{SUFFIX}"
        write_durably(self.folder / file, data, self._files)
        digest = hashlib.sha256(data).hexdigest()
        record = new_record(
            snapshot.id, snapshot.version, digest, file, len(data), dict(snapshot.meta)
        )
        self._ledger.put_module(record, let_go)
        return record

    def load(self, module: str, version: int | None = None) -> ModuleSnapshot:
        """One version, by default the newest sound one.

        Raises Corrupt when the file is not what was committed, StoreError when there is no such
        version.
        """
        record = self._ledger.module(module, version)
        data = self.verified(record)
        try:
            arrays = load(data)
        except SafetensorError as error:
            raise Corrupt(f"{self.folder / record.file}: {error}") from error
        return ModuleSnapshot(record.id, record.version, arrays, record.meta)

    def verified(self, record: ModuleRecord) -> bytes:
        """The module's file, its digest checked; raises Corrupt."""
        path = self.folder / record.file
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise Corrupt(f"{path}: expected the file of module {record.id!r}: missing") from error
        except OSError as error:
            raise store_error(error, f"reading {path}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.digest:
            raise Corrupt(
                f"{path}: expected {record.bytes} bytes with SHA-256 {record.digest}, "
                f"received {len(data)} bytes with {digest}"
            )
        return data

    def quarantine_wrong_sizes(self) -> list[ModuleRecord]:
        """Quarantine what is missing or has another size; quick enough for every start."""
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        wrong = [
            record
            for record in self._ledger.modules()
            if record.state == "closed" and sizes.get(record.file) != record.bytes
        ]
        for record in wrong:
            self._ledger.quarantine(record.id, record.version)
        return wrong

    def remove_orphans(self) -> list[Path]:
        """Remove files that no row names: a commit that was cut short."""
        named = {record.file for record in self._ledger.modules()}
        orphans = [path for path in self.folder.iterdir() if path.name not in named]
        for path in orphans:
            remove(path, self._files)
        return orphans
