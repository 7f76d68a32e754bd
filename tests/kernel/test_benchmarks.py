"""The benchmarks measure what they say, and refuse a figure for flows that a proxy did not relay."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.bed import Bed
from benchmarks.generators import build
from benchmarks.results import NoFigure, Results
from benchmarks.runner import run
from benchmarks.subjects import Routing, Tproxyd
from benchmarks.workloads import Scale, UdpFlows
from tests.lab import answers, open_descriptors

TINY = Scale(rounds=1, seconds=1, idle_flows=10, short_flows=10, dns_flows=100)


class Impostor(Routing):
    """Says that it relays, and lets the kernel forward."""

    name = "impostor"
    title = "impostor"
    routes = False


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    folder.parent.chmod(0o755)
    build(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left(root: None) -> Iterator[None]:
    gc.collect()
    files, namespaces = open_descriptors(), own_namespaces()
    yield
    gc.collect()
    assert own_namespaces() == namespaces
    assert {number: target for number, target in open_descriptors().items() if files.get(number) != target} == {}


def own_namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(f"tpl{os.getpid()}-")}


def test_a_run_gives_figures_and_tells_who_let_flows_pass() -> None:
    results = Results({})
    told: list[str] = []
    run(results, [UdpFlows()], TINY, [Routing, Impostor, Tproxyd], told.append)
    assert told == ["short UDP flows, 64 at a time"]
    for subject in ("routing", "tproxyd"):
        assert (results.median("udp-short-flows", subject, "rate") or 0) > 0
    assert results.median("udp-short-flows", "routing", "cpu_us") == 0
    assert results.median("udp-short-flows", "impostor", "rate") is None
    (error,) = results.errors
    assert re.fullmatch(r"udp-short-flows, impostor: \d+ packets were routed past impostor", error)


def test_a_proxy_that_did_not_relay_all_or_is_dead_gives_no_figure(tmp_path: Path, tools: Path) -> None:
    tmp_path.chmod(0o755)
    with Bed(Tproxyd, tmp_path / "bed", tools) as bed:
        before = bed.witnessed()
        found = UdpFlows().sample(bed, TINY)
        assert found.flows > 0.9 * TINY.dns_flows
        bed.check(before, tcp=found.tcp, udp=found.udp, flows=found.flows)
        with pytest.raises(NoFigure, match="made 0 connections"):
            bed.check(before, tcp=1, udp=found.udp, flows=0)
        with pytest.raises(NoFigure, match=r"counted \d+ flows of \d+"):
            bed.check(before, tcp=0, udp=0, flows=TINY.dns_flows)
        for pid in bed.lab.gateway.pids():
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(NoFigure, match="no query was answered"):
            UdpFlows().sample(bed, TINY)


def test_a_bed_stops_routing_when_its_subject_does(tmp_path: Path, tools: Path) -> None:
    tmp_path.chmod(0o755)
    with Bed(Routing, tmp_path / "bed", tools) as bed:
        assert answers(bed.lab.client, "udp", (bed.server4, 7))
        bed.stop()
        assert not answers(bed.lab.client, "udp", (bed.server4, 7))
        bed.restart()
        assert answers(bed.lab.client, "udp", (bed.server4, 7))
