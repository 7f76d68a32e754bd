"""ipsets in a namespace of their own."""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tproxyd.errors import RulesetError
from tproxyd.netfilter import ipset
from tproxyd.netfilter.child import in_child
from tproxyd.netfilter.iptables import IpSet

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("ipset") is None, reason="needs ipset"),
]

FOUR = IpSet("tproxyd_excluded_destination_v4", 4, ("10.0.0.0/8", "192.0.2.1/32"))
SIX = IpSet("tproxyd_excluded_destination_v6", 6, ("2001:db8::/32", "fe80::/10"))
LEASE = IpSet("tproxyd_lease_v4", 4, (), timeout_s=0)
INBOUND = IpSet("tproxyd_inbound_v4", 4, (), timeout_s=180, kind="hash:ip,port,ip")
INBOUND_SIX = IpSet("tproxyd_inbound_v6", 6, (), timeout_s=180, kind="hash:ip,port,ip")


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"xset-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def inside(namespace: str, function: Callable[..., Any], *args: Any) -> Any:
    def enter() -> Any:
        descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) == 0
        return function(*args)

    return in_child(enter)


def run(namespace: str, *command: str) -> str:
    done = subprocess.run(["ip", "netns", "exec", namespace, *command], check=True, capture_output=True, text=True)
    return done.stdout


def test_what_is_put_is_read_back_and_shown_by_ipset(namespace: str) -> None:
    inside(namespace, ipset.put, [FOUR, SIX, LEASE])
    assert inside(namespace, ipset.read) == (FOUR, SIX, LEASE)
    members = [line for line in run(namespace, "ipset", "save").splitlines() if line.startswith("add")]
    assert sorted(members) == [
        "add tproxyd_excluded_destination_v4 10.0.0.0/8",
        "add tproxyd_excluded_destination_v4 192.0.2.1",
        "add tproxyd_excluded_destination_v6 2001:db8::/32",
        "add tproxyd_excluded_destination_v6 fe80::/10",
    ]


def test_flows_from_the_other_side_are_kept_while_they_last(namespace: str) -> None:
    inside(namespace, ipset.put, [INBOUND, INBOUND_SIX])
    run(namespace, "ipset", "add", INBOUND.name, "10.0.0.1,udp:53,192.0.2.1")
    run(namespace, "ipset", "add", INBOUND_SIX.name, "2001:db8::1,udp:53,2001:db8::2")
    assert inside(namespace, ipset.read) == (INBOUND, INBOUND_SIX)
    inside(namespace, ipset.put, [INBOUND, INBOUND_SIX])
    lines = run(namespace, "ipset", "save").splitlines()
    assert sorted(line.rpartition(" timeout ")[0] for line in lines if line.startswith("add")) == [
        "add tproxyd_inbound_v4 10.0.0.1,udp:53,192.0.2.1",
        "add tproxyd_inbound_v6 2001:db8::1,udp:53,2001:db8::2",
    ]
    created = next(line for line in lines if line.startswith(f"create {INBOUND.name}"))
    assert created.startswith("create tproxyd_inbound_v4 hash:ip,port,ip family inet ")
    assert " maxelem 65536 timeout 180" in created


def test_others_sets_are_neither_read_nor_destroyed(namespace: str) -> None:
    run(namespace, "ipset", "create", "theirs", "bitmap:port", "range", "0-1000")
    inside(namespace, ipset.put, [FOUR])
    inside(namespace, ipset.keep_only, [])
    assert inside(namespace, ipset.names) == []
    assert run(namespace, "ipset", "list", "-n").split() == ["theirs"]


def test_a_used_set_gets_new_members_at_one_stroke(namespace: str) -> None:
    inside(namespace, ipset.put, [FOUR])
    rule = ("-t", "raw", "-A", "PREROUTING", "-m", "set", "--match-set", FOUR.name, "dst", "-j", "DROP")
    run(namespace, "ip", "link", "set", "lo", "up")
    run(namespace, "iptables-legacy", *rule)
    inside(namespace, ipset.put, [IpSet(FOUR.name, 4, ("127.0.0.2/32",))])
    assert inside(namespace, ipset.names) == [FOUR.name]
    ping = ["ip", "netns", "exec", namespace, "ping", "-c1", "-W1", "-q", "127.0.0.2"]
    assert subprocess.run(ping, check=False).returncode == 1
    with pytest.raises(RulesetError, match="rules still use it"):
        inside(namespace, ipset.keep_only, [])


def test_the_same_members_are_not_written_again(namespace: str) -> None:
    inside(namespace, ipset.put, [FOUR])
    seed = run(namespace, "ipset", "list", "-t")  # initval is random for each set that is made
    inside(namespace, ipset.put, [IpSet(FOUR.name, 4, FOUR.prefixes[::-1])])
    assert run(namespace, "ipset", "list", "-t") == seed
    inside(namespace, ipset.put, [IpSet(FOUR.name, 4, FOUR.prefixes[:1])])
    assert run(namespace, "ipset", "list", "-t") != seed


def test_a_half_filled_set_of_an_interrupted_run_is_in_nobodys_way(namespace: str) -> None:
    run(namespace, "ipset", "create", "tproxyd_new", "hash:net")
    inside(namespace, ipset.put, [FOUR])
    assert inside(namespace, ipset.names) == [FOUR.name]


def test_a_set_of_another_type_under_our_name_is_refused(namespace: str) -> None:
    run(namespace, "ipset", "create", FOUR.name, "hash:ip")
    with pytest.raises(RulesetError, match="is not tproxyd's"):
        inside(namespace, ipset.put, [FOUR])


def test_a_renewal_moves_the_end_of_the_lease_and_zero_takes_it_back(namespace: str) -> None:
    inside(namespace, ipset.put, [LEASE])
    inside(namespace, ipset.renew_lease, (4,), 2)
    inside(namespace, ipset.renew_lease, (4,), 9)
    members = run(namespace, "ipset", "save", LEASE.name).splitlines()[1:]
    assert sorted(line.rpartition(" timeout ")[0] for line in members) == [
        "add tproxyd_lease_v4 0.0.0.0/1",
        "add tproxyd_lease_v4 128.0.0.0/1",
    ]
    assert all(7 <= int(line.rpartition(" ")[2]) <= 9 for line in members)
    inside(namespace, ipset.put, [LEASE])
    assert "timeout" in run(namespace, "ipset", "save", LEASE.name).splitlines()[-1], "applying leaves a lease alone"
    inside(namespace, ipset.renew_lease, (4,), 0)
    assert len(run(namespace, "ipset", "save", LEASE.name).splitlines()) == 1


def test_a_lease_whose_set_is_gone_is_an_error(namespace: str) -> None:
    with pytest.raises(RulesetError, match="tproxyd_lease_v6: no such set"):
        inside(namespace, ipset.renew_lease, (6,), 5)
    with pytest.raises(RulesetError, match="tproxyd_lease_v6: no such set"):
        inside(namespace, ipset.renew_lease, (6,), 0)


@pytest.mark.parametrize("version", [4, 6])
def test_a_hundred_thousand_prefixes_load_within_seconds(namespace: str, version: int) -> None:
    template = {4: "10.{}.{}.{}/32", 6: "2001:db8:{:x}:{:x}:{:x}::/80"}[version]
    many = tuple(template.format(i >> 16, i >> 8 & 255, i & 255) for i in range(100_000))
    wanted = IpSet("tproxyd_many", version, many)
    start = time.monotonic()
    inside(namespace, ipset.put, [wanted])
    assert time.monotonic() - start < 5
    assert f"Number of entries: {len(many)}" in run(namespace, "ipset", "list", "-t")
    (held,) = inside(namespace, ipset.read)
    assert len(held.prefixes) == len(many)
    inside(namespace, ipset.put, [wanted])  # read back the same
