"""The rules in the form in which a worker asks them, once for each new flow: a few look-ups, however many there are.

Whoever has read the configuration packs them; workers unpack, and know neither prefixes nor configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network
from typing import Any, Final, Self

from tproxyd.flow import Action, Decision, Endpoint, Flow
from tproxyd.policy.address import number_of
from tproxyd.policy.rule import Field, Prefix, Rule, Rules
from tproxyd.policy.table import Interval, IntervalTable, merged

_V6: Final = 1 << 32
"""Both families stand on one line of numbers: IPv4 first, IPv6 behind it."""


def pack(rules: Rules) -> bytes:
    """Return the rules as JSON, prefixes as numbers; a hundred thousand of them take some 3 MB."""
    last = rules.last_word
    return json.dumps(
        [*(_packed(rule) for rule in rules.rules), {"decision": [last.rule, last.backend, None]}]
    ).encode()


class Policy:
    """First match wins; the last word is the default.

    Each field that some rule asks for yields an integer with a bit for each rule that is content; the lowest bit
    that is set in all of them is the first rule that takes the flow.

    Attributes:
        names: of the rules in their order, then that of the last word.
        asks_interface: some rule wants to know where a flow came in.
    """

    def __init__(self, packed: bytes) -> None:
        """Unpack; a fraction of a second for a hundred thousand prefixes."""
        clauses: list[dict[str, Any]] = json.loads(packed)
        self._decisions = [_decision(*clause["decision"]) for clause in clauses]
        self._everything = (1 << len(clauses)) - 1
        self._networks = self._named(clauses, Field.NETWORK)
        self._interfaces = self._named(clauses, Field.INTERFACE)
        self._listeners = self._named(clauses, Field.LISTENER)
        self._sources = self._numbered(clauses, Field.SOURCE)
        self._destinations = self._numbered(clauses, Field.DESTINATION)
        self._source_ports = self._numbered(clauses, Field.SOURCE_PORT)
        self._ports = self._numbered(clauses, Field.PORT)
        self.names = tuple(decision.rule for decision in self._decisions)
        self.asks_interface = self._interfaces is not None

    @classmethod
    def of(cls, rules: Rules) -> Self:
        """Compile rules that need not travel."""
        return cls(pack(rules))

    def decide(self, flow: Flow) -> Decision:
        """Return the decision for a flow; the same flow always gets the same one."""
        bits = self._everything
        client, orig_dst = flow.client, flow.orig_dst
        if self._networks is not None:
            bits &= self._networks.get(flow.network, self._networks[""])
        if self._interfaces is not None:
            bits &= self._interfaces.get(flow.interface, self._interfaces[""])
        if self._listeners is not None:
            bits &= self._listeners.get(flow.listener, self._listeners[""])
        if self._ports is not None:
            bits &= self._ports[orig_dst.port]
        if self._source_ports is not None:
            bits &= self._source_ports[client.port]
        if self._destinations is not None:
            bits &= self._destinations[_line_number(orig_dst)]
        if self._sources is not None:
            bits &= self._sources[_line_number(client)]
        return self._decisions[(bits & -bits).bit_length() - 1]

    def _named(self, clauses: Sequence[dict[str, Any]], field: Field) -> dict[str, int] | None:
        """Return the bits by name; those of all other names stand under the empty one."""
        asked = [clause.get(field) for clause in clauses]
        if not any(asked):
            return None
        anything = _bits(number for number, names in enumerate(asked) if not names)
        known = {name for names in asked for name in names or ()}
        return {"": anything} | {
            name: anything | _bits(number for number, names in enumerate(asked) if name in (names or ()))
            for name in known
        }

    def _numbered(self, clauses: Sequence[dict[str, Any]], field: Field) -> IntervalTable | None:
        asked: list[list[Interval]] = [clause.get(field) or [] for clause in clauses]
        if not any(asked):
            return None
        return IntervalTable(asked, _bits(number for number, intervals in enumerate(asked) if not intervals))


def _packed(rule: Rule) -> dict[str, Any]:
    match, decision = rule.match, rule.decision
    fields = {
        Field.NETWORK: match.networks,
        Field.INTERFACE: match.interfaces,
        Field.LISTENER: match.listeners,
        Field.SOURCE: _intervals(match.sources),
        Field.DESTINATION: _intervals(match.destinations),
        Field.SOURCE_PORT: match.source_ports,
        Field.PORT: match.ports,
    }
    asked = {str(field): values for field, values in fields.items() if values}
    return {"decision": [decision.rule, decision.backend, decision.action], **asked}


def _decision(rule: str, backend: str, action: str | None) -> Decision:
    return Decision(rule, backend, None if action is None else Action(action))


def _intervals(prefixes: Iterable[Prefix]) -> list[Interval]:
    return merged(
        (int(prefix.network_address) + offset, int(prefix.broadcast_address) + offset)
        for prefix in prefixes
        for offset in (0 if isinstance(prefix, IPv4Network) else _V6,)
    )


def _line_number(end: Endpoint) -> int:
    address = end.address
    return number_of(address) + _V6 if ":" in address else number_of(address)


def _bits(numbers: Iterable[int]) -> int:
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits
