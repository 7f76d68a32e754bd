"""Settings on their way to a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tproxyd.config import parse_config
from tproxyd.daemon.preparation import share, summary
from tproxyd.netfilter.plan import plan
from tproxyd.policy import Policy
from tproxyd.relay.settings import DirectSettings, ProxySettings, RelaySettings

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
    assert PREPARED.settings.backends == {
        "direct": DirectSettings(source="four-tuple", nat="full-cone"),
        "other": DirectSettings(source="gateway", nat="symmetric"),
    }


def test_a_password_is_read_from_its_file_travels_and_shows_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes("pä ss\xff\n".encode("latin-1"))
    secret.chmod(0o640)
    proxy = f"{{type: http_connect, server: 'x:1', username: u, password_file: {secret}}}"
    config = parse_config(f"interception: {{interfaces: [a]}}\nbackends: {{corp: {proxy}}}".encode(), "x")
    settings = summary(config, plan(config)).settings
    corp = settings.backends["corp"]
    assert isinstance(corp, ProxySettings)
    assert corp.password.encode("utf-8", "surrogateescape") == b"p\xe4 ss\xff"
    assert RelaySettings.from_json(settings.to_json()) == settings
    assert "ss" not in repr(corp).replace("password", "").replace("class", "").replace("ProxySettings", "")


@pytest.mark.parametrize(("workers", "flows", "per_client"), [(1, 10, 7), (4, 3, 2), (100, 1, 1)])
def test_limits_are_shared_out_and_rounded_up(workers: int, flows: int, per_client: int) -> None:
    shared = share(PREPARED.settings, workers)
    assert (shared.max_flows, shared.max_flows_per_client) == (flows, per_client)
