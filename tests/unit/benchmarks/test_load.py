"""What wrk and iperf3 print, and when that is no figure."""

import json

import pytest

from benchmarks.load import parse_iperf3, parse_wrk
from benchmarks.results import NoFigure

WRK = """\
Running 2s test @ http://10.2.0.2/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   528.36us  612.22us  12.60ms   95.11%
    Req/Sec    64.68k     8.20k   75.55k    65.00%
  Latency Distribution
     50%  418.00us
     75%  512.00us
     90%  745.00us
     99%    3.71ms
  128709 requests in 2.00s, 19.27MB read
Requests/sec:  64336.29
Transfer/sec:      9.63MB
"""


def test_wrk_gives_rate_and_latencies() -> None:
    found = parse_wrk(WRK)
    assert (found.count, found.seconds, found.p50_us, found.p99_us) == (128709, 2.0, 418.0, 3710.0)
    assert found.rate == 64354.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exit code 1: unable to connect to 10.2.0.2:http Connection refused\n",
        WRK.replace("128709 requests", "0 requests"),
        WRK + "  Socket errors: connect 0, read 700, write 0, timeout 800\n",
        WRK + "  Non-2xx or 3xx responses: 128709\n",
        WRK.replace("     99%    3.71ms\n", ""),
    ],
    ids=["nothing", "refused", "no answers", "errors", "other answers", "no percentile"],
)
def test_wrk_without_a_working_service_gives_no_figure(text: str) -> None:
    with pytest.raises(NoFigure, match="wrk"):
        parse_wrk(text)


def test_a_few_errors_of_wrk_are_let_pass() -> None:
    assert parse_wrk(WRK + "  Socket errors: connect 0, read 3, write 0, timeout 0\n").count == 128709


def test_iperf3_counts_what_was_received() -> None:
    end = {"sum_sent": {"bytes": 3_000_000_000, "seconds": 2}, "sum_received": {"bytes": 2_500_000_000, "seconds": 2}}
    found = parse_iperf3(json.dumps({"end": end}))
    assert (found.moved, found.gbit_s) == (2_500_000_000, 10.0)


@pytest.mark.parametrize(
    "text",
    [
        "exit code 1: iperf3: error",
        json.dumps({"error": "unable to connect to server", "end": {}}),
        json.dumps({"end": {"sum_received": {"bytes": 0, "seconds": 2}}}),
    ],
)
def test_iperf3_that_failed_gives_no_figure(text: str) -> None:
    with pytest.raises(NoFigure, match="iperf3"):
        parse_iperf3(text)
