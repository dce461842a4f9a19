"""What an initialization file holds is kept in the user's cache: the next start needs no PyTorch.

Importing PyTorch takes longer than all else before the daemon is ready. A cached copy carries the
digest of the file it was read from and a checksum of its own; one that is not sound is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from mclnf_edge.config import ServeConfig
from mclnf_edge.mapping.engines import open_start
from mclnf_edge.mapping.initialization import Initialization, SignalInitialization, init_file

log = logging.getLogger(__name__)


def open_cached(config: ServeConfig, path: Path | None) -> Initialization | SignalInitialization:
    """`open_start`, from the cache where the very file at `path` was read before.

    Those of signals are read with PyTorch anyway. Raises InitError as `open_start` does.
    """
    file = init_file(path)
    if not file.is_file():
        return open_start(config, path)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    cached = _read(digest)
    if cached is not None and cached.kind == config.field.kind:
        return cached
    start = open_start(config, path)
    if isinstance(start, Initialization):
        _write(start)
    return start


def cache_dir() -> Path:
    """The user's cache folder of this program (XDG_CACHE_HOME); one for nobody's without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mclnf-edge"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"mclnf-edge-{os.getuid()}"


def _entry(digest: str) -> Path:
    return cache_dir() / f"init-{digest}"


def _write(start: Initialization) -> None:
    about = {"digest": start.digest, "kind": start.kind, "meta": start.meta}
    packed = io.BytesIO()
    np.savez(packed, mlp=start.mlp, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    data, entry = packed.getvalue(), _entry(start.digest)
    part = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(data).digest() + data)
        part.replace(entry)
    except OSError as error:
        log.info("the initialization is not cached, so that starts are slower: %s", error)


def _read(digest: str) -> Initialization | None:
    """The copy of the file with this digest; None where there is no sound one."""
    try:
        packed = _entry(digest).read_bytes()
    except OSError:
        return None
    checksum, data = packed[:32], packed[32:]
    if hashlib.sha256(data).digest() != checksum:
        log.warning("%s is damaged: the initialization is read anew", _entry(digest))
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        return Initialization(arrays["mlp"], about["digest"], about["meta"], about["kind"])
