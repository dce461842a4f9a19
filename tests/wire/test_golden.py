"""The bytes on the wire and their document: both fail when the format changes unannounced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import zmq

import mclnf_edge.wire
from mclnf_edge.daemon.security import ALLOWED, ROLES
from mclnf_edge.wire import messages
from mclnf_edge.wire.codec import decode, encode
from mclnf_edge.wire.messages import MESSAGES, PROTOCOL
from tests.wire.echo import EchoDaemon
from tests.wire.examples import EXAMPLES, plain
from tests.wire.golden import GOLDEN, PRESENT, load
from tests.wire.schema import SECTIONS, rows

DOCUMENT = (Path(mclnf_edge.wire.__file__).parent / "PROTOCOL.md").read_text()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*.bin")), ids=lambda path: path.stem)
def test_golden_message_of_any_version_is_read_as_its_example(path: Path) -> None:
    assert plain(decode(load(path))) == plain(EXAMPLES[path.stem])


@pytest.mark.parametrize("name", EXAMPLES)
def test_present_bytes_are_the_golden_ones(name: str) -> None:
    assert encode(EXAMPLES[name]) == load(PRESENT / f"{name}.bin"), (
        "the format changed: raise PROTOCOL's minor, write its changelog line, then run "
        "`python -m tests.wire.golden`"
    )


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda folder: folder.name)
def test_client_of_any_version_is_served(folder: Path) -> None:
    """What a client of that version sends, byte for byte, to a daemon of today."""
    context = zmq.Context[zmq.Socket[bytes]]()
    with EchoDaemon() as daemon, context, context.socket(zmq.DEALER) as old:
        old.linger = 0
        old.connect(daemon.address)
        for name in ("hello", "put-frame", "render", "status", "close-task", "drain"):
            old.send_multipart(load(folder / f"{name}.bin"))
        answered: set[str] = set()
        while not {"acks", "progress"} <= answered:
            assert old.poll(5_000), f"no more answers after {answered}"
            answered.add(decode(old.recv_multipart()).tag)
    assert answered == {"welcome", "acks", "render-reply", "status-reply", "closed", "progress"}


def test_every_message_has_a_golden_one() -> None:
    assert {message.tag for message in EXAMPLES.values()} == set(MESSAGES)
    assert {path.stem for path in PRESENT.glob("*.bin")} == set(EXAMPLES)


def section(name: str) -> str:
    """The text below one `###` heading."""
    match = re.search(rf"^### `{re.escape(name)}`\n(.*?)(?=^##|\Z)", DOCUMENT, re.M | re.S)
    assert match, f"PROTOCOL.md has no section for {name}"
    return match[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_document_lists_every_field_with_type_and_limits(name: str) -> None:
    lines = [line for line in section(name).splitlines() if line.startswith("| `")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    documented = [(row[0].strip(" `"), *row[1:4]) for row in cells]
    assert documented == rows(SECTIONS[name])
    assert all(len(row) == 5 and row[4].strip(" |") for row in cells), "a field has no meaning"


def test_document_lists_nothing_else() -> None:
    assert re.findall(r"^### `(\S+)`", DOCUMENT, re.M) == list(SECTIONS)


def test_document_states_the_version_the_limits_and_the_roles() -> None:
    assert f"version {PROTOCOL[0]}.{PROTOCOL[1]}\n" in DOCUMENT
    assert f"\n* {PROTOCOL[0]}.{PROTOCOL[1]}: " in DOCUMENT.partition("## Changelog")[2]
    for name in ("MAX_PARTS", "MAX_HEADER_BYTES", "MAX_PART_BYTES", "MAX_MESSAGE_BYTES"):
        assert re.search(rf"^\| [a-z ]+ \| {getattr(messages, name)}\b", DOCUMENT, re.M), name
    for role in ROLES[:-1]:
        line = re.search(rf"^\| `{role}` \| (.*) \|$", DOCUMENT, re.M)
        allowed = {kind.tag for kind, roles in ALLOWED.items() if role in roles}
        assert line and set(re.findall(r"`([a-z-]+)`", line[1])) == allowed
