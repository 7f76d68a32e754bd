"""What a key may hold: the annotated types that `model` builds its sections from. Pure.

A reader takes what YAML holds, or a finished value, and gives the value. It raises `ValueError` with
`what; hint`, or `ValidationError` with one problem for each item of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeGuard, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import InitErrorDetails

from tproxyd.config.scalars import (
    MAX_PORT,
    Mark,
    PortRange,
    Prefix,
    Server,
    check_account,
    check_interface,
    check_name,
    check_path,
    check_username,
    checked_duration,
    format_duration,
    merge_ports,
    parse_duration,
    parse_mark,
    parse_ports,
    parse_prefix,
    parse_server,
)
from tproxyd.config.wording import shortened, shown
from tproxyd.flow import Network

T = TypeVar("T")

WRITTEN: Final = "written"
"""The validation context of values from a file: durations need units, listeners and backends a type."""

MAX_PROBLEMS: Final = 1000
"""As many are reported; of a list's items, one more is looked for."""

MAX_WORKERS: Final = 256
MAX_FLOWS: Final = 2**24
_RESERVED_TABLES: Final = {0: "unspec", 253: "default", 254: "main", 255: "local"}


def unexpected(value: object, what: str, hint: str = "") -> ValueError:
    """Return an error rather than raise it; pydantic turns no TypeError into a problem."""
    return ValueError(f"expected {what}, found {shown(value)}{hint}")


def problem(error: ValueError, found: object, *loc: int | str) -> InitErrorDetails:
    """Return one problem of a `ValidationError`; `loc` leads from the value read to the wrong one in it."""
    return InitErrorDetails(type="value_error", loc=loc, input=found, ctx={"error": error})


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return _is_int(value) or isinstance(value, float)


def _text(value: object, what: str) -> str:
    if isinstance(value, str):
        return value
    raise unexpected(value, what)


def _each(value: object, read: Callable[[object], T]) -> tuple[T, ...]:
    """Read every item of a list; all that is wrong with the items comes in one error."""
    if not isinstance(value, list | tuple):
        single = _is_number(value) or (isinstance(value, str) and value)
        raise unexpected(value, "a list", f"; write [{shortened(str(value))}]" if single else "")
    items: list[T] = []
    wrong: list[InitErrorDetails] = []
    for index, item in enumerate(value):
        try:
            items.append(read(item))
        except ValueError as error:
            wrong.append(problem(error, item, index))
        if len(wrong) > MAX_PROBLEMS:
            break
    if wrong:
        raise ValidationError.from_exception_data("list", wrong)
    return tuple(items)


def _once(read: Callable[[object], T]) -> Callable[[object], T]:
    """Wrap a reader of items so that it refuses what it has read before."""
    seen: set[T] = set()

    def read_once(value: object) -> T:
        item = read(value)
        if item in seen:
            raise ValueError(f"{shown(item)} is there twice; remove one")
        seen.add(item)
        return item

    return read_once


def _some(items: tuple[T, ...], what: str) -> tuple[T, ...]:
    if not items:
        raise ValueError(f"the list is empty; {what}")
    return items


def _read_mark(value: object) -> Mark:
    if isinstance(value, Mark):
        return value
    if _is_int(value) and value >= 0:
        return parse_mark(hex(value))
    return parse_mark(_text(value, "a mark, such as 0x1/0x1"))


def _read_port_range(value: object) -> PortRange:
    if isinstance(value, PortRange):
        return value
    if _is_int(value):
        return PortRange(value, value)
    return parse_ports(_text(value, "a port or a range"))


def _read_ports(value: object) -> tuple[PortRange, ...]:
    return merge_ports(_each(value, _read_port_range))


def _read_prefix(value: object) -> Prefix:
    if isinstance(value, Prefix):
        return value
    if isinstance(value, dict):  # YAML takes the last colon of `2001:db8::` for that of a key
        raise unexpected(value, "a prefix", "; quote an address that ends with ':'")
    return parse_prefix(_text(value, "a prefix"))


def _read_prefixes(value: object) -> tuple[Prefix, ...]:
    return _each(value, _read_prefix)


def _one_or_more(value: object, read: Callable[[object], T]) -> tuple[T, ...]:
    """Read the values that a rule asks for; one alone needs no list."""
    if not isinstance(value, list | tuple):
        return (read(value),)
    return _some(_each(value, read), "leave the key out to take any")


def _read_network(value: object) -> Network:
    if value in ("tcp", "udp"):
        return Network(value)
    raise unexpected(value, "tcp or udp")


def _read_client_interface(value: object) -> str:
    return "lo" if value == "lo" else _read_interface(value)  # the box's own traffic


def _read_name(value: object) -> str:
    return check_name(_text(value, "a name"))


def _read_asked_networks(value: object) -> tuple[Network, ...]:
    return _one_or_more(value, _once(_read_network))


def _read_asked_interfaces(value: object) -> tuple[str, ...]:
    return _one_or_more(value, _once(_read_client_interface))


def _read_asked_names(value: object) -> tuple[str, ...]:
    return _one_or_more(value, _once(_read_name))


def _read_asked_prefixes(value: object) -> tuple[Prefix, ...]:
    return _one_or_more(value, _read_prefix)


def _read_asked_ports(value: object) -> tuple[PortRange, ...]:
    return merge_ports(_one_or_more(value, _read_port_range))


def _read_interface(value: object) -> str:
    if _is_number(value):
        raise unexpected(value, "an interface name", "; quote it")
    return check_interface(_text(value, "an interface name"))


def _read_interfaces(value: object) -> tuple[str, ...]:
    names = _each(value, _once(_read_interface))
    return _some(names, "name at least one client-side interface")


def _read_family(value: object) -> Literal["ipv4", "ipv6"]:
    if value == "ipv4":
        return "ipv4"
    if value == "ipv6":
        return "ipv6"
    raise unexpected(value, "ipv4 or ipv6")


def _read_families(value: object) -> tuple[Literal["ipv4", "ipv6"], ...]:
    return _some(_each(value, _once(_read_family)), "write ipv4, ipv6 or both")


def _read_duration(value: object, info: ValidationInfo) -> float:
    if _is_number(value):
        if info.context == WRITTEN:
            seconds = value if _is_int(value) and value > 0 else 5
            raise ValueError(f"{shown(value)} has no unit; write such as {seconds}s")
        return checked_duration(float(value))
    return parse_duration(_text(value, "a duration, such as 5s"))


def _read_workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if _is_int(value) and 1 <= value <= MAX_WORKERS:
        return value
    raise unexpected(value, f"auto or a number from 1 to {MAX_WORKERS}")


def _read_account(value: object) -> str:
    return check_account(_text(value, "the name of an account"))


def _read_server(value: object) -> Server:
    if isinstance(value, Server):
        return value
    return parse_server(_text(value, "HOST:PORT, such as 192.0.2.1:1080"))


def _check_table(table: int) -> int:
    if table in _RESERVED_TABLES:
        raise ValueError(f"table {table} is the kernel's own ({_RESERVED_TABLES[table]}); take another number")
    return table


def _as_texts(items: tuple[object, ...]) -> list[str]:
    return [str(item) for item in items]


# The JSON form of a config is itself a configuration: what is written out is read back as the same.
_TEXT: Final = PlainSerializer(str, return_type=str, when_used="json")
_TEXTS: Final = PlainSerializer(_as_texts, return_type=list[str], when_used="json")
_DURATION: Final = PlainSerializer(format_duration, return_type=str, when_used="json")
_AS_IS: Final = PlainSerializer(lambda value: value, return_type=Any)

MarkField = Annotated[Mark, PlainValidator(_read_mark), _TEXT]
Ports = Annotated[tuple[PortRange, ...], PlainValidator(_read_ports), _TEXTS]
Prefixes = Annotated[tuple[Prefix, ...], PlainValidator(_read_prefixes), _TEXTS]
AskedNetworks = Annotated[tuple[Network, ...], PlainValidator(_read_asked_networks), _TEXTS]
AskedInterfaces = Annotated[tuple[str, ...], PlainValidator(_read_asked_interfaces), _TEXTS]
AskedNames = Annotated[tuple[str, ...], PlainValidator(_read_asked_names), _TEXTS]
AskedPrefixes = Annotated[tuple[Prefix, ...], PlainValidator(_read_asked_prefixes), _TEXTS]
AskedPorts = Annotated[tuple[PortRange, ...], PlainValidator(_read_asked_ports), _TEXTS]
Interfaces = Annotated[tuple[str, ...], PlainValidator(_read_interfaces), _TEXTS]
Families = Annotated[tuple[Literal["ipv4", "ipv6"], ...], PlainValidator(_read_families), _TEXTS]
Duration = Annotated[float, PlainValidator(_read_duration), _DURATION]
Workers = Annotated[int | Literal["auto"], PlainValidator(_read_workers), _AS_IS]
Name = Annotated[StrictStr, AfterValidator(check_name)]
Account = Annotated[str, PlainValidator(_read_account), _TEXT]
ServerField = Annotated[Server, PlainValidator(_read_server), _TEXT]
Username = Annotated[StrictStr, AfterValidator(check_username)]
FilePath = Annotated[StrictStr, AfterValidator(check_path)]
Table = Annotated[StrictInt, Field(ge=0, le=2**32 - 1), AfterValidator(_check_table)]
Port = Annotated[StrictInt, Field(ge=1, le=MAX_PORT)]
Priority = Annotated[StrictInt, Field(ge=1, le=32765)]
FlowCount = Annotated[StrictInt, Field(ge=1, le=MAX_FLOWS)]
