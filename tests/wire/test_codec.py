"""The codec: what is written is read back, and nothing malformed gets through."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any, get_args, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclnf_edge.errors import MessageTooLarge, ProtocolError, VersionMismatch
from mclnf_edge.types import Camera, Frame, View
from mclnf_edge.wire.codec import BadField, UnknownMessage, decode, encode, error_reply
from mclnf_edge.wire.messages import (
    FOREIGN_RULES,
    MAX_HEADER_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    MESSAGES,
    PROTOCOL,
    Hello,
    Message,
    Progress,
    PutFrame,
    PutSignal,
    Rule,
    StatusRequest,
    opengl_frame,
)
from tests.wire.examples import EXAMPLES, POSE, frame, plain

# Messages made from their own types and rules


def numbers(rule: Rule, kind: type) -> st.SearchStrategy[Any]:
    """Numbers inside the rule's bounds."""
    if kind is int:
        lo = -(2**63) if rule.lo is None else int(rule.lo)
        return st.integers(lo, 2**63 - 1 if rule.hi is None else int(rule.hi))
    return st.floats(rule.lo, rule.hi, allow_nan=False, allow_infinity=False)


def text(rule: Rule) -> st.SearchStrategy[str]:
    """Text the rule allows, unprintable only where it is free."""
    letters = st.characters(codec="utf-8")
    if not rule.free_text:
        letters = letters.filter(str.isprintable)
    return st.text(letters, min_size=int(rule.lo or 0), max_size=min(int(rule.hi or 512), 40))


def poses() -> st.SearchStrategy[Any]:
    """4x4 matrices with the last row 0 0 0 1."""
    rows = st.lists(st.floats(-1e9, 1e9), min_size=12, max_size=12)
    return rows.map(lambda row: np.array([*row, 0, 0, 0, 1.0]).reshape(4, 4))


def values(hint: Any, rule: Rule) -> st.SearchStrategy[Any]:
    """Values of a field's type within its rule."""
    origin, args = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        return values(args[0], hint.__metadata__[0])
    if type(None) in args:
        return st.none() | values(next(arg for arg in args if arg is not type(None)), rule)
    if origin is not None and str(origin) == "typing.Literal":
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0], rule), max_size=min(rule.max_items, 4)).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(arg, rule) for arg in args))
    if origin is dict:
        return st.dictionaries(text(Rule()), numbers(Rule(), int), max_size=3)
    if origin is np.ndarray:
        return poses()
    if dataclasses.is_dataclass(hint):
        return records(hint)  # type: ignore[arg-type]
    if hint is bytes:
        return st.binary(min_size=int(rule.lo or 0), max_size=64)
    if hint is bool:
        return st.booleans()
    return text(rule) if hint is str else numbers(rule, hint)


def records(cls: type) -> st.SearchStrategy[Any]:
    """Instances of a dataclass that travels."""
    hints, foreign = get_type_hints(cls, include_extras=True), FOREIGN_RULES.get(cls, {})
    fields = {}
    for field in dataclasses.fields(cls):
        rule = foreign.get(field.name, Rule())
        if rule.travels:
            fields[field.name] = values(hints[field.name], rule)
    return st.builds(cls, **fields)


@given(st.sampled_from(sorted(MESSAGES)).flatmap(lambda tag: records(MESSAGES[tag])))
def test_every_message_survives_the_round_trip(message: Message) -> None:
    assert plain(decode(encode(message))) == plain(message)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_survives_as_memory_views(name: str) -> None:
    views = [memoryview(part) for part in encode(EXAMPLES[name])]
    assert plain(decode(views)) == plain(EXAMPLES[name])


def test_what_the_source_knows_stays_at_home() -> None:
    put = PutFrame(session="s", stream="c", frame=frame(meta={"path": "/home/me/secret.jpg"}))
    parts = encode(put)
    assert b"secret" not in b"".join(parts)
    received = decode(parts)
    assert isinstance(received, PutFrame) and received.frame.meta == {}


def test_numpy_numbers_travel_as_plain_ones() -> None:
    size: Any = np.float64(2.0)
    number: Any = np.int64(3)
    posed = Frame(number, 0.0, b"x", "raw", Camera(4, 4, size, size, size, size), POSE)
    put = PutFrame(session="s", stream="c", frame=posed)
    received = decode(encode(put))
    assert isinstance(received, PutFrame) and type(received.frame.seq) is int


def test_positions_keep_all_their_bits() -> None:
    pose = POSE.copy()
    pose[:3, 3] = 691234.123456789, 5334567.987654321, 612.000000001
    received = decode(encode(PutFrame(session="s", stream="c", frame=frame(T_world_camera=pose))))
    assert isinstance(received, PutFrame)
    assert received.frame.T_world_camera.tobytes() == pose.tobytes()


def test_opencv_axes_become_opengl_axes() -> None:
    looking = frame(T_world_camera=np.eye(4))
    turned = opengl_frame(looking, "opencv").T_world_camera
    assert (turned[:3, :3] @ [0, 0, -1] == [0, 0, 1]).all()  # the view direction
    assert (turned[:3, :3] @ [0, 1, 0] == [0, -1, 0]).all()  # the picture's up
    assert opengl_frame(looking, "opengl") is looking


# Malformed messages


def header(parts: list[bytes], **changes: Any) -> list[bytes]:
    """`parts` with entries of the header changed; None removes one."""
    plain_header = msgpack.unpackb(parts[0]) | changes
    kept = {key: value for key, value in plain_header.items() if value is not None}
    return [msgpack.packb(kept), *parts[1:]]


def with_field(parts: list[bytes], path: str, value: Any) -> list[bytes]:
    """`parts` with one field, named by a dotted path, set to `value`."""
    plain_header = msgpack.unpackb(parts[0])
    target = plain_header["f"]
    *way, last = path.split(".")
    for step in way:
        target = target[step]
    target[last] = value
    return [msgpack.packb(plain_header), *parts[1:]]


PUT = encode(EXAMPLES["put-frame"])
NAN, INF = float("nan"), float("inf")

MALFORMED: dict[str, tuple[list[bytes], type[ProtocolError], str]] = {
    "no part": ([], ProtocolError, "expected 1 to 8 message parts, received 0"),
    "too many parts": ([PUT[0]] * (MAX_PARTS + 1), ProtocolError, "received 9"),
    "empty header": ([b""], ProtocolError, "not the expected MessagePack"),
    "random bytes": ([b"\xc1\xff\x00"], ProtocolError, "not the expected MessagePack"),
    "large header": ([b"\xc0" * (MAX_HEADER_BYTES + 1)], MessageTooLarge, "header: at most 262144"),
    "not a map": ([msgpack.packb([1, 2])], ProtocolError, "expected a map, received list"),
    "bytes after it": ([PUT[0] + b"\0", *PUT[1:]], ProtocolError, "extra"),
    "keys not text": ([msgpack.packb({1: 2})], ProtocolError, "not the expected"),
    "extension type": ([msgpack.packb({"v": msgpack.ExtType(4, b"")})], ProtocolError, "extension"),
    "time stamp type": (
        [msgpack.packb({"v": msgpack.Timestamp(1, 1)})],
        ProtocolError,
        "not the expected",
    ),
    "text not UTF-8": ([b"\x81\xa1t\xa2\xff\xfe"], ProtocolError, "not the expected"),
    "deep nesting": ([b"\x81\xa1f" + b"\x91" * 100_000 + b"\xc0"], ProtocolError, "not the exp"),
    "huge list": ([b"\x81\xa1f\xdd\xff\xff\xff\xff"], ProtocolError, "not the expected"),
    "huge text": ([b"\x81\xa1f\xdb\xff\xff\xff\xff"], ProtocolError, "not the expected"),
    "huge map": ([b"\xdf\xff\xff\xff\xff"], ProtocolError, "not the expected"),
    "no version": (header(PUT, v=None), ProtocolError, "expected [major, minor]"),
    "version as text": (header(PUT, v="1.0"), ProtocolError, "expected [major, minor]"),
    "next major": (header(PUT, v=[2, 0]), VersionMismatch, "expected major 1 to 1, received 2.0"),
    "major 0": (header(PUT, v=[0, 9]), VersionMismatch, "received 0.9"),
    "bool as version": (header(PUT, v=[True, False]), ProtocolError, "expected [major, minor]"),
    "unknown tag": (header(PUT, t="put-soup"), UnknownMessage, "received 'put-soup'"),
    "tag is a list": (header(PUT, t=[1]), UnknownMessage, "received [1]"),
    "no tag": (header(PUT, t=None), UnknownMessage, "received None"),
    "no fields": (header(PUT, f=None), BadField, "expected a map of fields"),
    "id negative": (header(PUT, i=-1), BadField, "put-frame.id: expected 0 to"),
    "id too large": (header(PUT, i=2**63), BadField, "put-frame.id: expected 0 to"),
    "id a float": (header(PUT, i=1.0), BadField, "put-frame.id: expected an integer"),
    "part too few": (PUT[:-1], ProtocolError, "different part names"),
    "part too many": ([*PUT, b"x"], ProtocolError, "different part names"),
    "part twice": (header(PUT, p=["frame.image"] * 3), ProtocolError, "different part names"),
    "part unknown": (header(PUT, p=["a", "b", "c"]), BadField, "frame.image: missing"),
    "part names not text": (header(PUT, p=[1, 2, 3]), ProtocolError, "list of part names"),
    "image empty": ([PUT[0], b"", *PUT[2:]], BadField, "frame.image: at least 1 bytes"),
    "frame missing": (header(PUT, f={"session": "s", "stream": "c"}), BadField, "frame: missing"),
    "frame a list": (with_field(PUT, "frame", [1]), BadField, "put-frame.frame: expected a map"),
    "seq a bool": (with_field(PUT, "frame.seq", True), BadField, "seq: expected an integer"),
    "seq as text": (with_field(PUT, "frame.seq", "1"), BadField, "seq: expected an integer"),
    "seq negative": (with_field(PUT, "frame.seq", -1), BadField, "seq: expected 0 to"),
    "time NaN": (with_field(PUT, "frame.timestamp", NAN), BadField, "expected a finite number"),
    "time infinite": (with_field(PUT, "frame.timestamp", INF), BadField, "finite number"),
    "session empty": (with_field(PUT, "session", ""), BadField, "session: expected 1 to 128"),
    "session long": (with_field(PUT, "session", "x" * 129), BadField, "session: expected 1 to 128"),
    "session bytes": (with_field(PUT, "session", b"x"), BadField, "session: expected text"),
    "line break": (with_field(PUT, "stream", "a\nb"), BadField, "stream: expected printable text"),
    "encoding": (with_field(PUT, "frame.encoding", "tiff"), BadField, "expected one of ('jpeg'"),
    "encoding a list": (with_field(PUT, "frame.encoding", []), BadField, "expected one of"),
    "split": (with_field(PUT, "frame.split", "all"), BadField, "expected one of ('train'"),
    "pose NaN": (
        with_field(PUT, "frame.T_world_camera", [NAN] * 12 + [0, 0, 0, 1]),
        BadField,
        "frame.T_world_camera: expected a finite number",
    ),
    "pose 12 numbers": (
        with_field(PUT, "frame.T_world_camera", [1.0] * 12),
        BadField,
        "expected 16 numbers",
    ),
    "pose last row": (
        with_field(PUT, "frame.T_world_camera", [1.0] * 16),
        BadField,
        "expected the last row 0 0 0 1",
    ),
    "camera width 0": (with_field(PUT, "frame.camera.width", 0), BadField, "camera.width: expec"),
    "focal length 0": (with_field(PUT, "frame.camera.fx", 0.0), BadField, "camera.fx: expected"),
    "focal length absurd": (with_field(PUT, "frame.camera.fy", 1e30), BadField, "camera.fy: exp"),
    "distortion long": (
        with_field(PUT, "frame.camera.distortion", [0.0] * 13),
        BadField,
        "distortion: expected at most 12 items, received 13",
    ),
    "exposure 0": (with_field(PUT, "frame.exposure", 0.0), BadField, "exposure: expected 1e-12"),
    "depth scale": (with_field(PUT, "frame.depth_scale_m", 0), BadField, "depth_scale_m: expected"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_message_is_a_named_error(name: str) -> None:
    parts, kind, said = MALFORMED[name]
    with pytest.raises(kind) as caught:
        decode(parts)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1_000
    reply = error_reply(caught.value, parts)
    assert reply.code == caught.value.code
    encode(reply)  # the answer itself is sound


def test_every_truncation_is_an_error() -> None:
    for cut in range(len(PUT[0])):
        with pytest.raises(ProtocolError):
            decode([PUT[0][:cut], *PUT[1:]])


class Claimed(bytes):
    """Bytes that claim a length which nobody allocated."""

    claimed = 0

    def __len__(self) -> int:
        return self.claimed


@pytest.mark.parametrize(("part", "size"), [(1, MAX_PART_BYTES + 1), (3, 2**40)])
def test_oversized_part_is_refused_by_its_length_alone(part: int, size: int) -> None:
    claimed = Claimed()
    claimed.claimed = size
    parts = [*PUT[:part], claimed, *PUT[part + 1 :]]
    with pytest.raises(MessageTooLarge, match=f"at most {MAX_PART_BYTES} bytes, {size} received"):
        decode(parts)


def test_whole_message_has_its_own_limit() -> None:
    largest = bytes(MAX_PART_BYTES)
    with pytest.raises(MessageTooLarge, match="message: at most 67108864"):
        decode([PUT[0], largest, largest, largest])


@pytest.mark.parametrize("bomb", ["deep nesting", "huge list", "huge text", "huge map"])
def test_small_bomb_allocates_little(bomb: str) -> None:
    parts = MALFORMED[bomb][0]
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(parts)
        assert tracemalloc.get_traced_memory()[1] < 2 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_nested_largest_lists_stay_within_a_stated_bound() -> None:
    """The worst header: every open list reserves its stated 4096 places, up to the depth limit."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([b"\x81\xa1f" + b"\xdc\x10\x00" * 80_000])
        assert tracemalloc.get_traced_memory()[1] < 40 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "message",
    [
        PutFrame(session="", stream="c", frame=frame()),
        PutFrame(session="s", stream="c", frame=frame(timestamp=NAN)),
        PutFrame(session="s", stream="c", frame=frame(T_world_camera=np.eye(3))),
        PutFrame(session="s", stream="c", frame=frame(image=b"")),
        PutFrame(session="s", stream="c", frame=frame(image="text")),  # type: ignore[arg-type]
        PutSignal(session="s", stream="c", signal=frame()),  # type: ignore[arg-type]
        Progress(steps=-1),
        Progress(modules_open="two"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_message_is_refused_by_its_sender(message: Message) -> None:
    with pytest.raises(BadField):
        encode(message)


def test_error_reply_carries_the_number_of_what_it_answers() -> None:
    fault = BadField("x" * 5_000)
    assert error_reply(fault, header(PUT, t="nonsense")).id == EXAMPLES["put-frame"].id
    assert len(error_reply(fault, PUT).message) == 4096
    assert error_reply(fault, [b"\xff"]).id == 0


# Other versions


def test_older_minor_lacks_the_newer_fields() -> None:
    """A peer from before a field with a default existed does not send it."""
    optional = {"stream": None, "modality": None, "world": None, "axes": None, "client": None}
    message = decode(header(encode(EXAMPLES["hello"]), f={"session": "flight-1"}, v=[1, 0]))
    assert plain(message) == plain(dataclasses.replace(EXAMPLES["hello"], **_defaults(optional)))


def _defaults(names: dict[str, None]) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(MESSAGES["hello"])}
    return {name: fields[name] for name in names}


def test_newer_minor_has_fields_and_header_entries_that_are_ignored() -> None:
    newer = header(with_field(PUT, "frame.temperature", {"celsius": 4}), v=[1, PROTOCOL[1] + 1, 7])
    newer = header(newer, x="later")
    assert plain(decode(newer)) == plain(EXAMPLES["put-frame"])


def test_an_error_is_read_from_any_version() -> None:
    parts = header(encode(EXAMPLES["error"]), v=[9, 4])
    assert plain(decode(parts)) == plain(EXAMPLES["error"])


def test_view_without_optional_fields() -> None:
    request = EXAMPLES["render"]
    bare = View(request.view.camera, POSE)  # type: ignore[attr-defined]
    message = dataclasses.replace(request, view=bare)  # type: ignore[call-arg]
    assert plain(decode(encode(message))) == plain(message)
    assert decode(encode(StatusRequest(id=4))) == StatusRequest(id=4)


def test_nil_is_absent() -> None:
    parts = encode(Hello(session="s", stream="camera"))
    header = msgpack.unpackb(parts[0])
    header["f"]["stream"] = None
    assert decode([msgpack.packb(header)]) == Hello(session="s")
    header["f"]["session"] = None
    with pytest.raises(BadField, match="session: missing"):
        decode([msgpack.packb(header)])
