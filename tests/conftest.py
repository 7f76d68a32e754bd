"""What must be so before any test."""

import signal

import tproxyd.daemon.log  # noqa: F401  # Mininet replaces the class of all loggers made after it

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup hands on that it is ignored, and programs keep to that
