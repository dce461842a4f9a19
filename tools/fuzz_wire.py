"""Malformed messages through the real decoder and over the real socket; results as JSON.

    python tools/fuzz_wire.py decoder --count 1000000
    python tools/fuzz_wire.py socket --count 10000

Message n depends on the seed and n only, so a run that was stopped goes on where its result file
stands. A message must either decode to one that encodes again, or raise a ProtocolError; anything
else is a failure and is kept in the results with its bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import zmq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the examples live with the tests

from mclnf_edge.errors import ProtocolError  # noqa: E402
from mclnf_edge.wire.codec import decode, encode, error_reply  # noqa: E402
from mclnf_edge.wire.messages import StatusReply, StatusRequest  # noqa: E402
from tests.wire.echo import EchoDaemon  # noqa: E402
from tests.wire.examples import EXAMPLES  # noqa: E402

RESULTS = ROOT / "tools" / "results"
SEED = 20_260_301
CHUNK = 10_000
"""Messages between two savings of the result file."""
PATIENCE_MS = 5_000
"""How long an honest client may wait for its answer."""
ASKED = 2**40
"""Ids of the fuzzer's own questions, which no malformed message has."""

SEEDS = [encode(message) for message in EXAMPLES.values()]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "x" * 600, "x" * 70_000, "\0", "\n", "\u202e", "ü" * 128, "../../etc/passwd"),
    *(b"", b"\xff" * 40, [], [[]], [None] * 17, [0] * 5_000, {}, {"": {}}, {"a": [{"b": 1}]}),
]

Parts = list[bytes]


def malformed(number: int, seed: int = SEED) -> Parts:
    """Message `number`: a sound one, broken in one to three ways."""
    random_ = random.Random(f"{seed}/{number}")
    parts = list(random_.choice(SEEDS))
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        parts = random_.choice(BREAKS)(parts, random_)
    return parts


def _flip_bits(parts: Parts, random_: random.Random) -> Parts:
    return _on_a_part(parts, random_, lambda part: _flipped(part, random_))


def _flipped(part: bytearray, random_: random.Random) -> bytearray:
    for _ in range(random_.randint(1, 4)):
        if part:
            part[random_.randrange(len(part))] ^= 1 << random_.randrange(8)
    return part


def _truncate(parts: Parts, random_: random.Random) -> Parts:
    return _on_a_part(parts, random_, lambda part: part[: random_.randrange(len(part) + 1)])


def _insert(parts: Parts, random_: random.Random) -> Parts:
    def insert(part: bytearray) -> bytearray:
        at = random_.randrange(len(part) + 1)
        return part[:at] + random_.randbytes(random_.randint(1, 9)) + part[at:]

    return _on_a_part(parts, random_, insert)


def _claim_lengths(parts: Parts, random_: random.Random) -> Parts:
    """A MessagePack prefix that promises more than there is."""
    prefix = random_.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9", b"\xdc", b"\xde"])
    return [parts[0][:-1] + prefix + random_.randbytes(4), *parts[1:]] if parts else [prefix]


def _nest(parts: Parts, random_: random.Random) -> Parts:
    level, most = random_.choice([(b"\x91", 3_000), (b"\x81\xa1f", 3_000), (b"\xdc\x10\0", 50)])
    deep = level * random_.randint(1, most)
    return [b"\x81\xa1f" + deep, *parts[1:]]


def _noise(parts: Parts, random_: random.Random) -> Parts:
    return [random_.randbytes(random_.randint(0, 200)) for _ in range(random_.randint(0, 10))]


def _odd_value(parts: Parts, random_: random.Random) -> Parts:
    """Any value of the header, at any depth, becomes something odd."""
    try:
        header = msgpack.unpackb(parts[0], strict_map_key=False)
    except (ValueError, IndexError, TypeError):
        return parts
    places = list(_places(header)) if isinstance(header, dict | list) else []
    if not places:
        return parts
    holder, key = random_.choice(places)
    if random_.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = random_.choice(ODD)
    return [msgpack.packb(header), *parts[1:]]


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _shuffle_parts(parts: Parts, random_: random.Random) -> Parts:
    parts = parts + [random_.choice(random_.choice(SEEDS))] * random_.randint(0, 9)
    return random_.sample(parts, random_.randint(0, len(parts)))


def _on_a_part(
    parts: Parts, random_: random.Random, change: Callable[[bytearray], bytearray]
) -> Parts:
    if not parts:
        return parts
    # Mostly the header: that is where the structure is.
    at = 0 if random_.random() < 0.8 else random_.randrange(len(parts))
    return [*parts[:at], bytes(change(bytearray(parts[at]))), *parts[at + 1 :]]


BREAKS: Sequence[Callable[[Parts, random.Random], Parts]] = (
    *(_flip_bits, _truncate, _insert, _claim_lengths, _nest, _noise),
    # Most of them keep the structure, or little would get as far as the fields.
    *(_shuffle_parts, *[_odd_value] * 9),
)


def try_message(parts: Parts) -> str:
    """What the decoder says: `sound` or the error's code; raises what must not happen."""
    try:
        message = decode(parts)
    except ProtocolError as error:
        encode(error_reply(error, parts))
        return error.code
    encode(message)
    return "sound"


def fuzz_decoder(first: int, count: int, outcomes: Counter[str]) -> list[dict[str, Any]]:
    """Messages `first` to `first + count`; counts outcomes and returns failures."""
    failures = []
    for number in range(first, first + count):
        parts = malformed(number)
        try:
            outcomes[try_message(parts)] += 1
        except Exception as error:  # whatever it is, it is what we look for
            outcomes["failure"] += 1
            failures.append(
                {"number": number, "error": repr(error), "parts": [part.hex() for part in parts]}
            )
    return failures


def fuzz_socket(first: int, count: int, outcomes: Counter[str]) -> list[dict[str, Any]]:
    """Send malformed messages to a real endpoint and count every reply.

    Every 10th time the same connection is asked for the status, so that no reply is left unread or
    uncounted; every 50th time an honest client asks too.
    """
    context = zmq.Context[zmq.Socket[bytes]]()
    with EchoDaemon() as daemon, context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(daemon.address)
        with context.socket(zmq.DEALER) as honest:
            honest.linger = 0
            honest.connect(daemon.address)
            for number in range(first, first + count):
                socket.send_multipart(malformed(number) or [b""])
                last = number == first + count - 1
                if (number % 10 == 9 or last) and not _ask(socket, number, outcomes):
                    return [{"number": number, "error": "the connection is answered no more"}]
                if number % 50 == 49:
                    if not _ask(honest, number, Counter()):
                        return [{"number": number, "error": "an honest client was not answered"}]
                    outcomes["honest answered"] += 1
        outcomes["too many parts"] += daemon.endpoint.dropped["parts"]
        outcomes["unread"] += daemon.endpoint.dropped["unread"]
    return []


def _ask(socket: zmq.Socket[bytes], number: int, outcomes: Counter[str]) -> bool:
    """Ask for the status, count the replies that come before it; False when it does not come."""
    question = StatusRequest(id=ASKED + number)
    socket.send_multipart(encode(question))
    while socket.poll(PATIENCE_MS):
        reply = decode(socket.recv_multipart())
        if reply.tag == StatusReply.tag and reply.id == question.id:
            return True
        outcomes[getattr(reply, "code", reply.tag)] += 1
    return False


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(kind: str, count: int, path: Path) -> dict[str, Any]:
    """Go on from the result file up to `count` messages, saving now and then."""
    fuzz = {"decoder": fuzz_decoder, "socket": fuzz_socket}[kind]
    state = json.loads(path.read_text()) if path.exists() else {}
    if state.get("seed") != SEED or state.get("kind") != kind:
        state = {"kind": kind, "seed": SEED, "done": 0, "outcomes": {}, "failures": []}
        state |= {"seconds": 0.0, "resident_mb": []}
    outcomes = Counter(state["outcomes"])
    while state["done"] < count:
        start, size = time.monotonic(), min(CHUNK, count - state["done"])
        state["failures"] += fuzz(state["done"], size, outcomes)
        state["done"] += size
        state["seconds"] = round(state["seconds"] + time.monotonic() - start, 2)
        state["outcomes"] = dict(outcomes.most_common())
        state["resident_mb"].append(round(resident_mb(), 1))
        state["machine"] = {"python": platform.python_version(), "cpus": os.cpu_count()}
        state["machine"] |= {"platform": platform.platform(), "load": os.getloadavg()[0]}
        _save(path, state)
    return state


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(state, indent=1) + "\n")
    fresh.replace(path)


def main() -> int:
    """Run, print a line, return 1 when anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=("decoder", "socket"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="result file, tools/results/fuzz_<kind>.json")
    arguments = parser.parse_args()
    path = arguments.out or RESULTS / f"fuzz_{arguments.kind}.json"
    state = run(arguments.kind, arguments.count, path)
    print(f"{state['done']} messages, {len(state['failures'])} failures, {state['outcomes']}")
    print(f"resident {state['resident_mb'][0]} to {state['resident_mb'][-1]} MB, {path}")
    return 1 if state["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
