"""How log lines look: text or JSON, with journald's `<N>` priorities (sd-daemon(3)) where systemd reads them."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from queue import Full, Queue
from threading import Thread
from typing import Final, TextIO

from tproxyd.flow import FlowEnd

FLOW_LOGGER: Final = "tproxyd.flow"

_QUEUED_LINES: Final = 10_000
_LAST_WRITE_S: Final = 1.0

_PRIORITY: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_flow_log = logging.getLogger(FLOW_LOGGER)


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool, journald: bool) -> None:
        super().__init__()
        self._as_json = as_json
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        text = self._json(record) if self._as_json else self._text(record)
        return f"<{_PRIORITY.get(record.levelno, 6)}>{text}" if self._journald else text

    def _text(self, record: logging.LogRecord) -> str:
        when = "" if self._journald else f"{_time(record)} "
        return f"{when}{record.levelname.lower()}: {_printable(record.getMessage())}{self._trace(record)}"

    def _json(self, record: logging.LogRecord) -> str:
        fields = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        flow = getattr(record, "flow", None)
        return json.dumps(fields | (flow or {"message": record.getMessage() + self._trace(record)}))

    def _trace(self, record: logging.LogRecord) -> str:
        if not record.exc_info or record.levelno < logging.ERROR:
            return ""
        return " | " + " | ".join(self.formatException(record.exc_info).splitlines())


class QueuedHandler(logging.Handler):
    """Writes lines in a thread of its own: whoever does not read them, or a full disk, stops no flow.

    Lines that find the queue full are dropped and counted.
    """

    def __init__(self, stream: TextIO) -> None:
        """Start the thread; it ends with the process."""
        super().__init__()
        self._stream = stream
        self._lines: Queue[str | None] = Queue(_QUEUED_LINES)
        self._dropped = 0
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.finish)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line."""
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._dropped += 1

    def finish(self) -> None:
        """Write what is queued, but wait for no one for long."""
        with suppress(Full):
            self._lines.put_nowait(None)
            self._thread.join(_LAST_WRITE_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):
                self._stream.write(f"{line}\n")
                self._stream.flush()
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                logging.getLogger(__name__).warning("%d log lines were dropped: nobody took them in time", dropped)


def set_up_logging(level: str, form: str) -> QueuedHandler:
    """Send log lines to standard error, one write a line."""
    handler = QueuedHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=form == "json", journald="JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    return handler


def log_flow_end(end: FlowEnd) -> None:
    """Write the access log's line for a flow."""
    fields = flow_fields(end)
    text = " ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
    _flow_log.info("flow %s", text, extra={"flow": fields})


def flow_fields(end: FlowEnd) -> dict[str, object]:
    """The fields of an access log line, in the order in which they are written."""
    return {
        "network": str(end.flow.network),
        "client": str(end.flow.client),
        "orig_dst": str(end.flow.orig_dst),
        "source": str(end.source) if end.source else None,
        "rule": end.decision.rule if end.decision else None,
        "backend": end.decision.backend if end.decision else None,
        "layer": str(end.layer),
        "cause": str(end.cause),
        "phase": str(end.phase),
        "bytes_up": end.bytes_up,
        "bytes_down": end.bytes_down,
        "duration_s": round(end.duration_s, 3),
    }


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
