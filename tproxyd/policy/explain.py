"""Why a flow is decided as it is, for people: what comes before the rules, each rule's answer, the outcome.

Asks rule by rule, as a reader of the configuration would; it has to come to what the compiled forms come to.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final

from tproxyd.flow import Action, Decision, Endpoint, Flow, Layer, Network
from tproxyd.policy.rule import Field, Match, Ports, Prefix, Rule, Rules

OWN_INTERFACE: Final = "lo"
_UNKNOWN_PORT: Final = 0


class NotToldError(ValueError):
    """A rule asks for something of the flow that was not said; the message names it."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decides before any rule whether a flow is intercepted.

    Attributes:
        interfaces: the client-side ones.
        ports: destination ports by transport and IP version; what is not there is not intercepted.
        excluded: prefixes that stay routed, by the end that they are about.
        kernel_refuses_udp4: the kernel itself answers refused UDP over IPv4 of clients.
        learned: backends whose UDP flows the kernel carries on by itself.
        without_udp: backends that can carry no UDP.
    """

    interfaces: tuple[str, ...]
    own_traffic: bool
    ports: Mapping[tuple[Network, int], tuple[Ports, ...]]
    excluded: Mapping[Field, tuple[Prefix, ...]]
    kernel_refuses_udp4: bool
    learned: frozenset[str] = frozenset()
    without_udp: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rule says to a flow: the first field that the flow does not answer to, None if the rule takes it."""

    rule: Rule
    failing: Field | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The way of a flow through the policy.

    Attributes:
        untouched: why it is not intercepted at all; then no rule was asked, and there is no decision.
        answers: of the rules that were asked, in their order; the last one may take the flow.
        how: what happens to it, in a few words.
    """

    flow: Flow
    untouched: str | None
    answers: tuple[Answer, ...]
    decision: Decision | None
    layer: Layer
    how: str


def explain(rules: Rules, around: Surroundings, flow: Flow, own: Collection[str]) -> Explanation:
    """Follow a flow; `own` has those addresses of its two ends that are the box's.

    The client's port may be 0 and the interface empty where they are not known.

    Raises:
        NotToldError: a rule asks for just that.
    """
    untouched = _untouched(around, flow, own)
    if untouched is not None:
        return Explanation(flow, untouched, (), None, Layer.KERNEL, "not intercepted")
    answers: list[Answer] = []
    decision = rules.last_word
    for rule in rules.rules:
        answers.append(Answer(rule, _failing(rule, flow)))
        if answers[-1].failing is None:
            decision = rule.decision
            break
    layer, how = _outcome(decision, around, flow)
    return Explanation(flow, None, tuple(answers), decision, layer, how)


def as_lines(found: Explanation) -> list[str]:
    """Return an explanation to read."""
    flow = found.flow
    came = f", in by {flow.interface}" if flow.interface else ""
    lines = [f"flow: {flow.network} {_end(flow.client)} to {flow.orig_dst}{came}, listener {flow.listener}"]
    if found.untouched is not None:
        lines.append(f"not intercepted: {found.untouched}")
    lines += [_answer_line(answer, flow) for answer in found.answers]
    if found.decision is not None and (not found.answers or found.answers[-1].failing is not None):
        lines.append("no rule takes it: default")
    return [*lines, f"outcome: {found.how}", f"layer: {found.layer}"]


def as_json(found: Explanation) -> dict[str, object]:
    """Return an explanation as plain JSON values."""
    flow, decision = found.flow, found.decision
    return {
        "network": str(flow.network),
        "source": _end(flow.client),
        "destination": str(flow.orig_dst),
        "interface": flow.interface or None,
        "listener": flow.listener,
        "not_intercepted": found.untouched,
        "rules": [
            {"name": each.rule.name, "takes": not each.failing, "failing": each.failing} for each in found.answers
        ],
        "rule": decision.rule if decision else None,
        "backend": decision.backend if decision and not decision.action else None,
        "action": decision.action if decision else None,
        "outcome": found.how,
        "layer": str(found.layer),
    }


def parse_end(text: str) -> Endpoint:
    """Read `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`; no port is 0.

    Raises:
        ValueError: anything else.
    """
    address, port = text, ""
    if text.startswith("["):
        address, _, rest = text[1:].partition("]")
        if rest and not rest.startswith(":"):
            raise ValueError(f"{text!r} is not [ADDRESS]:PORT")
        port = rest[1:]
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise ValueError(f"{text!r} has no port from 1 to 65535")
    return Endpoint(ip_address(address).compressed, int(port or _UNKNOWN_PORT))


def _untouched(around: Surroundings, flow: Flow, own: Collection[str]) -> str | None:
    """Return why a flow stays in the kernel, in the order in which the kernel's rules find it out."""
    if flow.interface == OWN_INTERFACE and not around.own_traffic:
        return "it is the box's own, and own_traffic is false"
    if flow.interface not in ("", OWN_INTERFACE, *around.interfaces):
        return f"{flow.interface} is no client-side interface"
    if flow.client.address in own and flow.interface != OWN_INTERFACE:
        return f"{flow.client.address} is an address of this box: from a client such a packet is dropped"
    if flow.orig_dst.address in own:
        return f"{flow.orig_dst.address} is an address of this box"
    return _left_out(around, flow)


def _left_out(around: Surroundings, flow: Flow) -> str | None:
    for field, end in ((Field.DESTINATION, flow.orig_dst), (Field.SOURCE, flow.client)):
        address = ip_address(end.address)
        prefix = next((each for each in around.excluded.get(field, ()) if address in each), None)
        if prefix is not None:
            return f"its {field} is in {prefix}, which is excluded"
    ports = around.ports.get((flow.network, flow.orig_dst.version), ())
    if not any(first <= flow.orig_dst.port <= last for first, last in ports):
        return (
            f"{flow.network} port {flow.orig_dst.port} over IPv{flow.orig_dst.version} is not among those intercepted"
        )
    return None


def _failing(rule: Rule, flow: Flow) -> Field | None:
    """Return what the flow does not answer to, looking at what is known first."""
    unknown = {
        "interfaces": (Field.INTERFACE, not flow.interface, "the interface: say --interface NAME"),
        "source_ports": (Field.SOURCE_PORT, not flow.client.port, "the source port: write SOURCE as ADDRESS:PORT"),
    }
    missing = {name: hint for name, (_, lacks, hint) in unknown.items() if lacks and getattr(rule.match, name)}
    known: Match = replace(rule.match, **dict.fromkeys(missing, ()))
    failing = known.failing(flow)
    if failing is None and missing:
        raise NotToldError(f"rule {rule.name} asks for {next(iter(missing.values()))}")
    return failing


def _outcome(decision: Decision, around: Surroundings, flow: Flow) -> tuple[Layer, str]:
    udp = flow.network is Network.UDP
    match decision.action:
        case Action.BYPASS:
            return Layer.KERNEL, "bypass: routed by the kernel"
        case Action.DROP:
            return Layer.KERNEL, "drop: no answer"
        case Action.REJECT if not udp:
            return Layer.KERNEL, "reject: a TCP reset from the kernel"
        case Action.REJECT:
            by_kernel = flow.orig_dst.version == 6 or (around.kernel_refuses_udp4 and flow.interface != OWN_INTERFACE)
            who = "the kernel" if by_kernel else "a worker"
            return Layer.KERNEL if by_kernel else Layer.COPY, f"reject: ICMP port unreachable from {who}"
        case _:
            return _carried(decision.backend, around, flow)


def _carried(backend: str, around: Surroundings, flow: Flow) -> tuple[Layer, str]:
    if flow.network is Network.TCP:
        return Layer.SPLICE, f"backend {backend}"
    if backend in around.without_udp:
        return Layer.COPY, f"backend {backend}, which carries no UDP: ICMP administratively prohibited from a worker"
    if backend in around.learned and flow.interface != OWN_INTERFACE:
        return (
            Layer.LEARNED,
            f"backend {backend}; the kernel forwards it after its first datagrams, if the box forwards",
        )
    return Layer.COPY, f"backend {backend}"


def _answer_line(answer: Answer, flow: Flow) -> str:
    if answer.failing is None:
        return f"rule {answer.rule.name}: takes it"
    found = {
        Field.NETWORK: flow.network,
        Field.INTERFACE: flow.interface,
        Field.LISTENER: flow.listener,
        Field.SOURCE: flow.client.address,
        Field.DESTINATION: flow.orig_dst.address,
        Field.SOURCE_PORT: flow.client.port,
        Field.PORT: flow.orig_dst.port,
    }
    return f"rule {answer.rule.name}: no, not for {answer.failing} {found[answer.failing]}"


def _end(client: Endpoint) -> str:
    return str(client) if client.port else client.address
