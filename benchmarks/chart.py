"""A bar chart of the medians as SVG: panels of one metric each, a group of bars for each workload.

The same results give the same bytes. Text and lines follow the reader's light or dark scheme; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from benchmarks.results import Results
from benchmarks.subjects import SUBJECTS

_COLUMN: Final = 420
_BETWEEN: Final = 40  # columns
_LABELS: Final = 140  # left of the bars
_FIGURES: Final = 56  # right of them
_BAR: Final = 13
_GAP: Final = 10
_HEAD: Final = 34
_COLOURS: Final = {
    "routing": "#8b949e",
    "tproxyd-learned": "#5fc3a0",
    "tproxyd": "#1a7f5a",
    "haproxy": "#4a7fc1",
    "v2ray": "#c9783a",
}
_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 14px; }
.note, .figure { fill: #57606a; font-size: 11px; }
.axis { stroke: #d0d7de; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.note, .figure { fill: #9da7b1; }
.axis { stroke: #444c56; }
}
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric over some workloads.

    Attributes:
        title: with the unit.
        better: which way is better.
        key: the metric.
        digits: behind the point.
        rows: labels and names of workloads.
    """

    title: str
    better: str
    key: str
    digits: int
    rows: Sequence[tuple[str, str]]


_BULK: Final = [
    (f"{way}, {streams} stream{'s' if streams > 1 else ''}", f"bulk-{way}-{streams}")
    for way in ("up", "down")
    for streams in (1, 4, 64)
]
_REQUESTS: Final = [
    ("1 connection", "requests-1"),
    ("32 connections", "requests-32"),
    ("32, IPv6", "requests-32-ipv6"),
    ("256 connections", "requests-256"),
]
_UDP: Final = [("64 bytes", "udp-64"), ("1200 bytes", "udp-1200")]
_HIGH: Final = "longer is better"
_LOW: Final = "shorter is better"
COLUMNS: Final = (
    (
        Panel("Bulk TCP, Gbit/s", _HIGH, "gbit_s", 1, _BULK),
        Panel("Bulk TCP, CPU seconds per GB", _LOW, "cpu_s_per_gb", 2, _BULK),
        Panel("New connections per second", _HIGH, "rate", 0, [("32 at a time", "connections")]),
        Panel("Memory of an idle flow, kB", _LOW, "kb", 1, [("TCP", "memory-tcp"), ("UDP", "memory-udp")]),
    ),
    (
        Panel("Requests per second", _HIGH, "rate", 0, _REQUESTS),
        Panel("Requests, p99 in µs", _LOW, "p99_us", 0, _REQUESTS),
        Panel("UDP, datagrams per second", _HIGH, "pps", 0, _UDP),
        Panel("UDP ping-pong, p50 in µs", _LOW, "p50_us", 0, [("64 bytes", "udp-ping-pong")]),
        Panel("Short UDP flows per second", _HIGH, "rate", 0, [("64 at a time", "udp-short-flows")]),
    ),
)


def svg(results: Results) -> str:
    """Return the chart; panels without a figure are left out."""
    names = [each.name for each in SUBJECTS if any(subject == each.name for _, subject in results.cells)]
    body, bottom = [*_legend(names)], 0
    for number, panels in enumerate(COLUMNS):
        body.append(f'<g transform="translate({number * (_COLUMN + _BETWEEN)},0)">')
        y = 56
        for panel in panels:
            lines, height = _panel(panel, results, names, y)
            body += lines
            y += height
        body.append("</g>")
        bottom = max(bottom, y)
    about = results.about
    source = (
        f"{about['machine']['processor']}, {about['machine']['cores']} cores, Linux {about['machine']['kernel']}; "
        f"tproxyd {about['versions']['tproxyd']}; medians, rounds: {about['rounds']}, interleaved"
    )
    body.append(_text(0, bottom + 4, source, "note"))
    width = len(COLUMNS) * (_COLUMN + _BETWEEN) - _BETWEEN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 14}" role="img"'
    return "\n".join(
        [f'{head} aria-label="tproxyd beside its peers">', f"<style>{_STYLE}</style>", *body, "</svg>", ""]
    )


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = 0
    for each in SUBJECTS:
        if each.name in names:
            yield f'<rect x="{x}" y="12" width="12" height="12" rx="2" fill="{_COLOURS[each.name]}"/>'
            yield _text(x + 18, 22, each.title)
            x += 40 + 7 * len(each.title)


def _panel(panel: Panel, results: Results, names: Sequence[str], top: int) -> tuple[list[str], int]:
    """Return a panel's lines and its height."""
    rows = [
        (label, [(name, value) for name in names if (value := results.median(workload, name, panel.key)) is not None])
        for label, workload in panel.rows
    ]
    # What has no process costs nothing: a bar of zero would look like a result.
    rows = [(label, [bar for bar in bars if bar[1]]) for label, bars in rows]
    rows = [(label, bars) for label, bars in rows if bars]
    if not rows:
        return [], 0
    most = max(value for _, bars in rows for _, value in bars)
    lines = [_text(0, top, panel.title, "title"), _text(_COLUMN, top, panel.better, "note", anchor="end")]
    y = top + 12
    for label, bars in rows:
        lines += _group(label, bars, most, panel.digits, y)
        y += _BAR * len(bars) + _GAP
    lines.append(f'<line class="axis" x1="{_LABELS}" y1="{top + 10}" x2="{_LABELS}" y2="{y - _GAP + 2}"/>')
    return lines, y - top + _HEAD - _GAP


def _group(label: str, bars: Sequence[tuple[str, float]], most: float, digits: int, top: int) -> Iterator[str]:
    yield _text(_LABELS - 10, top + _BAR * len(bars) / 2 + 4, label, anchor="end")
    for number, (name, value) in enumerate(bars):
        y = top + number * _BAR
        width = max(1.0, value / most * (_COLUMN - _LABELS - _FIGURES))
        yield (f'<rect x="{_LABELS}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" rx="1" fill="{_COLOURS[name]}"/>')
        yield _text(_LABELS + width + 6, y + 9.5, f"{value:,.{digits}f}", "figure")


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    shown = f' class="{style}"' if style else ""
    return f'<text x="{x:.5g}" y="{y:g}"{shown} text-anchor="{anchor}">{escape(text)}</text>'
