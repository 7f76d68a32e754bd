"""What is an address, what is a name, and what is neither."""

from __future__ import annotations

import pytest

from tproxyd.errors import LocalProtocolError
from tproxyd.flow import Endpoint
from tproxyd.protocols.address import HostName, to_address


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.1", Endpoint("192.0.2.1", 80)),
        ("2001:DB8:0::1", Endpoint("2001:db8::1", 80)),
        ("::ffff:127.0.0.1", Endpoint("127.0.0.1", 80)),
        ("example.com", HostName("example.com", 80)),
        ("_sip._tcp.xn--bcher-kva.example.", HostName("_sip._tcp.xn--bcher-kva.example.", 80)),
        ("a" * 255, HostName("a" * 255, 80)),
        ("0x7f.example", HostName("0x7f.example", 80)),
    ],
)
def test_a_host_is_read_as_what_it_is(host: str, address: Endpoint | HostName) -> None:
    assert to_address(host, 80) == address
    assert type(to_address(host, 80)) is type(address)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a" * 256,
        "bücher.example",
        "a b",
        "a\n",
        "a\0b",
        "[::1]",
        "user@host",
        "host:80",
        "host/path",
        "%41",
        "\u017f",
    ],
)
def test_what_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(LocalProtocolError):
        to_address(host, 80)


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0x7f.1", "127.0.0.1.", "010.0.0.1", "1.2.3.0x"])
def test_an_address_in_disguise_is_no_name(host: str) -> None:
    with pytest.raises(LocalProtocolError, match="neither a host name nor an IP address"):
        to_address(host, 80)


def test_an_address_with_a_zone_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="zone"):
        to_address("fe80::1%eth0", 80)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.com"])
@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(host: str, port: int) -> None:
    with pytest.raises(LocalProtocolError, match="not a port"):
        to_address(host, port)


def test_names_and_addresses_are_written_with_their_port() -> None:
    assert str(to_address("example.com", 443)) == "example.com:443"
    assert str(to_address("::1", 443)) == "[::1]:443"
