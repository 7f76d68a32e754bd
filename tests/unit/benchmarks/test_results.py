"""Medians, ratios, verdicts; what was not measured is neither reached nor missed."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks.chart import svg
from benchmarks.report import table, write_json
from benchmarks.results import Results
from benchmarks.subjects import SUBJECTS, haproxy_sessions
from benchmarks.targets import verdicts

ABOUT = {
    "machine": {"processor": "A <fast> one", "cores": 2, "memory_mb": 4096, "kernel": "6.18", "system": "Debian"},
    "versions": {"tproxyd": "0.1.0", "haproxy": "2.6"},
    "load_before": 0.1,
    "rounds": 3,
    "seconds": 2,
}


def results(**rates: list[float]) -> Results:
    """Results of new connections, a list of rates for each subject."""
    made = Results(ABOUT)
    for subject, values in rates.items():
        made.cell("connections", subject).samples.extend({"rate": value, "p99_us": 1.0} for value in values)
    return made


def verdict(found: Results, name: str) -> tuple[float | None, bool | None]:
    (one,) = [each for each in verdicts(found) if each.name == name]
    return one.found, one.reached


def test_the_median_is_taken_over_the_rounds() -> None:
    assert results(tproxyd=[9, 1, 5]).median("connections", "tproxyd", "rate") == 5


def test_what_failed_once_has_no_median() -> None:
    found = results(tproxyd=[9, 1])
    found.cell("connections", "tproxyd").errors.append("nothing was relayed")
    assert found.median("connections", "tproxyd", "rate") is None
    assert found.errors == ["connections, tproxyd: nothing was relayed"]
    assert "nothing was relayed" in table(found)
    assert "none" in table(found)


@pytest.mark.parametrize(("own", "reached"), [([110.0], True), ([100.0], True), ([99.0], False)])
def test_a_target_is_a_ratio_within_the_run(own: list[float], reached: bool) -> None:
    assert verdict(results(tproxyd=own, haproxy=[100.0]), "new connections: rate") == (own[0] / 100, reached)


def test_a_target_without_its_peer_is_not_measured() -> None:
    assert verdict(results(tproxyd=[100.0]), "new connections: rate") == (None, None)


def test_bulk_is_held_to_the_better_peer() -> None:
    found = Results(ABOUT)
    for subject, rate in (("tproxyd", 12.0), ("haproxy", 5.0), ("v2ray", 10.0)):
        found.cell("bulk-up-1", subject).samples.append({"gbit_s": rate, "cpu_s_per_gb": 1.0})
    assert verdict(found, "bulk TCP up, 1 stream") == (1.2, False)
    found.cell("bulk-up-1", "v2ray").errors.append("it died")
    assert verdict(found, "bulk TCP up, 1 stream") == (None, None)


def test_json_is_read_back_the_same(tmp_path: Path) -> None:
    found = results(routing=[3, 4], tproxyd=[1.5])
    write_json(found, tmp_path / "new" / "results.json")
    read = Results.from_json(json.loads((tmp_path / "new" / "results.json").read_text()))
    assert read.as_json() == found.as_json()
    assert table(read) == table(found)


def test_the_chart_is_the_same_for_the_same_results_and_well_formed() -> None:
    found = results(routing=[400.0], tproxyd=[100.0], haproxy=[200.0])
    chart = svg(found)
    assert chart == svg(found)
    root = ET.fromstring(chart)
    space = "{http://www.w3.org/2000/svg}"
    bars = [each for each in root.iter(f"{space}rect") if each.get("height") == "11"]
    widths = [float(each.get("width", "0")) for each in bars]
    assert widths == [4 * widths[1], widths[1], 2 * widths[1]]
    assert "prefers-color-scheme: dark" in chart
    words = [each.text or "" for each in root.iter(f"{space}text")]
    assert "New connections per second" in words
    assert any("A <fast> one" in each for each in words)


def test_a_chart_leaves_out_what_was_not_measured() -> None:
    assert "UDP" not in svg(results(tproxyd=[1.0]))


def test_haproxy_tells_the_sessions_of_its_frontend() -> None:
    answer = "# pxname,svname,scur,stot,\nall,FRONTEND,3,4711,\nany,any,3,4710,\nany,BACKEND,3,4709,\n\n"
    assert haproxy_sessions(answer) == 4711
    with pytest.raises(ValueError, match="frontend"):
        haproxy_sessions("# pxname,svname,stot,\n")


@pytest.mark.parametrize(("load", "shown"), [(0.4, False), (2.0, True)])
def test_a_busy_machine_is_named(load: float, shown: bool) -> None:
    found = results(tproxyd=[1.0])
    found.about = {**ABOUT, "load_before": load}
    assert ("NOT QUIET" in table(found)) is shown


def test_every_subject_has_a_place_in_the_chart() -> None:
    found = Results(ABOUT)
    for subject in SUBJECTS:
        found.cell("udp-64", subject.name).samples.append({"pps": 1000.0})
    drawn = svg(found)
    assert all(f">{subject.title}</text>" in drawn for subject in SUBJECTS)
