"""Settings to backends, each after the one that it goes via."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tproxyd.relay.backends.backend import Backend
from tproxyd.relay.backends.direct import Direct
from tproxyd.relay.counters import Counters
from tproxyd.relay.opening import Means
from tproxyd.relay.settings import BackendSettings, DirectSettings, ProxySettings

if TYPE_CHECKING:
    from tproxyd.relay.backends.proxy import Proxy


def make_backends(settings: Mapping[str, BackendSettings], means: Means, counters: Counters) -> dict[str, Backend]:
    """Build them all; the configuration has seen to it that each `via` names a proxy and none leads to itself."""
    proxies: dict[str, Proxy] = {}
    made: dict[str, Backend] = {}
    for name, one in settings.items():
        if isinstance(one, DirectSettings):
            made[name] = Direct(one, means.mark, counters)
        else:
            made[name] = _proxy(name, settings, means, proxies)
    return made


def _proxy(name: str, settings: Mapping[str, BackendSettings], means: Means, proxies: dict[str, Proxy]) -> Proxy:
    if name not in proxies:
        one = settings[name]
        assert isinstance(one, ProxySettings)  # noqa: S101  # checked with the configuration
        via = _proxy(one.via, settings, means, proxies) if one.via else None
        proxies[name] = _class_of(one)(name, one, means, via)
    return proxies[name]


def _class_of(settings: ProxySettings) -> type[Proxy]:
    """Import a protocol only where a backend speaks it: a worker starts in less time and memory."""
    if settings.type == "socks5":
        from tproxyd.relay.backends.socks5 import Socks5

        return Socks5
    from tproxyd.relay.backends.http_connect import HttpConnect

    return HttpConnect
