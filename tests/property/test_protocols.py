"""Properties of the codecs: cuts don't matter, what is written is read back, rubbish raises what is documented."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv6Address
from itertools import pairwise
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from tproxyd.errors import LocalProtocolError, RemoteProtocolError
from tproxyd.flow import Client, Endpoint, Network, OrigDst
from tproxyd.protocols import http_connect, socks5
from tproxyd.protocols.address import HostName, to_address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.protocols.proxy_protocol import Header, Receiver, Tlv, TlvType, parse, render
from tproxyd.protocols.socks5 import Command, Method, Reply, Request, datagram_header, decode_datagram

PORT = st.integers(0, 65535)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).filter(lambda address: not address.ipv4_mapped).map(str)
ENDPOINT = st.builds(Endpoint, V4 | V6, PORT)
LABEL = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
NAME = st.lists(LABEL, max_size=4).map(lambda labels: ".".join([*labels, "example"]))
ADDRESS = ENDPOINT | st.builds(HostName, NAME, PORT)
FIELD = st.binary(min_size=1, max_size=255).map(lambda data: data.decode("utf-8", "surrogateescape"))
CREDENTIALS = st.builds(Credentials, FIELD, FIELD)
TLV = st.builds(Tlv, st.integers(0, 255).filter(lambda kind: kind != TlvType.CRC32C), st.binary(max_size=50))
CHECKED = {"tlvs": st.lists(TLV, max_size=5).map(tuple), "checksum": st.booleans()}


def of_a_flow(version: int, network: st.SearchStrategy[Network], **more: Any) -> st.SearchStrategy[Header]:
    return st.sampled_from([V4, V6]).flatmap(
        lambda ip: st.builds(
            Header.of, st.just(version), network, st.builds(Client, ip, PORT), st.builds(OrigDst, ip, PORT), **more
        )
    )


HEADER = (
    st.sampled_from([Header(1), Header(2, local=True)])
    | of_a_flow(1, st.just(Network.TCP))
    | of_a_flow(2, st.sampled_from(Network), **CHECKED)
    | st.builds(Header, st.just(2), **CHECKED)
)

# What a peer may say: all that is well-formed, and that with bytes changed, left out or put in.
PREFIXES = st.sampled_from(
    [b"", b"\5\0", b"\5\2\1\0\5\0\0", b"\5\1\0", b"\5\1\2\1\1u\1p\5\1\0", b"HTTP/1.1 200 OK\r\n"]
)
HEADS = st.sampled_from(
    [b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.0 200 OK\n\n", b"HTTP/1.1 407 A\r\nA: b\r\n\r\n", b"HTTP/1.1"]
)
ANSWERS = st.builds(lambda address: datagram_header(address)[3:], ADDRESS)
SPOKEN = st.lists(PREFIXES | HEADS | ANSWERS | HEADER.map(render) | st.binary(max_size=20), max_size=5).map(b"".join)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:end] for start, end in pairwise(places)]


def answered(dialogue: Dialogue[Any], event: object) -> None:
    """Decide as a server must, always in the same way."""
    if isinstance(dialogue, socks5.Server):
        if isinstance(event, Credentials):
            dialogue.accept_credentials()
        else:
            dialogue.reply(Reply.SUCCEEDED)


def outcome(dialogue: Dialogue[Any], said: Iterable[bytes]) -> tuple[list[object], bytes, bytes | None]:
    """All events (an error counts as one), all that is sent, and what follows the dialogue (None: it is not over)."""
    events: list[object] = []
    sent = dialogue.data_to_send()
    waiting = list(said)
    try:
        while waiting and not dialogue.over:
            dialogue.receive_data(waiting.pop(0))
            while (event := dialogue.next_event()) is not None:
                events.append(event)
                answered(dialogue, event)
    except RemoteProtocolError as error:
        events.append(type(error))  # its text may quote what has come so far
        waiting.clear()  # nobody reads on
    sent += dialogue.data_to_send()
    in_vain = any(
        isinstance(event, socks5.Rejected | socks5.Unauthenticated | http_connect.Rejected) for event in events
    )
    rest = b"" if in_vain else b"".join(waiting)
    return events, sent, dialogue.trailing + rest if dialogue.over else None


def why_refused(error: type[Exception], function: Callable[..., object], *arguments: object) -> str | None:
    """What the one error that may come says; any other fails the test."""
    try:
        function(*arguments)
    except error as refused:
        return str(refused)
    return None


MOST_HELD_BYTES = 4096  # the longest unfinished message of any of these protocols, but for HTTP's
TARGET = Endpoint("192.0.2.1", 80)
USER = Credentials("user", "pass")
DIALOGUES: dict[str, Callable[[], Dialogue[Any]]] = {
    "socks5 connect": lambda: socks5.Client(Command.CONNECT, TARGET),
    "socks5 bind with user": lambda: socks5.Client(Command.BIND, TARGET, USER),
    "socks5 server": socks5.Server,
    "socks5 server with users": lambda: socks5.Server([Method.USER_PASSWORD, Method.NONE]),
    "http": lambda: http_connect.Client(TARGET, USER),
    "proxy protocol": Receiver,
}
DIALOGUE = st.sampled_from(sorted(DIALOGUES)).map(DIALOGUES.__getitem__)


@given(DIALOGUE, SPOKEN, CUTS)
def test_events_don_t_depend_on_where_the_bytes_are_cut(make, data, cuts):
    assert outcome(make(), pieces(data, cuts)) == outcome(make(), [data] if data else [])


@given(DIALOGUE, SPOKEN)
def test_events_are_the_same_byte_by_byte(make, data):
    assert outcome(make(), pieces(data, range(len(data)))) == outcome(make(), [data] if data else [])


@given(DIALOGUE, SPOKEN | st.binary(max_size=600), CUTS)
def test_rubbish_raises_only_what_is_documented_and_buffers_stay_small(make, data, cuts):
    dialogue = make()

    def hear_and_answer(piece: bytes) -> None:
        dialogue.receive_data(piece)
        while (event := dialogue.next_event()) is not None:
            answered(dialogue, event)

    for piece in pieces(data, cuts):
        if dialogue.over:
            break
        refused = why_refused(RemoteProtocolError, hear_and_answer, piece)
        assert refused is None or (dialogue.over and refused.isprintable())
        assert dialogue.over or len(dialogue._received) <= MOST_HELD_BYTES


# What is written is read back


@given(st.sampled_from(Command), ADDRESS, st.none() | CREDENTIALS, st.booleans(), ADDRESS, st.binary(max_size=20))
def test_client_and_server_understand_each_other(command, asked, credentials, only_users, bound, data):
    assume(credentials or not only_users)
    client = socks5.Client(command, asked, credentials)
    server = socks5.Server([Method.USER_PASSWORD] if only_users else [Method.NONE])
    requests, results = [], []
    while not client.over:
        server.receive_data(client.data_to_send())
        while (event := server.next_event()) is not None:
            requests.append(event)
            if isinstance(event, Credentials):
                server.accept_credentials()
            else:
                server.reply(Reply.SUCCEEDED, bound)
                if command is Command.BIND:
                    server.reply(Reply.SUCCEEDED, bound)
        client.receive_data(server.data_to_send() + (data if server.over else b""))
        while (event := client.next_event()) is not None:
            results.append(event)
    assert requests == ([credentials] if only_users else []) + [Request(command, asked)]
    assert [result.address for result in results] == [bound] * (2 if command is Command.BIND else 1)
    assert client.trailing == data


@given(ADDRESS, st.binary(max_size=100))
def test_datagrams_are_read_back_as_written(address, payload):
    found = decode_datagram(datagram_header(address) + payload)
    assert found == (address, payload)
    assert type(found[0]) is type(address)


@given(HEADER, st.binary(max_size=20))
def test_proxy_headers_are_read_back_as_written(header, rest):
    wire = render(header)
    assert parse(wire + rest) == (header, len(wire))


@given(ADDRESS)
def test_addresses_are_read_back_as_printed(address):
    host, _, port = str(address).rpartition(":")
    assert to_address(host.strip("[]"), int(port)) == address


@given(st.integers(0, 2**32 - 1).map(lambda low: IPv6Address((0xFFFF << 32) + low)), PORT)
def test_no_mapped_address_comes_off_the_wire(address, port):
    wire = b"\0\0\0\4" + address.packed + port.to_bytes(2, "big")
    assert decode_datagram(wire)[0] == Endpoint(str(address.ipv4_mapped), port)


# Rubbish


@given(st.text(max_size=30) | st.text("0123456789abcdefx:.%[]", max_size=20), st.integers(-10, 70000))
def test_any_text_is_an_address_a_name_or_refused(host, port):
    refused = why_refused(LocalProtocolError, to_address, host, port)
    assert refused.isprintable() if refused else str(to_address(host, port)).isascii()


@given(st.binary(max_size=300) | st.builds(lambda head, data: b"\0\0\0" + head + data, ANSWERS, st.binary()))
def test_any_datagram_is_decoded_or_refused(datagram):
    refused = why_refused(RemoteProtocolError, decode_datagram, datagram)
    assert refused.isprintable() if refused else datagram.endswith(decode_datagram(datagram)[1])


@given(HEADER.map(render), st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_in_a_proxy_header_is_read_or_refused(wire, at, change):
    at %= len(wire)
    broken = wire[:at] + bytes([wire[at] ^ change]) + wire[at + 1 :]
    refused = why_refused(RemoteProtocolError, parse, broken)
    found = None if refused else parse(broken)
    assert refused is None or refused.isprintable()
    assert found is None or found[1] <= len(broken)
