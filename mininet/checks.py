"""What must hold in a topology, asserted from packets at both ends. Each check is a function of a `Scenario`.

To add one: write a function that takes the scenario and returns rows, and give it a name in `CHECKS` and in
`scenario.CHECK_NAMES`, which is known without Mininet, too.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from capture import Capture, Endpoint, Seen
from testbed import DNS_PORT, ECHO_PORTS, WEB_PORTS, WORKERS, ZONE, Gateway, Testbed, wait_for
from topologies import VERSIONS

from tproxyd.netfilter.plan import LEASE_S

FRAGMENTED_BYTES: Final = 4000

_FIRST_HOPS: Final = 64
_SAME_PORT: Final = 20000  # no port that the kernel gives away: one in TIME_WAIT could not be had
_CLIENT_S: Final = 8.0
_LOG_S: Final = 8.0
_EACH_KIND: Final = [
    (network, version, port) for network, port in (("tcp", WEB_PORTS[0]), ("udp", DNS_PORT)) for version in VERSIONS
]
_QUERY: Final = {4: "A", 6: "AAAA"}


@dataclass(frozen=True, slots=True)
class Row:
    """One flow in a check's table; `problem` is empty where it is as it must be."""

    host: str
    network: str
    sent_from: str
    asked: str
    server_saw: str
    answer_from: str
    problem: str


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client is to do.

    Attributes:
        source_port: 0 for any.
        size_bytes: of the datagram, where that is up to us.
    """

    host: str
    network: str
    version: int
    port: int
    source_port: int = 0
    size_bytes: int = 9

    @property
    def title(self) -> str:
        """Network and IP version."""
        return f"{self.network.upper()}/IPv{self.version}"


@dataclass
class Scenario:
    """A testbed whose gateways run, with a capture at both ends.

    Attributes:
        kept: network, client and original destination of every flow so far.
    """

    bed: Testbed
    capture: Capture
    ruleset: str
    kept: set[tuple[str, str, str]] = field(default_factory=set)

    def own(self, ask: Ask) -> str:
        """The client's address."""
        return self.bed.topology.clients[ask.host][ask.version]

    def asked(self, ask: Ask) -> Endpoint:
        """Where the client goes."""
        return Endpoint(self.bed.topology.server[ask.version], ask.port)

    def client(self, ask: Ask, patience_s: float = 3) -> subprocess.Popen[str]:
        """Start the client program for an ask."""
        own, asked = self.own(ask), self.asked(ask)
        if ask.port in WEB_PORTS:
            ports = ["--local-port", str(ask.source_port)] if ask.source_port else []
            return self.bed.start(ask.host, ["curl", "-sS", "-m", str(patience_s), *ports, f"http://{asked}/"])
        if ask.port == DNS_PORT:
            command = ["dig", f"@{asked.address}", "-b", f"{own}#{ask.source_port}", f"www.{ZONE}"]
            options = [_QUERY[ask.version], "+short", f"+time={patience_s:.0f}", "+tries=1"]
            return self.bed.start(ask.host, [*command, *options])
        payload = self.bed.folder / f"{ask.size_bytes}-bytes"
        if not payload.exists():  # another client may be reading it
            payload.write_text("x" * ask.size_bytes)
        with payload.open() as stdin:
            # -t: how long to wait for answers once all is sent; datagrams have no end to wait for
            socat = ["socat", "-b", "65536", "-t", "1", "-", f"UDP{ask.version}:{asked}"]
            return self.bed.start(ask.host, socat, stdin=stdin)

    def clients(self) -> list[str]:
        """The names of the client hosts."""
        return list(self.bed.topology.clients)


def everyone(
    network: str, version: int, port: int, scenario: Scenario, *, routers: int = 0, **options: int
) -> list[Row]:
    """All clients ask at once; nothing changes on the way."""
    return exchange(scenario, [Ask(host, network, version, port, **options) for host in scenario.clients()], routers)


def second_port(scenario: Scenario) -> list[Row]:
    """Another port of the same server is another destination."""
    h1, h2, h3, h4 = scenario.clients()
    asks = [Ask(h1, "tcp", 4, WEB_PORTS[1]), Ask(h2, "tcp", 6, WEB_PORTS[1])]
    return exchange(scenario, [*asks, Ask(h3, "udp", 4, ECHO_PORTS[1]), Ask(h4, "udp", 6, ECHO_PORTS[1])])


def same_source_port(scenario: Scenario) -> list[Row]:
    """Clients that differ by nothing but their address are not mixed up."""
    asks = [Ask(host, *kind, source_port=_SAME_PORT + kind[1]) for host in scenario.clients() for kind in _EACH_KIND]
    return exchange(scenario, asks)


def access_log(scenario: Scenario) -> list[Row]:
    """Every gateway has logged exactly the flows that there were, with the client as their source."""
    return [row for gateway in scenario.bed.gateways for row in _logged_by(gateway, scenario.kept)]


def killed(scenario: Scenario) -> list[Row]:
    """While one gateway's processes are dead, nothing new gets through; afterwards it does again."""
    rows = []
    for gateway in scenario.bed.gateways:
        count = gateway.kill()
        what = f"kill -9 of {count} processes"
        problem = "" if count == 1 + WORKERS else f"there should be a supervisor and {WORKERS} workers"
        rows.append(Row(gateway.node.name, "", "", what, "", "", problem))
        rows += _nothing_passes(scenario)
        gateway.start(scenario.ruleset)
        rows += everyone("tcp", 4, WEB_PORTS[0], scenario)
    return rows


def clean_stop(scenario: Scenario) -> list[Row]:
    """A stop leaves each gateway's kernel as it was, and no way past it."""
    rows = [_as_before(gateway, "stop", gateway.stop()) for gateway in scenario.bed.gateways]
    return rows + _nothing_passes(scenario)


def killed_open(scenario: Scenario) -> list[Row]:
    """A gateway that may fail open relays while it lives; once it is dead, flows pass it by.

    Dead gateways route, so for this they forward. Each of them takes one from the hop count.
    """
    gateways = scenario.bed.gateways
    for gateway in gateways:
        gateway.stop()
        gateway.forward(on=True)
        gateway.start(scenario.ruleset, on_failure="open")
    rows = [row for ask in _EACH_KIND for row in everyone(*ask, scenario)]
    for gateway in gateways:
        gateway.kill()
    time.sleep(LEASE_S + 1)
    rows += [row for ask in _EACH_KIND for row in everyone(*ask, scenario, routers=len(gateways))]
    for gateway in gateways:
        gateway.remove_rules()
        gateway.forward(on=False)
        rows.append(_as_before(gateway, "remove-rules", 0))
    return rows


def exchange(scenario: Scenario, asks: list[Ask], routers: int = 0) -> list[Row]:
    """Let clients ask at once; compare what each sent and got with what the server's wire carried.

    Args:
        scenario: where.
        asks: who asks what.
        routers: how many hops only route; none where all relay.
    """
    scenario.capture.forget()
    said = _ask_all(scenario, asks, patience_s=3)

    def judged(seen: list[Seen]) -> list[Row]:
        return [_judge(scenario, ask, seen, said[ask], routers) for ask in asks]

    seen = scenario.capture.wait(lambda seen: not any(row.problem for row in judged(seen)))
    rows = judged(seen)
    scenario.kept |= {(ask.network, row.sent_from, row.asked) for ask, row in zip(asks, rows, strict=True)}
    return rows + _strays(scenario, seen)


CHECKS: Final[dict[str, Callable[[Scenario], list[Row]]]] = {
    "tcp-ipv4": partial(everyone, "tcp", 4, WEB_PORTS[0]),
    "tcp-ipv6": partial(everyone, "tcp", 6, WEB_PORTS[0]),
    "udp-ipv4": partial(everyone, "udp", 4, DNS_PORT),
    "udp-ipv6": partial(everyone, "udp", 6, DNS_PORT),
    "udp-fragments-ipv4": partial(everyone, "udp", 4, ECHO_PORTS[0], size_bytes=FRAGMENTED_BYTES),
    "udp-fragments-ipv6": partial(everyone, "udp", 6, ECHO_PORTS[0], size_bytes=FRAGMENTED_BYTES),
    "second-port": second_port,
    "same-source-port": same_source_port,
    "access-log": access_log,
    "killed": killed,
    "clean-stop": clean_stop,
    "killed-open": killed_open,
}


def _ask_all(scenario: Scenario, asks: Iterable[Ask], patience_s: float) -> dict[Ask, str]:
    """Run all clients at once and return what each printed; a client that failed has printed nothing."""
    running = {ask: scenario.client(ask, patience_s) for ask in asks}
    said = {}
    for ask, process in running.items():
        try:
            output, _ = process.communicate(timeout=_CLIENT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        said[ask] = "" if process.returncode else output.strip()
    return said


def _judge(scenario: Scenario, ask: Ask, seen: list[Seen], said: str, routers: int) -> Row:
    """Compare one flow on the client's wire with the same one on the server's."""
    own, asked = scenario.own(ask), scenario.asked(ask)
    mine = [packet for packet in seen if packet.network == ask.network]
    sent = [p for p in mine if p.node == ask.host and p.source.address == own and p.destination == asked]
    came = [p for p in mine if p.node == ask.host and p.destination.address == own and p.source.port == ask.port]
    arrived = [p for p in mine if p.node == "server" and p.source.address == own and p.destination == asked]
    answered = [p for p in mine if p.node == "server" and p.source == asked and p.destination.address == own]
    froms, at_server = _ends(sent), _ends(arrived)
    problems = {
        "sent from more than one port, or not at all": len(froms) != 1,
        "the server saw something else": at_server != froms,
        "the server answered someone else": {p.destination for p in answered} != froms,
        "answers from elsewhere, or none": _ends(came) != {asked},
        "answers to another port": {p.destination for p in came} != froms,
        f"not over {routers} routers": any(p.hops_left != _FIRST_HOPS - routers for p in arrived + came),
        "not fragmented": ask.size_bytes > 1500 and not all(any(p.fragment for p in w) for w in (sent, arrived, came)),
        f"wrong answer: {said[:60]!r}": not _is_right(ask, said, froms, asked),
    }
    return Row(
        host=ask.host,
        network=ask.title,
        sent_from=_written(froms),
        asked=str(asked),
        server_saw=_written(at_server),
        answer_from=_written(_ends(came)),
        problem="; ".join(text for text, holds in problems.items() if holds),
    )


def _is_right(ask: Ask, said: str, froms: set[Endpoint], asked: Endpoint) -> bool:
    """Whether the client got what that server answers: web pages name the client, names have the server's address."""
    if ask.port in WEB_PORTS:
        return said in {f"you are {end.address} port {end.port}" for end in froms}
    if ask.port == DNS_PORT:
        return said == asked.address
    return said == "x" * ask.size_bytes


def _strays(scenario: Scenario, seen: list[Seen]) -> list[Row]:
    """Packets at the server that no client sent: a spoofed source must be a real one."""
    sent = {(p.network, p.source, p.destination) for p in seen if p.node != "server"}
    own = set(scenario.bed.topology.server.values())
    strays = {
        (p.network, p.source, p.destination) for p in seen if p.node == "server" and p.source.address not in own
    } - sent
    return [
        Row("?", network.upper(), "", str(asked), str(source), "", "no client sent this")
        for network, source, asked in sorted(strays)
    ]


def _as_before(gateway: Gateway, what: str, code: int) -> Row:
    problems = [f"exit code {code}"] if code else []
    problems += [f"left behind: {left}" for left in gateway.residue()]
    return Row(gateway.node.name, "", "", what, "", "", "; ".join(problems))


def _nothing_passes(scenario: Scenario) -> list[Row]:
    """New flows of all kinds get no answer, and nothing of them reaches the server's wire."""
    scenario.capture.forget()
    asks = [Ask(host, *kind) for host, kind in zip(scenario.clients(), _EACH_KIND, strict=True)]
    said = _ask_all(scenario, asks, patience_s=1)
    return [_unheard(scenario, ask, said[ask]) for ask in asks]


def _unheard(scenario: Scenario, ask: Ask, said: str) -> Row:
    """One flow that must not get through."""
    asked = scenario.asked(ask)
    mine = [p for p in scenario.capture.seen() if p.network == ask.network]
    sent = _ends(p for p in mine if p.node == ask.host and p.destination == asked)
    arrived = _ends(p for p in mine if p.node == "server" and p.source.address == scenario.own(ask))
    problems = {"it was not even tried": not sent, "it got through": bool(arrived), f"answered: {said}": bool(said)}
    return Row(
        host=ask.host,
        network=ask.title,
        sent_from=_written(sent),
        asked=str(asked),
        server_saw=_written(arrived),
        answer_from="",
        problem="; ".join(text for text, holds in problems.items() if holds),
    )


def _logged_by(gateway: Gateway, kept: set[tuple[str, str, str]]) -> list[Row]:
    def logged() -> set[tuple[str, str, str]]:
        return {(flow["network"], flow["client"], flow["orig_dst"]) for flow in gateway.flows()}

    problem = ""
    try:
        wait_for(lambda: kept <= logged(), "flows in the log", _LOG_S)
    except TimeoutError:
        problem = f"not logged: {sorted(kept - logged())}"
    rows = [Row(gateway.node.name, "", f"{len(kept)} flows", "", f"{len(logged())} logged", "", problem)]
    rows += [
        Row(gateway.node.name, flow["network"].upper(), flow["client"], flow["orig_dst"], str(flow["source"]), "", why)
        for flow in gateway.flows()
        if (why := _wrong_entry(flow, kept))
    ]
    return rows


def _wrong_entry(flow: dict[str, object], kept: set[tuple[str, str, str]]) -> str:
    if (flow["network"], flow["client"], flow["orig_dst"]) not in kept:
        return "logged, but nobody sent it"
    if flow["source"] != flow["client"]:
        return "another source"
    return "" if (flow["backend"], flow["cause"]) in {("straight", "done"), ("straight", "idle")} else f"{flow}"


def _ends(packets: Iterable[Seen]) -> set[Endpoint]:
    return {packet.source for packet in packets}


def _written(ends: Iterable[Endpoint]) -> str:
    return " ".join(sorted(str(end) for end in ends))
