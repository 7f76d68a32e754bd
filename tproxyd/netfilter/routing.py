"""Policy routing (ip-rule(8), ip-route(8)): marked packets are delivered to this box, whatever their destination.

One rule `fwmark MARK lookup TABLE` and one route `local default dev lo` a family, told from anyone else's by
their protocol number. pyroute2 opens its netlink socket in a loop of its own, so nothing here may run on a
uvloop loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any, Final

from tproxyd.errors import PermissionDenied, RulesetError
from tproxyd.netfilter.plan import Ruleset

if TYPE_CHECKING:
    from pyroute2 import IPRoute

PROTOCOL: Final = 174
"""The rtnetlink protocol number of what is ours; unassigned in iproute2's rt_protos."""

_FAMILY: Final = {4: AF_INET, 6: AF_INET6}
_VERSION: Final = {AF_INET: 4, AF_INET6: 6}
_RTN_LOCAL: Final = 2
_NOT_PERMITTED: Final = 1
_FIB_RULE_INVERT: Final = 0x2


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """A policy rule of ours; `ip -4 rule add fwmark MARK/MASK lookup TABLE priority PRIORITY`."""

    version: int
    priority: int
    mark: int
    mask: int
    table: int

    def __str__(self) -> str:
        return f"ip -{self.version} rule {self.priority}: fwmark {self.mark:#x}/{self.mask:#x} lookup {self.table}"


@dataclass(frozen=True, slots=True, order=True)
class Route:
    """A route of ours; `ip -4 route add local default dev lo table TABLE`."""

    version: int
    table: int

    def __str__(self) -> str:
        return f"ip -{self.version} route: local default dev lo table {self.table}"


State = frozenset[Rule | Route]


def wanted(ruleset: Ruleset) -> State:
    """The rules and routes that a ruleset needs; pure."""
    mark, table = ruleset.mark, ruleset.route_table
    rules = {Rule(v, ruleset.rule_priority, mark.value, mark.mask, table) for v in ruleset.versions}
    return frozenset(rules | {Route(version, table) for version in ruleset.versions})


class RoutingPart:
    """Our rules and routes in the kernel."""

    name = "policy routing"

    def __init__(self, ruleset: Ruleset | None) -> None:
        """Args: ruleset: the wanted state; None when ours are only to be read or removed."""
        self._ruleset = ruleset

    def check(self) -> None:
        """As `Part.check`: priority, table and mark must be free."""
        ruleset = self._wanted()
        with _netlink() as netlink:
            for version in ruleset.versions:
                for message in netlink.get_rules(family=_FAMILY[version]):
                    if message.get("protocol") != PROTOCOL:
                        _check_rule(ruleset, version, message)
                for message in netlink.get_routes(family=_FAMILY[version], table=ruleset.route_table):
                    if message["proto"] != PROTOCOL and _table(message) == ruleset.route_table:
                        raise RulesetError(
                            f"route table {ruleset.route_table} already holds {_describe_route(message)}: "
                            "set another interception.route_table"
                        )

    def difference(self) -> str:
        """As `Part.difference`."""
        held, want = self._read(), wanted(self._wanted())
        lines = [f"-{item}" for item in _ordered(held - want)]
        return "\n".join(lines + [f"+{item}" for item in _ordered(want - held)])

    def snapshot(self) -> State | None:
        """As `Part.snapshot`."""
        return self._read() or None

    def write(self) -> None:
        """As `Part.write`."""
        self.restore(wanted(self._wanted()))

    def restore(self, snapshot: State | None) -> None:
        """As `Part.restore`: routes before the rules that lead to them, and the other way round on removal."""
        want = snapshot or frozenset()
        held = self._read()
        with _netlink() as netlink:
            for item in _ordered(want - held, routes_first=True):
                _change(netlink, "add", item)
            for item in _ordered(held - want):
                _change(netlink, "del", item)
        if (seen := self._read()) != want:
            raise RulesetError(
                "policy routing differs after writing it: " + "; ".join(str(item) for item in _ordered(seen ^ want))
            )

    def _wanted(self) -> Ruleset:
        if self._ruleset is None:
            raise ValueError("no ruleset to write")
        return self._ruleset

    def _read(self) -> State:
        with _netlink() as netlink:
            return frozenset(_read(netlink))


def _netlink() -> IPRoute:
    from pyroute2 import IPRoute

    return IPRoute()


def _read(netlink: IPRoute) -> Iterator[Rule | Route]:
    for version, family in _FAMILY.items():
        for message in netlink.get_rules(family=family):
            if message.get_attr("FRA_PROTOCOL") == PROTOCOL:
                yield Rule(
                    version,
                    message.get_attr("FRA_PRIORITY") or 0,
                    message.get_attr("FRA_FWMARK") or 0,
                    message.get_attr("FRA_FWMASK") or 0,
                    _table(message),
                )
        for message in netlink.get_routes(family=family, proto=PROTOCOL):
            if message["proto"] == PROTOCOL and message["type"] == _RTN_LOCAL:
                yield Route(version, _table(message))


def _change(netlink: IPRoute, command: str, item: Rule | Route) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        if isinstance(item, Rule):
            netlink.rule(
                command,
                family=_FAMILY[item.version],
                priority=item.priority,
                table=item.table,
                fwmark=item.mark,
                fwmask=item.mask,
                protocol=PROTOCOL,
            )
        else:
            netlink.route(
                command,
                family=_FAMILY[item.version],
                dst="default",
                type="local",
                scope=254 if item.version == 4 else 0,
                oif=netlink.link_lookup(ifname="lo")[0],
                table=item.table,
                proto=PROTOCOL,
            )
    except NetlinkError as error:
        if error.code == _NOT_PERMITTED:
            raise PermissionDenied("policy routing: not permitted: run as root or with CAP_NET_ADMIN") from error
        raise RulesetError(f"{command} {item}: {error.args[1] if len(error.args) > 1 else error}") from error


def _check_rule(ruleset: Ruleset, version: int, message: Any) -> None:
    """Refuse a foreign rule that has our priority or table, or that would take our marked packets."""
    text = _describe_rule(version, message)
    if (message.get_attr("FRA_PRIORITY") or 0) == ruleset.rule_priority:
        raise RulesetError(
            f"rule priority {ruleset.rule_priority} is in use: {text}: set another interception.rule_priority"
        )
    if _table(message) == ruleset.route_table:
        raise RulesetError(f"route table {ruleset.route_table} is in use: {text}: set another interception.route_table")
    mark, mask = message.get_attr("FRA_FWMARK"), message.get_attr("FRA_FWMASK")
    if not mark or message["flags"] & _FIB_RULE_INVERT:
        return
    for key in ("mark", "client_mark", "server_mark"):
        ours = getattr(ruleset, key)
        if mark & mask & ours.mask and (ours.value & mask & ours.mask) == (mark & mask & ours.mask):
            raise RulesetError(f"mark {ours} is in use: {text}: set another interception.{key}")


def _describe_rule(version: int, message: Any) -> str:
    mark = message.get_attr("FRA_FWMARK")
    marked = f" fwmark {mark:#x}/{message.get_attr('FRA_FWMASK'):#x}" if mark else ""
    return f"ip -{version} rule {message.get_attr('FRA_PRIORITY') or 0}:{marked} lookup {_table(message)}"


def _describe_route(message: Any) -> str:
    destination = message.get_attr("RTA_DST")
    return f"the route {destination}/{message['dst_len']}" if destination else "a default route"


def _table(message: Any) -> int:
    table = message.get_attr("FRA_TABLE") if "FRA_TABLE" in dict(message["attrs"]) else message.get_attr("RTA_TABLE")
    return int(table or message["table"])


def _ordered(items: frozenset[Rule | Route], *, routes_first: bool = False) -> list[Rule | Route]:
    return sorted(items, key=lambda item: (isinstance(item, Rule) == routes_first, str(item)))
