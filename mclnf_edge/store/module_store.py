"""Committed modules: immutable safetensors files, each with its digest in the ledger.

The file is written, fsynced, renamed and its directory fsynced before the ledger has a row for
it, so a row always has its whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        arrays = {name: np.ascontiguousarray(a) for name, a in snapshot.arrays.items()}
        data = save(arrays, metadata={"id": snapshot.id, "version": str(snapshot.version)})
        return self.keep(snapshot.id, snapshot.version, data, dict(snapshot.meta), let_go)

    def keep(
        self,
        module: str,
        version: int,
        data: bytes,
        meta: dict[str, Any],
        let_go: Mapping[int, int],
    ) -> ModuleRecord:
        """Commit a version whose file's bytes are `data`; see `commit`."""
        if self._ledger.has_module(module, version):
            raise StoreError(
                f"{self.folder}: version {version} of module {module!r} is "
                "committed already and never changes"
            )
        json.dumps(meta, allow_nan=False)
        file = _file_of(module, version)
        write_durably(self.folder / file, data, self._files)
        digest = hashlib.sha256(data).hexdigest()
        record = new_record(module, version, digest, file, len(data), meta)
        self._ledger.put_module(record, let_go)
        return record

    def keep_lost(
        self, module: str, version: int, digest: str, size: int, meta: dict[str, Any]
    ) -> None:
        """Remember a version that is quarantined where it was made: it has no file here."""
        record = new_record(module, version, digest, _file_of(module, version), size, meta)
        self._ledger.put_module(replace(record, state="quarantined"), {})

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

    def read(self, record: ModuleRecord, offset: int, length: int) -> bytes:
        """Bytes of a module's file; the whole file's digest is checked where `offset` is 0.

        Raises Corrupt when the file is not what was committed.
        """
        if offset == 0:
            return self.verified(record)[:length]
        try:
            with (self.folder / record.file).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as error:
            raise Corrupt(f"{self.folder / record.file}: missing") from error
        except OSError as error:
            raise store_error(error, f"reading {self.folder / record.file}") from error

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


def _file_of(module: str, version: int) -> str:
    return f"{safe_name(module)}.{version}{SUFFIX}"
