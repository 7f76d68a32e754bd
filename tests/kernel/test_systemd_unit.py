"""The unit in systemd/: well-formed, and its rights are enough. There is no systemd here to run it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Gateway, TcpService, UdpService

UNIT = Path(__file__).parents[2] / "systemd" / "tproxyd.service"


def setting(name: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return next(line.partition("=")[2].split() for line in lines if line.startswith(f"{name}="))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / "tproxyd.service"
    copy.write_text(UNIT.read_text().replace("/opt/tproxyd/bin/tproxyd", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert "tproxyd.service" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("ruleset", ["nftables", "iptables"])
def test_the_units_capabilities_are_enough(lab: Gateway, daemon: DaemonFactory, ruleset: str) -> None:
    names = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in setting("CapabilityBoundingSet"))
    under = ["setpriv", "--no-new-privs", "--bounding-set", f"-all,{names}", "--inh-caps=-all"]
    running = daemon(under=under, interception={"ruleset": ruleset})
    with TcpService(lab.server, lab.server_address(6)) as tcp, lab.client.tcp(tcp.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    with UdpService(lab.server, lab.server_address(4), 53) as udp, lab.client.udp(udp.address) as client:
        client.send(b"x")
        assert client.recv(1) == b"x"
    running.stop()
