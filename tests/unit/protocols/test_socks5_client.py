"""The client's end of SOCKS5, as dialogues."""

from __future__ import annotations

import pytest

from tests.lab.dialogue import hear
from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Cause, Endpoint
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.socks5 import (
    CAUSE_OF_REPLY,
    UNSPECIFIED,
    Associated,
    Bound,
    Client,
    Command,
    Connected,
    Rejected,
    Unauthenticated,
)

SERVER = Endpoint("192.0.2.1", 80)
USER = Credentials("user", "pass")
GRANTED = bytes.fromhex("05000001c63364051389")  # 198.51.100.5:5001
GRANTED_AT = Endpoint("198.51.100.5", 5001)


def asking(address: Address = SERVER, command: Command = Command.CONNECT) -> Client:
    """A client whose request is on its way."""
    client = Client(command, address)
    client.data_to_send()
    hear(client, b"\5\0")
    return client


def test_connect_without_authentication() -> None:
    client = Client(Command.CONNECT, SERVER)
    assert client.data_to_send() == b"\5\1\0"
    assert client.next_event() is None
    assert hear(client, b"\5\0") == []
    assert client.data_to_send() == bytes.fromhex("05010001c00002010050")
    assert client.data_to_send() == b""
    assert hear(client, GRANTED) == [Connected(GRANTED_AT)]
    assert client.over
    assert client.data_to_send() == client.trailing == b""


def test_connect_with_user_and_password() -> None:
    client = Client(Command.CONNECT, SERVER, USER)
    assert client.data_to_send() == b"\5\2\0\2"
    assert hear(client, b"\5\2") == []
    assert client.data_to_send() == b"\1\4user\4pass"
    assert hear(client, b"\1\0") == []
    assert client.data_to_send()[:3] == b"\5\1\0"
    assert hear(client, GRANTED) == [Connected(GRANTED_AT)]


def test_a_proxy_that_wants_no_credentials_gets_none() -> None:
    client = Client(Command.CONNECT, SERVER, USER)
    client.data_to_send()
    hear(client, b"\5\0")
    assert client.data_to_send()[:3] == b"\5\1\0"


def test_the_version_of_socks_is_taken_as_version_of_the_negotiation() -> None:
    """Against RFC 1929, but many servers send it."""
    client = Client(Command.CONNECT, SERVER, USER)
    hear(client, b"\5\2")
    assert hear(client, b"\5\0" + GRANTED) == [Connected(GRANTED_AT)]


@pytest.mark.parametrize(
    ("address", "on_the_wire"),
    [
        (Endpoint("192.0.2.1", 80), "01c00002010050"),
        (Endpoint("2001:db8::1", 65535), "0420010db8000000000000000000000001ffff"),
        (Endpoint("::ffff:192.0.2.1", 80), "01c00002010050"),
        (HostName("a.example", 53), "0309612e6578616d706c650035"),
    ],
)
def test_the_request_carries_every_kind_of_address(address: Address, on_the_wire: str) -> None:
    client = Client(Command.CONNECT, address)
    client.data_to_send()
    hear(client, b"\5\0")
    assert client.data_to_send().hex() == "050100" + on_the_wire


@pytest.mark.parametrize(
    ("on_the_wire", "address"),
    [
        ("0420010db80000000000000000000000010035", Endpoint("2001:db8::1", 53)),
        ("0400000000000000000000ffff010203040035", Endpoint("1.2.3.4", 53)),
        ("0309612e6578616d706c650035", HostName("a.example", 53)),
        ("03073132372e302e31", None),
        ("03093132372e302e302e310035", Endpoint("127.0.0.1", 53)),
    ],
)
def test_the_reply_carries_every_kind_of_address(on_the_wire: str, address: Address | None) -> None:
    expected = [Connected(address)] if address else []
    assert hear(asking(), bytes.fromhex("050000" + on_the_wire)) == expected


def test_bytes_glued_to_the_reply_are_kept() -> None:
    client = asking()
    assert hear(client, GRANTED + b"220 mail") == [Connected(GRANTED_AT)]
    assert client.trailing == b"220 mail"
    with pytest.raises(LocalProtocolError):
        client.receive_data(b" more")


def test_trailing_bytes_are_unknown_before_the_end() -> None:
    with pytest.raises(LocalProtocolError):
        _ = asking().trailing


def test_bind_has_two_replies() -> None:
    client = asking(command=Command.BIND)
    assert client.data_to_send()[1] == Command.BIND
    assert hear(client, GRANTED) == [Bound(GRANTED_AT)]
    assert not client.over
    assert hear(client, bytes.fromhex("05000001c00002010050") + b"hi") == [Connected(SERVER)]
    assert client.trailing == b"hi"


def test_both_replies_to_bind_may_come_at_once() -> None:
    assert hear(asking(command=Command.BIND), GRANTED + GRANTED) == [Bound(GRANTED_AT), Connected(GRANTED_AT)]


def test_the_second_reply_to_bind_may_be_a_failure() -> None:
    client = asking(command=Command.BIND)
    assert hear(client, GRANTED + b"\5\4\0\1\0\0\0\0\0\0") == [Bound(GRANTED_AT), Rejected(4)]
    assert client.over


def test_udp_associate_tells_where_datagrams_are_taken() -> None:
    client = asking(UNSPECIFIED, Command.UDP_ASSOCIATE)
    assert client.data_to_send() == bytes.fromhex("05030001000000000000")
    assert hear(client, bytes.fromhex("05000001000000001389")) == [Associated(Endpoint("0.0.0.0", 5001))]


@pytest.mark.parametrize(
    ("code", "text", "cause"),
    [
        (1, "general failure", None),
        (3, "network unreachable", Cause.UNREACHABLE),
        (5, "connection refused", Cause.REFUSED),
        (6, "ttl expired", Cause.TIMED_OUT),
        (0x5B, "reply code 91", None),
    ],
)
def test_a_failure_is_told_by_its_code(code: int, text: str, cause: Cause | None) -> None:
    client = asking()
    (event,) = hear(client, bytes([5, code, 0, 1, 0, 0, 0, 0, 0, 0]))
    assert event == Rejected(code)
    assert str(event) == text
    assert CAUSE_OF_REPLY.get(code) is cause
    assert client.over
    assert client.trailing == b""


@pytest.mark.parametrize("rest", ["", "00", "0000000000000000", "0003000000"])
def test_a_failure_needs_no_address(rest: str) -> None:
    assert hear(asking(), b"\5\5" + bytes.fromhex(rest)) == [Rejected(5)]


def test_a_reserved_byte_is_not_looked_at() -> None:
    assert hear(asking(), GRANTED[:2] + b"\xff" + GRANTED[3:]) == [Connected(GRANTED_AT)]


@pytest.mark.parametrize("credentials", [None, USER])
def test_no_method_in_common(credentials: Credentials | None) -> None:
    client = Client(Command.CONNECT, SERVER, credentials)
    (event,) = hear(client, b"\5\xff")
    assert event == Unauthenticated(offered=False)
    assert "no authentication method" in str(event)


def test_refused_credentials() -> None:
    client = Client(Command.CONNECT, SERVER, USER)
    hear(client, b"\5\2")
    (event,) = hear(client, b"\1\1")
    assert event == Unauthenticated(offered=True)
    assert str(event) == "user name or password refused"
    assert client.over


@pytest.mark.parametrize(
    ("answers", "what"),
    [
        ([b"HTTP/1.1 400 Bad Request"], "version 72"),
        ([b"\4\0"], "version 4"),
        ([b"\5\2"], "method 2, which was not offered"),
        ([b"\5\1"], "method 1, which was not offered"),
        ([b"\5\0", b"\4\0"], "version 4"),
        ([b"\5\0", b"\5\0\0\2\0\0\0\0\0\0"], "address type 2"),
        ([b"\5\0", b"\5\0\0\3\0\0\0"], "1 to 255"),
        ([b"\5\0", b"\5\0\0\3\1\n\0\0"], "not a host name"),
        ([b"\5\0", b"\5\0\0\3\1\xfc\0\0"], "not a host name"),
    ],
)
def test_what_is_no_answer_is_an_error(answers: list[bytes], what: str) -> None:
    client = Client(Command.CONNECT, SERVER)
    for answer in answers[:-1]:
        hear(client, answer)
    with pytest.raises(RemoteProtocolError, match=what):
        hear(client, answers[-1])
    assert client.over
    assert client.next_event() is None


def test_a_bad_version_of_the_negotiation_is_an_error() -> None:
    client = Client(Command.CONNECT, SERVER, USER)
    hear(client, b"\5\2")
    with pytest.raises(RemoteProtocolError, match="version 0"):
        hear(client, b"\0\0")


@pytest.mark.parametrize("answers", [b"", b"\5", b"\5\0\5\0\0\1"])
def test_a_proxy_that_leaves_in_the_middle_is_an_error(answers: bytes) -> None:
    client = Client(Command.CONNECT, SERVER)
    if answers:
        hear(client, answers)
    with pytest.raises(RemoteProtocolError, match="closed the connection"):
        client.receive_data(b"")


@pytest.mark.parametrize(
    "credentials",
    [
        Credentials("", "secret"),
        Credentials("u" * 256, "secret"),
        Credentials("u", "secret" * 50),
        Credentials("u", "\ud800"),
    ],
)
def test_credentials_that_fit_no_message_are_refused_without_showing_them(credentials: Credentials) -> None:
    with pytest.raises(LocalProtocolError) as refused:
        Client(Command.CONNECT, SERVER, credentials)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(credentials)


def test_longest_credentials_and_an_empty_password_fit() -> None:
    client = Client(Command.CONNECT, SERVER, Credentials("ü" * 127, ""))
    client.data_to_send()
    hear(client, b"\5\2")
    assert client.data_to_send() == b"\1\xfe" + "ü".encode() * 127 + b"\0"


@pytest.mark.parametrize("address", [Endpoint("example.com", 80), Endpoint("fe80::1%lo", 80), Endpoint("::1", 65536)])
def test_an_endpoint_without_address_is_refused(address: Endpoint) -> None:
    with pytest.raises(LocalProtocolError):
        Client(Command.CONNECT, address)
