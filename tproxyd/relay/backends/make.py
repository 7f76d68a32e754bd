"""Settings to backends, each after the one that it goes via.

What only proxies need is imported only where there are some: a worker starts in less time and memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tproxyd.relay.backends.backend import Backend
from tproxyd.relay.backends.direct import Direct
from tproxyd.relay.counters import Counters
from tproxyd.relay.poller import Poller
from tproxyd.relay.settings import DirectSettings, ProxySettings, RelaySettings

if TYPE_CHECKING:
    from tproxyd.relay.backends.proxy import Proxy
    from tproxyd.relay.opening import Means


def make_backends(
    settings: RelaySettings, loop: asyncio.AbstractEventLoop, poller: Poller, counters: Counters
) -> dict[str, Backend]:
    """Build them all; the configuration has seen to it that each `via` names a proxy and none leads to itself."""
    direct = {name: one for name, one in settings.backends.items() if isinstance(one, DirectSettings)}
    proxies = {name: one for name, one in settings.backends.items() if isinstance(one, ProxySettings)}
    made: dict[str, Backend] = {name: Direct(one, settings.server_mark, counters) for name, one in direct.items()}
    if proxies:
        made.update(_make_proxies(proxies, _means(settings, loop, poller)))
    return made


def _make_proxies(settings: Mapping[str, ProxySettings], means: Means) -> dict[str, Proxy]:
    made: dict[str, Proxy] = {}

    def make(name: str) -> Proxy:
        if name not in made:
            one = settings[name]
            via = make(one.via) if one.via else None
            made[name] = _class_of(one)(name, one, means, via)
        return made[name]

    for name in settings:
        make(name)
    return made


def _means(settings: RelaySettings, loop: asyncio.AbstractEventLoop, poller: Poller) -> Means:
    from tproxyd.relay.complaints import Complaints
    from tproxyd.relay.opening import Means
    from tproxyd.relay.resolver import Resolver

    return Means(
        loop=loop,
        poller=poller,
        resolver=Resolver(loop),
        mark=settings.server_mark,
        limit_s=settings.connect_s,
        complain=Complaints(),
    )


def _class_of(settings: ProxySettings) -> type[Proxy]:
    if settings.type == "socks5":
        from tproxyd.relay.backends.socks5 import Socks5

        return Socks5
    from tproxyd.relay.backends.http_connect import HttpConnect

    return HttpConnect
