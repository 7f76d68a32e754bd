"""The client's end of HTTP CONNECT, as dialogues."""

from __future__ import annotations

import traceback
from base64 import b64encode

import pytest

from tests.lab.dialogue import hear
from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Cause, Endpoint
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.http_connect import CAUSE_OF_STATUS, MOST_HEAD_BYTES, Client, Connected, Rejected

SERVER = HostName("a.example", 443)
USER = Credentials("user", "hunter2")
SECRET = b64encode(b"user:hunter2").decode()


@pytest.mark.parametrize(
    ("address", "authority"),
    [
        (Endpoint("192.0.2.1", 80), "192.0.2.1:80"),
        (Endpoint("2001:DB8:0::1", 443), "[2001:db8::1]:443"),
        (HostName("a.example", 443), "a.example:443"),
    ],
)
def test_the_request_names_the_authority(address: Address, authority: str) -> None:
    expected = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"
    assert Client(address).data_to_send().decode() == expected


def test_credentials_are_sent_at_once() -> None:
    sent = Client(SERVER, USER).data_to_send()
    assert f"\r\nProxy-Authorization: Basic {SECRET}\r\n".encode() in sent


def test_credentials_are_utf_8() -> None:
    """The example of RFC 7617 §2.1."""
    assert b" Basic dGVzdDoxMjPCow==\r\n" in Client(SERVER, Credentials("test", "123£")).data_to_send()


@pytest.mark.parametrize("head", ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 200 Connection established\r\nVia: x\r\n\r\n"])
def test_connected_with_the_first_bytes_of_the_flow(head: str) -> None:
    client = Client(SERVER)
    assert hear(client, head.encode() + b"\r\n\r\n220 mail") == [Connected()]
    assert client.over
    assert client.trailing == b"\r\n\r\n220 mail"


@pytest.mark.parametrize("field", ["Content-Length: 4", "Transfer-Encoding: chunked"])
def test_a_body_that_2xx_can_not_have_belongs_to_the_flow(field: str) -> None:
    client = Client(SERVER)
    assert hear(client, f"HTTP/1.1 200 OK\r\n{field}\r\n\r\nflow".encode()) == [Connected()]
    assert client.trailing == b"flow"


def test_lines_may_end_in_a_bare_line_feed() -> None:
    client = Client(SERVER)
    assert hear(client, b"HTTP/1.1 200 OK\nVia: x\n\nflow") == [Connected()]
    assert client.trailing == b"flow"


def test_interim_responses_are_skipped() -> None:
    client = Client(SERVER)
    assert hear(client, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 2") == []
    assert hear(client, b"00 OK\r\n\r\n") == [Connected()]


@pytest.mark.parametrize(
    ("line", "event", "text"),
    [
        ("407 Proxy Authentication Required", Rejected(407, "Proxy Authentication Required"), None),
        ("403 Forbidden", Rejected(403, "Forbidden"), "403 Forbidden"),
        ("504 ", Rejected(504, ""), "504"),
        ("302 Found", Rejected(302, "Found"), None),
        ("502 " + "x" * 200, Rejected(502, "x" * 80), None),
    ],
)
def test_rejections_tell_status_and_reason(line: str, event: Rejected, text: str | None) -> None:
    client = Client(SERVER)
    (found,) = hear(client, f"HTTP/1.1 {line}\r\nContent-Length: 4\r\n\r\nbody".encode())
    assert found == event
    assert client.over
    assert client.trailing == b""
    assert text is None or str(found) == text


def test_a_reason_is_printable_ascii() -> None:
    assert hear(Client(SERVER), b"HTTP/1.1 500 a\tb\xfc\xe9c\r\n\r\n") == [Rejected(500, "a?b??c")]
    assert hear(Client(SERVER), b"HTTP/1.1 500 a\x1b[31mb\x7f\r\n\r\n") == [Rejected(500, "a?[31mb?")]


def test_statuses_have_causes_where_they_tell_of_the_destination() -> None:
    assert CAUSE_OF_STATUS[504] is Cause.TIMED_OUT
    assert 403 not in CAUSE_OF_STATUS


@pytest.mark.parametrize("answer", [b"\5\xff", b"SSH-2.0-OpenSSH", b"HTTP/2.0 200", b"\r\nHTTP/1.1 200", b"hTTP/1.1"])
def test_another_protocol_is_an_error_at_once(answer: bytes) -> None:
    client = Client(SERVER)
    with pytest.raises(RemoteProtocolError, match="another protocol"):
        hear(client, answer)
    assert client.over


@pytest.mark.parametrize(
    "head",
    ["HTTP/1.1 20 OK", "HTTP/1.1 abc", "HTTP/1.1 200 OK\r\nno colon", "HTTP/1.1 200 OK\r\nA: b\0", "HTTP/1.1 101 X"],
)
def test_a_malformed_head_is_an_error(head: str) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        hear(Client(SERVER), f"{head}\r\n\r\n".encode())


@pytest.mark.parametrize("piece_bytes", [1000, MOST_HEAD_BYTES + 5])
def test_heads_are_bounded_whole_or_in_pieces(piece_bytes: int) -> None:
    begin, end = b"HTTP/1.1 200 OK\r\nA: ", b"\r\n\r\n"
    most = begin + b"x" * (MOST_HEAD_BYTES - len(begin) - len(end)) + end

    def tell(head: bytes) -> list[Connected | Rejected]:
        client = Client(SERVER)
        return [event for at in range(0, len(head), piece_bytes) for event in hear(client, head[at : at + piece_bytes])]

    assert tell(most) == [Connected()]
    with pytest.raises(RemoteProtocolError, match="more than 16384 bytes"):
        tell(begin + b"x" + most[len(begin) :])


def test_interim_responses_without_end_are_an_error() -> None:
    client = Client(SERVER)
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    for _ in range(MOST_HEAD_BYTES // len(interim)):
        assert hear(client, interim) == []
    with pytest.raises(RemoteProtocolError, match="more than"):
        hear(client, interim)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n"])
def test_a_proxy_that_leaves_in_the_middle_is_an_error(sent: bytes) -> None:
    client = Client(SERVER)
    if sent:
        hear(client, sent)
    with pytest.raises(RemoteProtocolError, match="closed the connection"):
        client.receive_data(b"")


@pytest.mark.parametrize(
    "answer",
    [f"HTTP/1.1 400 Proxy-Authorization: Basic {SECRET}", f"HTTP/1.1 400 X\r\nProxy-Authorization {SECRET}", SECRET],
)
def test_credentials_that_a_proxy_sends_back_are_not_shown(answer: str) -> None:
    try:
        told = str(hear(Client(SERVER, USER), f"{answer}\r\n\r\n".encode()))
    except RemoteProtocolError as error:
        told = "".join(traceback.format_exception(error))
    assert SECRET not in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    "credentials", [Credentials("a:b", "hunter2"), Credentials("a", "hunter2\n"), Credentials("a", "hunter2\ud800")]
)
def test_credentials_that_fit_no_header_are_refused_without_showing_them(credentials: Credentials) -> None:
    with pytest.raises(LocalProtocolError) as refused:
        Client(SERVER, credentials)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("address", [Endpoint("192.0.2.1", 65536), Endpoint("x\r\ny", 80), Endpoint("fe80::1%lo", 80)])
def test_an_endpoint_without_address_is_refused(address: Endpoint) -> None:
    with pytest.raises(LocalProtocolError):
        Client(address)
