"""The golden rulesets of `rules/`, loaded by the kernel's own tools."""

import re
from pathlib import Path

import pytest

from tests.lab import Gateway, cli
from tests.lab.golden import examples, golden
from tproxyd.config import load_config
from tproxyd.netfilter.iptables_part import IptablesPart
from tproxyd.netfilter.plan import plan

EXAMPLES = pytest.mark.parametrize("example", examples(), ids=lambda path: path.stem)
PROGRAMS = {
    "ipset restore": ["ipset", "restore"],
    "iptables-restore --noflush": ["iptables-legacy-restore", "--noflush"],
    "ip6tables-restore --noflush": ["ip6tables-legacy-restore", "--noflush"],
}


def words(listing: str) -> list[str]:
    """An nftables listing without its line breaks, the order of a set's elements, the length of a lone address."""
    found = re.sub(r"(?<=\d)/(32|128)\b|,", "", listing)
    return re.sub(r"\{([^{}:]*)\}", lambda match: " ".join(sorted(match[1].split())), found).split()


@EXAMPLES
def test_nft_loads_it_and_shows_the_same(lab: Gateway, example: Path) -> None:
    text = golden(example, "nft").read_text()
    lab.gateway.nft(text)
    lab.gateway.nft(text)  # it replaces the table that is there
    listing = lab.gateway.run(["nft", "-s", "list", "table", "inet", "tproxyd"]).stdout
    assert cli(lab.gateway, "remove-rules").stdout == "removed\n"
    assert words(listing) == words(text.partition("delete table inet tproxyd\n")[2])


@EXAMPLES
def test_iptables_and_ipset_load_it_and_hold_the_same(lab: Gateway, example: Path) -> None:
    sections = re.split(r"(?m)^# (.*)\n", golden(example, "iptables").read_text())[1:]
    for command, text in zip(sections[::2], sections[1::2], strict=True):
        lab.gateway.run(PROGRAMS[command], input=text)
    assert lab.gateway.call(difference, example) == ""
    assert cli(lab.gateway, "remove-rules").stdout == "removed\n"


def difference(example: Path) -> str:
    return IptablesPart(plan(load_config(example))).difference()


@EXAMPLES
@pytest.mark.parametrize("ruleset", ["nftables", "iptables"])
def test_apply_rules_takes_it(lab: Gateway, example: Path, tmp_path: Path, ruleset: str) -> None:
    text = re.sub(r"(?m)^  ruleset: .*\n", "", example.read_text())
    path = tmp_path / "example.yaml"
    path.write_text(text.replace("interception:\n", f"interception:\n  ruleset: {ruleset}\n"))
    done = cli(lab.gateway, "apply-rules", "-c", path)
    assert (done.returncode, done.stdout) == (0, "applied\n"), done.stderr
    assert cli(lab.gateway, "apply-rules", "-c", path).stdout == "nothing to change\n"
    assert cli(lab.gateway, "remove-rules").stdout == "removed\n"
