"""The plan: from a configuration to what the kernel has to be told."""

from ipaddress import ip_address, ip_network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.config import Config, Interception, PortRange
from tproxyd.config.model import DirectBackend, Exclude, Limits, Timeouts, TproxyListener
from tproxyd.flow import Network
from tproxyd.netfilter.plan import (
    LEARNED_IDLE_S,
    LEARNED_MOST,
    NEVER_DESTINATIONS,
    NEVER_SOURCES,
    Learned,
    Ruleset,
    as_json,
    plan,
)

ADDRESSES = {4: st.ip_addresses(v=4), 6: st.ip_addresses(v=6)}
LONGEST = {4: 32, 6: 128}


def prefixes(version: int):
    lengths = st.integers(0, LONGEST[version])
    return st.lists(
        st.builds(lambda a, length: ip_network(f"{a}/{length}", strict=False), ADDRESSES[version], lengths), max_size=8
    ).map(tuple)


def planned(**interception: object) -> Ruleset:
    return plan(Config(interception=Interception(interfaces=("lan0",), **interception)))


def test_each_family_and_transport_has_its_intercept() -> None:
    found = {(i.network, i.version): (i.address, i.port) for i in planned().intercepts}
    assert found == {
        (Network.TCP, 4): ("127.0.0.1", 7440),
        (Network.UDP, 4): ("127.0.0.1", 7440),
        (Network.TCP, 6): ("::1", 7440),
        (Network.UDP, 6): ("::1", 7440),
    }


def test_no_ports_switch_a_transport_off_and_families_are_chosen() -> None:
    ruleset = planned(udp_ports=(), families=("ipv6",), tcp_ports=(PortRange(80, 80),))
    assert [(i.network, i.version, i.ports) for i in ruleset.intercepts] == [(Network.TCP, 6, (PortRange(80, 80),))]
    assert ruleset.versions == (6,)
    assert {prefix_set.version for prefix_set in ruleset.excluded} == {6}


def test_the_listener_names_the_port() -> None:
    listener = TproxyListener(name="x", port=9999)
    ruleset = plan(Config(interception=Interception(interfaces=("lan0",)), listeners=(listener,)))
    assert {intercept.port for intercept in ruleset.intercepts} == {9999}


@pytest.mark.parametrize("on_failure", ["closed", "open"])
def test_only_an_open_gateway_needs_a_lease(on_failure: str) -> None:
    assert planned(on_failure=on_failure).lease == (on_failure == "open")


def test_learned_flows_need_udp_and_a_backend_that_keeps_the_four_tuple() -> None:
    assert planned().learned == Learned(LEARNED_MOST, LEARNED_IDLE_S)
    assert planned(udp_ports=()).learned is None
    assert planned(learned_flows=False).learned is None
    assert planned(ruleset="iptables").learned is None
    lan0 = Interception(interfaces=("lan0",))
    for source, wanted in (("four-tuple", True), ("address", False), ("gateway", False)):
        config = Config(interception=lan0, backends={"direct": DirectBackend(source=source)})
        assert (plan(config).learned is not None) == wanted


def test_learned_flows_are_no_more_than_flows_and_silent_no_longer_than_those() -> None:
    config = Config(
        interception=Interception(interfaces=("lan0",)),
        limits=Limits(max_flows=100, max_flows_per_client=10),
        timeouts=Timeouts(udp_idle=0.3),
    )
    assert plan(config).learned == Learned(flows=100, idle_s=1)


def test_order_of_interfaces_and_families_makes_no_difference() -> None:
    one = plan(Config(interception=Interception(interfaces=("b", "a"), families=("ipv6", "ipv4"))))
    other = plan(Config(interception=Interception(interfaces=("a", "b"), families=("ipv4", "ipv6"))))
    assert one == other


@pytest.mark.parametrize("version", [4, 6])
@given(data=st.data())
def test_excluded_sets_are_disjoint_sorted_and_hold_exactly_what_was_asked(version: int, data: st.DataObject) -> None:
    destinations, sources = data.draw(prefixes(version)), data.draw(prefixes(version))
    ruleset = planned(exclude=Exclude(destinations=destinations, sources=sources))
    asked = {"destination": (destinations, NEVER_DESTINATIONS), "source": (sources, NEVER_SOURCES)}
    for prefix_set in ruleset.excluded:
        if prefix_set.version != version:
            continue
        held = [ip_network(text) for text in prefix_set.prefixes]
        assert [str(prefix) for prefix in held] == list(prefix_set.prefixes)
        assert held == sorted(held)
        assert all(one.broadcast_address < other.network_address for one, other in pairwise(held))
        configured, never = asked[prefix_set.field]
        wanted = [*configured, *(ip_network(text) for text in never[version])]
        assert all(any(prefix.subnet_of(each) for each in held) for prefix in wanted)
        assert sum(prefix.num_addresses for prefix in held) == size_of_union(wanted)


def size_of_union(networks: list) -> int:
    """Counted the naive way: by walking over sorted intervals."""
    total, end = 0, -1
    for first, last in sorted((int(n.network_address), int(n.broadcast_address)) for n in networks):
        total += max(0, last - max(first - 1, end))
        end = max(end, last)
    return total


def test_prefixes_of_the_other_family_stay_out() -> None:
    ruleset = planned(exclude=Exclude(destinations=(ip_network("2001:db8::/32"), ip_network("192.0.2.0/24"))))
    for prefix_set in ruleset.excluded:
        assert {ip_network(text).version for text in prefix_set.prefixes} == {prefix_set.version}


@pytest.mark.parametrize("address", ["127.0.0.1", "224.0.0.251", "255.255.255.255", "169.254.1.1", "0.0.0.0", "::1"])
def test_what_cannot_be_relayed_is_always_excluded(address: str) -> None:
    version = ip_address(address).version
    (destinations,) = (s for s in planned().excluded if (s.field, s.version) == ("destination", version))
    assert any(ip_address(address) in ip_network(prefix) for prefix in destinations.prefixes)


def test_json_names_everything_as_the_configuration_does() -> None:
    shown = as_json(planned(tcp_ports=(PortRange(80, 81),), on_failure="open"))
    assert shown["on_failure"] == "open"
    assert shown["mark"] == "0x1/0x1"
    assert {"network": "tcp", "version": 4, "ports": ["80-81"], "listener": {"address": "127.0.0.1", "port": 7440}} in (
        shown["intercept"]  # type: ignore[operator]
    )
