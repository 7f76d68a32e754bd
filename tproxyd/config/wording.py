"""How values and names from a file stand in a message: short, printable, on one line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

MAX_SHOWN: Final = 40
MAX_LISTED: Final = 10


def escaped(text: str) -> str:
    """Return text with everything unprintable as an escape, so that it stays on one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str) -> str:
    """Return printable text of at most `MAX_SHOWN` characters of the original."""
    if len(text) <= MAX_SHOWN:
        return escaped(text)
    return escaped(text[: MAX_SHOWN - 3]) + "..."


def shown(value: object) -> str:
    """Return what was found as an operator would say it: `"eth*"`, `5`, `true`, `nothing`, `a list`."""
    match value:
        case None | bool():
            return {None: "nothing", True: "true", False: "false"}[value]
        case int() | float():
            return str(value)
        case str():
            return f'"{shortened(value)}"'
        case list() | tuple():
            return "a list"
        case Mapping():
            return "a mapping"
        case _:
            return f"a value of type {type(value).__name__}"


def one_of(names: Iterable[str]) -> str:
    """Return the names as a choice: `a, b or c`; a long list is cut."""
    listed = [shortened(name) for name in names]
    if len(listed) > MAX_LISTED:
        return ", ".join(listed[:MAX_LISTED]) + f" or one of {len(listed) - MAX_LISTED} more"
    if len(listed) < 2:
        return "".join(listed)
    return f"{', '.join(listed[:-1])} or {listed[-1]}"
