"""`make demo`: real clients talk to a real server through tproxyd, and both sides see the original four-tuple.

The outer half makes a place for it and looks, at the end, whether anything is left; the inner half (`--inside`)
does the rest in there.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from isolation import Place, missing

if TYPE_CHECKING:
    from testbed import Testbed

_LIMIT_S: Final = 60.0
_LOG_S: Final = 6.0

_PICTURE: Final = """\
   h1  10.0.1.1  fd00:1::1 --+
   h2  10.0.1.2  fd00:1::2 --|            +---- gw -----+
   h3  10.0.1.3  fd00:1::3 --|-- switch --|lan0     wan0|-- server  10.0.2.1  fd00:2::1
   h4  10.0.1.4  fd00:1::4 --+            +-- tproxyd --+          nginx, dnsmasq
"""


class StepError(Exception):
    """A step of the demo went wrong."""


@dataclass(frozen=True)
class Talk:
    """What a client did, and what it learned.

    Attributes:
        sent_from: the client's own view of its address and port.
        answer: what the server said, in short.
        server_saw: the client's address and port as the server logged them.
    """

    host: str
    network: str
    version: int
    command: str
    sent_from: str
    asked: str
    answer: str
    server_saw: str

    @property
    def kept(self) -> bool:
        """Both ends saw the same."""
        return self.sent_from == self.server_saw


def main() -> int:
    """Run the demo; 0 only if everything held."""
    parser = argparse.ArgumentParser(description="Shows tproxyd at work between four clients and a server.")
    parser.add_argument("--ruleset", choices=["nftables", "iptables"], default="nftables")
    parser.add_argument("--show-rules", action="store_true", help="print all rules, not only their number")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # both halves write to it
    if options.inside:
        return _inside(options.ruleset, options.inside, show_rules=options.show_rules)
    if lacks := missing():
        print(f"demo: this needs {', '.join(lacks)}", file=sys.stderr)
        return 77 if "root" in lacks else 69
    return _outside(sys.argv[1:])


def _outside(arguments: list[str]) -> int:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    place = Place("demo")
    code = 1
    try:
        with place:
            command = [sys.executable, __file__, *arguments, "--inside", str(place.folder)]
            code = place.start(command).wait(_LIMIT_S)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except subprocess.TimeoutExpired:
        print(f"\ndemo: not done within {_LIMIT_S:.0f} s", file=sys.stderr)
    left = place.residue()
    print("\nLeft behind (namespaces, interfaces, rules, routes, processes, files):", ", ".join(left) or "none")
    if left and not code:
        code = 1
    verdict = _paint("OK", 32) if code == 0 else _paint("NOT FINISHED" if code == 130 else "FAILED", 31)
    print(f"{verdict} after {time.monotonic() - started:.1f} s")
    return code


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _inside(ruleset: str, folder: Path, *, show_rules: bool) -> int:
    from testbed import log_tails, testbed
    from topologies import FourHosts

    print("tproxyd demo: four clients, a gateway, a server, each a Mininet host of its own\n")
    print(_PICTURE)
    print("The gateway forwards nothing (ip_forward = 0): what reaches the server went through tproxyd.")
    try:
        with testbed(FourHosts(), folder) as bed:
            _show(bed, ruleset, show_rules=show_rules)
    except (StepError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"\n{_paint('failed', 31)} in this step: {error}\nThe logs end with:\n{log_tails(folder)}")
        return 1
    return 0


def _show(bed: Testbed, ruleset: str, *, show_rules: bool) -> None:
    from testbed import tproxyd

    gateway = bed.gateways[0]
    _title(f"1. gw$ tproxyd run -c {gateway.config.name}")
    gateway.start(ruleset)
    print(_indented(gateway.config.read_text()))
    print(f"   applied: {_rules_in_short(gateway.rules())}")
    if show_rules:
        print(_indented(bed.run(gateway.node.name, [*tproxyd(), "show-rules", "-c", str(gateway.config)]).stdout))
    else:
        print("   (all of them: `tproxyd show-rules`, here `mininet/demo.py --show-rules`)")
    _title("2. What the clients ask and what they get")
    talks = _talk(bed)
    _title("3. What each end saw")
    _show_ends(talks)
    _title("4. How tproxyd took each flow (its access log)")
    _show_log(bed, talks)
    _title("5. A clean stop")
    _stop(bed)


def _talk(bed: Testbed) -> list[Talk]:
    server = bed.topology.server
    talks = [
        _web(bed, "h1", 4, f"http://{server[4]}/big"),
        _web(bed, "h2", 6, f"http://[{server[6]}]/"),
        _dns(bed, "h3", 4),
        _dns(bed, "h4", 6),
    ]
    for talk in talks:
        print(f"   {talk.host}$ {talk.command}\n       {talk.answer}")
    return talks


def _web(bed: Testbed, host: str, version: int, url: str) -> Talk:
    command = ["curl", "-sS", "--max-time", "5", url]
    report = "%{stderr}%{http_code} %{size_download} %{local_ip} %{local_port}"
    done = bed.run(host, [*command, "-o", "-", "-w", report])
    if done.returncode:
        raise StepError(f"{host}: {' '.join(command)}: {done.stderr.strip()}")
    status, size, address, port = done.stderr.split()
    said = done.stdout.strip() if int(size) < 100 else f"{int(size):,} bytes"
    path = "/" + url.rpartition("/")[2]
    return Talk(
        host=host,
        network="TCP",
        version=version,
        command=f"curl {url}",
        sent_from=_endpoint(address, port),
        asked=_endpoint(bed.topology.server[version], 80),
        answer=f"HTTP {status}: {said}",
        server_saw=_logged(bed, "access.log", rf"^(?P<address>\S*{_sort(version)}\S*) (?P<port>\d+) 80 {path}$"),
    )


def _dns(bed: Testbed, host: str, version: int) -> Talk:
    from testbed import ZONE

    own, server = bed.topology.clients[host][version], bed.topology.server[version]
    port = 20000 + version  # dig does not tell which port it took, so it is given one that nobody else gets
    query, kind = f"www.{ZONE}", {4: "A", 6: "AAAA"}[version]
    command = ["dig", f"@{server}", "-b", f"{own}#{port}", query, kind, "+short", "+time=2", "+tries=2"]
    done = bed.run(host, command)
    if done.returncode or not done.stdout.strip() or ";" in done.stdout:
        raise StepError(f"{host}: {' '.join(command)}: {done.stdout.strip()} {done.stderr.strip()}")
    return Talk(
        host=host,
        network="UDP",
        version=version,
        command=" ".join(command[:6]),
        sent_from=_endpoint(own, port),
        asked=_endpoint(server, 53),
        answer=f"answered by {server}: {done.stdout.strip()}",
        server_saw=_logged(
            bed, "dnsmasq.log", rf" (?P<address>\S*{_sort(version)}\S*)/(?P<port>\d+) query\[{kind}\] {query}"
        ),
    )


def _sort(version: int) -> str:
    return {4: "[.]", 6: ":"}[version]


def _logged(bed: Testbed, name: str, pattern: str) -> str:
    """The client as a server's log has it."""
    from testbed import wait_for

    wait_for(lambda: re.search(pattern, bed.server_file(name), re.MULTILINE) is not None, f"the server's {name}", 3)
    found = re.search(pattern, bed.server_file(name), re.MULTILINE)
    return _endpoint(found["address"], found["port"]) if found else "nothing"


def _show_ends(talks: list[Talk]) -> None:
    rows = [("", "", "the client sent from", "to", "the server saw", "")]
    for talk in talks:
        same = _paint("equal", 32) if talk.kept else _paint("DIFFERENT", 31)
        rows.append((talk.host, f"{talk.network}/IPv{talk.version}", talk.sent_from, talk.asked, talk.server_saw, same))
    _table(rows)
    if not all(talk.kept for talk in talks):
        raise StepError("the four-tuple was not kept")


def _show_log(bed: Testbed, talks: list[Talk]) -> None:
    from testbed import wait_for

    wanted = {(talk.network.lower(), talk.sent_from, talk.asked) for talk in talks}
    print("   (a UDP flow is logged when it has been idle for 2 s)")
    wait_for(lambda: wanted <= set(_by_flow(bed)), f"flows in the access log: {wanted}", _LOG_S)
    keys = ("rule", "backend", "layer", "cause", "bytes_up", "bytes_down")
    rows = [("", "client", "original destination", "source kept", *(key.replace("_", " ") for key in keys))]
    flows = _by_flow(bed)
    for talk in talks:
        flow = flows[talk.network.lower(), talk.sent_from, talk.asked]
        kept = "yes" if flow["source"] == flow["client"] else str(flow["source"])
        rows.append((talk.host, flow["client"], flow["orig_dst"], kept, *(str(flow[key]) for key in keys)))
    _table(rows)


def _by_flow(bed: Testbed) -> dict[tuple[str, str, str], dict[str, Any]]:
    flows = bed.gateways[0].flows()
    return {(flow["network"], flow["client"], flow["orig_dst"]): flow for flow in flows}


def _stop(bed: Testbed) -> None:
    gateway = bed.gateways[0]
    if code := gateway.stop():
        raise StepError(f"tproxyd ended with exit code {code}")
    left = gateway.residue()
    print(f"   gw: rules and routes as before the start: {'no: ' + ', '.join(left) if left else 'yes'}")
    if left:
        raise StepError("tproxyd left something in the kernel")
    reached = bed.run("h1", ["curl", "-s", "--connect-timeout", "1", f"http://{bed.topology.server[4]}/"])
    print(f"   h1 without tproxyd: {'STILL REACHES THE SERVER' if reached.returncode == 0 else 'no way to the server'}")
    if reached.returncode == 0:
        raise StepError("the server can be reached past tproxyd, so nothing was shown")


def _rules_in_short(rules: dict[str, str]) -> str:
    chains = re.findall(r"^\tchain .*?^\t}", rules["nftables"], re.MULTILINE | re.DOTALL)
    nft = [line for chain in chains for line in chain.splitlines()[2:-1]]  # without name, hook and bracket
    xt = [line for line in rules["iptables"].splitlines() if line.startswith("-A")]
    routing = [line for line in rules["ip rule"].splitlines() if "7440" in line]
    counts = {"nftables rules": len(nft), "iptables rules": len(xt), "policy routing rules": len(routing)}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _endpoint(address: str, port: str | int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _title(text: str) -> None:
    print(f"\n{_paint(text, 1)}")


def _indented(text: str) -> str:
    return "".join(f"   | {line}\n" for line in text.splitlines()).rstrip()


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _paint(text: str, colour: int) -> str:
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{colour}m{text}\033[0m"


if __name__ == "__main__":
    sys.exit(main())
