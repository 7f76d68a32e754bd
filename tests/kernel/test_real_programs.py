"""The clients and servers that people use, through the gateway: curl, iperf3, dig, sftp; four-tuple kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernel.conftest import DaemonFactory
from tests.lab import Gateway, eventually

BIG_BYTES = 1_000_000_000

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
rulesets = pytest.mark.parametrize("ruleset", ["nftables", "iptables"])


def host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def listening(lab: Gateway, what: str) -> bool:
    return what in lab.server.run(["ss", "-tulnH"]).stdout


@rulesets
@versions
def test_curl_fetches_from_nginx_which_sees_the_client(
    lab: Gateway, daemon: DaemonFactory, tmp_path: Path, version: int, ruleset: str
) -> None:
    running = daemon(interception={"ruleset": ruleset})
    page = os.urandom(5_000_000)
    (tmp_path / "page").write_bytes(page)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}/b; proxy_temp_path {tmp_path}/p;\n"
        f"  fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u; scgi_temp_path {tmp_path}/s;\n"
        "  server { listen 80; listen [::]:80;\n"
        '    location = /who { return 200 "$remote_addr $remote_port"; }\n'
        f"    location / {{ root {tmp_path}; }} }} }}\n"
    )
    tmp_path.chmod(0o755)
    lab.server.popen(["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.DEVNULL)
    eventually(lambda: listening(lab, ":80"), "nginx listens")
    base = f"http://{host(lab.server_address(version))}"
    curl = ["curl", "-sS", "-m", "20", "--interface", lab.client_address(version)]
    told = lab.client.run([*curl, "-w", " %{local_port}", f"{base}/who"]).stdout.split()
    assert told[0] == lab.client_address(version)
    assert told[1] == told[2]
    fetched = lab.client.run([*curl, "-o", str(tmp_path / "got"), "-w", "%{http_code}", f"{base}/page"]).stdout
    assert fetched == "200"
    assert (tmp_path / "got").read_bytes() == page
    assert {end["cause"] for end in running.wait_flow_ends(2)} <= {"done", "client-reset", "server-reset"}


@rulesets
@versions
@pytest.mark.parametrize("udp", [False, True], ids=["tcp", "udp"])
def test_iperf3_runs_both_ways(lab: Gateway, daemon: DaemonFactory, version: int, udp: bool, ruleset: str) -> None:
    running = daemon(interception={"ruleset": ruleset})
    # A wildcard UDP server answers from an address of the kernel's choice, and the lab's server has several.
    lab.server.popen(["iperf3", "-s", "-B", lab.server_address(version)], stdout=subprocess.DEVNULL)
    eventually(lambda: listening(lab, ":5201"), "iperf3 listens")
    # Slow enough that a socket's buffer outlasts a worker's wait for a core: what is lost is not ours.
    options = ["-u", "-b", "4M"] if udp else ["-P", "4"]
    for reverse in ([], ["-R"]):
        command = ["iperf3", "-J", "-t", "1", "-c", lab.server_address(version), *options, *reverse]
        result = json.loads(lab.client.run(command).stdout)
        assert "error" not in result
        moved = result["end"]["sum" if udp else "sum_received"]
        assert moved["bytes"] > (300_000 if udp else 1_000_000)
        if udp:
            assert moved["lost_percent"] < 5
    assert running.counters()["tcp_flows"] >= (2 if udp else 10)
    assert running.counters()["udp_flows"] == (2 if udp else 0)


@rulesets
@versions
def test_dig_asks_dnsmasq_by_udp_and_tcp_beside_a_dnsmasq_on_the_gateway(
    lab: Gateway, daemon: DaemonFactory, version: int, ruleset: str
) -> None:
    """The gateway's own resolver on the wildcard address answers its own queries, and no one else's."""
    daemon(interception={"ruleset": ruleset})
    common = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file="]
    lab.server.popen([*common, "--user=root", "--address=/name.example/192.0.2.1"])
    resolver = lab.gateway.popen([*common, "--user=root", "--address=/name.example/192.0.2.99"])
    eventually(lambda: listening(lab, ":53"), "dnsmasq listens")
    eventually(lambda: ":53" in lab.gateway.run(["ss", "-tulnH"]).stdout, "the gateway's dnsmasq listens")

    def ask(server: str, *options: str) -> str:
        return lab.client.run(["dig", "+short", "+time=2", "+tries=2", *options, f"@{server}", "name.example"]).stdout

    assert ask(lab.server_address(version)) == "192.0.2.1\n"
    assert ask(lab.server_address(version), "+tcp") == "192.0.2.1\n"
    assert ask(lab.gateway_address(version)) == "192.0.2.99\n"
    resolver.terminate()
    resolver.wait(5)


@versions
def test_sftp_of_a_gigabyte_keeps_every_byte(lab: Gateway, daemon: DaemonFactory, tmp_path: Path, version: int) -> None:
    running = daemon()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (tmp_path / "sshd_config").write_text(
        f"Port 2222\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\nStrictModes no\n"
        f"PermitRootLogin prohibit-password\nPidFile {tmp_path}/sshd.pid\nSubsystem sftp internal-sftp\nUsePAM no\n"
    )
    lab.server.popen(["/usr/sbin/sshd", "-D", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.DEVNULL)
    eventually(lambda: listening(lab, ":2222"), "sshd listens")
    block, digest = os.urandom(1 << 20), hashlib.sha256()
    with (tmp_path / "sent").open("wb") as sent:
        for number in range(-(-BIG_BYTES // len(block))):
            piece = block[number % 4096 :] + block[: number % 4096]
            sent.write(piece)
            digest.update(piece)
    options = [
        *("-i", str(tmp_path / "user"), "-P", "2222", "-q"),
        *(
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            f"UserKnownHostsFile={tmp_path}/known",
            "-o",
            "Ciphers=aes128-gcm@openssh.com",
        ),
    ]
    target = f"root@{host(lab.server_address(version))}"
    batch = f"put {tmp_path}/sent {tmp_path}/put\nget {tmp_path}/put {tmp_path}/got\n"
    lab.client.run(["sftp", *options, "-b", "-", target], input=batch, timeout=110)
    with (tmp_path / "got").open("rb") as got:
        assert hashlib.file_digest(got, "sha256").digest() == digest.digest()
    for name in ("sent", "put", "got"):
        (tmp_path / name).unlink()
    assert running.wait_flow_ends(1)[0]["bytes_up"] > BIG_BYTES
