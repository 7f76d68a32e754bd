"""All that a program could leave behind in a namespace, as comparable lines."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.lab.namespace import Namespace

_LISTINGS: Final = (
    "nft -a list ruleset",
    "iptables-legacy-save",
    "ip6tables-legacy-save",
    "iptables-nft-save",
    "ip6tables-nft-save",
    "ipset save",
    "ip -4 rule show",
    "ip -6 rule show",
    "ip -4 route show table all",
    "ip -6 route show table all",
)
_SCRIPT: Final = "\n".join(f"echo '### {command}'; {command} 2>&1" for command in _LISTINGS)
_COUNTERS: Final = re.compile(r"\[\d+:\d+\]|(?<=counter )packets \d+ bytes \d+| expires \w+")
_CHANCE: Final = re.compile(r" hashsize \d+| initval 0x\w+")  # of an ipset: differs from one making to the next
_HANDLES: Final = re.compile(r" # handle \d+")
_LISTEN: Final = "0A"


@dataclass(frozen=True, slots=True)
class Residue:
    """Rules, sets, routes, processes and sockets, one a line, comments and counters taken out."""

    lines: tuple[str, ...]

    @classmethod
    def of(cls, namespace: Namespace) -> Self:
        """Take a snapshot."""
        rules = without_empty_tables(listings(namespace))
        processes = sorted(f"process {_cmdline(pid)}" for pid in namespace.pids())
        return cls((*rules, "### processes", *processes, "### sockets", *_sockets(namespace)))

    def difference(self, later: Residue) -> str:
        """What differs from `self` in `later`, as a unified diff; empty if nothing does."""
        return "\n".join(difflib.unified_diff(self.lines, later.lines, "before", "after", lineterm="", n=1))


def listings(namespace: Namespace) -> list[str]:
    """The full listings of rules, sets and routes; without comments, counters, handles and the order of ipsets."""
    text = _HANDLES.sub("", _CHANCE.sub("", exact_listings(namespace)))
    before, mark, rest = text.partition("### ipset save\n")
    sets, following, after = rest.partition("### ip -4 rule")
    return [*(before + mark).splitlines(), *sorted(sets.splitlines()), *(following + after).splitlines()]


def exact_listings(namespace: Namespace) -> str:
    """The full listings byte for byte with all handles; counters as zeros, comments with the time left out."""
    text = namespace.run(["sh", "-c", _SCRIPT]).stdout
    return re.sub(r"(?m)^# .*\n", "", _COUNTERS.sub("0", text))


def without_empty_tables(lines: list[str]) -> list[str]:
    """Leave out legacy tables in which nothing is: looking at a table creates it, nothing deletes it."""
    text = "\n".join(lines)
    return re.sub(r"(?m)^\*\w+\n(:[A-Z]+ ACCEPT 0\n)*COMMIT\n", "", text + "\n").splitlines()


def open_descriptors() -> dict[int, str]:
    """The open files of this process, by number."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            continue  # the folder's own
    return found


def _sockets(namespace: Namespace) -> list[str]:
    with namespace.entered():
        found = {line.split()[-1] for line in _proc_net("unix") if "@tproxyd" in line}
        for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
            for line in _proc_net(name):
                fields = line.split()
                if not name.startswith("tcp") or fields[3] == _LISTEN:
                    found.add(f"{name} {_endpoint(fields[1])}")
    return sorted(found)


def _proc_net(name: str) -> list[str]:
    return Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]


def _endpoint(text: str) -> str:
    address, port = text.split(":")
    words = [address[at : at + 8] for at in range(0, len(address), 8)]
    octets = b"".join(bytes.fromhex(word)[::-1] for word in words)
    shown = ".".join(map(str, octets)) if len(octets) == 4 else octets.hex(":", 2)
    return f"{shown} port {int(port, 16)}"


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f"(pid {pid}, gone; parent {os.getpid()})"
