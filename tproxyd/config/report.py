"""What pydantic found wrong -> problems with a place in the file, in an operator's words. Pure."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tproxyd.config.document import Entries, Entry, Items, Leaf, Node, Position, Problem
from tproxyd.config.model import Config
from tproxyd.config.section import Section
from tproxyd.config.wording import shown

Loc = tuple[int | str, ...]

_KEY: Final = "[key]"  # pydantic's last step, to the key of a mapping rather than to its value
_MAX_GUESSED_CHARS: Final = 64


def explain(error: ValidationError, root: Node, at_most: int) -> list[Problem]:
    """Return the first `at_most` problems, in the order of the file."""
    details = error.errors(include_url=False)
    placed = sorted(((_place(root, one), one) for one in details), key=lambda pair: pair[0])
    return [Problem(position, _sentence(one, root)) for position, one in placed[:at_most]]


# Places


def _place(root: Node, details: ErrorDetails) -> Position:
    """Return where the wrong key or value stands; what is missing is missing from a mapping."""
    loc, kind = details["loc"], details["type"]
    if loc and loc[-1] == _KEY and kind != "extra_forbidden":
        return _trail(root, loc[:-1])[-1].key
    trail = _trail(root, loc)
    if len(trail) <= len(loc) and "beside" in details.get("ctx", {}):
        trail = _trail(root, (*loc[:-1], details["ctx"]["beside"]))
    return trail[-1].key if kind == "extra_forbidden" else trail[-1].node.position


def _trail(root: Node, loc: Loc) -> list[Entry]:
    """Return the way from the root along `loc`, as far as the file has it."""
    trail = [Entry(root.position, root)]
    for step in loc:
        match trail[-1].node:
            case Entries(entries=entries) if isinstance(step, str) and step in entries:
                trail.append(entries[step])
            case Items(items=items) if isinstance(step, int) and step < len(items):
                trail.append(Entry(items[step].position, items[step]))
            case _:
                break
    return trail


# Words


def _sentence(details: ErrorDetails, root: Node) -> str:
    loc = details["loc"]
    match details["type"]:
        case "extra_forbidden":
            what = _unknown(loc, root)
        case "missing":
            what = f"missing{_example(loc, root)}"
        case _:
            what = _what(details, root)
    return f"{_path(loc)}: {what}" if loc else what


_PLAIN_STEP: Final = re.compile("[A-Za-z0-9_-]{1,40}")


def _path(loc: Loc) -> str:
    """Return `interception.exclude.sources[3]`."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != _KEY:
            path += f".{step}" if _PLAIN_STEP.fullmatch(step) else f".{shown(step)}"
    return path.removeprefix(".")


def _what(details: ErrorDetails, root: Node) -> str:
    found, ctx = details["input"], details.get("ctx", {})
    match details["type"]:
        case "value_error":
            what = str(ctx["error"])
        case "literal_error":
            what = f"expected {ctx['expected'].replace(chr(39), '')}, found {shown(found)}"
        case "greater_than_equal":
            what = f"{shown(found)} is too small; the least is {ctx['ge']}"
        case "less_than_equal":
            what = f"{shown(found)} is too large; the most is {ctx['le']}"
        case kind if kind in _EXPECTED:
            what = f"expected {_EXPECTED[kind]}, found {shown(found)}{_hint(kind, found)}"
        case _:
            what = details["msg"]
    return what if found is not None else what + _fill(details["loc"], root)


_EXPECTED: Final = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
}


def _hint(kind: str, found: object) -> str:
    match found:
        case "yes" | "on" | "no" | "off" if kind == "bool_type":
            return f"; write {'true' if found in {'yes', 'on'} else 'false'}"
        case str() if kind == "int_type" and found.isdecimal():
            return "; remove the quotes"
        case int() | float() if kind == "string_type":
            return "; quote it"
        case _:
            return ""


def _fill(loc: Loc, root: Node) -> str:
    """Return the hint for a key that has no value."""
    if not loc or isinstance(loc[-1], int):
        return ""
    return _example(loc, root) or "; leave the key out for its default"


def _example(loc: Loc, root: Node) -> str:
    key = str(loc[-1])
    field = _section(loc, root).model_fields.get(key)
    return f"; write {key}: {field.examples[0]}" if field and field.examples else ""


def _unknown(loc: Loc, root: Node) -> str:
    section, key = _section(loc, root), str(loc[-1])
    if key in section.not_yet:
        return "not in this version; remove it"
    known = list(section.model_fields)
    close = get_close_matches(key, known, n=1) if len(key) <= _MAX_GUESSED_CHARS else []
    return f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known here: {', '.join(known)}"


def _section(loc: Loc, root: Node) -> type[Section]:
    """Return the section whose key is the last step of `loc`; where several may stand, the file's `type` tells."""
    section: type[Section] = Config
    for depth, step in enumerate(loc[:-1]):
        field = section.model_fields.get(str(step))
        inner = _sections_in(field.annotation) if field else []
        if inner:
            kind = _type_at(root, loc[: depth + 2])
            section = next((one for one in inner if kind is not None and _default_type(one) == kind), inner[0])
    return section


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that an annotation such as `tuple[TproxyListener, ...]` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections_in(inner)]


def _type_at(root: Node, loc: Loc) -> object:
    node = _trail(root, (*loc, "type"))[-1].node
    return node.value if isinstance(node, Leaf) else None


def _default_type(section: type[Section]) -> object:
    field = section.model_fields.get("type")
    return field.default if field else None
