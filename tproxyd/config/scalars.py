"""The single values of the configuration and how each is written: marks, ports, durations, prefixes, names.

Pure: text in, value out. A parser raises `ValueError` whose text is `what; hint`, fit for an operator. What
`str` or `format_duration` gives is read back as the same value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from tproxyd.config.wording import shown

Prefix = IPv4Network | IPv6Network

MAX_PORT: Final = 65535
MAX_INTERFACE_BYTES: Final = 15  # IFNAMSIZ less the NUL
_MARK_BITS: Final = 0xFFFF_FFFF
_MAPPED_BITS: Final = 96  # ::ffff:0:0/96, RFC 4291 §2.5.5.2


@dataclass(frozen=True, slots=True)
class Mark:
    """A firewall mark: the bits of `mask` belong to it, and `value` is what they hold. Written `0x1/0x1`.

    Raises:
        ValueError: a zero or too wide value, or one with bits outside the mask.
    """

    value: int
    mask: int

    def __post_init__(self) -> None:
        for what, bits in (("value", self.value), ("mask", self.mask)):
            if not 0 < bits <= _MARK_BITS:
                raise ValueError(f"mark {what} {bits:#x} is out of range; allowed is 0x1 to 0xffffffff")
        if self.value & ~self.mask:
            raise ValueError(f"{self} has bits outside its mask; write {self.value:#x}/{self.value:#x}")

    def __str__(self) -> str:
        return f"{self.value:#x}/{self.mask:#x}"

    def overlaps(self, other: Mark) -> bool:
        """Tell whether some bit belongs to both."""
        return bool(self.mask & other.mask)


_NUMBER: Final = "0[xX][0-9a-fA-F]+|0|[1-9][0-9]*"
_MARK: Final = re.compile(rf"({_NUMBER})(?:/({_NUMBER}))?")
_MARK_CHARS: Final = 32


def parse_mark(text: str) -> Mark:
    """Read `VALUE/MASK`, each decimal or 0x hexadecimal.

    Raises:
        ValueError: anything else, or a mark that `Mark` refuses.
    """
    parts = _MARK.fullmatch(text) if len(text) <= _MARK_CHARS else None
    if parts is None:
        raise ValueError(f"{shown(text)} is no mark; write VALUE/MASK, such as 0x1/0x1")
    value = int(parts[1], 0)
    if parts[2] is None:
        raise ValueError(f"mark {parts[1]} has no mask; write {Mark(value, value)}")
    return Mark(value, int(parts[2], 0))


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """The ports from `first` to `last`, both included. Written `80` or `1-65535`.

    Raises:
        ValueError: a port that is none, or a range that runs backwards.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        for port in (self.first, self.last):
            if not 0 < port <= MAX_PORT:
                raise ValueError(f"{port} is no port; allowed is 1 to {MAX_PORT}")
        if self.first > self.last:
            raise ValueError(f"{self} runs backwards; write {self.last}-{self.first}")

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


_PORTS: Final = re.compile("([0-9]{1,8})(?:-([0-9]{1,8}))?")
_COLON_PORTS: Final = re.compile("([0-9]{1,5}):([0-9]{1,5})")


def parse_ports(text: str) -> PortRange:
    """Read `80` or `1-65535`.

    Raises:
        ValueError: anything else, or a range that `PortRange` refuses.
    """
    parts = _PORTS.fullmatch(text)
    if parts is not None:
        return PortRange(int(parts[1]), int(parts[2] or parts[1]))
    with_colon = _COLON_PORTS.fullmatch(text)
    hint = f"write {with_colon[1]}-{with_colon[2]}" if with_colon else "write a port or a range, such as 1-1023"
    raise ValueError(f"{shown(text)} is no port or range of ports; {hint}")


def merge_ports(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return the same ports as few ranges in rising order: overlapping and adjoining ones become one."""
    merged: list[PortRange] = []
    for ports in sorted(ranges):
        if merged and ports.first <= merged[-1].last + 1:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, ports.last))
        else:
            merged.append(ports)
    return tuple(merged)


_UNITS_MS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_DURATION: Final = re.compile("".join(f"(?:([0-9]{{1,12}}){unit})?" for unit in _UNITS_MS))
MIN_DURATION_S: Final = 0.01
MAX_DURATION_S: Final = 7 * 86_400.0


def parse_duration(text: str) -> float:
    """Read whole numbers with the units d, h, m, s, ms, from large to small: `5s`, `1m30s`, `300ms`.

    Returns:
        Seconds.

    Raises:
        ValueError: anything else, or less than 10 ms, or more than 7 days.
    """
    parts = _DURATION.fullmatch(text)
    if parts is None or not text:
        raise ValueError(f"{shown(text)} is no duration; write numbers with d, h, m, s or ms, such as 1m30s")
    total_ms = sum(int(part or 0) * unit for part, unit in zip(parts.groups(), _UNITS_MS.values(), strict=True))
    if not MIN_DURATION_S <= total_ms / 1000 <= MAX_DURATION_S:
        raise ValueError(f"{shown(text)} is out of range; allowed is 10ms to 7d")
    return total_ms / 1000


def checked_duration(seconds: float) -> float:
    """Return the same seconds.

    Raises:
        ValueError: less than 10 ms, or more than 7 days, or not a number.
    """
    if not MIN_DURATION_S <= seconds <= MAX_DURATION_S:
        raise ValueError(f"{seconds:g} s are out of range; allowed is 10ms to 7d")
    return seconds


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` reads as these seconds, to the millisecond."""
    rest, text = round(seconds * 1000), ""
    for unit, unit_ms in _UNITS_MS.items():
        count, rest = divmod(rest, unit_ms)
        text += f"{count}{unit}" if count else ""
    return text or "0ms"


_PREFIX: Final = re.compile("([0-9A-Fa-f:.]{2,45})(?:/(0|[1-9][0-9]{0,2}))?")


def parse_prefix(text: str) -> Prefix:
    """Read an IPv4 or IPv6 prefix; a bare address stands for itself alone.

    Raises:
        ValueError: anything else: host bits, zone ids, netmasks, IPv4 addresses in IPv6 clothes.
    """
    try:
        prefix = ip_network(text) if _PREFIX.fullmatch(text) else None
    except ValueError:
        prefix = None
    if prefix is None or _mapped_ipv4(prefix):
        raise ValueError(_why_no_prefix(text))
    return prefix


def _mapped_ipv4(prefix: Prefix) -> str:
    """Return the IPv4 prefix inside a v4-mapped IPv6 one, nothing for others."""
    if isinstance(prefix, IPv4Network) or prefix.prefixlen < _MAPPED_BITS:
        return ""
    address = prefix.network_address.ipv4_mapped
    return f"{address}/{prefix.prefixlen - _MAPPED_BITS}" if address else ""


def _why_no_prefix(text: str) -> str:
    if "%" in text:
        return f"{shown(text)} has a zone id, which a prefix can't have; leave out the % and what follows it"
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return f"{shown(text)} is no address or prefix; write such as 192.0.2.0/24 or 2001:db8::/32"
    if mapped := _mapped_ipv4(network):
        return f"{shown(text)} is an IPv4 prefix mapped into IPv6; write {mapped}"
    if not _PREFIX.fullmatch(text):
        return f"{shown(text)} is not ADDRESS/LENGTH; write {network}"
    return f"{shown(text)} has bits set past its length; write {network}"


def check_interface(name: str) -> str:
    """Return the name if the kernel allows it (dev_valid_name) and a ruleset can hold it.

    Raises:
        ValueError: it wouldn't, or it is a wildcard, or the loopback interface.
    """
    if name == "lo":
        raise ValueError('"lo" is not client-side; to intercept the box\'s own traffic set own_traffic: true')
    if "*" in name or name.endswith("+"):
        raise ValueError(f"{shown(name)} is a wildcard; name each interface")
    if not name or name in {".", ".."}:
        raise ValueError(f"{shown(name)} is no interface name; `ip link` lists them")
    if len(name.encode("utf-8", "surrogatepass")) > MAX_INTERFACE_BYTES:
        raise ValueError(f"{shown(name)} is too long for an interface name; at most 15 bytes")
    wrong = next((c for c in name if c in '/:"\\' or c.isspace() or not c.isprintable()), None)
    if wrong is not None:
        raise ValueError(f"{shown(name)} is no interface name: it contains {shown(wrong)}; `ip link` lists them")
    return name


_NAME: Final = re.compile("[a-z0-9][a-z0-9_-]{0,62}")
_ACCOUNT: Final = re.compile("[A-Za-z_][A-Za-z0-9_.-]{0,31}")


def check_name(name: str) -> str:
    """Return the name if a listener or backend may bear it.

    Raises:
        ValueError: it may not.
    """
    if not _NAME.fullmatch(name):
        rule = "use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit"
        raise ValueError(f"{shown(name)} is no name; {rule}")
    return name


def check_account(name: str) -> str:
    """Return the name if it looks like that of a user account; whether there is one, the system knows.

    Raises:
        ValueError: it doesn't.
    """
    if not _ACCOUNT.fullmatch(name):
        raise ValueError(f"{shown(name)} is no user name; write an account's name, such as nobody")
    return name


@dataclass(frozen=True, slots=True)
class Server:
    """Where a proxy listens: an address or a host name, and a port. Written `192.0.2.1:1080`, `[2001:db8::1]:1080`.

    Raises:
        ValueError: the host is neither an address nor a name, or the port is none.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        PortRange(self.port, self.port)
        if not _HOST_NAME.fullmatch(self.host) or len(self.host) > MAX_NAME_CHARS or _NUMERIC_END.search(self.host):
            _check_server_address(self.host)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


MAX_NAME_CHARS: Final = 253  # RFC 1035 §2.3.4, without the root's dot
_LABEL: Final = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# No top-level domain is a number (RFC 1123 §2.1), but inet_aton(3) takes "127.1" and "0x7f.1" for addresses.
_NUMERIC_END: Final = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)$")
_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([^\[\]:]{1,253})):([0-9]{1,8})")


def parse_server(text: str) -> Server:
    """Read `192.0.2.1:1080`, `[2001:db8::1]:1080` or `proxy.example:1080`.

    Raises:
        ValueError: anything else, or a place that `Server` refuses.
    """
    parts = _SERVER.fullmatch(text)
    if parts is None:
        raise ValueError(f"{shown(text)} is not HOST:PORT; write such as 192.0.2.1:1080 or [2001:db8::1]:1080")
    host = parts[1] or parts[2]
    return Server(str(ip_address(host)) if parts[1] and _is_address(host) else host, int(parts[3]))


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _check_server_address(host: str) -> None:
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError(f"{shown(host)} is neither an address nor a host name; write such as 192.0.2.1") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{shown(host)} is no address that a server has; write its own")
    if isinstance(address, IPv6Address) and (address.ipv4_mapped or address.scope_id):
        raise ValueError(f"{shown(host)} is an address that the network never shows; write a plain one")


_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")


def check_username(name: str) -> str:
    """Return the name if a proxy can be told it (RFC 1929 §2: 1 to 255 bytes).

    Raises:
        ValueError: it can't.
    """
    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_USERNAME_BYTES:
        raise ValueError(f"{shown(name)} is no user name for a proxy; it has 1 to {MAX_USERNAME_BYTES} bytes")
    if _UNPRINTABLE.search(name):
        raise ValueError(f"{shown(name)} is no user name for a proxy: it contains control characters; remove them")
    return name


MAX_USERNAME_BYTES: Final = 255


def check_path(path: str) -> str:
    """Return the path if it is an absolute one.

    Raises:
        ValueError: it isn't.
    """
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{shown(path)} is no absolute path; write such as /etc/tproxyd/proxy.secret")
    return path
