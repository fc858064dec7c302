"""The single writer: everything that changes the store passes here, many at a time, one transaction for all of them.

Owns: the order of all events (`pos`), the heads of all chains, the tree's growing edge, the collector's own chain, and
the moment a receipt may be given: after the commit that holds the events. Callers `submit` a function that is run with
the writer inside the transaction and get its result, once durable, from a future. A `Refusal` it raises is the
caller's alone, so it must be raised before anything is written; any other failure rolls the whole group back, and
every caller of that group is told.

Must not know: HTTP, roles. The key, the clock and whom to wake are handed in.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nacl.signing import SigningKey

from agent.contract import chain, event, wire
from server_stub import intake, signers
from server_stub.intake import Examined, Known, Row
from server_stub.refusal import Refusal
from server_stub.store import Store, StoreError

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_WAITING = 256
"""Submissions in the queue, at most; then `Busy`."""
GROUP_EVENTS = 20_000
"""Events in one transaction, about, so that nobody waits long for the others'."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


def _status_name(row: Row) -> str:
    """Under which name an agent's newest status is found again: its code; what sensors say, for each sensor of a run."""
    if row.code != "agent.sensors":
        return str(row.code)
    return f"agent.sensors/{str(event.read(row.raw).unmapped.sekisho.detail.get('sensor', ''))[:32]}"


class Busy(Exception):
    """The writer has more to do than it may queue; try again shortly."""


class Conflict(Refusal):
    """A batch does not continue the chain that is held; `reason` is "hole" or "fork", `hash` (hex) the head held."""

    def __init__(self, reason: str, epoch: int, known: Known) -> None:
        super().__init__(reason)
        self.reason, self.epoch, self.expected, self.hash = reason, epoch, known.last + 1, known.hash.hex()


class Histogram:
    """Commit latencies in seconds, in Prometheus' cumulative buckets."""

    def __init__(self) -> None:
        self.counts, self.total, self.count = [0] * len(BUCKETS_S), 0.0, 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.total, self.count = self.total + seconds, self.count + 1
        for n, bound in enumerate(BUCKETS_S):
            self.counts[n] += seconds <= bound


class Writer:
    """One thread over one session; `name` is this machine's.

    `woken` is called, from that thread, with the tree's size after each commit that made it grow.
    """

    def __init__(
        self, store: Store, key: SigningKey, name: str, *, now: Callable[[], int], woken: Callable[[int], None]
    ) -> None:
        self.store, self.key, self.name, self.now, self.woken = store, key, name, now, woken
        self.session = store.session()
        self.keys, self.rotations = signers.known(self.session, bytes(key.verify_key))
        self.id = chain.agent_id(self.keys[0])
        self.heads: dict[tuple[str, int], Known] = {}
        self.latency = Histogram()
        self.accepted = 0
        self.failed: str | None = None
        """Why the last commit failed; None if it did not."""
        self._queue: queue.Queue[tuple[Callable[[Writer], Any], int, Future[Any]] | None] = queue.Queue(MAX_WAITING)
        self._appended: list[tuple[str, str, int]] = []
        self.epoch = self._own_epoch()
        self.frontier = self.session.edge()
        self._stale = self._ended = False
        self._lock = threading.Lock()
        self.size = self.frontier.size
        """Size of the committed tree: the newest `pos`."""
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def _own_epoch(self) -> int:
        """The epoch of the collector's own chain: when this store was made (s), so that a lost one is never continued."""
        self.session.begin()
        new = "INSERT INTO meta VALUES ('epoch', ?) ON CONFLICT DO NOTHING"
        self.session.execute(new, (str(self.now() // 1000),))
        self.session.commit()
        return int(self.session.execute("SELECT value FROM meta WHERE name = 'epoch'")[0][0])

    def seen(self, size: int) -> None:
        """Another collector over this store has committed: the log has at least `size` events."""
        if size > self.size:
            self._grow(size)
            self.woken(size)

    def _grow(self, size: int) -> None:
        """The size never goes back: it is said by two threads, and what a reader was once told is durable."""
        with self._lock:
            self.size = max(self.size, size)

    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def alive(self) -> bool:
        """Whether the thread runs and its last commit went well."""
        return self.running() and self.failed is None

    def submit(self, work: "Callable[[Writer], T]", events: int = 1) -> "Future[T]":
        """Have `work(writer)` run within the next transaction; its result comes after the commit. Raises Busy."""
        future: Future[T] = Future()
        try:
            self._queue.put_nowait((work, events, future))
        except queue.Full:
            raise Busy("the collector is busy; try again shortly") from None
        if self._ended:
            self._refuse_waiting()
        return future

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._queue.put(None)
        self._thread.join()

    # Inside a transaction, from submitted work only.

    def known(self, agent: str, epoch: int) -> Known:
        """Where a chain ends, this transaction included."""
        found = self.heads.get((agent, epoch)) or self.session.known(agent, epoch)
        return found or Known(0, chain.genesis(agent, epoch), 0)

    def append(self, rows: list[Row], head: wire.Head) -> Known:
        """Add events that continue their chain, and the signed head they came under; where the chain ends now."""
        done: list[tuple[int, int, bytes]] = []
        first = self.frontier.size + 1
        for row in rows:
            done += self.frontier.add(row.leaf)
            if row.code is not None and row.code.startswith("agent."):
                self._appended.append((row.agent, _status_name(row), self.frontier.size))
        self.session.add(first, rows, self.now())
        self.session.add_head(first, head, rows[0].seq)
        if done:
            self.session.add_nodes(done)
        last = rows[-1]
        known = self.heads[last.agent, last.epoch] = Known(last.seq, last.hash, self.frontier.size)
        self.session.set_known(last.agent, last.epoch, known)
        self.accepted += len(rows)
        return known

    def record(self, happened: event.Event) -> int:
        """Seal an event of the collector's own into its chain and add it; its `pos`."""
        known = self.known(self.id, self.epoch)
        seq = known.last + 1
        raw = event.seal(happened, seq, self.epoch, known.hash)
        link = chain.link(known.hash, chain.digest(raw))
        head = wire.Head(self.id, self.epoch, seq, seq, known.hash.hex(), link.hex(), happened.time)
        head.sig = chain.sign(chain.head_bytes(head), self.key)
        return self.append([intake.row_of(raw, self.id, link)], head).tree_size

    def take(self, batch: Examined) -> tuple[str, wire.Receipt]:
        """Judge a batch and add what is new of it; "accept" or "repeat", and the unsigned receipt. Raises Conflict."""
        head = batch.head
        known = self.known(head.agent, head.epoch)
        held: tuple[int, bytes] | None = None
        if head.last < known.last:
            held = self.session.held(head.agent, head.epoch, head.last) if head.last else (0, batch.prev)
        elif head.last == known.last:
            held = (known.tree_size, known.hash)
        verdict = intake.judge(batch, known, held[1] if held else None)
        if verdict.kind in ("hole", "fork"):
            raise Conflict(verdict.kind, head.epoch, known)
        size = self.append(verdict.rows, head).tree_size if verdict.rows else held[0] if held else 0
        return verdict.kind, wire.Receipt(head.agent, head.epoch, head.last, head.hash, size)

    def signed(self, receipt: wire.Receipt) -> wire.Receipt:
        """The receipt with the collector's signature; only for what `take` gave out and is committed."""
        receipt.sig = chain.sign(chain.receipt_bytes(receipt), self.key)
        return receipt

    # The thread.

    def _group(self) -> "list[tuple[Callable[[Writer], Any], int, Future[Any]]] | None":
        """All that waits, up to GROUP_EVENTS; blocks for the first. None: stop."""
        first = self._queue.get()
        if first is None:
            return None
        group, events = [first], first[1]
        while events < GROUP_EVENTS:
            try:
                more = self._queue.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._queue.put(None)
                break
            group.append(more)
            events += more[1]
        return group

    def _run(self) -> None:
        try:
            self._work()
        finally:  # whatever ended it: nobody may wait for a thread that is gone
            self._ended = True
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while True:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                return
            if waiting is not None and waiting[2].set_running_or_notify_cancel():
                waiting[2].set_exception(StoreError("the thread that writes has ended; restart the collector"))

    def _work(self) -> None:
        while (group := self._group()) is not None:
            started = time.perf_counter()
            # Whoever gave up waiting is dropped now; from here on a future can't be cancelled under our hands.
            group = [each for each in group if each[2].set_running_or_notify_cancel()]
            results: list[tuple[Future[Any], Any, Refusal | None]] = []
            accepted = self.accepted
            try:
                self._recover()
                if self.session.begin():
                    self.heads.clear()
                    self.frontier = self.session.edge()
                for work, _, future in group:
                    try:
                        results.append((future, work(self), None))
                    except Refusal as refused:
                        results.append((future, None, refused))
                for agent, code, pos in self._appended:
                    if code == "agent.started":
                        self.session.execute("DELETE FROM latest WHERE agent = ? AND code LIKE 'agent.sensors/%'", (agent,))
                    put = "INSERT INTO latest VALUES (?, ?, ?) ON CONFLICT (agent, code) DO UPDATE SET pos = excluded.pos"
                    self.session.execute(put, (agent, code, pos))
                self.session.grown(self.frontier)
                self.session.commit()
            except Exception as error:
                self.accepted, self.failed, self._stale = accepted, str(error), True
                log.error("commit failed error=%r", error)
                for _, _, future in group:
                    future.set_exception(
                        error if isinstance(error, StoreError) else StoreError(f"the commit failed: {error!r}")
                    )
                continue
            self.failed = None
            self._appended.clear()
            grown = self.frontier.size != self.size
            self._grow(self.frontier.size)
            self.latency.add(time.perf_counter() - started)
            for future, result, refusal in results:
                if refusal is None:
                    future.set_result(result)
                else:
                    future.set_exception(refusal)
            if grown:
                self.woken(self.size)

    def _recover(self) -> None:
        """After a failed transaction: forget all it had made us believe, and read anew what is stored."""
        if self._stale:
            self._appended.clear()
            self.heads.clear()
            self.session.rollback()
            self.frontier = self.session.edge()
            self._stale = False
