"""Work in a forked child (`tproxyd.netfilter.child`), which the iptables ruleset is read and written in."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tproxyd.errors import ConfigError, RulesetError
from tproxyd.netfilter.child import in_child


def test_the_result_comes_back_however_large() -> None:
    assert in_child(lambda size: b"x" * size, 1 << 22) == b"x" * (1 << 22)


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_it_runs_in_a_process_of_its_own_that_leaves_nothing() -> None:
    before = open_files()
    assert in_child(os.getppid) == os.getpid()
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_exception_comes_back_as_it_is() -> None:
    def fail() -> None:
        raise ConfigError(["one", "two"])

    with pytest.raises(ConfigError) as caught:
        in_child(fail)
    assert caught.value.problems == ["one", "two"]


def test_a_bug_brings_its_traceback_with_it() -> None:
    def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as caught:
        in_child(fail)
    assert "in fail" in caught.value.__notes__[0]


def test_what_can_not_be_pickled_is_told_in_words() -> None:
    class LocalError(Exception):
        pass

    def fail() -> None:
        raise LocalError("of this function")

    with pytest.raises(RulesetError, match="LocalError: of this function"):
        in_child(fail)


def test_a_killed_child_is_an_error() -> None:
    with pytest.raises(RulesetError, match="killed by SIGKILL"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_child_that_ends_itself_is_an_error() -> None:
    with pytest.raises(RulesetError, match="status 3"):
        in_child(lambda: os._exit(3))


def test_it_works_from_a_thread() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(in_child(lambda: 7)))
    thread.start()
    thread.join()
    assert found == [7]


def test_nothing_of_the_parents_pending_output_is_written_twice() -> None:
    script = (
        "import os, sys; from tproxyd.netfilter.child import in_child; print('once')\n"
        "in_child(lambda: (sys.stdout.flush(), os.write(1, b'from the child')) and None)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"once\n"
