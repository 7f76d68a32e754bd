"""Fixtures of the kernel tests. Whatever a test does, the box must look as before when it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Daemon, Gateway, Residue, config, open_descriptors, tproxyd

with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError):
    import distutils.sysconfig  # noqa: F401  # half of python-iptables' start, which each of its children would pay

DaemonFactory = Callable[..., Daemon]

# The lock of iptables(8) is one for all namespaces: tests that run side by side would wait for each other.
os.environ["XTABLES_LOCKFILE"] = f"/run/xtables-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}.lock"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_armed: the lab's client, gateway and server on one switch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def root() -> None:
    """Skip where the kernel can't be worked on; in CI that is a failure."""
    if os.geteuid() == 0:
        return
    reason = "kernel tests need root and network namespaces"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}: CI must not skip them")
    pytest.skip(reason)


@pytest.fixture(params=["nftables", "iptables"])
def ruleset(request: pytest.FixtureRequest) -> str:
    """Run the test with both back ends."""
    name: str = request.param
    return name


@contextlib.contextmanager
def checked_lab(*, one_armed: bool = False) -> Iterator[Gateway]:
    """client - gateway - server; at the end the gateway must hold what it held before, and we no more open files."""
    gc.collect()
    files = open_descriptors()
    made = Gateway(one_armed=one_armed)
    try:
        before = Residue.of(made.gateway)
        yield made
        made.forwarding(False)
        left = before.difference(Residue.of(made.gateway))
    finally:
        made.close()
    gc.collect()
    opened = {number: target for number, target in open_descriptors().items() if files.get(number) != target}
    assert not left, f"the gateway is not as it was:\n{left}"
    assert not opened, f"open files are left: {opened}"


@pytest.fixture
def lab(root: None, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """A `checked_lab`; mark a test `one_armed` to have all three on one switch."""
    with checked_lab(one_armed=request.node.get_closest_marker("one_armed") is not None) as made:
        yield made


@pytest.fixture
def daemon(lab: Gateway, tmp_path: Path) -> Iterator[DaemonFactory]:
    """Start daemons in the gateway: `daemon(interception={...}, backends={...})`, or `daemon("YAML")`.

    Options of the command follow as positional arguments after the YAML text (None for the usual one). At the
    end each must stop in order; after a `kill_all`, `remove-rules` takes away what stayed.
    """
    started: list[Daemon] = []

    def start(text: str | None = None, *options: str, under: Sequence[str] = (), **sections: Any) -> Daemon:
        folder = tmp_path / f"daemon{len(started)}"
        content = config(**sections) if text is None else text
        started.append(Daemon(lab.gateway, folder, content, *options, under=under))
        return started[-1]

    yield start
    for each in started:
        if each.running:
            each.stop()
    if any(each.killed for each in started):
        done = tproxyd(lab.gateway, "remove-rules")
        assert done.returncode == 0, done.stderr
