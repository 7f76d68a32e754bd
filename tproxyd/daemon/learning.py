"""The supervisor's part in learned flows: workers ask for them, the kernel gets them, their ends are reported.

A worker's flow stays in the worker's table while the kernel carries it, and is given back, with what the kernel
counted, when it has been silent, when nothing may be learned any more, or at the end. Netlink may block, so a
thread does it; one step at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from tproxyd.daemon.learned_table import LearnedFlow, LearnedTable
from tproxyd.daemon.preparation import LearningSettings
from tproxyd.errors import RulesetError
from tproxyd.flow import Client, FlowKey, OrigDst
from tproxyd.netfilter import learned
from tproxyd.netfilter.plan import LEASE_S

_TURN_S: Final = 0.05
_WATCH_S: Final = 1.0
_FLOWS_READ_A_SECOND: Final = 1000
_LONGEST_S: Final = 15.0
_QUEUED: Final = 4096
_BATCH: Final = 256

_log = logging.getLogger(__name__)


class Learning:
    """All learned flows of this box.

    Attributes:
        versions: the families in which flows may be learned now.
    """

    def __init__(self, settings: LearningSettings, tell: Callable[[int, dict[str, Any]], bool]) -> None:
        """Args: tell: sends a message to the worker of a slot; False: it has to be sent again."""
        self.versions: tuple[int, ...] = ()
        self._settings = settings
        self._tell = tell
        self._table = LearnedTable(settings.flows)
        self._asked: deque[tuple[int, FlowKey]] = deque()
        self._wake = asyncio.Event()
        self._unsent: list[tuple[int, dict[str, Any]]] = []
        self._one_at_a_time = asyncio.Lock()
        self._distrusted: set[int] = set()
        self._said: dict[int, str | None] = {}
        self._abandoned: set[int] = set()
        self._broken = self._stopping = False
        self._next_watch_s = self._next_read_s = 0.0

    def flows(self) -> list[LearnedFlow]:
        """The flows that the kernel carries, with their traffic as last read."""
        return self._table.flows()

    def ask(self, slot: int, asked: object) -> None:
        """Take a worker's request for flows: lists of client address and port, server address and port.

        A worker is less trusted than we are: what is not understood, or too much, is dropped. It asks again.
        """
        for each in asked if isinstance(asked, list) else []:
            key = _key(each)
            if key is not None and len(self._asked) < _QUEUED:
                self._asked.append((slot, key))
        self._wake.set()

    async def start(self) -> None:
        """Clear what an earlier daemon left behind, and look whether anything may be learned."""
        await self._step(self._clear)
        await self._step(self._watch)

    async def serve(self) -> None:
        """Go on until `stop`."""
        while not self._stopping:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _WATCH_S)
            self._wake.clear()
            await self._step(self._forget_abandoned)
            for due_s, do in ((self._next_watch_s, self._watch), (self._next_read_s, self._read)):
                if monotonic() >= due_s:
                    await self._step(do)
            await self._step(self._learn)
            self._send()
            await asyncio.sleep(_TURN_S)  # what is asked for meanwhile shares one transaction

    async def flush(self) -> None:
        """Give all flows back to their workers: the policy has changed, or we end."""
        await self._step(self._flush)
        self._send()

    def abandon(self, slot: int) -> None:
        """Forget the flows of a worker that ended; nobody is left to report them."""
        self._abandoned.add(slot)
        self._wake.set()

    def stop(self) -> None:
        """Let `serve` return."""
        self._stopping = True
        self._wake.set()

    async def close(self) -> None:
        """Give everything back, and let nothing pass any more; after `serve` has returned."""
        await self.flush()
        await self._step(self._clear)

    async def _step(self, do: Callable[[], None]) -> None:
        async with self._one_at_a_time:
            await asyncio.to_thread(self._guarded, do)

    def _guarded(self, do: Callable[[], None]) -> None:
        try:
            do()
        except RulesetError as error:
            if not self._broken:
                _log.warning("%s: no UDP flow is learned", error)
            self._broken = True
            self.versions = ()
            self._give_back(self._table.flows())

    def _clear(self) -> None:
        learned.renew_lease(self._settings.versions, 0)
        learned.forget_all(self._settings.versions)

    def _watch(self) -> None:
        """Renew the lease of the families in which flows can be forwarded; take back the flows of the others."""
        self._next_watch_s = monotonic() + _WATCH_S
        if self._broken:
            self._clear()
        good = tuple(version for version in self._settings.versions if self._may_learn(version))
        gone = [version for version in self.versions if version not in good]
        self._withdraw(gone)
        if good:
            learned.renew_lease(good, LEASE_S)
        self.versions, self._broken = good, False

    def _may_learn(self, version: int) -> bool:
        if version in self._distrusted:
            return False
        why = learned.why_not(version, self._settings.interfaces, self._settings.idle_s)
        if why != self._said.get(version):
            _log.info("IPv%d: UDP flows are %s", version, f"not learned: {why}" if why else "learned again")
        self._said[version] = why
        return why is None

    def _read(self) -> None:
        """Look at the flows; the more there are, the more rarely."""
        self._next_read_s = monotonic() + min(_LONGEST_S, max(_WATCH_S, len(self._table) / _FLOWS_READ_A_SECOND))
        for version in self._settings.versions:
            flows = self._table.flows(version)
            if not flows:
                continue
            reading = self._table.update(version, learned.traffic(version, [flow.key for flow in flows]))
            if reading.stuck is not None:
                self._distrust(version, reading.stuck)
                continue
            learned.forget(flow.key for flow in reading.ended)
            self._give_back(reading.ended)

    def _forget_abandoned(self) -> None:
        slots, self._abandoned = self._abandoned, set()
        if slots:
            self._asked = deque(each for each in self._asked if each[0] not in slots)
            flows = [flow for flow in self._table.flows() if flow.slot in slots]
            self._table.remove(flows)
            learned.forget(flow.key for flow in flows)

    def _distrust(self, version: int, flow: LearnedFlow) -> None:
        """A firewall, a route or a filter drops what is forwarded: stop for good rather than break a network."""
        _log.warning(
            "IPv%d: no UDP flow is learned any more: the kernel takes in packets of %s and does not forward them: "
            "let forward chains accept what clients may reach, or set interception.learned_flows: false",
            version,
            flow.key,
        )
        self._distrusted.add(version)
        self._withdraw([version])
        self.versions = tuple(each for each in self.versions if each != version)

    def _withdraw(self, versions: Iterable[int]) -> None:
        for version in versions:
            learned.renew_lease((version,), 0)
            flows = self._table.flows(version)
            if flows:
                self._table.update(version, learned.traffic(version, [flow.key for flow in flows]))
                learned.forget_all((version,))
                self._give_back(flows)

    def _flush(self) -> None:
        self._asked.clear()
        self._withdraw(self._settings.versions)
        self._next_watch_s = 0.0

    def _learn(self) -> None:
        """Have the kernel take what was asked for, all in one transaction."""
        new: dict[FlowKey, int] = {}
        told: list[tuple[int, FlowKey]] = []
        room = {version: self._table.room(version) for version in self.versions}
        for _ in range(min(_BATCH, len(self._asked))):
            slot, key = self._asked.popleft()
            known = self._table.get(key)
            if known is None and room.get(key.version, 0) > 0 and key not in new:
                room[key.version] -= 1
                new[key] = slot
            elif known is None or known.slot != slot:
                continue
            told.append((slot, key))
        if self._asked:
            self._wake.set()
        learned.learn(new)
        for key, slot in new.items():
            self._table.put(key, slot)
        for slot in {slot for slot, _ in told}:
            self._unsent.append((slot, {"do": "learned", "flows": [_plain(key) for each, key in told if each == slot]}))

    def _give_back(self, flows: list[LearnedFlow]) -> None:
        """Tell the workers what the kernel counted; the flows are theirs again."""
        self._table.remove(flows)
        by_slot: dict[int, list[LearnedFlow]] = {}
        for flow in flows:
            by_slot.setdefault(flow.slot, []).append(flow)
        for slot, some in by_slot.items():
            for at in range(0, len(some), _BATCH):
                reports = [self._report(flow) for flow in some[at : at + _BATCH]]
                self._unsent.append((slot, {"do": "returned", "flows": reports}))

    def _report(self, flow: LearnedFlow) -> list[object]:
        traffic = flow.traffic
        silent_s = 0 if traffic.alive else self._settings.idle_s
        return [*_plain(flow.key), traffic.up.payload_bytes, traffic.down.payload_bytes, silent_s]

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        self._unsent += [(slot, message) for slot, message in unsent if not self._tell(slot, message)]


def _plain(key: FlowKey) -> list[object]:
    return [*key.client, *key.orig_dst]


def _key(asked: object) -> FlowKey | None:
    match asked:
        case [str(client), int(client_port), str(server), int(server_port)]:
            key = FlowKey(Client(client, client_port), OrigDst(server, server_port))
            return key if learned.is_key(key) else None
    return None
