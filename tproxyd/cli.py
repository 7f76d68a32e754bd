"""Commands and exit codes, nothing else (sysexits.h where it has a word for it)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tproxyd import __version__
from tproxyd.errors import (
    ConfigError,
    KernelUnsupported,
    PermissionDenied,
    TproxydError,
    TryAgain,
)

if TYPE_CHECKING:
    from tproxyd.flow import Endpoint
    from tproxyd.netfilter.apply import Application

DEFAULT_CONFIG: Final = Path("/etc/tproxyd/tproxyd.yaml")

EXIT_CODES: Final[tuple[tuple[type[TproxydError], int], ...]] = (
    (ConfigError, 78),
    (PermissionDenied, 77),
    (KernelUnsupported, 69),
    (TryAgain, 75),
    (TproxydError, 1),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every error is lines on standard error, never a traceback."""
    _open_standard_files()
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except TproxydError as error:
        for line in str(error).splitlines():
            print(f"tproxyd: error: {line}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except BrokenPipeError:
        _discard_output()
        return 1
    except OSError as error:
        print(f"tproxyd: error: {error}", file=sys.stderr)
        _discard_output()
        return 1
    except KeyboardInterrupt:
        return 130


def _open_standard_files() -> None:
    """Give standard input, output and error a place where the caller closed them: else a socket would get theirs."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _discard_output() -> None:
    """Let the interpreter's last flush of standard output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tproxyd", description="A transparent proxy gateway that keeps the original four-tuple."
    )
    parser.add_argument("--version", action="version", version=f"tproxyd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        found.set_defaults(command=command)
        if name != "remove-rules":
            found.add_argument("-c", "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE")
        return found

    run = add("run", _run, "apply the rules and relay flows until SIGTERM; SIGUSR1 logs the counters")
    run.add_argument("--keep-rules", action="store_true", help="leave the rules in place after a clean stop")
    add("check-config", _check_config, "read the configuration and report every problem in it")
    apply = add("apply-rules", _apply_rules, "bring nftables or iptables and policy routing to the configured state")
    apply.add_argument("--dry-run", action="store_true", help="print what would change, change nothing")
    apply.add_argument(
        "--confirm", type=_seconds, metavar="SECONDS", help="take the change back unless it is confirmed in time"
    )
    add("remove-rules", _remove_rules, "take everything of tproxyd's out of the kernel, whatever made it")
    show = add("show-rules", _show_rules, "print the rules that the configuration stands for")
    show.add_argument("--format", choices=["nft", "iptables", "json"], help="default: what the configuration uses")
    why = add("explain", _explain, "tell which rule takes a flow, why those before it don't, and where it runs")
    why.add_argument("source", type=_end, metavar="SOURCE", help="ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT")
    why.add_argument("destination", type=_end_with_port, metavar="DESTINATION", help="ADDRESS:PORT or [ADDRESS]:PORT")
    why.add_argument("--network", choices=["tcp", "udp"], default="tcp", help="default: tcp")
    why.add_argument(
        "--interface", metavar="NAME", help="where it comes in; default: the only one, lo for the box's own"
    )
    why.add_argument("--listener", metavar="NAME", help="which listener takes it; default: the first")
    why.add_argument("--json", action="store_true", help="print one JSON object")
    why.set_defaults(usage_error=why.error)
    return parser


def _end(text: str) -> Endpoint:
    from tproxyd.policy.explain import parse_end

    try:
        return parse_end(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _end_with_port(text: str) -> Endpoint:
    end = _end(text)
    if not end.port:
        raise argparse.ArgumentTypeError(f"{text!r} has no port")
    return end


def _seconds(text: str) -> int:
    seconds = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 3600")
    return seconds


def _run(options: argparse.Namespace) -> int:
    from tproxyd.daemon.run import run

    run(options.config, keep_rules=options.keep_rules)
    return 0


def _check_config(options: argparse.Namespace) -> int:
    from tproxyd.config import load_config
    from tproxyd.netfilter.plan import plan

    config = load_config(options.config)
    ruleset = plan(config)
    prefixes = sum(len(prefix_set.prefixes) for prefix_set in ruleset.excluded)
    rules = f", {len(config.rules)} rules" if config.rules else ""
    print(f"{options.config}: ok: {', '.join(ruleset.interfaces)}, {prefixes} excluded prefixes{rules}")
    return 0


def _apply_rules(options: argparse.Namespace) -> int:
    application = _application(options)
    for warning in application.check():
        print(f"tproxyd: warning: {warning}", file=sys.stderr)
    if options.dry_run:
        print(application.difference() or "nothing to change")
        return 0
    if options.confirm:
        return _apply_on_trial(application, options.confirm)
    print("applied" if application.apply(checked=True) else "nothing to change")
    return 0


def _apply_on_trial(application: Application, seconds: int) -> int:
    from tproxyd.netfilter.confirm import Trial, asked_to_keep

    with Trial(application, seconds) as trial:
        if not application.apply(checked=True):
            trial.confirm()
            print("nothing to change")
            return 0
        if asked_to_keep(seconds):
            trial.confirm()
            print("kept")
            return 0
    print("tproxyd: error: not confirmed: the rules are as they were before", file=sys.stderr)
    return 1


def _remove_rules(_: argparse.Namespace) -> int:
    from tproxyd.netfilter.apply import remove

    print("removed" if remove() else "nothing to remove")
    return 0


def _show_rules(options: argparse.Namespace) -> int:
    from tproxyd.config import load_config
    from tproxyd.netfilter import iptables, nft
    from tproxyd.netfilter.plan import as_json, plan

    config = load_config(options.config)
    ruleset = plan(config)
    form = options.format or {"nftables": "nft", "iptables": "iptables"}[config.interception.ruleset]
    if form == "json":
        print(json.dumps(as_json(ruleset), indent=2))
    else:
        print({"nft": nft, "iptables": iptables}[form].render(ruleset), end="")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from tproxyd.config import load_config
    from tproxyd.flow import Client, Flow, Network, OrigDst
    from tproxyd.netfilter.plan import plan, rules_of, surroundings
    from tproxyd.policy.explain import NotToldError, as_json, as_lines, explain
    from tproxyd.relay.sockets import is_local

    config = load_config(options.config)
    around = surroundings(plan(config), config)
    client, orig_dst = Client(*options.source), OrigDst(*options.destination)
    if client.version != orig_dst.version:
        options.usage_error("SOURCE and DESTINATION are of different address families")
    listeners = [listener.name for listener in config.listeners]
    if options.listener not in (None, *listeners):
        options.usage_error(f"there is no listener {options.listener}: {', '.join(listeners)}")
    own = {end.address for end in (client, orig_dst) if is_local(end.address)}
    only_one = around.interfaces[0] if len(around.interfaces) == 1 else ""
    interface = options.interface or ("lo" if client.address in own else only_one)
    flow = Flow(Network(options.network), client, orig_dst, options.listener or listeners[0], interface)
    try:
        found = explain(rules_of(config), around, flow, own)
    except NotToldError as error:
        options.usage_error(str(error))
    print(json.dumps(as_json(found), indent=2) if options.json else "\n".join(as_lines(found)))
    return 0


def _application(options: argparse.Namespace) -> Application:
    from tproxyd.config import load_config
    from tproxyd.netfilter.apply import Application

    return Application(load_config(options.config))


if __name__ == "__main__":
    sys.exit(main())
