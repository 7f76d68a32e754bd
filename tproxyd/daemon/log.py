"""How log lines look: text or JSON, with journald's `<N>` priorities (sd-daemon(3)) where systemd reads them."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Final

from tproxyd.flow import FlowEnd

FLOW_LOGGER: Final = "tproxyd.flow"

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


def set_up_logging(level: str, form: str) -> None:
    """Send log lines to standard error, one write a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=form == "json", journald="JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.raiseExceptions = False  # a full log disk must not stop a flow


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
