"""The rulesets that the examples in `rules/` must render to; `python -m tests.lab.golden` writes them anew."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tproxyd.config import load_config
from tproxyd.netfilter import iptables, nft
from tproxyd.netfilter.plan import plan

FOLDER: Final = Path(__file__).parents[2] / "rules"
FORMATS: Final = {"nft": nft.render, "iptables": iptables.render}


def examples() -> list[Path]:
    """The example configurations."""
    return sorted(FOLDER.glob("*.yaml"))


def golden(example: Path, form: str) -> Path:
    """The file that holds an example's ruleset in a format of `show-rules`."""
    return example.with_suffix(f".{form}")


def main() -> None:
    """Write all golden files; print those that changed."""
    for example in examples():
        ruleset = plan(load_config(example))
        for form, render in FORMATS.items():
            path, text = golden(example, form), render(ruleset)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                print(f"{path.name}: written; look at the difference before you commit it")


if __name__ == "__main__":
    main()
