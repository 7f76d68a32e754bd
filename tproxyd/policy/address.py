"""Addresses as numbers, quicker than `ipaddress` can do it: one for each new flow."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Final

_GROUPS: Final = 8


def number_of(address: str) -> int:
    """Return the number of an address in the form in which the kernel's socket functions give it (inet_ntop(3)).

    Raises:
        ValueError: it is none.
    """
    if ":" in address:
        return _number_of_ipv6(address)
    first, second, third, fourth = address.split(".")
    return int(first) << 24 | int(second) << 16 | int(third) << 8 | int(fourth)


def _number_of_ipv6(address: str) -> int:
    if "." in address or "%" in address:  # IPv4 in IPv6 clothes, a zone: too rare to be quick
        return int(IPv6Address(address.partition("%")[0]))
    head, gap, tail = address.partition("::")
    front = head.split(":") if head else []
    back = tail.split(":") if tail else []
    if len(front) + len(back) > _GROUPS or (not gap and len(front) != _GROUPS):
        raise ValueError(f"{address} is no IPv6 address")
    number = 0
    for group in front:
        number = number << 16 | int(group, 16)
    number <<= 16 * (_GROUPS - len(front))
    low = 0
    for group in back:
        low = low << 16 | int(group, 16)
    return number | low
