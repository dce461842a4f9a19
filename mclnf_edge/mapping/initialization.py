"""Initialization files: what every new module starts from."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mclnf_edge.engine.field import MLP_SIZE
from mclnf_edge.errors import InitError

FORMAT = "mclnf-edge-init"
VERSION = 1
MAX_BYTES = 8 * 1024 * 1024
SHIPPED = "city_init.pt"


@dataclass(frozen=True)
class Initialization:
    """Shared parameters (MLP_SIZE,), the digest a map remembers, and how they were made."""

    mlp: npt.NDArray[np.float32]
    digest: str
    meta: dict[str, Any]


def load_init(path: Path | None) -> Initialization:
    """Read an initialization, the shipped one when `path` is None.

    Raises InitError for a missing, unsafe or foreign file, another modality, or wrong shapes.
    Loaded with `weights_only=True`: nothing in it is executed.
    """
    import torch

    if path is None:
        path = Path(str(resources.files("mclnf_edge") / "inits" / SHIPPED))
    if not path.is_file():
        raise InitError(f"init {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise InitError(f"init {path}: expected at most {MAX_BYTES} bytes")
    data = path.read_bytes()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise InitError(
            f"init {path}: not a safe initialization: {(reason or ['?'])[0]}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InitError(f"init {path}: expected a {FORMAT} file")
    if content.get("version") != VERSION:
        raise InitError(
            f"init {path}: expected version {VERSION}, received {content.get('version')!r}"
        )
    if content.get("modality") != "posed" or content.get("kind") != "planes":
        raise InitError(
            f"init {path}: expected modality posed, kind planes; received modality "
            f"{content.get('modality')!r}, kind {content.get('kind')!r}"
        )
    mlp = content.get("mlp")
    if not isinstance(mlp, torch.Tensor) or mlp.shape != (MLP_SIZE,) or not mlp.isfinite().all():
        raise InitError(f"init {path}: expected {MLP_SIZE} finite parameters")
    digest = hashlib.sha256(data).hexdigest()
    return Initialization(mlp.numpy().astype(np.float32), digest, _described(path, content))


def _described(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InitError(f"init {path}: config: expected a JSON object: {error}") from error
    if not isinstance(meta, dict):
        raise InitError(f"init {path}: config: expected a JSON object")
    return meta


def save_init(path: Path, mlp: npt.NDArray[np.float32], meta: dict[str, Any]) -> None:
    """Write an initialization with how it was made."""
    import torch

    content = {
        "format": FORMAT,
        "version": VERSION,
        "modality": "posed",
        "kind": "planes",
        "mlp": torch.from_numpy(np.ascontiguousarray(mlp, np.float32)),
        "config": json.dumps(meta),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
