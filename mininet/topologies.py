"""The networks: four client hosts on a switch, one or two gateways in a row, a server behind them.

Only what Mininet needs to build them: who is connected to whom, and who has which address.

    h1 h2 h3 h4 - s1 - lan0 gw wan0 - eth0 server
    h1 h2 h3 h4 - s1 - lan0 gw1 wan0 - lan0 gw2 wan0 - eth0 server
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any, Final

from isolation import DEBIAN_PACKAGES


def _provide_mininet() -> None:
    """Make Debian's Mininet importable, and nothing else of Debian's: the virtual environment has its own packages.

    This very folder is named `mininet`, too, and may be found as a namespace package; the real one has an origin.
    """
    spec = PathFinder.find_spec("mininet")
    if spec is None or spec.origin is None:
        spec = PathFinder.find_spec("mininet", [DEBIAN_PACKAGES])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("there is no Mininet: apt install mininet")
    package = module_from_spec(spec)
    sys.modules["mininet"] = package
    spec.loader.exec_module(package)


_provide_mininet()

from mininet.link import Link  # noqa: E402
from mininet.log import setLogLevel  # noqa: E402
from mininet.net import Mininet  # noqa: E402
from mininet.node import Host  # noqa: E402
from mininet.nodelib import LinuxBridge  # noqa: E402
from mininet.topo import Topo  # noqa: E402

VERSIONS: Final = (4, 6)

_QUICK_IPV6: Final = "net.ipv6.conf.{}.accept_dad=0 net.ipv6.conf.{}.accept_ra=0 net.ipv6.conf.{}.forwarding=0"
_PLAIN_IPV4: Final = "net.ipv4.conf.{}.rp_filter=0 net.ipv4.conf.{}.send_redirects=0"


class Machine(Host):
    """A host with addresses of both families; it forwards nothing, so a dead proxy can't pass for a working one."""

    def __init__(self, name: str, *, addresses: dict[str, list[str]], routes: dict[str, str], **params: Any) -> None:
        """Args: addresses: with prefix length, by interface; routes: next hop by destination."""
        super().__init__(name, **params)
        self._addresses = addresses
        self._routes = routes
        settings = [f"{_PLAIN_IPV4} {_QUICK_IPV6}".replace("{}", scope) for scope in ("all", "default")]
        self.sure(f"sysctl -qw net.ipv4.ip_forward=0 {' '.join(settings)}")

    def config(self, **params: Any) -> dict[str, Any]:
        """Give the interfaces their addresses, then the routes."""
        result: dict[str, Any] = super().config(**params)
        for interface, addresses in self._addresses.items():
            for address in addresses:
                self.sure(f"ip address add {address} dev {interface}")
        for destination, hop in self._routes.items():
            self.sure(f"ip {'-6' if ':' in hop else '-4'} route add {destination} via {hop}")
        return result

    def sure(self, command: str) -> None:
        """Run a command that has nothing to say.

        Raises:
            RuntimeError: it said something.
        """
        if said := self.cmd(command).strip():
            raise RuntimeError(f"{self.name}: {command}: {said}")


class FourHosts(Topo):
    """Four clients on a switch, the gateway, the server.

    Attributes:
        gateways: from the clients' side to the server's; clients arrive on their interface `lan0`.
        clients, server: addresses by IP version.
    """

    gateways: tuple[str, ...] = ("gw",)
    clients: Final = {f"h{n}": {4: f"10.0.1.{n}", 6: f"fd00:1::{n}"} for n in range(1, 5)}
    server: Final = {4: "10.0.2.1", 6: "fd00:2::1"}

    def build(self, *_: Any, **__: Any) -> None:
        """Tell Mininet what there is."""
        self.addSwitch("s1")
        for name, address in self.clients.items():
            own = {"eth0": [f"{address[4]}/24", f"{address[6]}/64"]}
            self._machine(name, own, default=("10.0.1.254", "fd00:1::fe"))
            self.addLink(name, "s1", intfName1="eth0")
        before = "s1"
        for index, name in enumerate(self.gateways):
            self._gateway(index, name)
            # The switch takes interfaces that bear its name; the others are told apart by their side.
            ends = {"intfName2": "lan0"} if before == "s1" else {"intfName1": "wan0", "intfName2": "lan0"}
            self.addLink(before, name, **ends)
            before = name
        own = {"eth0": [f"{self.server[4]}/24", f"{self.server[6]}/64"]}
        self._machine("server", own, default=("10.0.2.254", "fd00:2::fe"))
        self.addLink(before, "server", intfName1="wan0", intfName2="eth0")

    def _gateway(self, index: int, name: str) -> None:
        """Links between gateways are 10.0.(100+n).0/24 and fd00:(100+n)::/64, with .1 on the clients' side."""
        first, last = index == 0, index == len(self.gateways) - 1
        near, far = 100 + index - 1, 100 + index
        addresses = {
            "lan0": ["10.0.1.254/24", "fd00:1::fe/64"] if first else [f"10.0.{near}.2/24", f"fd00:{near}::2/64"],
            "wan0": ["10.0.2.254/24", "fd00:2::fe/64"] if last else [f"10.0.{far}.1/24", f"fd00:{far}::1/64"],
        }
        routes = {} if first else {"10.0.1.0/24": f"10.0.{near}.1", "fd00:1::/64": f"fd00:{near}::1"}
        if not last:
            routes |= {"10.0.2.0/24": f"10.0.{far}.2", "fd00:2::/64": f"fd00:{far}::2"}
        self.addHost(name, cls=Machine, ip=None, addresses=addresses, routes=routes)

    def _machine(self, name: str, addresses: dict[str, list[str]], default: tuple[str, str]) -> None:
        routes = {"0.0.0.0/0": default[0], "::/0": default[1]}
        self.addHost(name, cls=Machine, ip=None, addresses=addresses, routes=routes)


class TwoGateways(FourHosts):
    """Two gateways in a row: the second one gets flows whose source was already kept by the first, and so must it.

    Side by side, each flow would cross one gateway only, which `FourHosts` shows already.
    """

    gateways = ("gw1", "gw2")


TOPOLOGIES: Final[dict[str, type[FourHosts]]] = {"four-hosts": FourHosts, "two-gateways": TwoGateways}


def build(topology: FourHosts) -> Mininet:
    """Build and start a network in the current network namespace; the caller stops it."""
    setLogLevel("error")  # it warns of bridged packets that meet iptables rules: there are none where the bridge is
    Mininet.inited = True  # else it would set limits of the whole machine
    net = Mininet(topo=topology, switch=LinuxBridge, link=Link, controller=None, autoSetMacs=True)
    net.start()
    return net
