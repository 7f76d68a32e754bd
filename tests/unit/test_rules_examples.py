"""The examples in `rules/` are valid, and render to exactly what stands beside them."""

from pathlib import Path

import pytest

from tests.lab.golden import FORMATS, examples, golden
from tproxyd.cli import main


@pytest.mark.parametrize("example", examples(), ids=lambda path: path.stem)
@pytest.mark.parametrize("form", FORMATS)
def test_show_rules_prints_the_golden_ruleset(example: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-rules", "-c", str(example), "--format", form]) == 0
    assert capsys.readouterr().out == golden(example, form).read_text(), "see python -m tests.lab.golden"


@pytest.mark.parametrize("example", examples(), ids=lambda path: path.stem)
def test_examples_are_valid(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "-c", str(example)]) == 0
    assert ": ok: " in capsys.readouterr().out


def test_every_golden_file_has_its_example() -> None:
    names = {path.stem for path in examples()}
    assert {path.stem for path in golden(examples()[0], "nft").parent.iterdir()} == names
