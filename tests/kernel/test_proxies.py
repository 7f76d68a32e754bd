"""Flows through real proxies: microsocks, Dante, tinyproxy; alone, in a chain, and found by name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Daemon, Gateway, TcpService, UdpService, config, eventually, tproxyd, write_config
from tests.lab.danted import danted
from tests.lab.proxies import socks5_proxy

USER, PASSWORD = "user", "hunter2"
BULK = 2_000_000

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
Start = Callable[[int, Sequence[str]], str]


@pytest.fixture
def start(lab: Gateway, tmp_path: Path) -> Iterator[Start]:
    """Start a program on the server's side: `start(port, argv)` waits until it listens, and returns HOST:PORT."""
    started = []

    def start(port: int, argv: Sequence[str]) -> str:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(lab.server.popen(argv, env={**os.environ, "TMPDIR": str(tmp_path)}, **quiet))
        eventually(lambda: f":{port} " in lab.server.run(["ss", "-tlnH"]).stdout, f"{argv[0]} listens")
        return f"{lab.server_address(4, host=3)}:{port}"

    tmp_path.chmod(0o755)  # for programs that give up root
    yield start
    for process in started:
        process.terminate()  # Dante's children outlive a kill
        process.wait(5)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{PASSWORD}\n")
    path.chmod(0o600)
    return path


def microsocks(start: Start) -> str:
    return start(1080, ["microsocks", "-p", "1080", "-u", USER, "-P", PASSWORD])


def dante(start: Start, folder: Path) -> str:
    return start(1081, danted(folder, "eth0", 1081))


def tinyproxy(start: Start, folder: Path) -> str:
    (folder / "tinyproxy.conf").write_text(
        f'Port 8888\nTimeout 10\nMaxClients 10\nLogFile "{folder}/log"\nBasicAuth {USER} {PASSWORD}\n'
    )
    return start(8888, ["tinyproxy", "-d", "-c", f"{folder}/tinyproxy.conf"])


def login(secret: Path) -> dict[str, str]:
    return {"username": USER, "password_file": str(secret)}


def carries_bulk(lab: Gateway, running: Daemon, version: int) -> None:
    """What is sent comes back whole, and runs in the kernel once the way is open."""
    data = os.urandom(BULK)
    with TcpService(lab.server, lab.server_address(version)) as echo, lab.client.tcp(echo.address) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        got = bytearray()
        while len(got) < BULK and (piece := client.recv(1 << 20)):
            got += piece
        sender.join()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    end = running.wait_flow_ends(1)[0]
    assert (end["backend"], end["layer"]) == ("corp", "splice")
    assert (end["bytes_up"], end["bytes_down"]) == (BULK, BULK)


@versions
def test_tcp_goes_through_microsocks(
    lab: Gateway, daemon: DaemonFactory, start: Start, secret: Path, version: int
) -> None:
    corp = {"type": "socks5", "server": microsocks(start), **login(secret)}
    carries_bulk(lab, daemon(backends={"corp": corp}, default="corp"), version)


@versions
def test_tcp_goes_through_tinyproxy(
    lab: Gateway, daemon: DaemonFactory, start: Start, secret: Path, tmp_path: Path, version: int
) -> None:
    corp = {"type": "http_connect", "server": tinyproxy(start, tmp_path), **login(secret)}
    carries_bulk(lab, daemon(backends={"corp": corp}, default="corp"), version)


def test_tcp_goes_through_three_proxies_in_a_row(
    lab: Gateway, daemon: DaemonFactory, start: Start, secret: Path, tmp_path: Path
) -> None:
    backends = {
        "corp": {"type": "socks5", "server": dante(start, tmp_path), "via": "middle"},
        "middle": {"type": "http_connect", "server": tinyproxy(start, tmp_path), "via": "near", **login(secret)},
        "near": {"type": "socks5", "server": microsocks(start), **login(secret)},
    }
    carries_bulk(lab, daemon(backends=backends, default="corp"), 4)


def test_udp_and_tcp_go_through_dante(lab: Gateway, daemon: DaemonFactory, start: Start, tmp_path: Path) -> None:
    running = daemon(backends={"corp": {"type": "socks5", "server": dante(start, tmp_path)}}, default="corp")
    with UdpService(lab.server, lab.server_address(4)) as echo, lab.client.udp(echo.address) as client:
        for payload in (b"hello", b"", os.urandom(9000)):
            client.send(payload)
            assert client.recv(1 << 16) == payload
    (end,) = running.wait_flow_ends(1)
    assert (end["network"], end["bytes_up"], end["bytes_down"], end["cause"]) == ("udp", 9005, 9005, "idle")
    assert end["source"].startswith(f"{lab.gateway_address(4, 'server')}:")


def test_wrong_credentials_are_said_to_be_wrong(
    lab: Gateway, daemon: DaemonFactory, start: Start, secret: Path, tmp_path: Path
) -> None:
    secret.write_text("wrong")
    corp = {"type": "socks5", "server": microsocks(start), **login(secret)}
    running = daemon(backends={"corp": corp}, default="corp")
    with lab.client.tcp((lab.server_address(4), 80)) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    (end,) = running.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("rejected", "handshake")
    assert any("backend corp: " in message and "refused" in message for message in running.messages())
    assert "wrong" not in running.log()


@pytest.fixture
def hosts(lab: Gateway) -> Iterator[Callable[[str], None]]:
    """Write the gateway's own /etc/hosts; `ip netns exec` shows it to what runs there."""
    folder = Path("/etc/netns") / lab.gateway.name
    folder.mkdir(parents=True)
    yield (folder / "hosts").write_text  # type: ignore[misc]
    (folder / "hosts").unlink(missing_ok=True)
    folder.rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # unless others use it


def test_a_proxy_is_found_by_name_and_its_next_address_is_tried(
    lab: Gateway, daemon: DaemonFactory, start: Start, secret: Path, hosts: Callable[[str], None]
) -> None:
    """Nobody listens at the first address; a name that is unknown is an end cause of its own."""
    at = microsocks(start)
    dead = lab.gateway_address(4, "server")
    hosts(f"{dead} proxy.example\n{at.partition(':')[0]} proxy.example\n")
    backends = {
        "corp": {"type": "socks5", "server": "proxy.example:1080", **login(secret)},
        "lost": {"type": "socks5", "server": "nowhere.invalid:1080"},
    }
    carries_bulk(lab, running := daemon(backends=backends, default="corp"), 4)
    running.stop()
    lost = daemon(backends=backends, default="lost", timeouts={"connect": "4s"})
    with lab.client.tcp((lab.server_address(4), 80)) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    (end,) = lost.wait_flow_ends(1)
    assert (end["cause"], end["phase"]) == ("unresolved", "connect")


@pytest.mark.parametrize("resolve", ["remote", "local"])
def test_the_next_proxy_is_named_to_the_one_before_or_not(
    lab: Gateway, daemon: DaemonFactory, hosts: Callable[[str], None], resolve: str
) -> None:
    """`resolve: local` hands out addresses alone."""
    asked: list[str] = []
    address = lab.server_address(4, host=3)
    hosts(f"{address} far.example\n")
    with socks5_proxy(lab.server, address, on_request=lambda target: asked.append(str(target))) as near:
        backends = {
            "near": {"type": "socks5", "server": f"{address}:{near.address[1]}", "resolve": resolve},
            "far": {"type": "socks5", "server": "far.example:1080", "via": "near"},
        }
        daemon(backends=backends, default="far")
        with lab.client.tcp((lab.server_address(4), 80)) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
    assert asked == [{"remote": "far.example:1080", "local": f"{address}:1080"}[resolve]]


@pytest.mark.parametrize(
    ("mode", "content", "told"),
    [
        (0o644, "x\n", "every user may open it (mode 0644)"),
        (0o600, None, "No such file"),
        (0o600, "x" * 300, "255 bytes"),
        (0o600, "x" * 5000, "longer than 4096 bytes"),
    ],
)
def test_a_password_file_that_will_not_do_stops_the_start(
    lab: Gateway, tmp_path: Path, mode: int, content: str | None, told: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    corp: dict[str, Any] = {"type": "socks5", "server": "192.0.2.1:1080", "username": USER, "password_file": str(path)}
    file = write_config(tmp_path / "config", config(backends={"corp": corp}))
    done = tproxyd(lab.gateway, "run", "-c", file)
    assert done.returncode == 78
    assert "backends.corp.password_file: " in done.stderr
    assert told in done.stderr
