"""What a command loads is what its start takes: each imports the libraries it needs, and no others."""

from __future__ import annotations

import subprocess
import sys

import pytest

CONFIGURATION = {"pydantic", "yaml", "tproxyd.config"}
RULES = {"pyroute2", "iptc"}


def loaded_by(script: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a script."""
    script += "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_the_usage_is_told_without_any_library() -> None:
    script = "import tproxyd.cli\ntry: tproxyd.cli.main(['--help'])\nexcept SystemExit: pass"
    assert not loaded_by(script) & {*CONFIGURATION, *RULES, "asyncio", "uvloop"}


@pytest.mark.parametrize("module", ["worker", "supervisor"])
def test_a_process_that_stays_reads_no_configuration_and_writes_no_rules(module: str) -> None:
    assert not loaded_by(f"import tproxyd.daemon.{module}") & (CONFIGURATION | RULES)


def test_the_child_that_prepares_is_forked_before_anything_heavy_is_loaded() -> None:
    assert not loaded_by("import tproxyd.daemon.run") & {*CONFIGURATION, *RULES, "asyncio", "uvloop"}


def test_rules_are_removed_and_a_lease_is_renewed_without_the_configuration() -> None:
    script = "import tproxyd.netfilter.apply as a, tproxyd.netfilter.nfnetlink, tproxyd.netfilter.ipset\n"
    assert not loaded_by(script + "a.parts(None, 'iptables')") & CONFIGURATION


def test_python_iptables_comes_without_setuptools_and_compilers() -> None:
    pytest.importorskip("iptc")
    script = """
import sys
sys.addaudithook(lambda event, args: event == "subprocess.Popen" and print("ran", args[0], args[1]))
from tproxyd.netfilter.iptables_part import _library
_library()
import distutils.sysconfig  # whoever needs it gets it
"""
    before = script.partition("import distutils")[0]
    assert not loaded_by(before) & {"setuptools", "distutils.sysconfig"}
    if sys.version_info < (3, 12):
        assert "distutils.sysconfig" in loaded_by(script)
    done = subprocess.run([sys.executable, "-P", "-c", before], capture_output=True, text=True, check=True)
    assert "gcc" not in done.stdout
