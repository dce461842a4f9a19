"""What PROTOCOL.md has to say about each record, read from the dataclasses and their rules."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from mclnf_edge.types import Camera, Frame, Signal, View, WorldFrame
from mclnf_edge.wire.messages import FOREIGN_RULES, MAX_PART_BYTES, MESSAGES, Ack, Rule

RECORDS: dict[str, type] = {
    cls.__name__: cls for cls in (Frame, Signal, Camera, WorldFrame, View, Ack)
}
SECTIONS: dict[str, type] = {**MESSAGES, **RECORDS}


def rows(cls: type) -> list[tuple[str, str, str, str]]:
    """(field, type, limits, default) of every field that travels."""
    hints, foreign = get_type_hints(cls, include_extras=True), FOREIGN_RULES.get(cls, {})
    result = []
    for field in dataclasses.fields(cls):
        hint, rule = hints[field.name], Rule()
        if hasattr(hint, "__metadata__"):
            hint, rule = get_args(hint)[0], hint.__metadata__[0]
        hint, rule = _inner(hint, foreign.get(field.name, rule))
        if rule.travels and field.name != "id":
            result.append((field.name, _type(hint, rule), _limits(hint, rule), _default(field)))
    return result


def _inner(hint: Any, rule: Rule) -> tuple[Any, Rule]:
    """The type below `| None` and Annotated, with its rule."""
    args = get_args(hint)
    if type(None) in args:
        hint = next(arg for arg in args if arg is not type(None))
    if hasattr(hint, "__metadata__"):
        return get_args(hint)[0], hint.__metadata__[0]
    return hint, rule


def _type(hint: Any, rule: Rule) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if rule.part:
        return "own part"
    if str(origin) == "typing.Literal":
        return "one of " + ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        item = _type(_inner(args[0], rule)[0], rule)
        return f"list of {item}" if args[-1] is Ellipsis else f"{len(args)} x {item}"
    if origin is dict:
        return "map of text to int"
    if origin is np.ndarray:
        return "16 x float, row by row"
    if dataclasses.is_dataclass(hint):
        return f"[`{hint.__name__}`](#{hint.__name__.lower()})"  # type: ignore[union-attr]
    return {str: "text", int: "int", float: "float", bool: "bool"}[hint]


def _limits(hint: Any, rule: Rule) -> str:
    many = get_origin(hint) in (tuple, dict)
    item = _inner(get_args(hint)[0], rule) if get_origin(hint) is tuple else (hint, rule)
    counted = f"at most {rule.max_items} items" if many and get_args(hint)[-1:] != () else ""
    if get_origin(hint) is tuple and get_args(hint)[-1] is not Ellipsis:
        counted = ""
    return "; ".join(filter(None, (counted, _range(*item)))) or "-"


def _range(hint: Any, rule: Rule) -> str:
    if rule.part or hint is bytes:
        return f"{rule.lo or 0} to {_number(rule.hi or MAX_PART_BYTES)} bytes"
    if hint is str:
        line = "" if rule.free_text else ", printable"
        return f"{rule.lo or 0} to {_number(rule.hi or 512)} characters{line}"
    if rule.lo is None or hint is bool or dataclasses.is_dataclass(hint):
        return ""
    if str(get_origin(hint)) == "typing.Literal":
        return ""
    return f"{_number(rule.lo)} to {_number(rule.hi)}"


def _number(value: float | None) -> str:
    if value == 2**63 - 1:
        return "2^63-1"
    return "no limit" if value is None else f"{value:.12g}"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default in ((), "", b"", b"{}"):
        return "empty"
    if dataclasses.is_dataclass(field.default):
        return "its defaults"
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return "none" if field.default is None else str(field.default)
