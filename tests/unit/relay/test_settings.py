"""Settings on their way to a worker."""

from __future__ import annotations

import pytest

from tproxyd.config import parse_config
from tproxyd.daemon.preparation import share, summary
from tproxyd.netfilter.plan import plan
from tproxyd.policy import Policy
from tproxyd.relay.settings import RelaySettings

CONFIG = parse_config(
    b"""
interception: {interfaces: [lan0], on_failure: open, families: [ipv4], udp_ports: []}
backends: {other: {type: direct, source: gateway, nat: symmetric}}
default: other
rules: [{name: web, match: {port: 80}, backend: direct}, {name: none, match: {port: 81}, action: drop}]
limits: {max_flows: 10, max_flows_per_client: 7}
workers: 4
""",
    "test.yaml",
)
PREPARED = summary(CONFIG, plan(CONFIG))


def test_settings_survive_the_channel() -> None:
    assert RelaySettings.from_json(PREPARED.settings.to_json()) == PREPARED.settings


def test_a_supervisor_learns_what_it_must_serve() -> None:
    assert PREPARED.listen == (("tcp", "127.0.0.1", 7440),)
    assert PREPARED.workers == 4
    assert PREPARED.lease == "nftables"
    assert PREPARED.rules == Policy(PREPARED.policy).names == ("web", "none", "default")
    assert PREPARED.settings.backends["other"].source == "gateway"
    assert PREPARED.settings.backends["direct"].source == "four-tuple"


@pytest.mark.parametrize(("workers", "flows", "per_client"), [(1, 10, 7), (4, 3, 2), (100, 1, 1)])
def test_limits_are_shared_out_and_rounded_up(workers: int, flows: int, per_client: int) -> None:
    shared = share(PREPARED.settings, workers)
    assert (shared.max_flows, shared.max_flows_per_client) == (flows, per_client)
