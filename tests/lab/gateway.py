"""Three boxes in a row: client - gateway - server, each a namespace, joined by veth pairs.

    client  eth0 10.1.0.2..9  fd01::2..9  ---  lan0 10.1.0.1 fd01::1  gateway
    gateway wan0 10.2.0.1     fd02::1     ---  eth0 10.2.0.2..9 fd02::2..9  server

The gateway does not forward unless told to, so a proxy that does nothing can't pass for one that works.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.lab.namespace import Namespace
from tests.lab.waiting import eventually

_HOSTS: Final = range(2, 10)


class Gateway:
    """The three namespaces and their addresses; `close` deletes them.

    Attributes:
        one_armed: client and server stand on the same side of the gateway, behind lan0.
    """

    def __init__(self, *, one_armed: bool = False) -> None:
        """Build it; less than half a second."""
        self.one_armed = one_armed
        self.namespaces: list[Namespace] = []
        try:
            self.client, self.gateway, self.server = (self._add(role) for role in ("client", "gateway", "server"))
            if one_armed:
                self._join_on_a_switch()
            else:
                self._join_in_a_row()
            self._wait_for_links()
        except BaseException:
            self.close()
            raise

    def client_address(self, version: int, host: int = 2) -> str:
        """An address of the client; hosts 2 to 9."""
        return {4: f"10.1.0.{host}", 6: f"fd01::{host}"}[version]

    def server_address(self, version: int, host: int = 2) -> str:
        """An address of the server; hosts 2 to 9."""
        return {4: f"10.2.0.{host}", 6: f"fd02::{host}"}[version]

    def gateway_address(self, version: int, side: str = "client") -> str:
        """The gateway's address towards the client or the server."""
        network = {"client": 1, "server": 2}[side]
        return {4: f"10.{network}.0.1", 6: f"fd0{network}::1"}[version]

    def forwarding(self, on: bool) -> None:
        """Let the gateway's kernel route between the two networks, or not."""
        self.gateway.sysctl("net.ipv4.ip_forward", int(on))
        self.gateway.sysctl("net.ipv6.conf.all.forwarding", int(on))

    def close(self) -> None:
        """Delete everything, even if something of it fails."""
        errors = []
        while self.namespaces:
            try:
                self.namespaces.pop().close()
            except Exception as error:  # noqa: BLE001  # the others are deleted first; raised below
                errors.append(error)
        if errors:
            raise errors[0]

    def _add(self, role: str) -> Namespace:
        self.namespaces.append(Namespace(role))
        return self.namespaces[-1]

    def _join_in_a_row(self) -> None:
        gateway, server = self.gateway.name, self.server.name
        self.client.ip(
            f"link add eth0 type veth peer name lan0 netns {gateway}\n" + _end("eth0", 1, _HOSTS) + _default(1)
        )
        self.gateway.ip(
            f"link add wan0 type veth peer name eth0 netns {server}\n" + _end("lan0", 1, [1]) + _end("wan0", 2, [1])
        )
        self.server.ip(_end("eth0", 2, _HOSTS) + _default(2))

    def _join_on_a_switch(self) -> None:
        switch = self._add("switch")
        switch.ip("link add br0 type bridge\nlink set br0 up")
        for port, (namespace, name) in enumerate(
            [(self.client, "eth0"), (self.gateway, "lan0"), (self.server, "eth0")]
        ):
            switch.ip(
                f"link add p{port} type veth peer name {name} netns {namespace.name}\n"
                f"link set p{port} master br0\nlink set p{port} up"
            )
        self.client.ip(_end("eth0", 1, _HOSTS) + _default(1))
        self.gateway.ip(_end("lan0", 1, [1]) + _addresses("lan0", 2, [1]))
        self.server.ip(_end("eth0", 2, _HOSTS) + _default(2))

    def _wait_for_links(self) -> None:
        for namespace in self.namespaces:
            eventually(lambda at=namespace: _all_up(at), f"links of {namespace.name} are up")


@contextmanager
def gateway(*, one_armed: bool = False) -> Iterator[Gateway]:
    """A `Gateway` for a block."""
    made = Gateway(one_armed=one_armed)
    try:
        yield made
    finally:
        made.close()


def _end(interface: str, network: int, hosts: range | list[int]) -> str:
    return f"link set {interface} up\n" + _addresses(interface, network, hosts)


def _addresses(interface: str, network: int, hosts: range | list[int]) -> str:
    return "".join(
        f"addr add 10.{network}.0.{host}/24 dev {interface}\naddr add fd0{network}::{host}/64 dev {interface} nodad\n"
        for host in hosts
    )


def _default(network: int) -> str:
    return f"route add default via 10.{network}.0.1\nroute add default via fd0{network}::1\n"


def _all_up(namespace: Namespace) -> bool:
    links = json.loads(namespace.run(["ip", "-j", "link"]).stdout)
    return all(link["operstate"] == "UP" for link in links if link["ifname"] != "lo")
