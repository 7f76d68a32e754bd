"""The codecs of `tproxyd.protocols` in conversation with those of others, in one namespace.

As client: microsocks, Dante, tinyproxy. As server: curl. PROXY headers: HAProxy in both roles, nginx.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.lab import Namespace, TcpService, UdpService, eventually, open_descriptors
from tests.lab.danted import danted
from tests.lab.dialogue import converse
from tproxyd.errors import ProtocolError, RemoteProtocolError
from tproxyd.flow import Client, Endpoint, Network, OrigDst
from tproxyd.protocols import http_connect, socks5
from tproxyd.protocols.address import Address, HostName
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.proxy_protocol import Header, Receiver, Tlv, TlvType, render
from tproxyd.protocols.socks5 import UNSPECIFIED, Command, Method, Reply, Request

LOOPBACK = "127.0.0.1"
USER = Credentials("user", "hunter2")
STRANGER = Credentials("user", "wrong")
CLOSED_PORT = 9
TARGETS = pytest.mark.parametrize("host", [LOOPBACK, "::1", "localhost"])

Start = Callable[..., tuple[str, int]]


@pytest.fixture
def island(root: None) -> Iterator[Namespace]:
    """A namespace with nothing but loopback; at its end, no more open files than before."""
    files = open_descriptors()
    made = Namespace("peers")
    try:
        yield made
    finally:
        made.close()
    opened = {number: target for number, target in open_descriptors().items() if files.get(number) != target}
    assert not opened, f"open files are left: {opened}"


@pytest.fixture
def start(island: Namespace, tmp_path: Path) -> Iterator[Start]:
    """Start a program: `start(port, argv)` waits until it listens, and returns where."""
    started = []

    def start(port: int, argv: Sequence[str]) -> tuple[str, int]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(island.popen(argv, env=environment, **quiet))
        eventually(lambda: f":{port} " in island.run(["ss", "-tlnH"]).stdout, f"{argv[0]} listens")
        return LOOPBACK, port

    tmp_path.chmod(0o755)  # for programs that give up root
    yield start
    for process in started:
        process.terminate()  # Dante's children outlive a kill
        process.wait(5)


def target(host: str, port: int) -> Address:
    return HostName(host, port) if host == "localhost" else Endpoint(host, port)


@contextmanager
def echo_on_both(island: Namespace) -> Iterator[int]:
    """An echo service on both loopback addresses ("localhost" may be either), by its port."""
    with TcpService(island, LOOPBACK) as echo, TcpService(island, "::1", echo.address[1]):
        yield echo.address[1]


def echo_through(connected: socket.socket, trailing: bytes) -> None:
    """What is sent over the proxied connection comes back."""
    assert trailing == b""
    connected.sendall(b"hello")
    assert connected.recv(16) == b"hello"


def banner(connected: socket.socket) -> None:
    """A server that speaks first."""
    connected.sendall(b"220 welcome")
    connected.recv(16)


# SOCKS5, as client


def microsocks(start: Start, *options: str) -> tuple[str, int]:
    return start(1080, ["microsocks", "-i", LOOPBACK, "-p", "1080", *options])


def dante(start: Start, folder: Path) -> tuple[str, int]:
    return start(1080, danted(folder, LOOPBACK, 1080))


@TARGETS
def test_socks5_client_connects_through_microsocks(island: Namespace, start: Start, host: str) -> None:
    proxy = microsocks(start)
    with echo_on_both(island) as port, island.tcp(proxy) as connected:
        client = socks5.Client(Command.CONNECT, target(host, port))
        assert isinstance(converse(connected, client), socks5.Connected)
        echo_through(connected, client.trailing)


@pytest.mark.parametrize(
    ("credentials", "event"),
    [
        (USER, None),
        (STRANGER, socks5.Unauthenticated(offered=True)),
        (None, socks5.Unauthenticated(offered=False)),
    ],
)
def test_socks5_client_shows_credentials_to_microsocks(
    island: Namespace, start: Start, credentials: Credentials | None, event: socks5.Unauthenticated | None
) -> None:
    proxy = microsocks(start, "-u", USER.username, "-P", USER.password)
    with TcpService(island, LOOPBACK) as echo, island.tcp(proxy) as connected:
        client = socks5.Client(Command.CONNECT, Endpoint(*echo.address), credentials)
        found = converse(connected, client)
        assert found == event or (event is None and isinstance(found, socks5.Connected))
        if event is None:
            echo_through(connected, client.trailing)


def test_socks5_client_hears_of_a_refusal_from_microsocks(island: Namespace, start: Start) -> None:
    with island.tcp(microsocks(start)) as connected:
        found = converse(connected, socks5.Client(Command.CONNECT, Endpoint(LOOPBACK, CLOSED_PORT)))
        assert found == socks5.Rejected(Reply.CONNECTION_REFUSED)


def test_socks5_client_makes_dante_connect_bind_and_relay_datagrams(
    island: Namespace, start: Start, tmp_path: Path
) -> None:
    proxy = dante(start, tmp_path)
    with TcpService(island, LOOPBACK, handler=banner) as greeter, island.tcp(proxy) as connected:
        client = socks5.Client(Command.CONNECT, Endpoint(*greeter.address))
        assert isinstance(converse(connected, client), socks5.Connected)
        assert (client.trailing or connected.recv(16)) == b"220 welcome"
    with island.tcp(proxy) as connected:
        found = converse(connected, socks5.Client(Command.CONNECT, Endpoint(LOOPBACK, CLOSED_PORT)))
        assert found == socks5.Rejected(Reply.CONNECTION_REFUSED)
    with island.tcp(proxy) as connected:
        client = socks5.Client(Command.BIND, Endpoint(LOOPBACK, 0))
        bound = converse(connected, client)
        assert isinstance(bound, socks5.Bound)
        assert isinstance(bound.address, Endpoint)
        with island.tcp(bound.address) as caller:
            assert converse(connected, client) == socks5.Connected(Endpoint(*caller.getsockname()))
            caller.sendall(b"hello")
            assert (client.trailing or connected.recv(16)) == b"hello"
    with UdpService(island, LOOPBACK) as echo, island.tcp(proxy) as connected:
        client = socks5.Client(Command.UDP_ASSOCIATE, UNSPECIFIED)
        associated = converse(connected, client)
        assert isinstance(associated, socks5.Associated)
        assert isinstance(associated.address, Endpoint)
        with island.udp(associated.address) as relay:
            for payload in (b"hello", b""):
                relay.send(socks5.datagram_header(Endpoint(*echo.address)) + payload)
                assert socks5.decode_datagram(relay.recv(100)) == (Endpoint(*echo.address), payload)


# SOCKS5, as server


def serve_socks5(connected: socket.socket, code: Reply, seen: list[object], methods: Sequence[Method]) -> None:
    """Take one request; answer what curl asks over it."""
    server = socks5.Server(methods)
    try:
        while not isinstance(event := converse(connected, server), Request):
            seen.append(event)
            if event != USER:
                server.reject_credentials()
                break
            server.accept_credentials()
        else:
            seen.append(event)
            server.reply(code, Endpoint("::1", 5001))
    except ProtocolError as error:
        seen.append(error)
    connected.sendall(server.data_to_send())
    if server.over and connected.recv(4096):
        connected.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")


def curl(island: Namespace, *options: str) -> subprocess.CompletedProcess[str]:
    return island.run(["curl", "-sS", "-m", "5", *options], check=False)


@pytest.mark.parametrize(
    ("option", "url", "address"),
    [
        ("--socks5", "http://192.0.2.1/", Endpoint("192.0.2.1", 80)),
        ("--socks5", "http://[2001:db8::1]:81/", Endpoint("2001:db8::1", 81)),
        ("--socks5-hostname", "http://name.example/", HostName("name.example", 80)),
        ("--socks5-hostname", "http://192.0.2.1/", Endpoint("192.0.2.1", 80)),
    ],
)
@pytest.mark.parametrize("credentials", [None, USER])
def test_curl_asks_the_socks5_server(
    island: Namespace, option: str, url: str, address: Address, credentials: Credentials | None
) -> None:
    seen: list[object] = []
    methods = [Method.USER_PASSWORD if credentials else Method.NONE]
    handler = partial(serve_socks5, code=Reply.SUCCEEDED, seen=seen, methods=methods)
    login = ["-U", f"{credentials.username}:{credentials.password}"] if credentials else []
    with TcpService(island, LOOPBACK, handler=handler) as service:
        done = curl(island, *login, option, f"{LOOPBACK}:{service.address[1]}", url)
    assert (done.stdout, done.stderr) == ("hello", "")
    assert seen == [*([credentials] if credentials else []), Request(Command.CONNECT, address)]


@pytest.mark.parametrize(
    ("login", "methods", "code", "told"),
    [
        ("user:wrong", [Method.USER_PASSWORD], Reply.SUCCEEDED, "rejected by the SOCKS5 server (1 1)"),
        (":", [Method.USER_PASSWORD], Reply.SUCCEEDED, "No authentication method was acceptable"),
        ("user:hunter2", [Method.NONE], Reply.CONNECTION_REFUSED, "(5)"),
    ],
)
def test_curl_understands_what_the_socks5_server_refuses(
    island: Namespace, login: str, methods: list[Method], code: Reply, told: str
) -> None:
    handler = partial(serve_socks5, code=code, seen=[], methods=methods)
    options = ["-U", login] if login != ":" else []
    with TcpService(island, LOOPBACK, handler=handler) as service:
        done = curl(island, *options, "--socks5", f"{LOOPBACK}:{service.address[1]}", "http://192.0.2.1/")
    assert done.returncode == 97
    assert told in done.stderr


# HTTP CONNECT, as client


def tinyproxy(start: Start, folder: Path) -> tuple[str, int]:
    (folder / "tinyproxy.conf").write_text(
        f'Port 8888\nListen {LOOPBACK}\nTimeout 5\nMaxClients 10\nLogFile "{folder}/log"\n'
        f"BasicAuth {USER.username} {USER.password}\n"
    )
    return start(8888, ["tinyproxy", "-d", "-c", f"{folder}/tinyproxy.conf"])


@TARGETS
def test_http_client_connects_through_tinyproxy(island: Namespace, start: Start, tmp_path: Path, host: str) -> None:
    proxy = tinyproxy(start, tmp_path)
    with echo_on_both(island) as port, island.tcp(proxy) as connected:
        client = http_connect.Client(target(host, port), USER)
        assert converse(connected, client) == http_connect.Connected()
        echo_through(connected, client.trailing)


def test_http_client_hears_of_refusals_from_tinyproxy(island: Namespace, start: Start, tmp_path: Path) -> None:
    proxy = tinyproxy(start, tmp_path)
    for credentials, statuses in ((None, {407}), (STRANGER, {401, 407}), (USER, range(500, 600))):
        with island.tcp(proxy) as connected:
            found = converse(connected, http_connect.Client(Endpoint(LOOPBACK, CLOSED_PORT), credentials))
            assert isinstance(found, http_connect.Rejected)
            assert found.status in statuses
            assert found.reason


def test_a_socks5_proxy_is_no_http_proxy(island: Namespace, start: Start) -> None:
    """What a wrong `type:` in the configuration looks like."""
    with island.tcp(microsocks(start)) as connected, pytest.raises(RemoteProtocolError):
        converse(connected, http_connect.Client(Endpoint(LOOPBACK, CLOSED_PORT)))


# PROXY headers

V4 = Client("192.0.2.1", 56324), OrigDst("198.51.100.1", 443)
V6 = Client("2001:db8::1", 56324), OrigDst("2001:db8::2", 443)
UNIQUE_ID = Tlv(TlvType.UNIQUE_ID, b"flow-1")
PROXIED = [
    Header.of(1, Network.TCP, *V4),
    Header.of(1, Network.TCP, *V6),
    Header.of(2, Network.TCP, *V4),
    Header.of(2, Network.TCP, *V6, tlvs=(UNIQUE_ID, Tlv(0xE4, b"ours")), checksum=True),
]
HAPROXY = (
    "global\n  maxconn 100\ndefaults\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n"
    f"frontend taking\n  mode http\n  bind {LOOPBACK}:8001 accept-proxy\n  http-request return status 200"
    " content-type text/plain lf-string '%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_unique_id]'\n"
    f"listen giving1\n  mode tcp\n  bind {LOOPBACK}:8002\n  bind [::1]:8002\n"
    f"  server one {LOOPBACK}:8010 send-proxy\n"
    f"listen giving2\n  mode tcp\n  bind {LOOPBACK}:8003\n  bind [::1]:8003\n  unique-id-format flow-%ms\n"
    f"  server two {LOOPBACK}:8010 send-proxy-v2 proxy-v2-options crc32c,unique-id\n"
)


def haproxy(start: Start, folder: Path, more: str = "") -> None:
    (folder / "haproxy.cfg").write_text(HAPROXY + more)
    start(8001, ["haproxy", "-db", "-f", f"{folder}/haproxy.cfg"])


def nginx(start: Start, folder: Path) -> None:
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;\n"
        f"  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n"
        f"  server {{ listen {LOOPBACK}:8001 proxy_protocol; return 200 '$proxy_protocol_addr $proxy_protocol_port"
        " $proxy_protocol_server_addr $proxy_protocol_server_port '; } }\n"
    )
    start(8001, ["nginx", "-p", str(folder), "-c", f"{folder}/nginx.conf"])


def page_after(island: Namespace, header: bytes) -> str:
    """What the server on port 8001 answers behind a header; "" if it hangs up."""
    with island.tcp((LOOPBACK, 8001)) as connected:
        connected.sendall(header + b"GET / HTTP/1.0\r\n\r\n")
        page = b""
        try:
            while piece := connected.recv(4096):
                page += piece
        except ConnectionResetError:
            return ""
    return page.decode().partition("\r\n\r\n")[2]


@pytest.mark.parametrize("server", [haproxy, nginx])
def test_rendered_proxy_headers_are_understood(
    island: Namespace, start: Start, tmp_path: Path, server: Callable[[Start, Path], None]
) -> None:
    server(start, tmp_path)
    for header in PROXIED:
        assert header.source is not None
        assert header.destination is not None
        told = page_after(island, render(header))
        expected = (
            f"{header.source.address} {header.source.port} {header.destination.address} {header.destination.port}"
        )
        unique_id = "flow-1" if server is haproxy and header.tlvs else ""
        assert told == f"{expected} {unique_id}"
    for own in (Header(1), Header(2, local=True)):
        told = page_after(island, render(own))
        if server is haproxy:  # nginx has no addresses to tell then
            assert told.startswith(f"{LOOPBACK} ")
        assert told


def test_haproxy_finds_our_checksum_good_and_a_changed_one_bad(island: Namespace, start: Start, tmp_path: Path) -> None:
    haproxy(start, tmp_path)
    wire = render(Header.of(2, Network.TCP, *V4, checksum=True))
    assert page_after(island, wire).startswith("192.0.2.1 ")
    assert page_after(island, wire[:-1] + bytes([wire[-1] ^ 1])) == ""


@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
def test_headers_of_haproxy_are_read(island: Namespace, start: Start, tmp_path: Path, host: str) -> None:
    received: list[tuple[Header, bytes]] = []

    def receive(connected: socket.socket) -> None:
        receiver = Receiver()
        header = converse(connected, receiver)
        received.append((header, receiver.trailing or connected.recv(16)))
        connected.sendall(b"seen")

    with TcpService(island, LOOPBACK, 8010, handler=receive):
        haproxy(start, tmp_path)
        for port in (8002, 8003):
            with island.tcp((host, port)) as connected:
                source = connected.getsockname()[:2]
                connected.sendall(b"hello")
                assert connected.recv(16) == b"seen"
            header, data = received.pop()
            assert (header.network, data) == (Network.TCP, b"hello")
            assert header.source == Client(*source)
            assert header.destination == OrigDst(host, port)
            assert header.checksum == (port == 8003)
            assert [tlv.kind for tlv in header.tlvs] == ([TlvType.UNIQUE_ID] if port == 8003 else [])


def test_health_checks_of_haproxy_are_local(island: Namespace, start: Start, tmp_path: Path) -> None:
    received: list[Header] = []
    with TcpService(island, LOOPBACK, 8010, handler=lambda connected: received.append(converse(connected, Receiver()))):
        haproxy(start, tmp_path, f"  server three {LOOPBACK}:8010 send-proxy-v2 check inter 50ms check-send-proxy\n")
        eventually(lambda: received, "HAProxy checks")
    assert received[0] == Header(2, local=True)
