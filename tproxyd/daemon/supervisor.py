"""The supervisor: owns the listening sockets, the workers and the lease; relays nothing, parses nothing foreign.

Each worker slot has listening sockets of its own (SO_REUSEPORT). A worker that dies is replaced by one that
takes over the very sockets, accept queue included.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from tproxyd.daemon.learning import Learning
from tproxyd.daemon.notify import notify
from tproxyd.daemon.preparation import STOP_SIGNALS, Prepared, share
from tproxyd.errors import PermissionDenied, TproxydError
from tproxyd.netfilter.plan import LEASE_S
from tproxyd.relay import sockets
from tproxyd.relay.counters import Counters
from tproxyd.relay.settings import MESSAGE_BYTES

_HEARTBEAT_S: Final = 1.0
_SILENT_S: Final = 4.0
_HUNG_S: Final = 10.0
_READY_S: Final = 15.0
_STOP_S: Final = 3.0
_SHORT_LIFE_S: Final = 2.0
_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 5.0

_log = logging.getLogger(__name__)


class Slot:
    """A worker's place: its listening sockets, and the process that serves them now.

    Attributes:
        ready: set once a worker of this slot serves.
        failure: why a worker refused to start.
        heard: monotonic seconds of the last message.
        counters: the worker's last counters.
        rule_counters: how many flows each rule took there.
    """

    def __init__(self, number: int, prepared: Prepared, *, policy: int, learning: Learning | None) -> None:
        """Open the slot's listening sockets.

        Args:
            number: which slot it is.
            prepared: the configuration.
            policy: an open file that holds the packed rules, for all workers to read.
            learning: who takes the flows that its worker offers to the kernel; None: nobody.

        Raises:
            OSError: the kernel refused one.
        """
        self.number = number
        self.ready = asyncio.Event()
        self.failure: str | None = None
        self.heard = 0.0
        self.counters: dict[str, int] = {}
        self.rule_counters: dict[str, int] = {}
        self.process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._learning = learning
        self._settings = share(prepared.settings, prepared.workers)
        self._rules = prepared.rules
        self._policy = policy
        self._channel: socket.socket | None = None
        self._listeners: list[tuple[str, sockets.Socket]] = []
        openers = {"tcp": sockets.tcp_listener, "udp": sockets.udp_listener}
        try:
            for network, address, port in prepared.listen:
                self._listeners.append((network, openers[network](address, port, self._settings.client_mark)))
        except BaseException:
            self.close()
            raise

    def tell(self, message: dict[str, Any]) -> bool:
        """Send a message to the worker, if there is one; False: it has too many to read, try again."""
        if self._channel is not None:
            try:
                self._channel.send(json.dumps(message).encode())
            except BlockingIOError:
                return False
            except OSError:
                _log.debug("worker %d does not listen", self.number)
        return True

    async def serve(self) -> None:
        """Keep a worker running until cancelled."""
        delay_s = _FIRST_DELAY_S
        while True:
            started = monotonic()
            try:
                end = _how(await self._run_worker())
            except OSError as error:
                end = f"could not be started: {error}"
            self.counters, self.rule_counters = {}, {}
            if self._learning is not None:
                self._learning.abandon(self.number)
            if self._stopping or (self.failure is not None and not self.ready.is_set()):
                self.ready.set()
                return
            delay_s = _FIRST_DELAY_S if monotonic() - started > _SHORT_LIFE_S else min(2 * delay_s, _LONGEST_DELAY_S)
            why = self.failure or end
            self.failure = None
            _log.error("worker %d ended (%s): starting another in %.1f s", self.number, why, delay_s)
            await asyncio.sleep(delay_s)

    def kill_if_hung(self) -> None:
        """End a worker that has not answered for long, so that another takes its place."""
        process = self.process
        if self._channel is None or process is None or monotonic() - self.heard < _HUNG_S:
            return
        _log.error("worker %d has not answered for %.0f s: killed", self.number, _HUNG_S)
        self.heard = monotonic()
        with suppress(ProcessLookupError):
            process.kill()

    async def stop(self) -> None:
        """End the worker, in order if it listens."""
        self._stopping = True
        process = self.process
        if process is None or process.returncode is not None:
            return
        self.tell({"do": "stop"})
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            _log.error("worker %d does not stop: killed", self.number)
            process.kill()
            await process.wait()

    def close(self) -> None:
        """Close the listening sockets."""
        for _, listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def _run_worker(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        loop = asyncio.get_running_loop()
        with ours:
            with theirs:
                arguments = [f"{network}:{listener.fileno()}" for network, listener in self._listeners]
                ours.send(self._settings.to_json())
                ours.setblocking(False)
                self.process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "tproxyd.daemon.worker"),
                    *(str(theirs.fileno()), str(self._policy), *arguments),
                    pass_fds=(theirs.fileno(), self._policy, *(held.fileno() for _, held in self._listeners)),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # away from the operator's terminal
                )
            self._channel = ours
            self.heard = monotonic()
            loop.add_reader(ours.fileno(), self._on_message, ours)
            try:
                return await self.process.wait()
            finally:
                self._channel = None
                loop.remove_reader(ours.fileno())
                self._drain(ours)

    def _drain(self, channel: socket.socket) -> None:
        """Read what a worker said right before it ended."""
        while self._on_message(channel):
            pass

    def _on_message(self, channel: socket.socket) -> bool:
        try:
            data = channel.recv(MESSAGE_BYTES)
        except OSError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(channel.fileno())
            return False
        self.heard = monotonic()
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        """Take a message of the worker's, which is less trusted than we are: what is not understood is dropped."""
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            _log.warning("worker %d said what nobody understands", self.number)
            return
        counters = message.get("counters")
        if isinstance(counters, dict):
            self.counters = {
                name: value for name in Counters().as_dict() if isinstance(value := counters.get(name), int)
            }
        taken = message.get("rules")
        if isinstance(taken, list) and all(isinstance(value, int) for value in taken):
            self.rule_counters = dict(zip(self._rules, taken, strict=False))
        if "failed" in message:
            self.failure = str(message["failed"])
        if message.get("ready"):
            self.ready.set()
        if self._learning is not None and "learn" in message:
            self._learning.ask(self.number, message["learn"])


class Supervisor:
    """All slots, the lease, the signals."""

    def __init__(self, prepared: Prepared, rules: Callable[[], list[str]]) -> None:
        """Args: rules: waits until the rules are applied and returns warnings; it may block."""
        self._prepared = prepared
        self._rules = rules
        self._slots: list[Slot] = []
        self._policy = _sealed(prepared.policy)
        self._stop = asyncio.Event()
        self._lease_lost = False
        self._learning: Learning | None = None
        if prepared.learning is not None:
            self._learning = Learning(prepared.learning, lambda slot, message: self._slots[slot].tell(message))

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            TproxydError: the daemon could not start; the rules are not applied, or are taken back by the caller.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGUSR1, self._log_counters)
        loop.add_signal_handler(signal.SIGHUP, _log.warning, "SIGHUP: this version can't reload, restart it")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        tasks: list[asyncio.Task[None]] = []
        learning: asyncio.Task[None] | None = None
        try:
            self._open_slots()
            tasks = [asyncio.create_task(slot.serve()) for slot in self._slots]
            await self._start()
            if self._learning is not None:
                learning = asyncio.create_task(self._learning.serve())
            await self._serve()
        finally:
            notify("STOPPING=1")
            try:
                if self._learning is not None and learning is not None:
                    self._learning.stop()
                    await learning
                    await self._learning.close()
            finally:
                await self._end(tasks)

    def _open_slots(self) -> None:
        for number in range(self._prepared.workers):
            try:
                self._slots.append(Slot(number, self._prepared, policy=self._policy, learning=self._learning))
            except PermissionError as error:
                raise PermissionDenied(f"no transparent socket ({error}): run as root or with CAP_NET_RAW") from error
            except OSError as error:
                port = self._prepared.listen[0][2]
                raise TproxydError(f"the listener can't be opened on port {port}: {error}: set another port") from error

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(_READY_S):
                for slot in self._slots:
                    await slot.ready.wait()
                    if slot.failure is not None:
                        raise TproxydError(slot.failure)
        except TimeoutError as error:
            raise TproxydError(f"the workers were not ready within {_READY_S:.0f} s") from error
        warnings = await asyncio.get_running_loop().run_in_executor(None, self._rules)
        for warning in warnings:
            _log.warning("%s", warning)
        await self._renew_lease()
        if self._learning is not None:
            await self._learning.start()
        _log.info(
            "serving with %d workers on %s",
            len(self._slots),
            ", ".join(f"{network} {address} port {port}" for network, address, port in self._prepared.listen),
        )
        notify("READY=1")

    async def _serve(self) -> None:
        while not self._stop.is_set():
            for slot in self._slots:
                slot.tell({"do": "count", "learn": self._learning.versions if self._learning else ()})
                slot.kill_if_hung()
            try:
                await asyncio.wait_for(self._stop.wait(), _HEARTBEAT_S)
            except TimeoutError:
                await self._renew_lease()
        _log.info("stopping")

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        await self._renew_lease(0)
        await asyncio.gather(*(slot.stop() for slot in self._slots))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self._slots:
            slot.close()
        os.close(self._policy)

    async def _renew_lease(self, lease_s: int = LEASE_S) -> None:
        """Renew the lease of an open gateway as long as a worker answers; a thread does it, netlink can block."""
        how = self._prepared.lease
        if how is None or (lease_s and all(monotonic() - slot.heard > _SILENT_S for slot in self._slots)):
            return
        try:
            await asyncio.get_running_loop().run_in_executor(None, _renew_lease, how, self._prepared.versions, lease_s)
            self._lease_lost = False
        except (TproxydError, OSError) as error:
            if not self._lease_lost and lease_s:
                _log.error("%s: the gateway is open", error)
            self._lease_lost = True

    def _log_counters(self) -> None:
        total: Counter[str] = Counter()
        rules: Counter[str] = Counter(dict.fromkeys(self._prepared.rules, 0))
        for slot in self._slots:
            total.update(slot.counters)
            rules.update(slot.rule_counters)
        _log.info("counters %s", json.dumps({**total, "rules": rules}))


def _renew_lease(how: str, versions: tuple[int, ...], lease_s: int) -> None:
    if how == "nftables":
        from tproxyd.netfilter import nfnetlink

        nfnetlink.renew_lease(versions, lease_s)
    else:
        from tproxyd.netfilter import ipset

        ipset.renew_lease(versions, lease_s)


def _sealed(data: bytes) -> int:
    """Return an open file in memory that nobody can change any more (memfd_create(2)): workers get it, too."""
    file = os.memfd_create("tproxyd-policy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(file, "wb", closefd=False) as out:
            out.write(data)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(file)
        raise
    return file


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
