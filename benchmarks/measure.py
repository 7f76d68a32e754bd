"""What a subject costs: CPU time and memory of its processes. And what it all ran on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import tproxyd

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PRIVATE: Final = re.compile(r"^(?:Private_\w+|Swap):\s+(\d+) kB", re.MULTILINE)
_VERSIONS: Final = {
    "haproxy": (("haproxy", "-v"), r"version (\S+)"),
    "v2ray": (("v2ray", "-version"), r"V2Ray (\S+)"),
    "iperf3": (("iperf3", "--version"), r"iperf (\S+)"),
    "wrk": (("wrk", "-v"), r"wrk (\S+)"),
    "nginx": (("nginx", "-v"), r"nginx/(\S+)"),
    "nft": (("nft", "--version"), r"v(\S+)"),
    "cc": (("cc", "--version"), r"(\d+\.\d+\.\d+)"),
}


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time of processes with all threads, ended ones included (proc(5), stat: utime + stime).

    The kernel's work in softirqs is charged to whatever it interrupted, so a part of a proxy's cost shows in the
    processes beside it, and a part of theirs in it.
    """
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def private_kb(pids: Iterable[int]) -> int:
    """Return the memory that only these processes hold, each for itself (proc(5), smaps_rollup); the kernel's not."""
    return sum(int(found) for pid in pids for found in _PRIVATE.findall(Path(f"/proc/{pid}/smaps_rollup").read_text()))


def machine() -> dict[str, Any]:
    """Return what it runs on: processor, cores, memory, kernel, system."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    system = re.search(r'PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text())
    return {
        "processor": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "system": system[1] if system else "",
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part; programs that are not there are left out."""
    found = {"tproxyd": tproxyd.__version__, "python": platform.python_version()}
    for name, (argv, pattern) in _VERSIONS.items():
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        match = re.search(pattern, done.stdout + done.stderr)
        if match:
            found[name] = match[1]
    return found
