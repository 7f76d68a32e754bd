"""The server's end of SOCKS5, as dialogues."""

from __future__ import annotations

import pytest

from tests.lab.dialogue import hear
from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Cause, Endpoint
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.socks5 import REPLY_OF_CAUSE, Command, Method, Reply, Request, Server
from tproxyd.protocols.socks5.server import MOST_BYTES

CONNECT = bytes.fromhex("05010001c00002010050")
CONNECT_EVENT = Request(Command.CONNECT, Endpoint("192.0.2.1", 80))
FAILED = "0001000000000000"


def greeted() -> Server:
    """A server that waits for the request."""
    server = Server()
    hear(server, b"\5\1\0")
    server.data_to_send()
    return server


def authenticating() -> Server:
    """A server that waits for user name and password."""
    server = Server([Method.USER_PASSWORD])
    hear(server, b"\5\2\0\2")
    server.data_to_send()
    return server


def test_connect_without_authentication() -> None:
    server = Server()
    assert hear(server, b"\5\2\0\1") == []
    assert server.data_to_send() == b"\5\0"
    assert hear(server, CONNECT) == [CONNECT_EVENT]
    assert server.data_to_send() == b""
    server.reply(Reply.SUCCEEDED, Endpoint("198.51.100.5", 5001))
    assert server.data_to_send() == bytes.fromhex("05000001c63364051389")
    assert server.over
    assert server.trailing == b""


def test_connect_with_user_and_password() -> None:
    server = Server([Method.USER_PASSWORD])
    assert hear(server, b"\5\2\0\2") == []
    assert server.data_to_send() == b"\5\2"
    (event,) = hear(server, b"\1\4user\4pass")
    assert event == Credentials("user", "pass")
    assert "pass" not in repr(event)
    server.accept_credentials()
    assert server.data_to_send() == b"\1\0"
    assert hear(server, CONNECT) == [CONNECT_EVENT]


def test_rejected_credentials_end_the_dialogue() -> None:
    server = authenticating()
    hear(server, b"\1\1u\1p" + CONNECT)
    server.reject_credentials()
    assert server.data_to_send() == b"\1\1"
    assert server.over
    assert server.next_event() is None
    assert server.trailing == b""


def test_a_client_that_sends_everything_at_once_waits_for_each_decision() -> None:
    server = Server([Method.USER_PASSWORD])
    assert hear(server, b"\5\1\2" + b"\1\1u\1p" + CONNECT + b"GET / ") == [Credentials("u", "p")]
    server.accept_credentials()
    assert server.next_event() == CONNECT_EVENT
    server.reply(Reply.SUCCEEDED)
    assert server.data_to_send() == bytes.fromhex("0502" + "0100" + "0500" + FAILED)
    assert server.trailing == b"GET / "


def test_the_first_method_of_the_servers_own_that_the_client_offers_is_chosen() -> None:
    server = Server([Method.USER_PASSWORD, Method.NONE])
    hear(server, b"\5\2\0\2")
    assert server.data_to_send() == b"\5\2"


@pytest.mark.parametrize("greeting", [b"\5\0", b"\5\1\0", b"\5\2\0\1", b"\5\1\xff"])
def test_a_client_without_a_common_method_is_sent_away(greeting: bytes) -> None:
    server = Server([Method.USER_PASSWORD])
    with pytest.raises(RemoteProtocolError, match="no authentication method"):
        hear(server, greeting)
    assert server.data_to_send() == b"\5\xff"
    assert server.over


def test_255_methods_may_be_offered() -> None:
    server = Server()
    assert hear(server, b"\5\xff" + bytes(range(1, 255)) + b"\0") == []
    assert server.data_to_send() == b"\5\0"


@pytest.mark.parametrize("first", [b"\4\1\0\x50", b"GET / HTTP/1.1", b"\x16\3\1"])
def test_another_protocol_is_an_error_at_its_first_byte(first: bytes) -> None:
    server = Server()
    with pytest.raises(RemoteProtocolError, match=f"{first[0]:#04x}"):
        hear(server, first[:1])
    assert server.data_to_send() == b""


def test_a_bad_version_of_the_negotiation_is_refused() -> None:
    server = authenticating()
    with pytest.raises(RemoteProtocolError, match="version 5"):
        hear(server, b"\5\1u\1p")
    assert server.data_to_send() == b"\1\1"


@pytest.mark.parametrize(
    ("message", "credentials"),
    [
        (b"\1\0\0", Credentials("", "")),
        (b"\1\1u\0", Credentials("u", "")),
        (b"\1\xff" + b"u" * 255 + b"\xff" + b"p" * 255, Credentials("u" * 255, "p" * 255)),
        (b"\1\2\xc3\xbc\1\xff", Credentials("ü", "\udcff")),
    ],
)
def test_credentials_of_every_length_are_for_the_check_to_judge(message: bytes, credentials: Credentials) -> None:
    assert hear(authenticating(), message) == [credentials]


@pytest.mark.parametrize(
    ("on_the_wire", "address"),
    [
        ("0420010db80000000000000000000000010035", Endpoint("2001:db8::1", 53)),
        ("0400000000000000000000ffff7f0000010035", Endpoint("127.0.0.1", 53)),
        ("0309612e6578616d706c650035", HostName("a.example", 53)),
        ("03093132372e302e302e310035", Endpoint("127.0.0.1", 53)),
        ("03ff" + "61" * 255 + "0035", HostName("a" * 255, 53)),
        ("01c00002010000", Endpoint("192.0.2.1", 0)),
    ],
)
@pytest.mark.parametrize("command", Command)
def test_requests_of_every_kind(command: Command, on_the_wire: str, address: Address) -> None:
    (event,) = hear(greeted(), bytes([5, command, 0]) + bytes.fromhex(on_the_wire))
    assert event == Request(command, address)


def test_a_reserved_byte_is_not_looked_at() -> None:
    assert hear(greeted(), CONNECT[:2] + b"\xff" + CONNECT[3:]) == [CONNECT_EVENT]


@pytest.mark.parametrize(
    ("request_bytes", "code", "what"),
    [
        ("0401000100000000", Reply.GENERAL_FAILURE, "version 4"),
        ("05000001", Reply.COMMAND_NOT_SUPPORTED, "command 0"),
        ("05f00001", Reply.COMMAND_NOT_SUPPORTED, "command 240"),
        ("05010002", Reply.ADDRESS_TYPE_NOT_SUPPORTED, "address type 2"),
        ("0501000300" + "0050", Reply.GENERAL_FAILURE, "1 to 255"),
        ("0501000303" + "612062" + "0050", Reply.GENERAL_FAILURE, "not a host name"),
        ("0501000302" + "c3bc" + "0050", Reply.GENERAL_FAILURE, "not a host name"),
        ("0501000305" + "3132372e31" + "0050", Reply.GENERAL_FAILURE, "neither a host name nor"),
    ],
)
def test_a_request_that_is_none_gets_its_reply(request_bytes: str, code: Reply, what: str) -> None:
    server = greeted()
    with pytest.raises(RemoteProtocolError, match=what):
        hear(server, bytes.fromhex(request_bytes))
    assert server.data_to_send().hex() == f"05{code:02x}{FAILED}"
    assert server.over


@pytest.mark.parametrize("code", [code for code in Reply if code is not Reply.SUCCEEDED])
def test_every_failure_can_be_told(code: Reply) -> None:
    server = greeted()
    hear(server, CONNECT + b"early")
    server.reply(code)
    assert server.data_to_send().hex() == f"05{code:02x}{FAILED}"
    assert server.over
    assert server.trailing == b""


def test_bind_is_answered_twice() -> None:
    server = greeted()
    hear(server, CONNECT[:1] + b"\2" + CONNECT[2:])
    server.reply(Reply.SUCCEEDED, Endpoint("198.51.100.5", 5001))
    assert not server.over
    assert hear(server, b"early") == []
    server.reply(Reply.SUCCEEDED, Endpoint("2001:db8::1", 53))
    assert server.data_to_send() == bytes.fromhex(
        "05000001c63364051389" + "0500000420010db80000000000000000000000010035"
    )
    assert server.over
    assert server.trailing == b"early"


def test_bind_may_fail_after_its_first_reply() -> None:
    server = greeted()
    hear(server, CONNECT[:1] + b"\2" + CONNECT[2:])
    server.reply(Reply.SUCCEEDED)
    server.reply(Reply.TTL_EXPIRED)
    assert server.over


def test_answers_that_nothing_waits_for_are_refused() -> None:
    server = Server()
    for answer in (server.accept_credentials, server.reject_credentials, lambda: server.reply(Reply.SUCCEEDED)):
        with pytest.raises(LocalProtocolError, match="nothing waits"):
            answer()
    hear(server, b"\5\1\0" + CONNECT)
    server.reply(Reply.SUCCEEDED)
    with pytest.raises(LocalProtocolError, match="nothing waits"):
        server.reply(Reply.SUCCEEDED)


@pytest.mark.parametrize("methods", [[], [Method.NO_ACCEPTABLE]])
def test_a_server_needs_a_method(methods: list[Method]) -> None:
    with pytest.raises(LocalProtocolError, match="can't choose"):
        Server(methods)


def test_a_client_can_not_send_without_end_ahead_of_an_answer() -> None:
    server = authenticating()
    hear(server, b"\1\1u\1p")
    hear(server, bytes(MOST_BYTES))
    with pytest.raises(RemoteProtocolError, match="ahead of an answer"):
        hear(server, b"x")
    assert server.over


@pytest.mark.parametrize("sent", [b"", b"\5\1", b"\5\1\0\5\1\0"])
def test_a_client_that_leaves_in_the_middle_is_an_error(sent: bytes) -> None:
    server = Server()
    if sent:
        hear(server, sent)
    with pytest.raises(RemoteProtocolError, match="closed the connection"):
        server.receive_data(b"")


def test_every_cause_before_the_reply_has_one() -> None:
    never = {Cause.DONE, Cause.CLIENT_RESET, Cause.IDLE}  # nobody is left to be answered, or the flow was up
    assert set(REPLY_OF_CAUSE) == set(Cause) - never
    assert REPLY_OF_CAUSE[Cause.REFUSED] is Reply.CONNECTION_REFUSED
