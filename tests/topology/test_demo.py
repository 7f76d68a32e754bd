"""`make demo`, as a stranger runs it: what it prints, what it leaves, what an impatient one leaves."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.topology

MININET = Path(__file__).parents[2] / "mininet"
DEMO = [sys.executable, str(MININET / "demo.py")]
OURS = re.compile(r"s1(-eth\d+)?|h\d(-eth\d+)?|gw\d?|lan0|wan0")


def machine():
    """What a demo could leave in the machine's own namespace."""

    def lines(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return {
        "nft": lines("nft", "--stateless", "list", "ruleset"),
        "rules": lines("ip", "-4", "rule") + lines("ip", "-6", "rule"),
        "links": {path.name for path in Path("/sys/class/net").iterdir() if OURS.fullmatch(path.name)},
    }


def left_by(pid):
    """What is named after a demo, or carries its mark."""
    name = f"tproxyd-demo-{pid}"
    left = [str(path) for folder in ("/run/netns", "/tmp") for path in Path(folder).glob(f"{name}*")]
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            found = f"TPROXYD_PLACE={name}".encode() in environ.read_bytes()
        except OSError:
            continue
        left += [str(environ.parent)] if found else []
    return left


def start():
    return subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def read_until(process, text):
    """Read the demo's output up to a line that holds this text."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the demo ended before it said {text!r}")


@pytest.mark.parametrize("ruleset", ["nftables", "iptables"])
def test_demo_shows_the_same_four_tuple_at_both_ends(ruleset):
    before = machine()
    process = subprocess.Popen([*DEMO, "--ruleset", ruleset], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=70)

    assert process.returncode == 0, output + errors
    assert errors == ""
    ends = re.findall(r"^   h\d  (\w+/IPv\d) +(\S+) +(\S+) +(\S+) +equal$", output, re.MULTILINE)
    assert [kind for kind, *_ in ends] == ["TCP/IPv4", "TCP/IPv6", "UDP/IPv4", "UDP/IPv6"]
    assert all(sent_from == server_saw for _, sent_from, _, server_saw in ends)
    for kind, sent_from, asked, _ in ends:
        layer = "splice" if kind == "TCP/IPv4" else "copy"  # that one fetches 4 MB, the others a line
        row = rf"^   h\d  {re.escape(sent_from)} +{re.escape(asked)} +yes +default +straight +{layer} "
        assert re.search(row, output, re.MULTILINE), output
    assert re.search(rf"applied: \d+ {ruleset} rules, 2 policy routing rules", output)
    assert "rules and routes as before the start: yes" in output
    assert re.search(r"^Left behind \(.*\): none$", output, re.MULTILINE)
    assert output.splitlines()[-1].startswith("OK ")
    assert left_by(process.pid) == []
    assert machine() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(number):
    process = start()
    read_until(process, "2. What the clients ask")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)

    assert process.returncode == 130
    assert "Left behind (namespaces, interfaces, rules, routes, processes, files): none" in output
    assert left_by(process.pid) == []


def test_demo_that_is_killed_takes_its_processes_with_it():
    process = start()
    read_until(process, "2. What the clients ask")
    process.kill()
    process.wait(5)
    try:
        deadline = time.monotonic() + 5
        while any("/proc/" in left for left in left_by(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any("/proc/" in left for left in left_by(process.pid))
    finally:
        process.stdout.close()
        subprocess.run(["ip", "netns", "del", f"tproxyd-demo-{process.pid}"], check=True)
        for folder in Path("/tmp").glob(f"tproxyd-demo-{process.pid}-*"):
            subprocess.run(["rm", "-r", str(folder)], check=True)


def test_demo_without_root_says_so():
    as_user = f"import os, sys; os.geteuid = lambda: 1000; sys.path.append({str(MININET)!r}); sys.argv = ['demo.py']; "
    command = [sys.executable, "-c", as_user + "import demo; sys.exit(demo.main())"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 77
    assert done.stderr == "demo: this needs root\n"
