"""What docs/configuration.md shows is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tproxyd.config import Config, Interception, parse_config
from tproxyd.config.model import Section
from tproxyd.errors import ConfigError

REFERENCE = (Path(__file__).parents[3] / "docs/configuration.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", REFERENCE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", blocks("yaml complete"))
def test_complete_examples_load_and_show_the_defaults(text):
    assert parse_config(text.encode(), "x") == Config(interception=Interception(interfaces=("lan0",)))


def test_the_full_example_has_every_key():
    full = blocks("yaml complete")[1]
    for key in all_keys(Config):
        assert re.search(rf"\b{key}:", full), key


def all_keys(section: type[Section]) -> set[str]:
    schema = section.model_json_schema()
    return {key for one in (schema, *schema["$defs"].values()) for key in one.get("properties", {})}


def test_the_wrong_example_gives_the_problems_shown():
    with pytest.raises(ConfigError) as caught:
        parse_config(blocks("yaml wrong")[0].encode(), "tproxyd.yaml")
    assert "\n".join(caught.value.problems) + "\n" == blocks("text")[0]


def test_the_example_in_the_readme_is_a_configuration():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert parse_config(example.encode(), "README.md").interception.interfaces == ("lan0",)
