"""Golden messages: `python -m tests.wire.golden` writes the folder of the present version.

A file holds one message: each part as a 32-bit little-endian length and its bytes. Folders of
older versions are never written again; they must stay readable.
"""

from __future__ import annotations

import struct
from pathlib import Path

from mclnf_edge.wire.codec import encode
from mclnf_edge.wire.messages import PROTOCOL
from tests.wire.examples import EXAMPLES

GOLDEN = Path(__file__).parent / "golden"
PRESENT = GOLDEN / f"{PROTOCOL[0]}.{PROTOCOL[1]}"


def dump(parts: list[bytes]) -> bytes:
    """One golden file's bytes."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def load(path: Path) -> list[bytes]:
    """The parts in a golden file."""
    data, parts = path.read_bytes(), []
    while data:
        (size,) = struct.unpack_from("<I", data)
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts


if __name__ == "__main__":
    PRESENT.mkdir(exist_ok=True)
    for name, message in EXAMPLES.items():
        (PRESENT / f"{name}.bin").write_bytes(dump(encode(message)))
    print(f"{len(EXAMPLES)} messages in {PRESENT.relative_to(Path.cwd())}")
