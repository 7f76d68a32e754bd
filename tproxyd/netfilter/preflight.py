"""Settings of the box, outside of any ruleset, that would swallow flows in silence.

Sysctls are read of the calling thread's network namespace.
"""

from __future__ import annotations

from pathlib import Path
from socket import AF_INET, AF_INET6, if_nameindex
from typing import Final

from tproxyd.errors import KernelUnsupported, RulesetError
from tproxyd.netfilter.plan import Ruleset

_SYSCTL: Final = Path("/proc/sys/net")
_IPV6_ADDRESSES: Final = Path("/proc/thread-self/net/if_inet6")
_STRICT: Final = 1


def check_box(ruleset: Ruleset) -> list[str]:
    """Look at the box as it is; return warnings.

    Raises:
        RulesetError: a setting that would swallow the flows; the message has the command that mends it.
        KernelUnsupported: IPv6 is wanted, but off.
    """
    present = {name for _number, name in if_nameindex()}
    if 6 in ruleset.versions:
        _check_ipv6()
    missing = [name for name in ruleset.interfaces if name not in present]
    warnings = [f"interface {name} does not exist (yet): nothing comes in through it" for name in missing]
    if 4 in ruleset.versions:
        warnings += _source_warnings(ruleset, sorted(present - {"lo"}))
    return warnings + _bridge_warnings(ruleset) + _rule_warnings(ruleset)


def _source_warnings(ruleset: Ruleset, present: list[str]) -> list[str]:
    """Refuse what makes the kernel drop clients' packets, warn of the same on other interfaces: servers' answers.

    With src_valid_mark a marked packet's source is looked up by its mark, so in our route table: it counts as one
    of the box's own, and is dropped whatever rp_filter says. accept_local lets it pass, but not a strict rp_filter.
    The kernel takes the greater rp_filter, and either of the others (Documentation/networking/ip-sysctl.rst).
    """
    warnings = []
    for interface in present:
        where = next((name for name in ("all", interface) if _setting(name, "src_valid_mark")), None)
        accepts = _setting("all", "accept_local") or _setting(interface, "accept_local")
        strict = max(_setting("all", "rp_filter"), _setting(interface, "rp_filter")) == _STRICT
        if where is None or (accepts and not strict):
            continue
        mend = f"sysctl -w net.ipv4.conf.{where}.src_valid_mark=0 (wg-quick sets it; rp_filter=2 serves as well there)"
        if interface in ruleset.interfaces:
            raise RulesetError(f"src_valid_mark=1 makes the kernel drop what comes from {interface}: {mend}")
        warnings.append(f"src_valid_mark=1: answers of servers behind {interface} will be dropped: {mend}")
    return warnings


def _setting(where: str, name: str) -> int:
    return _number(f"ipv4/conf/{where}/{name}")


def _check_ipv6() -> None:
    if not _IPV6_ADDRESSES.exists():
        raise KernelUnsupported("the kernel has no IPv6: set interception.families: [ipv4]")
    for where in ("all", "lo"):
        if _number(f"ipv6/conf/{where}/disable_ipv6"):
            raise KernelUnsupported(
                f"IPv6 is off: sysctl -w net.ipv6.conf.{where}.disable_ipv6=0, or set interception.families: [ipv4]"
            )


def _bridge_warnings(ruleset: Ruleset) -> list[str]:
    """br_netfilter sends frames that are only switched through the IP rules, ours with them."""
    names = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}
    calling = [names[version] for version in ruleset.versions if _number(f"bridge/{names[version]}")]
    if not calling or not _has_bridge():
        return []
    return [f"net.bridge.{name}=1: flows that are only bridged are intercepted, too" for name in calling]


def _rule_warnings(ruleset: Ruleset) -> list[str]:
    """Warn of foreign policy rules before ours that packets from a client interface could match."""
    from pyroute2 import IPRoute

    found = []
    with IPRoute() as netlink:
        for version in ruleset.versions:
            for message in netlink.get_rules(family={4: AF_INET, 6: AF_INET6}[version]):
                priority = message.get_attr("FRA_PRIORITY") or 0
                interface = message.get_attr("FRA_IIFNAME")
                marked = message.get_attr("FRA_FWMARK")
                if not 0 < priority < ruleset.rule_priority or marked or interface not in (None, *ruleset.interfaces):
                    continue
                found.append(
                    f"ip -{version} rule {priority} stands before ours: what it matches never reaches tproxyd: "
                    f"set interception.rule_priority below {priority} if that is not meant"
                )
    return found


def _has_bridge() -> bool:
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        return any(netlink.get_links(kind="bridge"))


def _number(name: str) -> int:
    """Read a sysctl; 0 where the kernel has none of that name."""
    try:
        return int((_SYSCTL / name).read_text())
    except FileNotFoundError:
        return 0
