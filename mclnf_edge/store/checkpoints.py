"""Checkpoints of open work: two generations each, so that one damaged file costs one interval.

A file is `MAGIC`, the SHA-256 of all that follows, the generation (8 bytes, big endian), and a
safetensors body whose metadata holds the name and the description as JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mclnf_edge.errors import Corrupt
from mclnf_edge.store.files import (
    DISK,
    FileSystem,
    remove,
    safe_name,
    store_error,
    write_durably,
)

log = logging.getLogger(__name__)

MAGIC = b"mclnfck1"
SLOTS = (".a.ckpt", ".b.ckpt")
_HEADER = len(MAGIC) + 8 + 32

Arrays = dict[str, npt.NDArray[Any]]


class Checkpoints:
    """Named checkpoints in one folder."""

    def __init__(self, folder: Path, files: FileSystem = DISK) -> None:
        self.folder, self._files = folder, files

    def save(
        self, name: str, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Keep `arrays` and the JSON-able `meta` under `name`, over the older generation."""
        generations = {path: _generation(path) for path in self._slots(name)}
        oldest = min(generations, key=lambda path: generations[path])
        number = max(generations.values()) + 1
        body = save(
            {key: np.asarray(array, order="C") for key, array in arrays.items()},
            metadata={"name": name, "meta": json.dumps(meta)},
        )
        checked = number.to_bytes(8, "big") + body
        write_durably(oldest, MAGIC + _digest(checked) + checked, self._files)

    def load(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """The newest sound generation, None when there never was one; raises Corrupt."""
        paths = [path for path in self._slots(name) if path.exists()]
        for path in sorted(paths, key=_generation, reverse=True):
            try:
                return read_checkpoint(path)[1:]
            except Corrupt as error:
                log.warning("%s; the generation before it is tried", error)
        if paths:
            raise Corrupt(f"{self.folder}: no generation of the checkpoint {name!r} is sound")
        return None

    def set_aside(self, name: str) -> None:
        """Give damaged generations another name, so that the next ones can be written."""
        try:
            for path in self._slots(name):
                if path.exists():
                    self._files.rename(path, path.with_name(path.name + ".damaged"))
        except OSError as error:
            raise store_error(error, f"renaming checkpoints in {self.folder}") from error

    def drop(self, name: str) -> None:
        """Forget both generations."""
        for path in self._slots(name):
            remove(path, self._files)

    def names(self) -> list[str]:
        """The names that have a sound checkpoint."""
        found = set()
        for path in sorted(self.folder.glob("*.ckpt")):
            try:
                found.add(read_checkpoint(path)[0])
            except Corrupt as error:
                log.warning("%s", error)
        return sorted(found)

    def _slots(self, name: str) -> list[Path]:
        return [self.folder / (safe_name(name) + slot) for slot in SLOTS]


def read_checkpoint(path: Path) -> tuple[str, Arrays, dict[str, Any]]:
    """(name, arrays, meta) of one file; raises Corrupt, or StoreError where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise store_error(error, f"reading {path}") from error
    checked = data[len(MAGIC) + 32 :]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : len(MAGIC) + 32] != _digest(checked):
        raise Corrupt(f"{path}: the checksum does not match ({len(data)} bytes)")
    body = checked[8:]
    try:
        length = int.from_bytes(body[:8], "little")
        texts = json.loads(body[8 : 8 + length])["__metadata__"]
        return texts["name"], load(body), json.loads(texts["meta"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise Corrupt(f"{path}: {error}") from error


def _generation(path: Path) -> int:
    """The number in the file's header, 0 when it is missing or not ours."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise store_error(error, f"reading {path}") from error
    ours = len(header) == _HEADER and header.startswith(MAGIC)
    return int.from_bytes(header[-8:], "big") if ours else 0


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
