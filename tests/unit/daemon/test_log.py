"""Log lines, as text and as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os

import pytest

from tproxyd.daemon.log import QueuedHandler, flow_fields, log_flow_end, set_up_logging
from tproxyd.flow import Cause, Client, Decision, Endpoint, Flow, FlowEnd, Layer, Network, OrigDst, Phase

END = FlowEnd(
    flow=Flow(Network.TCP, Client("fd01::2", 4321), OrigDst("198.51.100.7", 443), "lan"),
    decision=Decision("default", "direct"),
    layer=Layer.SPLICE,
    cause=Cause.DONE,
    phase=Phase.RELAY,
    source=Endpoint("fd01::2", 4321),
    bytes_up=10,
    bytes_down=20,
    duration_s=1.23456,
)


@pytest.fixture(autouse=True)
def _restore_logging() -> object:
    root = logging.getLogger()
    raising, logging.raiseExceptions = logging.raiseExceptions, False  # Mininet leaves a handler that can't write
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], root.level = before[0], before[1]
    logging.raiseExceptions = raising


def written(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_a_flow_ends_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    handler = set_up_logging("info", "json")
    log_flow_end(END)
    handler.finish()
    line = json.loads(written(capsys))
    assert line["logger"] == "tproxyd.flow"
    assert {key: line[key] for key in flow_fields(END)} == flow_fields(END)
    assert line["client"] == "[fd01::2]:4321"


def test_a_flow_ends_as_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    handler = set_up_logging("info", "text")
    log_flow_end(END)
    handler.finish()
    assert "client=[fd01::2]:4321 orig_dst=198.51.100.7:443" in written(capsys)


def test_control_characters_never_reach_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    handler = set_up_logging("info", "text")
    logging.getLogger("x").warning("name %s", "a\nb\x1b[31m")
    handler.finish()
    assert "name a\\x0ab\\x1b[31m" in written(capsys)


def test_journald_gets_priorities(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    handler = set_up_logging("info", "text")
    logging.getLogger("x").error("bad")
    handler.finish()
    assert "<3>error: bad\n" in written(capsys)


def test_a_level_hides_what_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    handler = set_up_logging("warning", "text")
    log_flow_end(END)
    handler.finish()
    assert written(capsys) == ""


def test_a_reader_that_takes_nothing_stops_no_one() -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    handler = QueuedHandler(stream)
    record = logging.makeLogRecord({"msg": "x" * 1000, "levelno": logging.INFO})
    for _ in range(20_000):
        handler.emit(record)
    assert handler._dropped > 0
    os.close(reader)  # from now on every write fails at once: the thread empties its queue and ends
    handler.finish()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
