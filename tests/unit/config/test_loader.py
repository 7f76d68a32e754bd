from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tproxyd.config import load_config, loader, parse_config
from tproxyd.errors import ConfigError

GOOD = b"interception: {interfaces: [lan0]}\n"


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return caught.value.problems


def test_a_file_is_loaded(tmp_path):
    path = tmp_path / "tproxyd.yaml"
    path.write_bytes(GOOD)
    assert load_config(path) == parse_config(GOOD, "x")


def test_problems_name_the_file_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(GOOD + b"x: 1\n")
    assert problems_of(Path("bad.yaml"))[0].startswith("bad.yaml:2:1: x: unknown key")


def test_a_missing_file(tmp_path):
    assert problems_of(tmp_path / "no") == [f"{tmp_path}/no: no such file; name one with -c"]


def test_a_file_below_a_file(tmp_path):
    (tmp_path / "f").touch()
    assert problems_of(tmp_path / "f/g") == [f"{tmp_path}/f/g: no such file; part of its path is not a directory"]


def test_a_directory(tmp_path):
    assert problems_of(tmp_path) == [f"{tmp_path}: a directory; name a file with -c"]


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert problems_of(tmp_path / "loop") == [f"{tmp_path}/loop: too many symbolic links; name the file itself"]


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "f").write_bytes(GOOD)
    (tmp_path / "link").symlink_to("f")
    assert load_config(tmp_path / "link")


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert problems_of(tmp_path / "fifo") == [f"{tmp_path}/fifo: not a regular file; name a file with -c"]


def test_a_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        assert problems_of(tmp_path / "s") == [f"{tmp_path}/s: not a regular file; name a file with -c"]


def test_a_device_is_refused():
    assert problems_of(Path("/dev/zero")) == ["/dev/zero: not a regular file; name a file with -c"]


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.yaml"
    path.write_bytes(GOOD)
    path.chmod(0)
    tmp_path.chmod(0o755)
    script = f"""
import os
from pathlib import Path
from tproxyd.config import load_config
from tproxyd.errors import ConfigError
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    load_config(Path({str(path)!r}))
except ConfigError as error:
    print(error)
"""
    for parent in path.parents[1:3]:  # pytest's own directories are closed to others
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: permission denied; run as root, or let this user read it\n"


@pytest.mark.parametrize("data", [b"", b"\n", b"# only\n\n  # comments\n", b"---\n", b"null", b"\xef\xbb\xbf"])
def test_a_file_with_nothing_in_it(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    expected = f"{tmp_path}/f: nothing in it; write at least interception: {{interfaces: [lan0]}}"
    assert problems_of(tmp_path / "f") == [expected]


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "f").open("wb") as file:
        file.truncate(loader.MAX_BYTES + 1)
    monkeypatch.setattr(loader.os, "read", None)
    assert problems_of(tmp_path / "f") == [f"{tmp_path}/f: larger than 16 MiB, the most a configuration may have"]


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(GOOD)
    monkeypatch.setattr(loader, "MAX_BYTES", 100)
    monkeypatch.setattr(loader.os, "read", lambda descriptor, size: b"#" * 60)
    assert problems_of(tmp_path / "f")[0].startswith(f"{tmp_path}/f: larger than")


def open_descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(tmp_path):
    (tmp_path / "good").write_bytes(GOOD)
    (tmp_path / "bad").write_bytes(b"[")
    os.mkfifo(tmp_path / "fifo")
    before = open_descriptors()
    load_config(tmp_path / "good")
    for name in ("bad", "fifo", "no", "."):
        problems_of(tmp_path / name)
    assert open_descriptors() == before


def test_a_name_that_can_not_be_printed_stays_on_one_line():
    with pytest.raises(ConfigError) as caught:
        parse_config(b"x", "a\nb\udc80")
    assert caught.value.problems == ['a\\nb\\udc80:1:1: expected a mapping, found "x"']


def test_a_hundred_thousand_prefixes_load_quickly():
    four = (f"{10 + n // 65536}.{n // 256 % 256}.{n % 256}.0/24" for n in range(50_000))
    six = (f"2001:db8:{n:x}::/48" for n in range(50_000))
    lines = "".join(f"    - {prefix}\n" for prefix in (*four, *six))
    text = "interception:\n  interfaces: [lan0]\n  exclude:\n   destinations:\n" + lines
    start = time.monotonic()
    config = parse_config(text.encode(), "x")
    took = time.monotonic() - start
    assert len(config.interception.exclude.destinations) == 100_000
    assert took < 10, "about 1 s on a small machine"


def test_importing_the_package_brings_in_no_edge():
    script = "import sys, tproxyd.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "pydantic" in modules
    assert not modules & {"pyroute2", "uvloop", "iptc", "asyncio", "tproxyd.netfilter", "tproxyd.relay"}
