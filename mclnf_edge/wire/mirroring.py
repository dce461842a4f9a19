"""The list of committed modules inside a `Committed`: packed by the leader, read by a follower."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mclnf_edge.errors import ProtocolError

MAX_LISTED = 64
MAX_LIST_BYTES = 16 * 1024 * 1024
"""Of JSON, before it is compressed."""
MAX_MODULE_BYTES = 1 << 30

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listed:
    """One committed version: its place, its file's length and SHA-256, and what it says of itself.

    A quarantined one cannot be fetched.
    """

    id: str
    version: int
    state: Literal["closed", "quarantined"]
    bytes: int
    digest: str
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise ProtocolError for a wrong type or a value out of range."""
        text = isinstance(self.id, str) and 1 <= len(self.id) <= 128 and self.id.isprintable()
        whole = all(
            type(n) is int and 0 <= n <= MAX_MODULE_BYTES for n in (self.version, self.bytes)
        )
        named = isinstance(self.digest, str) and _DIGEST.fullmatch(self.digest)
        known = self.state in ("closed", "quarantined") and isinstance(self.meta, dict)
        if not (text and whole and named and known):
            told = f"{self.id!r} {self.version!r} {self.state!r} {self.bytes!r} {self.digest!r}"
            raise ProtocolError(
                f"committed: expected a module with its digest, received {told:.300}"
            )


def pack_list(about: Mapping[str, Any], modules: Sequence[Listed]) -> bytes:
    """What the map is and as many of the modules as fit, at least one, as a `Committed` body."""
    listed: list[dict[str, Any]] = []
    size = len(json.dumps(about))
    for module in modules[:MAX_LISTED]:
        entry = asdict(module)
        size += len(json.dumps(entry)) + 2
        if listed and size > MAX_LIST_BYTES // 4:
            break
        listed.append(entry)
    text = json.dumps({"map": dict(about), "modules": listed}, allow_nan=False)
    return zlib.compress(text.encode())


def unpack_list(body: bytes) -> tuple[dict[str, Any], list[Listed]]:
    """(what the map is, modules) of a `Committed` body; raises ProtocolError."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(body, MAX_LIST_BYTES)
        if not inflater.eof:
            raise ProtocolError(f"committed: expected at most {MAX_LIST_BYTES} bytes of JSON")
        told = json.loads(text)
        about, modules = told["map"], [Listed(**entry) for entry in told["modules"]]
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"committed: expected compressed JSON: {error}") from error
    if not isinstance(about, dict) or len(modules) > MAX_LISTED:
        raise ProtocolError(f"committed: expected a map and at most {MAX_LISTED} modules")
    return about, modules
