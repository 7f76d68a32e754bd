"""Layer 1: UDP flows that the kernel carries on by itself once their first datagrams led to `direct`.

Unless a test says otherwise the gateway forwards. What shows that a flow was learned: datagrams reach the other end,
while the worker counts none.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Daemon, Gateway, UdpService, cli, eventually, hears_refusal, write_config
from tproxyd.flow import Endpoint

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LARGEST = {4: 65507, 6: 65487}
IP_RECVERR = {4: (socket.SOL_IP, 11), 6: (41, 25)}
FIRST_OFFER = 7

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
nats = pytest.mark.parametrize("nat", ["full-cone", "symmetric"])

MASQUERADE = """
table inet box {
    chain out { type nat hook postrouting priority srcnat; oifname wan0 masquerade; }
}
"""


@pytest.fixture
def lab(lab: Gateway) -> Gateway:
    lab.forwarding(True)
    return lab


def bound(lab: Gateway, where: str, version: int, port: int = 0, host: int = 2) -> socket.socket:
    namespace = getattr(lab, where)
    address = {"client": lab.client_address, "server": lab.server_address}[where](version, host)
    made: socket.socket = namespace.socket(FAMILY[version], socket.SOCK_DGRAM)
    made.bind((address, port))
    return made


def learned_sets(lab: Gateway, version: int) -> str:
    names = (f"learned_v{version}", f"came_v{version}", f"left_v{version}")
    return "".join(lab.gateway.run(["nft", "list", "set", "inet", "tproxyd", name]).stdout for name in names)


def is_learned(lab: Gateway, version: int, port: int) -> bool:
    listing = lab.gateway.run(["nft", "list", "set", "inet", "tproxyd", f"learned_v{version}"]).stdout
    return f" . {port} . " in listing


def exchange(client: socket.socket, server: socket.socket, data: bytes = b"ping") -> tuple[str, int]:
    """One datagram there and one back; whom the server saw."""
    client.sendto(data, server.getsockname())
    got, peer = server.recvfrom(1 << 16)
    assert got == data
    server.sendto(data[::-1], peer)
    assert client.recvfrom(1 << 16) == (data[::-1], server.getsockname())
    return peer


def learn(lab: Gateway, version: int, client: socket.socket, server: socket.socket) -> None:
    """Talk until the kernel carries the flow, and the worker hears nothing of it any more."""

    def learned() -> bool:
        exchange(client, server)
        return is_learned(lab, version, client.getsockname()[1])

    def let_go() -> bool:
        ends = {Endpoint(*sock.getsockname()[:2]) for sock in (client, server)}
        listed = lab.gateway.run(["ss", "-Huan", "state", "established"]).stdout
        ours = [
            line for line in listed.splitlines() if set(line.replace("%lo", "").split()[2:4]) == set(map(str, ends))
        ]
        return bool(ours) and all("%lo:" in line for line in ours)

    eventually(learned, "the flow is learned", every_s=0.05)
    eventually(let_go, "the worker lets go of it")


@contextmanager
def worker_stopped(running: Daemon) -> Iterator[None]:
    """What goes through meanwhile, the kernel carries. Shorter than what makes a worker hung."""
    (pid,) = running.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@versions
@nats
def test_the_kernel_carries_a_flow_on_without_the_worker(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    """All sizes, both directions, fragments; who was there before, strangers and ICMP errors."""
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "10s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    with worker_stopped(running):
        for size in (0, 1, 1472, 1473, 9000, 60000, LARGEST[version], 0):
            assert exchange(client, server, os.urandom(size)) == client.getsockname()
        server.sendto(b"by itself", client.getsockname())
        assert client.recv(100) == b"by itself"


@versions
@nats
def test_the_log_tells_the_layer_and_what_the_kernel_counted(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "2s"})
    client, server = bound(lab, "client", version, 4321), bound(lab, "server", version)
    learn(lab, version, client, server)
    with worker_stopped(running):
        for _ in range(10):
            exchange(client, server, b"counted once")
    (end,) = running.wait_flow_ends(1, 12)
    assert (end["layer"], end["cause"], end["client"]) == ("learned", "idle", end["source"])
    assert end["bytes_up"] == end["bytes_down"]
    assert (end["bytes_up"] - 10 * len(b"counted once")) % len(b"ping") == 0
    assert running.recent_counters()["udp_learned"] == 1
    assert str(4321) not in learned_sets(lab, version)


@versions
def test_other_flows_of_the_endpoint_and_strangers_go_on_in_the_worker(
    lab: Gateway, daemon: DaemonFactory, version: int
) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    other, stranger = bound(lab, "server", version, host=3), bound(lab, "server", version, host=4)
    exchange(client, other)
    learn(lab, version, client, server)
    for _ in range(2):
        assert exchange(client, other) == client.getsockname()
        exchange(client, server)
        stranger.sendto(b"hello", client.getsockname())
        assert client.recvfrom(100) == (b"hello", stranger.getsockname())
        client.sendto(b"who", stranger.getsockname())
        assert stranger.recvfrom(100) == (b"who", client.getsockname())
    counters = running.counters()
    assert (counters["udp_flows"], counters["udp_learned"]) == (3, 1)


@versions
@nats
def test_icmp_errors_of_a_learned_flow_reach_its_ends(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    address = server.getsockname()
    server.close()
    client.connect(address)
    client.send(b"anyone?")
    with pytest.raises(ConnectionRefusedError):
        client.recv(10)
    server = bound(lab, "server", version, address[1])
    server.connect(client.getsockname())
    client.close()
    assert eventually(lambda: hears_refusal(server), "the server hears that the port is closed")


@versions
@nats
def test_a_smaller_mtu_behind_the_gateway_is_told_to_the_client(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    lab.gateway.ip("link set wan0 mtu 1300")
    client.setsockopt(*IP_RECVERR[version], 1)
    client.connect(server.getsockname())
    client.send(bytes(1400))
    with pytest.raises(OSError, match="too long") as caught:
        client.recv(10)
    assert caught.value.errno == errno.EMSGSIZE
    client.send(bytes(1400))
    assert len(server.recv(1 << 16)) == 1400


@versions
@nats
def test_masquerading_on_the_box_shows_the_same_mapping_before_and_after(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    lab.gateway.nft(MASQUERADE)
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    rival = bound(lab, "client", version, client.getsockname()[1], host=3)
    exchange(rival, server)  # has the mapping that keeps the port
    before = exchange(client, server)
    assert before[0] == lab.gateway_address(version, "server")
    assert before[1] != client.getsockname()[1]
    learn(lab, version, client, server)
    with worker_stopped(running):
        for _ in range(3):
            assert exchange(client, server) == before
        server.sendto(b"by itself", before)
        assert client.recv(100) == b"by itself"
    lab.gateway.nft("delete table inet box")


def test_a_few_questions_from_one_port_are_not_worth_it(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(timeouts={"udp_idle": "10s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    time.sleep(1.2)  # the worker knows that it may offer flows
    for _ in range(FIRST_OFFER // 2):
        exchange(client, server)
    assert running.counters()["udp_learned"] == 0
    learn(lab, 4, client, server)


@pytest.mark.parametrize(
    "sections",
    [
        {"interception": {"learned_flows": False}},
        {"backends": {"direct": {"type": "direct", "source": "gateway"}}},
        {"interception": {"ruleset": "iptables"}},
    ],
    ids=["switched off", "another source", "iptables"],
)
def test_nothing_is_learned_where_it_is_off_or_cannot_be(lab: Gateway, daemon: DaemonFactory, sections: dict) -> None:
    running = daemon(timeouts={"udp_idle": "10s"}, **sections)
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    time.sleep(1.2)
    for _ in range(3 * FIRST_OFFER):
        exchange(client, server)
    assert running.counters()["udp_learned"] == 0
    assert "learned" not in lab.gateway.run(["nft", "list", "ruleset"]).stdout


@versions
@nats
def test_no_datagram_is_lost_when_a_busy_flow_changes_its_layer(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    """From the worker to the kernel, back to it as forwarding is switched off, and once more; both directions busy."""
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    peer = exchange(client, server)
    for sock in (client, server):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    port = client.getsockname()[1]
    sent = 0
    states = []
    for wanted in (True, False, True):
        end = time.monotonic() + 8
        if states:
            # Told to the supervisor by its own look at the settings, and not by a packet that is lost.
            lab.gateway.sysctl("net.netfilter.nf_conntrack_udp_timeout", 30 if wanted else 5)
        while time.monotonic() < end and is_learned(lab, version, port) != wanted:
            for _ in range(50):
                client.sendto(sent.to_bytes(4, "big"), server.getsockname())
                server.sendto(sent.to_bytes(4, "big"), peer)
                sent += 1
                time.sleep(0.0003)
        states.append(is_learned(lab, version, port))
    assert states == [True, False, True]
    for sock in (client, server):
        sock.settimeout(1.0)
        got = set()
        while len(got) < sent:
            got.add(int.from_bytes(sock.recv(10), "big"))
    assert running.counters()["udp_dropped"] == 0


# Boxes on which forwarding does not work


@versions
def test_a_box_that_does_not_forward_learns_nothing(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    """Nor does it break what it learned before, and it learns again when it forwards again."""
    lab.forwarding(False)
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    time.sleep(1.2)
    for _ in range(3 * FIRST_OFFER):
        exchange(client, server)
    assert running.counters()["udp_learned"] == 0
    assert any("not learned: net.ipv" in message for message in running.messages())
    lab.forwarding(True)
    learn(lab, version, client, server)
    lab.forwarding(False)
    eventually(lambda: not is_learned(lab, version, client.getsockname()[1]), "the flow is taken back")
    assert exchange(client, server) == client.getsockname()


DROPS = {
    "everything": "policy drop;",
    "from clients": 'policy accept; iifname "lan0" drop;',
    "to clients": 'policy accept; oifname "lan0" drop;',
}


@versions
@pytest.mark.parametrize(("what", "nat"), [*((what, "symmetric") for what in DROPS), ("everything", "full-cone")])
def test_a_firewall_that_drops_forwarded_packets_breaks_no_flow(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str, what: str
) -> None:
    """The flow stumbles once; then this family is relayed for good, and the log says why."""
    lab.gateway.nft(f"table inet box {{ chain f {{ type filter hook forward priority filter; {DROPS[what]} }}; }}")
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    peer = exchange(client, server)
    client.settimeout(0.1)
    server.settimeout(0.1)

    def refused() -> bool:
        for sock, target in ((client, server.getsockname()), (server, peer)):
            sock.sendto(b"x", target)
        for sock in (client, server):
            while True:
                try:
                    sock.recv(10)
                except TimeoutError:
                    break
        return any("not forward them" in message for message in running.messages())

    eventually(refused, "the daemon notices", 12)
    assert running.counters()["udp_learned"] == 1, "it was learned indeed"
    client.settimeout(3)
    server.settimeout(3)
    time.sleep(1.1)
    for _ in range(3 * FIRST_OFFER):
        assert exchange(client, server) == client.getsockname()
    assert not is_learned(lab, version, client.getsockname()[1])
    assert sum("not forward them" in message for message in running.messages()) == 1
    lab.gateway.nft("delete table inet box")


def test_a_firewall_that_begins_to_drop_later_is_noticed(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    flows = [(bound(lab, "client", 4), bound(lab, "server", 4)) for _ in range(6)]
    for client, server in flows:
        learn(lab, 4, client, server)
        exchange(client, server)
    lab.gateway.nft("table inet box { chain f { type filter hook forward priority filter; policy drop; }; }")

    def noticed() -> bool:
        for client, server in flows:
            client.sendto(b"x", server.getsockname())
        return any("not forward them" in message for message in running.messages())

    eventually(noticed, "the daemon notices", every_s=0.1)
    eventually(lambda: not any(is_learned(lab, 4, client.getsockname()[1]) for client, _ in flows), "all come back")
    for client, server in flows:
        client.sendto(b"last", server.getsockname())
        eventually(lambda at=server: at.recv(10) == b"last", "what was sent before the notice is over")
        exchange(client, server)
    lab.gateway.nft("delete table inet box")


# The daemon, its workers and its rules come and go


@pytest.mark.parametrize("on_failure", ["closed", "open"])
@versions
def test_a_killed_daemon_closes_or_opens_learned_flows_too(
    lab: Gateway, daemon: DaemonFactory, version: int, on_failure: str
) -> None:
    running = daemon(interception={"on_failure": on_failure}, timeouts={"udp_idle": "20s"})
    client = bound(lab, "client", version)
    server = bound(lab, "server", version)
    learn(lab, version, client, server)
    running.kill_all()
    exchange(client, server)
    server.settimeout(0.3)

    def arrives() -> bool:
        client.sendto(b"x", server.getsockname())
        try:
            return bool(server.recv(10))
        except TimeoutError:
            return False

    if on_failure == "closed":
        eventually(lambda: not arrives(), "the flow is stopped", 10)
        assert not any(arrives() for _ in range(3))
    else:
        end = time.monotonic() + 7
        while time.monotonic() < end:
            assert arrives()
            time.sleep(0.2)
        assert is_learned(lab, version, client.getsockname()[1])
        again = daemon(interception={"on_failure": on_failure}, timeouts={"udp_idle": "20s"})
        assert not is_learned(lab, version, client.getsockname()[1]), "the new daemon has never heard of it"
        learn(lab, version, client, server)
        assert again.counters()["udp_learned"] == 1


@versions
def test_a_killed_worker_takes_its_learned_flows_with_it(lab: Gateway, daemon: DaemonFactory, version: int) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    (pid,) = running.worker_pids()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_learned(lab, version, client.getsockname()[1]), "the flow is forgotten")
    eventually(lambda: running.worker_pids() not in ([], [pid]), "another worker serves")
    assert exchange(client, server) == client.getsockname()
    learn(lab, version, client, server)
    assert running.counters()["udp_flows"] == 1, "of the new worker"


def test_without_a_supervisor_the_worker_ends_what_the_kernel_carried(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    learn(lab, 4, client, server)
    running.killed = True
    (worker,) = running.worker_pids()
    running.process.kill()
    running.process.wait()
    end = time.monotonic() + 7
    while time.monotonic() < end:
        assert exchange(client, server) == client.getsockname()
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    client.settimeout(0.3)
    client.sendto(b"closed", server.getsockname())
    server.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.recv(10)


@versions
@nats
def test_a_silent_flow_returns_to_its_worker_and_is_learned_again(
    lab: Gateway, daemon: DaemonFactory, version: int, nat: str
) -> None:
    """`udp_idle` of 2 s lets the kernel keep it for 2 s; an answer meets the worker's socket, or the kernel."""
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "3s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    quiet = time.monotonic()
    eventually(lambda: not is_learned(lab, version, client.getsockname()[1]), "the kernel lets go", 6)
    server.sendto(b"late", client.getsockname())
    assert client.recv(10) == b"late"
    assert time.monotonic() - quiet >= 2
    learn(lab, version, client, server)
    running.wait_flow_ends(1, 12)
    assert {end["layer"] for end in running.flow_ends()} <= {"learned"}


@versions
def test_rules_are_the_same_with_learned_flows_and_a_change_takes_the_flows_back(
    lab: Gateway, daemon: DaemonFactory, version: int, tmp_path: Path
) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    assert cli(lab.gateway, "apply-rules", "-c", running.path).stdout == "nothing to change\n"
    assert is_learned(lab, version, client.getsockname()[1])
    wanted = {"exclude": {"sources": ["10.1.0.7"]}}
    path = write_config(running.path.parent, timeouts={"udp_idle": "20s"}, interception=wanted)
    changed = cli(lab.gateway, "apply-rules", "-c", path)
    assert changed.returncode == 0, changed.stderr
    assert not is_learned(lab, version, client.getsockname()[1])
    assert exchange(client, server) == client.getsockname()
    learn(lab, version, client, server)


def test_rules_are_taken_back_with_learned_flows_in_them(lab: Gateway, daemon: DaemonFactory) -> None:
    """Only the rules come back: a flow brought back would be nobody's by now."""
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    learn(lab, 4, client, server)
    path = write_config(running.path.parent, interception={"exclude": {"sources": ["10.1.0.7"]}})
    tried = cli(lab.gateway, "apply-rules", "-c", path, "--confirm", "1")
    assert "the rules are as they were before" in tried.stderr
    assert not is_learned(lab, 4, client.getsockname()[1])
    assert cli(lab.gateway, "apply-rules", "-c", running.path).stdout == "nothing to change\n"
    assert exchange(client, server) == client.getsockname()
    learn(lab, 4, client, server)


def test_the_supervisor_stops_in_order_with_flows_in_the_kernel(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    learn(lab, 4, client, server)
    for _ in range(10):
        exchange(client, server, bytes(1000))
    running.stop()
    (end,) = running.flow_ends()
    assert (end["layer"], end["cause"]) == ("learned", "shutdown")
    assert end["bytes_up"] == end["bytes_down"] >= 10_000


# Both ends on the client side


@pytest.mark.one_armed
@versions
@nats
def test_one_interface_for_both_sides(lab: Gateway, daemon: DaemonFactory, version: int, nat: str) -> None:
    for name in ("all", "lan0"):
        lab.gateway.sysctl(f"net.ipv4.conf.{name}.send_redirects", 0)
    running = daemon(backends={"direct": {"type": "direct", "nat": nat}}, timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    with worker_stopped(running):
        for size in (1, 0, 9000):
            exchange(client, server, bytes(size))
    assert running.counters()["udp_flows"] == 1, "answers are no flows of their own"


@versions
@nats
def test_two_client_interfaces(lab: Gateway, daemon: DaemonFactory, version: int, nat: str) -> None:
    running = daemon(
        interception={"interfaces": ["lan0", "wan0"]},
        backends={"direct": {"type": "direct", "nat": nat}},
        timeouts={"udp_idle": "20s"},
    )
    client, server = bound(lab, "client", version), bound(lab, "server", version)
    learn(lab, version, client, server)
    with worker_stopped(running):
        for _ in range(3):
            exchange(client, server)
    other = bound(lab, "client", version, host=3)
    learn(lab, version, server, other)
    counters = running.counters()
    assert (counters["udp_flows"], counters["udp_learned"]) == (2, 2)


def test_own_flows_are_not_learned(lab: Gateway, daemon: DaemonFactory) -> None:
    running = daemon(interception={"own_traffic": True}, timeouts={"udp_idle": "20s"})
    with UdpService(lab.server, lab.server_address(4)) as far:
        time.sleep(1.2)
        own = lab.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((lab.gateway_address(4, "server"), 0))
        own.connect(far.address)
        for _ in range(3 * FIRST_OFFER):
            own.send(b"x")
            assert own.recv(10) == b"x"
        own.close()
    counters = running.counters()
    assert (counters["udp_flows"], counters["udp_learned"]) == (1, 0)


def test_a_packet_in_its_last_hop_is_relayed(lab: Gateway, daemon: DaemonFactory) -> None:
    """The relay takes no hop off, and tools that count hops use one flow for all of them."""
    running = daemon(timeouts={"udp_idle": "20s"})
    client, server = bound(lab, "client", 4), bound(lab, "server", 4)
    learn(lab, 4, client, server)
    client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
    for _ in range(5):
        exchange(client, server)
    server.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
    for _ in range(5):
        exchange(client, server)
    time.sleep(1.2)
    assert not any("not forward them" in message for message in running.messages())
