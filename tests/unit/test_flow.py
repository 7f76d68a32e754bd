"""Values of a flow."""

from __future__ import annotations

import pytest

from tproxyd.flow import Client, Endpoint, Flow, Network, OrigDst
from tproxyd.policy import Policy


@pytest.mark.parametrize(
    ("endpoint", "text", "version"),
    [(Endpoint("10.0.0.1", 80), "10.0.0.1:80", 4), (Endpoint("fd01::2", 80), "[fd01::2]:80", 6)],
)
def test_an_endpoint_is_written_as_in_a_url(endpoint: Endpoint, text: str, version: int) -> None:
    assert str(endpoint) == text
    assert endpoint.version == version


def test_policy_gives_every_flow_the_default() -> None:
    flow = Flow(Network.UDP, Client("10.0.0.1", 4000), OrigDst("10.0.0.2", 53), "lan")
    decision = Policy("direct").decide(flow)
    assert (decision.rule, decision.backend) == ("default", "direct")
