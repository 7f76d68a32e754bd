"""Reading the configuration and writing the rules, in a child of its own.

100,000 prefixes cost some 200 MB for a moment, and pydantic, PyYAML and libnftables another 40: all of it goes
away with the child. The supervisor gets back only what it needs to serve.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self

from tproxyd.daemon.secret import read_secret
from tproxyd.errors import ConfigError, LocalProtocolError, TproxydError
from tproxyd.flow import Network
from tproxyd.policy import pack
from tproxyd.relay.settings import BackendSettings, DirectSettings, ProxySettings, RelaySettings

if TYPE_CHECKING:
    from tproxyd.config import Config
    from tproxyd.config.model import Backend
    from tproxyd.netfilter.plan import Ruleset


STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """What may be learned.

    Attributes:
        flows: flows of one family at most.
        interfaces: the client side.
    """

    versions: tuple[int, ...]
    flows: int
    idle_s: int
    interfaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration, as far as a supervisor needs it.

    Attributes:
        settings: limits are those of the whole daemon.
        policy: the packed rules; `rules` their names, that of the last word included.
        listen: the addresses and ports the listeners are bound to, with their network.
        lease: interception must be leased (`on_failure: open`), through nftables or iptables.
        learning: which UDP flows the kernel may carry; None: none.
    """

    settings: RelaySettings
    policy: bytes
    rules: tuple[str, ...]
    workers: int
    listen: tuple[tuple[str, str, int], ...]
    versions: tuple[int, ...]
    lease: str | None
    learning: LearningSettings | None


class Preparation:
    """The child, from fork to its second and last answer."""

    def __init__(self, path: Path) -> None:
        """Fork. Call it before any thread or event loop is there."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        go_reader, self._go = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if not self._pid:
            os.close(reader)
            os.close(self._go)
            _child(path, writer, go_reader)
        os.close(writer)
        os.close(go_reader)
        self._answers: IO[bytes] = os.fdopen(reader, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Wait for the child to end: it may still be at writing the rules, and nobody may meddle with them."""
        if self._pid:
            os.close(self._go)
            self._answers.read()
            self._answers.close()
            os.waitpid(self._pid, 0)
            self._pid = 0

    def prepared(self) -> Prepared:
        """Wait for the configuration.

        Raises:
            ConfigError: it can't be used.
        """
        answer: Prepared = self._next()
        return answer

    def rules(self) -> list[str]:
        """Have the rules applied, wait for it, and return warnings.

        Raises:
            TproxydError: as `Application.apply`; nothing has changed then.
        """
        with suppress(BrokenPipeError):  # it found the rules impossible already
            os.write(self._go, b"!")
        answer: list[str] = self._next()
        self.wait()
        return answer

    def _next(self) -> Any:
        try:
            answer = pickle.load(self._answers)  # noqa: S301  # our own child, with our own rights
        except EOFError as error:
            raise TproxydError("reading the configuration ended without an answer (out of memory?)") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _child(path: Path, writer: int, go: int) -> None:
    """Answer twice, then end without running anything of the parent's."""
    code = 0
    with os.fdopen(writer, "wb", buffering=0) as answers:
        try:
            _prepare(path, answers, go)
        except TproxydError as error:
            answers.write(pickle.dumps(error))
        except OSError as error:
            answers.write(pickle.dumps(TproxydError(f"preparing the rules failed: {error}")))
        except BaseException as error:  # noqa: BLE001  # a child's border: reported, and the child ends
            answers.write(pickle.dumps(TproxydError(f"internal error: {error!r}")))
            code = 1
    with suppress(OSError, AttributeError):
        sys.stderr.flush()
    os._exit(code)


def _prepare(path: Path, answers: Any, go: int) -> None:
    from tproxyd.config import load_config
    from tproxyd.netfilter.plan import plan

    config = load_config(path)
    ruleset = plan(config)
    answers.write(pickle.dumps(summary(config, ruleset)))

    from tproxyd.netfilter.apply import Application  # with all its libraries, while the workers come up

    application = Application(config, ruleset)
    warnings = application.check()
    if not os.read(go, 1):
        return  # the start failed: the rules stay as they are
    application.apply(checked=True)
    answers.write(pickle.dumps(warnings))


def summary(config: Config, ruleset: Ruleset) -> Prepared:
    """Reduce a configuration to what a supervisor needs."""
    from tproxyd.netfilter.plan import rules_of

    rules = rules_of(config)
    listen = {(str(i.network), i.address, i.port) for i in ruleset.intercepts}
    workers = config.workers if isinstance(config.workers, int) else len(os.sched_getaffinity(0))
    return Prepared(
        settings=RelaySettings(
            listener=config.listeners[0].name,
            backends={name: _backend(name, backend) for name, backend in config.backends.items()},
            connect_s=config.timeouts.connect,
            tcp_idle_s=config.timeouts.tcp_idle,
            udp_idle_s=config.timeouts.udp_idle,
            max_flows=config.limits.max_flows,
            max_flows_per_client=config.limits.max_flows_per_client,
            client_mark=ruleset.client_mark.value,
            server_mark=ruleset.server_mark.value,
            log_level=config.logging.level,
            log_format=config.logging.format,
            log_flows=config.logging.flows,
            user=config.user,
        ),
        policy=pack(rules),
        rules=rules.names,
        workers=workers,
        listen=tuple(sorted(listen)),
        versions=ruleset.versions,
        lease=config.interception.ruleset if ruleset.lease else None,
        learning=_learning(ruleset),
    )


def _learning(ruleset: Ruleset) -> LearningSettings | None:
    if ruleset.learned is None:
        return None
    versions = tuple(each.version for each in ruleset.intercepts if each.network is Network.UDP)
    return LearningSettings(versions, ruleset.learned.flows, ruleset.learned.idle_s, ruleset.interfaces)


def _backend(name: str, backend: Backend) -> BackendSettings:
    """Return a backend with its secret, which is read here, with the rights of root.

    Raises:
        ConfigError: the secret can't be read, or anyone could.
    """
    if backend.type == "direct":
        return DirectSettings(source=backend.source, nat=backend.nat)
    place = f"backends.{name}.password_file"
    settings = ProxySettings(
        type=backend.type,
        host=backend.server.host,
        port=backend.server.port,
        via=backend.via,
        resolve=backend.resolve,
        username=backend.username,
        password=read_secret(Path(backend.password_file), place) if backend.password_file else "",
    )
    if settings.username is not None:
        _check_credentials(settings, place)
    return settings


def _check_credentials(settings: ProxySettings, place: str) -> None:
    """Have the codec look at the password: what its protocol can't say should be known before a flow meets it."""
    from tproxyd.protocols import http_connect, socks5
    from tproxyd.protocols.credentials import Credentials

    credentials = Credentials(settings.username or "", settings.password)
    try:
        if settings.type == "socks5":
            socks5.Client(socks5.Command.CONNECT, socks5.UNSPECIFIED, credentials)
        else:
            http_connect.Client(socks5.UNSPECIFIED, credentials)
    except LocalProtocolError as error:
        raise ConfigError([f"{place}: {error}"]) from None


def share(settings: RelaySettings, workers: int) -> RelaySettings:
    """One worker's share of the limits, rounded up: the kernel spreads flows over workers by their client port."""
    return replace(
        settings,
        max_flows=-(-settings.max_flows // workers),
        max_flows_per_client=-(-settings.max_flows_per_client // workers),
    )
