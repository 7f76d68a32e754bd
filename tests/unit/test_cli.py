"""Commands without a kernel: usage, exit codes, messages."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tproxyd.cli import main
from tproxyd.errors import ConfigError, KernelUnsupported, PermissionDenied, RulesetError, TproxydError, TryAgain


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tproxyd.yaml"
    path.write_text("interception: {interfaces: [lan0]}\n")
    return path


def test_a_good_configuration_is_told_in_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "-c", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: ok: lan0, 12 excluded prefixes\n"


def test_every_problem_of_a_bad_one_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("interception: {interfaces: [lo], mark: 0x0/0x1}\nworkers: many\n")
    assert main(["check-config", "-c", str(config)]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"tproxyd: error: {config}:") for line in lines)


@pytest.fixture
def signals() -> Iterator[None]:
    """`run` blocks signals in this process, and what later tests start would inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.usefixtures("signals")
def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-c", str(tmp_path / "none.yaml")]) == 78
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["apply-rules", "--confirm", "0"], ["show-rules", "--format", "xml"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: tproxyd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["a:1:1: b"]), 78),
        (PermissionDenied("x"), 77),
        (TryAgain("x"), 75),
        (KernelUnsupported("x"), 69),
        (RulesetError("x"), 1),
        (TproxydError("x"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    config: Path, monkeypatch: pytest.MonkeyPatch, error: TproxydError, code: int
) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr("tproxyd.config.load_config", fail)
    assert main(["check-config", "-c", str(config)]) == code


@pytest.mark.parametrize(("form", "start"), [("nft", "add table inet"), ("iptables", "# ipset restore"), ("json", "{")])
def test_rules_are_shown_in_each_format(
    config: Path, capsys: pytest.CaptureFixture[str], form: str, start: str
) -> None:
    assert main(["show-rules", "-c", str(config), "--format", form]) == 0
    assert capsys.readouterr().out.startswith(start)
