"""The laboratory of the kernel tests: namespaces, a gateway between two networks, the real daemon, what it left behind.

Nothing here knows pytest; the fixtures stand in `tests/kernel/conftest.py`.
"""

from tests.lab.arena import Arena
from tests.lab.daemon import Daemon, DaemonError, cli, config, tproxyd, write_config
from tests.lab.gateway import Gateway
from tests.lab.namespace import Namespace
from tests.lab.residue import Residue, exact_listings, listings, open_descriptors
from tests.lab.services import TcpService, UdpService, answers, ask, hears_refusal, service
from tests.lab.waiting import eventually

__all__ = [
    "Arena",
    "Daemon",
    "DaemonError",
    "Gateway",
    "Namespace",
    "Residue",
    "TcpService",
    "UdpService",
    "answers",
    "ask",
    "cli",
    "config",
    "eventually",
    "exact_listings",
    "hears_refusal",
    "listings",
    "open_descriptors",
    "service",
    "tproxyd",
    "write_config",
]
