"""What may become an element of a learned set, whoever asks."""

from __future__ import annotations

import pytest

from tproxyd.flow import Client, FlowKey, OrigDst
from tproxyd.netfilter.learned import is_key

GOOD = FlowKey(Client("10.1.0.2", 4000), OrigDst("10.2.0.2", 53))


@pytest.mark.parametrize("key", [GOOD, FlowKey(Client("fd01::2", 1), OrigDst("fd02::2", 65535))])
def test_addresses_of_one_family_with_ports_are_a_key(key: FlowKey) -> None:
    assert is_key(key)


@pytest.mark.parametrize(
    "server",
    [("fd02::2", 53), ("10.2.0.2", 0), ("10.2.0.2", 65536), ("10.2.0.2", -1), ("10.2.0", 53), ("x", 1), ("", 1)],
)
def test_anything_else_is_none(server: tuple[str, int]) -> None:
    assert not is_key(GOOD._replace(orig_dst=OrigDst(*server)))
    assert not is_key(FlowKey(Client(*server), GOOD.orig_dst))


@pytest.mark.parametrize("address", ["fe80::1%lan0", "fd01::2\0", "fd01::2/64"])
def test_an_address_with_something_behind_it_is_none(address: str) -> None:
    assert not is_key(FlowKey(Client(address, 1), OrigDst("fd02::2", 53)))
