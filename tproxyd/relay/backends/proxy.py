"""What `socks5` and `http_connect` share: a proxy, reached straight or via others, is asked for the destination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tproxyd.flow import Client, OrigDst
from tproxyd.protocols.address import Address, to_address
from tproxyd.protocols.credentials import Credentials
from tproxyd.protocols.dialogue import Dialogue
from tproxyd.relay.opening import Ask, Failure, Means, Opening
from tproxyd.relay.settings import ProxySettings
from tproxyd.relay.sockets import Socket


class Proxy(ABC):
    """A proxy of the configuration. It speaks as this box: no proxy takes the client's address.

    Attributes:
        full_cone: one association speaks for a client endpoint to everybody.
        keeps_four_tuple: never.
    """

    full_cone = True
    keeps_four_tuple = False

    def __init__(self, name: str, settings: ProxySettings, means: Means, via: Proxy | None) -> None:
        """Args: name: of the backend; via: the proxy that leads to this one."""
        self.server = to_address(settings.host, settings.port)
        self.entrance: Address = via.entrance if via else self.server
        self._name = name
        self._resolve = settings.resolve == "local"
        self._means = means
        self._before = via.asks(self.server) if via else []
        has_credentials = settings.username is not None
        self._credentials = Credentials(settings.username or "", settings.password) if has_credentials else None

    def connect(self, client: Client, orig_dst: OrigDst) -> Opening:  # noqa: ARG002  # no proxy is told of the client
        """Return an opening that leads to the original destination; nothing is sent before it is started."""
        return Opening(self._means, self.entrance, self.asks(orig_dst))

    def asks(self, address: Address) -> list[Ask]:
        """Return what has to be asked, from the first proxy to this one, to be led to `address`."""
        return [*self._before, self._ask(address, self._dialogue, self._judge)]

    @abstractmethod
    def open_datagram(self, client: Client, connect_to: OrigDst | None) -> Socket | Opening:
        """See `Backend`."""

    @abstractmethod
    def _dialogue(self, address: Address) -> Dialogue[Any]:
        """Return the dialogue that asks for a connection."""

    @abstractmethod
    def _judge(self, event: Any) -> Failure | None:
        """Tell what is wrong with the dialogue's event."""

    def _ask(
        self, address: Address, begin: Callable[[Address], Dialogue[Any]], judge: Callable[[Any], Failure | None]
    ) -> Ask:
        return Ask(proxy=self._name, address=address, resolve=self._resolve, begin=begin, judge=judge)
