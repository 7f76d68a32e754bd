"""Bytes of YAML -> a tree of plain values in which every key and value knows its place. Pure.

What a value should be is not known here (see `model`). The language is YAML 1.2 with its core schema, without
what surprises in a configuration: one document; text keys, each once; no tags, anchors, aliases, merge keys.
The tree is built from parser events, not by recursion, so no input can exhaust the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import yaml

from tproxyd.config.wording import shown

Scalar = str | int | float | bool | None

MAX_DEPTH: Final = 32
MAX_VALUES: Final = 1_000_000
MAX_NUMBER_CHARS: Final = 64
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Position(NamedTuple):
    """A place in the file; both count from 1, columns in characters."""

    line: int
    column: int


class Problem(NamedTuple):
    """What is wrong at a place."""

    position: Position
    text: str


@dataclass(slots=True)
class Leaf:
    """A scalar."""

    position: Position
    value: Scalar


@dataclass(slots=True)
class Items:
    """A list."""

    position: Position
    items: list[Node] = field(default_factory=list)


class Entry(NamedTuple):
    """A value and where its key stands."""

    key: Position
    node: Node


@dataclass(slots=True)
class Entries:
    """A mapping."""

    position: Position
    entries: dict[str, Entry] = field(default_factory=dict)


Node = Leaf | Items | Entries


@dataclass(frozen=True, slots=True)
class Document:
    """The tree, as far as it could be read, and what is wrong with the YAML itself.

    `root` is None when there is nothing in the file, or when a problem ended the reading.
    """

    root: Node | None
    problems: tuple[Problem, ...]


class _DocumentError(Exception):
    """A problem after which reading on makes no sense."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def read_document(data: bytes) -> Document:
    """Read one YAML document; what is wrong with it is part of the answer. Raises nothing."""
    builder = _Builder()
    try:
        text = _decode(data)
        _build(builder, text)
    except _DocumentError as error:
        return Document(None, (*builder.problems, error.problem))
    return Document(builder.root, tuple(builder.problems))


def plain(node: Node) -> object:
    """Return the tree without its positions: dicts, lists and scalars."""
    match node:
        case Leaf():
            return node.value
        case Items():
            return [plain(item) for item in node.items]
        case Entries():
            return {key: plain(entry.node) for key, entry in node.entries.items()}


# Text

# YAML 1.2 §5.1 without DEL, C1, U+2028, U+2029: libyaml takes some of them for line ends, as YAML 1.1 did.
_UNPRINTABLE: Final = re.compile(
    "[^\t\n\r\x20-\x7e\u00a0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_LINE_END: Final = re.compile("\r\n|\r|\n")
_BOM: Final = "\ufeff"
_FOREIGN_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")


def _decode(data: bytes) -> str:
    if data.startswith(_FOREIGN_BOMS):
        raise _DocumentError(Problem(Position(1, 1), "the file is UTF-16 or UTF-32; save it as UTF-8"))
    try:
        text = data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").removeprefix(_BOM)
        what = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _DocumentError(Problem(_position(before, len(before)), what)) from None
    wrong = _UNPRINTABLE.search(text)
    if wrong:
        hint = "is the file UTF-16? save it as UTF-8" if wrong[0] == "\0" else "remove it"
        what = f"control character U+{ord(wrong[0]):04X}; {hint}"
        raise _DocumentError(Problem(_position(text, wrong.start()), what))
    return text


def _position(text: str, index: int) -> Position:
    line, start = 1, 0
    for line_end in _LINE_END.finditer(text, 0, index):
        line, start = line + 1, line_end.end()
    return Position(line, index - start + 1)


# Syntax

_SYNTAX: Final = {
    "mapping values are not allowed in this context": "a second ': ' in a line; quote text that has it",
    "block sequence entries are not allowed in this context": "a list item ('- ') needs a line of its own",
    "did not find expected alphabetic or numeric character": "quote text that begins with '*' or '&'",
    "did not find expected node content": "no value here; quote text that begins or ends with ':'",
    "found unexpected ':'": "a ':' ends a key; quote text that ends with it",
    "did not find expected ',' or ']'": "the list is not closed; ',' or ']' is missing before this",
    "did not find expected ',' or '}'": "the mapping is not closed; ',' or '}' is missing before this",
    "did not find expected key": "no key where one should be; look at indentation and quotes before this",
    "did not find expected '-' indicator": "no '- ' where a list item should be; look at the indentation",
    "could not find expected ':'": "':' is missing after the key",
    "found unexpected end of stream": "the file ends inside quoted text; the closing quote is missing",
    "found unexpected document indicator": "'---' or '...' inside quoted text; the closing quote is missing",
    "found unknown escape character": "unknown escape after a backslash; single quotes take text literally",
    "found undefined tag handle": "tags (!...) are not used here; remove it",
    "found unknown directive name": "directives (%YAML, %TAG) are not used here; remove the line",
    "could not find expected directive name": "directives (%...) are not used here; remove the line",
    "found a tab character that violates indentation": "a tab can't indent; use spaces",
    "did not find expected <document start>": "text after the end of the document ('...'); remove it",
}


def _syntax_problem(error: yaml.YAMLError, text: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    found = str(getattr(error, "problem", None) or "unreadable")
    position = Position(mark.line + 1, mark.column + 1) if mark else Position(1, 1)
    if mark and found.endswith("cannot start any token"):
        what = _unstartable(text[mark.index : mark.index + 1])
    else:
        what = _SYNTAX.get(found, found)
    return Problem(position, f"YAML syntax: {what}")


def _unstartable(character: str) -> str:
    if character == "\t":
        return "a tab can't indent; use spaces"
    return f"a value can't begin with {shown(character)}; quote the text"


# Tree


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet, and the key that waits for its value."""

    node: Items | Entries
    key: Position | None = None
    name: str | None = None  # None beside a key: it was refused, its value is dropped


@dataclass(slots=True)
class _Builder:
    """Takes parser events in turn and grows the tree."""

    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)
    open: list[_Open] = field(default_factory=list)
    documents: int = 0
    values: int = 0

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.ScalarEvent():
                self._add(Leaf(self._begin(event), self._scalar(event)))
            case yaml.MappingStartEvent():
                self._push(Entries(self._begin(event)))
            case yaml.SequenceStartEvent():
                self._push(Items(self._begin(event)))
            case yaml.CollectionEndEvent():
                self._add(self.open.pop().node)
            case yaml.AliasEvent():
                position = self._begin(event)
                self._refuse(position, "aliases (*name) are not used here; write the value out")
                self._add(Leaf(position, None))
            case yaml.DocumentStartEvent():
                self._document(event)

    def _begin(self, event: yaml.NodeEvent) -> Position:
        position = _start(event)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _DocumentError(Problem(position, f"more than {MAX_VALUES} values in the file"))
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._refuse(position, "anchors (&name) are not used here; remove it")
        if getattr(event, "tag", None) is not None:
            self._refuse(position, "tags (!...) are not used here; remove it, quote what is to be text")
        return position

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        if not event.implicit[0]:
            return str(event.value)
        try:
            return resolve(event.value)
        except ValueError as error:
            self._refuse(_start(event), str(error))
            return None

    def _push(self, node: Items | Entries) -> None:
        if len(self.open) == MAX_DEPTH:
            raise _DocumentError(Problem(node.position, f"nested more than {MAX_DEPTH} deep"))
        self.open.append(_Open(node))

    def _add(self, node: Node) -> None:
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if isinstance(parent.node, Items):
            parent.node.items.append(node)
        elif parent.key is None:
            parent.key, parent.name = node.position, self._key(parent.node, node)
        else:
            if parent.name is not None:
                parent.node.entries[parent.name] = Entry(parent.key, node)
            parent.key = None

    def _key(self, mapping: Entries, key: Node) -> str | None:
        """Return the key's name, or None if it is refused."""
        if not isinstance(key, Leaf) or not isinstance(key.value, str):
            hint = "quote it" if isinstance(key, Leaf) and key.value is not None else "write it as text"
            self._refuse(key.position, f"a key must be text, found {shown(plain(key))}; {hint}")
            return None
        if key.value == "<<":
            self._refuse(key.position, "merge keys (<<) are not used here; write the keys out")
            return None
        first = mapping.entries.get(key.value)
        if first is not None:
            where = f"{first.key.line}:{first.key.column}"
            self._refuse(key.position, f"key {shown(key.value)} is there twice, first at {where}; remove one")
            return None
        return key.value

    def _document(self, event: yaml.DocumentStartEvent) -> None:
        self.documents += 1
        if self.documents > 1:
            raise _DocumentError(Problem(_start(event), "a second YAML document ('---'); put everything into one"))
        if event.tags or event.version not in (None, (1, 2)):
            self._refuse(_start(event), "directives (%YAML, %TAG) are not used here; remove the line")

    def _refuse(self, position: Position, text: str) -> None:
        self.problems.append(Problem(position, text))


def _build(builder: _Builder, text: str) -> None:
    parsing: Any = yaml.parse(text, Loader=_LOADER)
    try:
        with closing(parsing) as events:
            for event in events:
                builder.take(event)
    except yaml.YAMLError as error:
        raise _DocumentError(_syntax_problem(error, text)) from None


def _start(event: yaml.Event) -> Position:
    mark: Any = event.start_mark  # typed as optional; every event has one
    return Position(mark.line + 1, mark.column + 1)


# Core schema, YAML 1.2.2 §10.3.2

_WORDS: Final[dict[str, Scalar]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_NUMBER: Final = re.compile(
    r"(?P<int>[-+]?[0-9]+) | 0o(?P<oct>[0-7]+) | 0x(?P<hex>[0-9a-fA-F]+)"
    r"| (?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)"
    r"| (?P<inf>[-+]?)\.(?:inf|Inf|INF) | \.(?P<nan>nan|NaN|NAN)",
    re.VERBOSE,
)
_CONVERT: Final[dict[str, Callable[[str], Scalar]]] = {
    "int": int,
    "oct": lambda digits: int(digits, 8),
    "hex": lambda digits: int(digits, 16),
    "float": float,
    "inf": lambda sign: float(f"{sign}inf"),
    "nan": float,
}


def resolve(text: str) -> Scalar:
    """Return what plain text means in the core schema; `off`, `yes`, `22:22`, `1_000`, dates stay text.

    Raises:
        ValueError: a number of more than 64 characters.
    """
    if text in _WORDS:
        return _WORDS[text]
    number = _NUMBER.fullmatch(text) if text[0] in "+-.0123456789" else None
    if number is None:
        return text
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError(f"a number of {len(text)} characters; no number here needs as many")
    kind = number.lastgroup or "float"
    return _CONVERT[kind](number[kind])
