"""What must be loaded before any test: Mininet replaces the class of all loggers made after it."""

import tproxyd.daemon.log  # noqa: F401
