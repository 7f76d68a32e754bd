"""apply-rules --confirm: rules on trial, for the operator who may have just cut off their own SSH."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import Gateway, Residue, cli, eventually, write_config
from tests.lab.daemon import TPROXYD

pytestmark = pytest.mark.usefixtures("lab")

Trial = subprocess.Popen[str]


@pytest.fixture
def trial(lab: Gateway, tmp_path: Path, ruleset: str) -> Callable[[int], Trial]:
    """Apply new rules on trial and wait until they stand; then it is the operator's turn."""

    def start(seconds: int) -> Trial:
        path = write_config(tmp_path, interception={"ruleset": ruleset})
        command = [*TPROXYD, "apply-rules", "-c", str(path), "--confirm", str(seconds)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = lab.gateway.popen(command, text=True, **pipes)
        assert process.stderr is not None
        asked = os.read(process.stderr.fileno(), 1000).decode()
        assert f"within {seconds} s" in asked, asked
        assert "fwmark 0x1/0x1" in lab.gateway.run(["ip", "rule"]).stdout
        return process

    return start


@pytest.fixture(params=["nothing", "earlier rules"])
def before(request: pytest.FixtureRequest, lab: Gateway, tmp_path: Path, ruleset: str) -> Residue:
    """What the trial finds: nothing, or rules of an earlier configuration."""
    if request.param == "earlier rules":
        other = {"families": ["ipv4"], "ruleset": ruleset, "exclude": {"destinations": ["192.0.2.0/24"]}}
        assert cli(lab.gateway, "apply-rules", "-c", write_config(tmp_path, interception=other)).returncode == 0
    return Residue.of(lab.gateway)


@pytest.fixture(autouse=True)
def removed(lab: Gateway, ruleset: str):
    yield
    cli(lab.gateway, "remove-rules")


def taken_back(lab: Gateway, before: Residue) -> None:
    eventually(lambda: not before.difference(Residue.of(lab.gateway)), "the earlier state is back", 6, 0.2)


def end(process: Trial) -> tuple[int, str]:
    _, errors = process.communicate(timeout=8)
    return process.returncode, errors


def test_confirmed_rules_stay(lab: Gateway, before: Residue, trial) -> None:
    process = trial(30)
    new = Residue.of(lab.gateway)
    out, _ = process.communicate("yes\n", timeout=5)
    assert (process.returncode, out) == (0, "kept\n")
    left = [line for line in new.difference(Residue.of(lab.gateway)).splitlines()[2:] if line.startswith(("+", "-"))]
    assert all(line.startswith("-process") or "socket" in line for line in left), left  # only it and its guard ended
    assert "fwmark 0x1/0x1" in lab.gateway.run(["ip", "-6", "rule"]).stdout


def test_silence_takes_the_rules_back(lab: Gateway, before: Residue, trial) -> None:
    process = trial(1)
    code, errors = end_without_answer(process)
    assert code == 1
    assert "not confirmed: the rules are as they were before" in errors
    taken_back(lab, before)


def end_without_answer(process: Trial) -> tuple[int, str]:
    code = process.wait(8)
    assert process.stderr is not None
    return code, process.stderr.read()


def test_end_of_input_takes_the_rules_back(lab: Gateway, before: Residue, trial) -> None:
    assert end(trial(30))[0] == 1
    taken_back(lab, before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_death_of_the_one_who_asks_takes_the_rules_back(
    lab: Gateway, before: Residue, trial, number: signal.Signals
) -> None:
    process = trial(30)
    process.send_signal(number)
    process.wait(8)
    taken_back(lab, before)


def test_nothing_to_change_asks_nothing(lab: Gateway, tmp_path: Path, ruleset: str) -> None:
    path = write_config(tmp_path, interception={"ruleset": ruleset})
    assert cli(lab.gateway, "apply-rules", "-c", path).returncode == 0
    done = cli(lab.gateway, "apply-rules", "-c", path, "--confirm", "30")
    assert (done.returncode, done.stdout) == (0, "nothing to change\n")
