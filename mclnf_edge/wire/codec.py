"""Messages to message parts and back: a MessagePack header, then the raw byte parts.

The mapping is derived once from each dataclass (`messages.py`). Everything is checked before it
is used: number and size of the parts, then the header's structure, version and tag, then every
field's type and range. Nothing is ever unpickled and no extension type is accepted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from mclnf_edge.errors import MclnfError, MessageTooLarge, ProtocolError, VersionMismatch
from mclnf_edge.wire.messages import (
    FOREIGN_RULES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    MESSAGES,
    OLDEST_MAJOR,
    PROTOCOL,
    ErrorReply,
    Message,
    Rule,
)

Buffer = bytes | bytearray | memoryview
Parts = dict[str, Buffer]
Read = Callable[[Any, str, Parts], Any]
Write = Callable[[Any, str, Parts], Any]


class BadField(ProtocolError):
    """A field is missing, of the wrong type or out of its range."""

    code = "field"


class UnknownMessage(ProtocolError):
    """A message tag that this side does not know: the peer is newer or not a peer."""

    code = "unknown-message"


def encode(message: Message) -> list[bytes]:
    """The parts of `message`; raises BadField or MessageTooLarge exactly where `decode` would."""
    parts: Parts = {}
    plan = _plan(type(message))
    fields = plan.write(message, message.tag, parts)
    # Reading back what was written checks every type and range by the receiver's own rules.
    plan.read(fields, message.tag, parts)
    number, names = fields.pop("id"), [path.partition(".")[2] for path in parts]
    header = {"v": list(PROTOCOL), "t": message.tag, "i": number, "f": fields, "p": names}
    frames = [msgpack.packb(header), *map(bytes, parts.values())]
    _check_sizes(frames)
    return frames


def decode(frames: Sequence[Buffer]) -> Message:
    """The message in `frames`; raises a ProtocolError that names the field at fault."""
    _check_sizes(frames)
    header = _unpack(frames[0])
    tag, number = header.get("t"), header.get("i", 0)
    _check_version(header.get("v"), tag)
    if not isinstance(tag, str) or tag not in MESSAGES:
        raise UnknownMessage(
            f"message tag: expected one of {sorted(MESSAGES)}, received {tag!r:.80}"
        )
    fields = header.get("f")
    if not isinstance(fields, dict):
        raise BadField(f"{tag}: expected a map of fields, received {_kind(fields)}")
    parts = _named_parts(tag, header.get("p", []), frames)
    message: Message = _plan(MESSAGES[tag]).read({**fields, "id": number}, tag, parts)
    return message


def error_reply(error: MclnfError, frames: Sequence[Buffer]) -> ErrorReply:
    """The reply to a message that raised `error`, with its id where that could be read."""
    number = 0
    try:
        _check_sizes(frames)
        number = _unpack(frames[0]).get("i", 0)
    except ProtocolError:
        pass
    valid = type(number) is int and 0 <= number < 2**63
    return ErrorReply(id=number if valid else 0, code=error.code, message=str(error)[:4096])


def _check_sizes(frames: Sequence[Buffer]) -> None:
    if not 1 <= len(frames) <= MAX_PARTS:
        raise ProtocolError(f"expected 1 to {MAX_PARTS} message parts, received {len(frames)}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise MessageTooLarge(
            f"header: at most {MAX_HEADER_BYTES} bytes, {len(frames[0])} received"
        )
    largest, total = max(map(len, frames)), sum(map(len, frames))
    if largest > MAX_PART_BYTES:
        raise MessageTooLarge(f"part: at most {MAX_PART_BYTES} bytes, {largest} received")
    if total > MAX_MESSAGE_BYTES:
        raise MessageTooLarge(f"message: at most {MAX_MESSAGE_BYTES} bytes, {total} received")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _unpack(frame: Buffer) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            max_bin_len=4096,
            max_str_len=65_536,
            max_array_len=4096,
            max_map_len=1024,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"header is not the expected MessagePack: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError(f"header: expected a map, received {_kind(header)}")
    return header


def _check_version(version: Any, tag: Any) -> None:
    shaped = isinstance(version, list) and len(version) >= 2
    if not shaped or not all(type(number) is int for number in version[:2]):
        raise ProtocolError(f"protocol version: expected [major, minor], received {version!r:.80}")
    # An error is read from any major, or a client could not learn that it is too old.
    if not OLDEST_MAJOR <= version[0] <= PROTOCOL[0] and tag != ErrorReply.tag:
        raise VersionMismatch(
            f"protocol version: expected major {OLDEST_MAJOR} to {PROTOCOL[0]}, "
            f"received {version[0]}.{version[1]}"
        )


def _named_parts(tag: str, names: Any, frames: Sequence[Buffer]) -> Parts:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProtocolError(f"{tag}: expected a list of part names, received {names!r:.80}")
    if len(names) != len(frames) - 1 or len(set(names)) != len(names):
        raise ProtocolError(
            f"{tag}: expected {len(frames) - 1} different part names, received {names!r:.80}"
        )
    return {f"{tag}.{name}": frame for name, frame in zip(names, frames[1:], strict=True)}


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """How values of one type are written to and read from plain MessagePack values."""

    write: Write
    read: Read


def _plan(hint: Any, rule: Rule | None = None) -> _Plan:
    return _cached_plan(hint, rule or Rule())


@functools.cache
def _cached_plan(hint: Any, rule: Rule) -> _Plan:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _plan(args[0], args[1])
    if origin in (Union, types.UnionType):
        return _optional(_plan(next(arg for arg in args if arg is not type(None)), rule))
    if origin is Literal:
        return _Plan(_write_scalar, _read_choice(args))
    if origin is tuple:
        return _tuple(args, rule)
    if origin is dict:
        return _map(args[1], rule)
    if origin is np.ndarray:
        return _Plan(_write_matrix, _read_matrix(rule))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint))
    return _Plan(_write_scalar, _SCALARS[hint](rule))


def _write_scalar(value: Any, path: str, parts: Parts) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _bounded(number: float, rule: Rule, path: str) -> None:
    if rule.lo is not None and number < rule.lo or rule.hi is not None and number > rule.hi:
        raise BadField(f"{path}: expected {rule.lo} to {rule.hi}, received {number!r:.80}")


def _read_bool(rule: Rule) -> Read:
    def read(value: Any, path: str, parts: Parts) -> bool:
        if type(value) is not bool:
            raise BadField(f"{path}: expected a bool, received {_kind(value)}")
        return value

    return read


def _read_int(rule: Rule) -> Read:
    def read(value: Any, path: str, parts: Parts) -> int:
        if type(value) is not int:
            raise BadField(f"{path}: expected an integer, received {_kind(value)}")
        _bounded(value, rule, path)
        return value

    return read


def _read_float(rule: Rule) -> Read:
    def read(value: Any, path: str, parts: Parts) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise BadField(f"{path}: expected a finite number, received {_kind(value)}")
        _bounded(value, rule, path)
        return float(value)

    return read


def _read_text(rule: Rule) -> Read:
    longest = 512 if rule.hi is None else rule.hi
    shortest = rule.lo or 0

    def read(value: Any, path: str, parts: Parts) -> str:
        if type(value) is not str:
            raise BadField(f"{path}: expected text, received {_kind(value)}")
        if not shortest <= len(value) <= longest:
            raise BadField(f"{path}: expected {shortest} to {longest} characters, got {len(value)}")
        if not rule.free_text and not value.isprintable():
            raise BadField(f"{path}: expected printable text, received {value!r:.80}")
        return value

    return read


_SCALARS: Mapping[Any, Callable[[Rule], Read]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_text,
}


def _read_choice(choices: tuple[Any, ...]) -> Read:
    def read(value: Any, path: str, parts: Parts) -> Any:
        if type(value) is not str or value not in choices:
            raise BadField(f"{path}: expected one of {choices}, received {value!r:.80}")
        return value

    return read


def _optional(plan: _Plan) -> _Plan:
    def write(value: Any, path: str, parts: Parts) -> Any:
        return None if value is None else plan.write(value, path, parts)

    def read(value: Any, path: str, parts: Parts) -> Any:
        return None if value is None else plan.read(value, path, parts)

    return _Plan(write, read)


def _tuple(args: tuple[Any, ...], rule: Rule) -> _Plan:
    """Plan of `tuple[T, ...]` or `tuple[T, T, T]`; the rule bounds the items, too."""
    item = _plan(args[0], rule)
    exact = None if args[-1] is Ellipsis else len(args)

    def write(value: Any, path: str, parts: Parts) -> Any:
        if not isinstance(value, tuple | list):
            raise BadField(f"{path}: expected a tuple, received {_kind(value)}")
        return [item.write(one, f"{path}[{i}]", parts) for i, one in enumerate(value)]

    def read(value: Any, path: str, parts: Parts) -> Any:
        if type(value) is not list:
            raise BadField(f"{path}: expected a list, received {_kind(value)}")
        if len(value) > rule.max_items or (exact is not None and len(value) != exact):
            expected = exact if exact is not None else f"at most {rule.max_items}"
            raise BadField(f"{path}: expected {expected} items, received {len(value)}")
        return tuple(item.read(one, f"{path}[{i}]", parts) for i, one in enumerate(value))

    return _Plan(write, read)


def _map(value_hint: Any, rule: Rule) -> _Plan:
    """Plan of `dict[str, T]`."""
    item, key = _plan(value_hint), _plan(str)

    def write(value: Any, path: str, parts: Parts) -> Any:
        return {name: item.write(one, f"{path}.{name}", parts) for name, one in value.items()}

    def read(value: Any, path: str, parts: Parts) -> Any:
        if type(value) is not dict or len(value) > rule.max_items:
            raise BadField(f"{path}: expected a map of at most {rule.max_items} entries")
        return {key.read(k, path, parts): item.read(v, path, parts) for k, v in value.items()}

    return _Plan(write, read)


def _write_matrix(value: Any, path: str, parts: Parts) -> Any:
    if np.shape(value) != (4, 4):
        raise BadField(f"{path}: expected a 4x4 matrix, received shape {np.shape(value)}")
    return np.asarray(value, np.float64).ravel().tolist()


def _read_matrix(rule: Rule) -> Read:
    number = _read_float(rule)

    def read(value: Any, path: str, parts: Parts) -> Any:
        if type(value) is not list or len(value) != 16:
            raise BadField(f"{path}: expected 16 numbers, row by row")
        matrix = np.array([number(one, path, parts) for one in value], np.float64).reshape(4, 4)
        if matrix[3].tolist() != [0.0, 0.0, 0.0, 1.0]:
            raise BadField(f"{path}: expected the last row 0 0 0 1, received {matrix[3].tolist()}")
        return matrix

    return read


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    plan: _Plan
    rule: Rule
    required: bool


def _fields(cls: type) -> list[_Field]:
    hints, foreign = get_type_hints(cls, include_extras=True), FOREIGN_RULES.get(cls, {})
    fields = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        own = get_args(hint)[1] if get_origin(hint) is Annotated else Rule()
        rule = foreign.get(field.name, own)
        required = field.default is field.default_factory is dataclasses.MISSING
        # A part's bytes and a field that stays at home have no plain value, hence no plan.
        plan = _plan(str) if rule.part or not rule.travels else _plan(hint, rule)
        fields.append(_Field(field.name, plan, rule, required))
    return fields


def _record(cls: type) -> _Plan:
    """Plan of a dataclass: a map by field name; unknown names are ignored."""
    fields = [field for field in _fields(cls) if field.rule.travels]

    def write(value: Any, path: str, parts: Parts) -> Any:
        if not isinstance(value, cls):
            raise BadField(f"{path}: expected {cls.__name__}, received {_kind(value)}")
        plain: dict[str, Any] = {}
        for field in fields:
            one, where = getattr(value, field.name), f"{path}.{field.name}"
            if not field.rule.part:
                plain[field.name] = field.plan.write(one, where, parts)
            elif one is not None:
                parts[where] = _part(one, where)
        return plain

    def read(value: Any, path: str, parts: Parts) -> Any:
        if type(value) is not dict:
            raise BadField(f"{path}: expected a map, received {_kind(value)}")
        known: dict[str, Any] = {}
        for field in fields:
            where = f"{path}.{field.name}"
            if field.rule.part and where in parts:
                known[field.name] = _checked_part(parts[where], field.rule, where)
            elif not field.rule.part and value.get(field.name) is not None:
                known[field.name] = field.plan.read(value[field.name], where, parts)
            elif field.required:
                raise BadField(f"{where}: missing")
        return cls(**known)

    return _Plan(write, read)


def _part(value: Any, path: str) -> Buffer:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise BadField(f"{path}: expected bytes, received {_kind(value)}")
    return value


def _checked_part(part: Buffer, rule: Rule, path: str) -> bytes:
    if rule.hi is not None and len(part) > rule.hi:
        raise MessageTooLarge(f"{path}: at most {rule.hi} bytes, {len(part)} received")
    if len(part) < (rule.lo or 0):
        raise BadField(f"{path}: at least {rule.lo} bytes, {len(part)} received")
    return bytes(part)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"
