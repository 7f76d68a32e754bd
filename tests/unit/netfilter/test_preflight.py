"""The judgement over sysctls; that the kernel does behave so is held by tests/kernel/test_iptables_part.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.netfilter.test_iptables import RULESET as TWO_INTERFACES
from tproxyd.errors import KernelUnsupported, RulesetError
from tproxyd.netfilter import preflight
from tproxyd.netfilter.preflight import check_box

RULESET = replace(TWO_INTERFACES, interfaces=("lan0",))


class Box:
    """A box's sysctls in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def set(self, **values: int) -> None:
        for name, value in values.items():
            path = self._root / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setattr(preflight, "_SYSCTL", tmp_path)
    monkeypatch.setattr(preflight, "_IPV6_ADDRESSES", tmp_path)
    monkeypatch.setattr(preflight, "if_nameindex", lambda: [(1, "lo"), (2, "lan0"), (3, "wan0")])
    monkeypatch.setattr(preflight, "_has_bridge", lambda: True)
    return Box(tmp_path)


def test_a_plain_box_gives_no_warnings(box: Box) -> None:
    assert check_box(RULESET) == []


@pytest.mark.parametrize("where", ["all", "lan0"])
def test_marks_in_the_source_check_are_refused_with_the_command_that_mends_it(box: Box, where: str) -> None:
    box.set(**{f"ipv4__conf__{where}__src_valid_mark": 1})
    with pytest.raises(RulesetError, match=rf"lan0.*sysctl -w net\.ipv4\.conf\.{where}\.src_valid_mark=0"):
        check_box(RULESET)


def test_accept_local_makes_up_for_it_unless_the_filter_is_strict(box: Box) -> None:
    box.set(ipv4__conf__all__src_valid_mark=1, ipv4__conf__all__accept_local=1, ipv4__conf__all__rp_filter=2)
    assert check_box(RULESET) == []
    box.set(ipv4__conf__all__rp_filter=0, ipv4__conf__lan0__rp_filter=1)
    with pytest.raises(RulesetError):
        check_box(RULESET)


def test_the_greater_rp_filter_holds(box: Box) -> None:
    box.set(ipv4__conf__all__src_valid_mark=1, ipv4__conf__all__accept_local=1)
    box.set(ipv4__conf__all__rp_filter=1, ipv4__conf__lan0__rp_filter=2, ipv4__conf__wan0__rp_filter=2)
    assert check_box(RULESET) == []


def test_the_same_on_a_server_side_interface_is_a_warning(box: Box) -> None:
    box.set(ipv4__conf__wan0__src_valid_mark=1)
    (warning,) = check_box(RULESET)
    assert "servers behind wan0" in warning


def test_the_source_check_is_ipv4s_alone(box: Box) -> None:
    box.set(ipv4__conf__all__src_valid_mark=1)
    assert check_box(replace(RULESET, versions=(6,))) == []


def test_a_missing_interface_is_a_warning(box: Box) -> None:
    (warning,) = check_box(replace(RULESET, interfaces=("lan0", "lan7")))
    assert "lan7" in warning


@pytest.mark.parametrize("where", ["all", "lo"])
def test_ipv6_that_is_off_is_refused_unless_it_is_not_wanted(box: Box, where: str) -> None:
    box.set(**{f"ipv6__conf__{where}__disable_ipv6": 1})
    with pytest.raises(KernelUnsupported, match=rf"{where}\.disable_ipv6=0, or set interception.families: \[ipv4\]"):
        check_box(RULESET)
    assert check_box(replace(RULESET, versions=(4,))) == []


def test_a_kernel_without_ipv6_is_refused(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_IPV6_ADDRESSES", Path("/nonexistent"))
    with pytest.raises(KernelUnsupported, match="no IPv6"):
        check_box(RULESET)


def test_bridged_frames_in_the_ip_rules_are_a_warning_where_there_is_a_bridge(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.set(**{"bridge__bridge-nf-call-iptables": 1, "bridge__bridge-nf-call-ip6tables": 0})
    (warning,) = check_box(RULESET)
    assert "bridge-nf-call-iptables=1" in warning
    monkeypatch.setattr(preflight, "_has_bridge", lambda: False)
    assert check_box(RULESET) == []
