"""Exit codes (sysexits.h), and one line for each error."""

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lab import Daemon, Gateway, Residue, cli, tproxyd, write_config
from tests.lab.daemon import TPROXYD
from tproxyd.lock import only_one

NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")
NEEDS_CONFIG = ("run", "apply-rules", "check-config", "show-rules")


@pytest.fixture
def readable(lab: Gateway) -> Iterator[Path]:
    """A folder that everyone can read, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="tproxyd-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["run", "apply-rules", "remove-rules"])
def test_without_rights_it_is_77(lab: Gateway, readable: Path, ruleset: str, command: str) -> None:
    before = Residue.of(lab.gateway)
    path = write_config(readable, interception={"ruleset": ruleset})
    options = [] if command == "remove-rules" else ["-c", str(path)]
    done = lab.gateway.run([*NOBODY, *TPROXYD, command, *options], check=False)
    assert done.returncode == 77, done
    assert "not permitted" in done.stderr or "CAP_NET" in done.stderr
    assert "Traceback" not in done.stderr
    assert not before.difference(Residue.of(lab.gateway))


def test_reading_needs_no_rights(lab: Gateway, readable: Path, ruleset: str) -> None:
    path = write_config(readable, interception={"ruleset": ruleset})
    for command in ("check-config", "show-rules"):
        assert lab.gateway.run([*NOBODY, *TPROXYD, command, "-c", str(path)]).stdout


@pytest.mark.parametrize("command", NEEDS_CONFIG)
def test_a_bad_configuration_is_78(lab: Gateway, tmp_path: Path, command: str) -> None:
    path = write_config(tmp_path, "interception: {interfaces: [lan0], ruleset: bpf}\ndefault: nowhere\n")
    done = cli(lab.gateway, command, "-c", path)
    assert done.returncode == 78
    assert f"{path}:1:45" in done.stderr
    assert f"{path}:2:10" in done.stderr


def test_a_second_daemon_is_75_and_the_first_runs_on(lab: Gateway, daemon) -> None:
    running: Daemon = daemon()
    rules = lab.gateway.run(["nft", "list", "ruleset"]).stdout
    done = tproxyd(lab.gateway, "run", "-c", running.path)
    assert done.returncode == 75
    assert "another tproxyd runs in this network namespace" in done.stderr
    assert lab.gateway.run(["nft", "list", "ruleset"]).stdout == rules
    assert running.running


def test_two_writers_of_rules_at_a_time_are_75(lab: Gateway, tmp_path: Path) -> None:
    before = Residue.of(lab.gateway)
    path = write_config(tmp_path)
    with ExitStack() as stack:
        with lab.gateway.entered():
            stack.enter_context(only_one("rules", "this test"))
        for arguments in (["apply-rules", "-c", path], ["remove-rules"]):
            done = cli(lab.gateway, *arguments)
            assert done.returncode == 75
            assert "another tproxyd is changing the rules" in done.stderr
    assert not before.difference(Residue.of(lab.gateway))


def test_a_kernel_without_ipv6_is_69(lab: Gateway, tmp_path: Path, ruleset: str) -> None:
    lab.gateway.sysctl("net.ipv6.conf.lo.disable_ipv6", 1)
    before = Residue.of(lab.gateway)
    done = cli(lab.gateway, "apply-rules", "-c", write_config(tmp_path, interception={"ruleset": ruleset}))
    assert done.returncode == 69
    assert "interception.families: [ipv4]" in done.stderr
    assert not before.difference(Residue.of(lab.gateway))
    lab.gateway.sysctl("net.ipv6.conf.lo.disable_ipv6", 0)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["apply-rules", "--confirm", "0"],
        ["apply-rules", "--confirm", "1h"],
        ["show-rules", "--format", "x"],
    ],
)
def test_wrong_usage_is_2(lab: Gateway, arguments: list[str]) -> None:
    assert cli(lab.gateway, *arguments).returncode == 2


def test_a_taken_port_is_1_and_says_which(lab: Gateway, tmp_path: Path) -> None:
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind(("127.0.0.1", 7440))
        holder.listen()
        done = tproxyd(lab.gateway, "run", "-c", write_config(tmp_path))
    assert done.returncode == 1
    assert "port 7440" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", NEEDS_CONFIG)
def test_a_missing_configuration_is_78(lab: Gateway, tmp_path: Path, command: str) -> None:
    done = cli(lab.gateway, command, "-c", tmp_path / "absent.yaml")
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 1


def test_a_failed_start_leaves_the_rules_that_were_there(lab: Gateway, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert cli(lab.gateway, "apply-rules", "-c", path).returncode == 0
    before = Residue.of(lab.gateway)
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind(("127.0.0.1", 7440))
        holder.listen()
        done = tproxyd(lab.gateway, "run", "-c", path)
    difference = before.difference(Residue.of(lab.gateway))
    cli(lab.gateway, "remove-rules")
    assert done.returncode == 1
    assert not difference
