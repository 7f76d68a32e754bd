"""The topology tests run what stands in `mininet/`; everything in there runs in a namespace of its own."""

import os
import sys
from pathlib import Path

import pytest

MININET = Path(__file__).parents[2] / "mininet"
sys.path.append(str(MININET))  # a folder of scripts: an `__init__.py` would shadow the real Mininet

from isolation import missing  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def able():
    if lacks := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"a topology needs {', '.join(lacks)}")
