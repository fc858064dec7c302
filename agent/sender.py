"""From the spool to the collector: batch, sign, send, check the receipt, release; back off when it does not work.

Owns: when to send and what each answer means. An event leaves our care only by a receipt that the pinned key signed and that
names our own chain's head; every other answer, however friendly, changes nothing but the time of the next try. Must not know:
SQLite, what events mean. HTTP itself is in `collector.py`, the register in `registerfeed.py`.

    200 receipt fits      release, go on                   409 hole     send again from what it lacks (digests where content
    went; 401                   stop until enrolled anew                      a new epoch if not even those are left)
    413, 422              smaller batches; one event alone 409 fork     stop: two histories under one name; a person must look
                          refused twice: its digest        429, 5xx     wait (Retry-After, else full jitter), send the same
                          again

`step` makes one exchange and says when the next is due, so that tests need no clock; `run` is the thread around it.
"""

import contextlib
import gzip
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from agent.collector import (
    Answer,
    Collector,
    Refused,
    Unreachable,
    enroll,
    host_name,
    join,
    newest_key,
    plain,
    token_digest,
    token_of,
)
from agent.config import Agent
from agent.contract import chain
from agent.contract.chain import NotWhole
from agent.contract.wire import MAX_EVENTS, Head, Problem, Receipt, batch_body
from agent.core.facts import Clock, Fact, Tampered
from agent.identity import Acknowledged, Identity, IdentityError, Pinned
from agent.registerfeed import RegisterFeed
from agent.spool import Batch, Spool, SpoolError

__all__ = ["Refused", "Sender", "enroll"]

log = logging.getLogger(__name__)

COALESCE_S = 0.2
"""After being woken, wait so long for more to send along."""
BASE_S, CAP_S = 1.0, 300.0
RETRY_AFTER_CAP_S = 3600.0
BATCH_BYTES = 1 << 20
"""Of events in one batch, before they are packed: four copies of it are in memory while it is sent."""
GROW_AFTER = 8
"""After so many batches taken, try larger ones again."""
_LEVEL = 3
"""gzip: 5 µs and 150 bytes an event of a storm; 6, its default, takes 10 µs for 116 bytes."""
CLOCK_STEP_MS = 2_000
"""A Date header has whole seconds; smaller changes of the offset are not told."""


class Next(NamedTuple):
    """When the next step is due; `wakeable`: sooner if something was appended."""

    wait_s: float
    wakeable: bool = True


NOW = Next(0.0)


class Backoff:
    """Full jitter: a random wait below a bound that doubles with each failure."""

    def __init__(self, uniform: Callable[[float, float], float]) -> None:
        self._uniform, self.failures = uniform, 0

    def failed(self, at_least_s: float = 0.0) -> float:
        """Count a failure; seconds to wait."""
        bound = min(CAP_S, BASE_S * 2 ** min(self.failures, 16))
        self.failures += 1
        return min(at_least_s, RETRY_AFTER_CAP_S) + self._uniform(0, bound)

    def worked(self) -> None:
        """Begin anew."""
        self.failures = 0


class Sender:
    """Sends what `spool` holds to the collector `agent` names. `tell` gets Clock, Tampered, Register; it must not block."""

    def __init__(
        self,
        identity: Identity,
        agent: Agent,
        spool: Spool,
        tell: Callable[[Fact], None],
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        uniform: Callable[[float, float], float] = random.uniform,
        peer: Collector | None = None,
    ) -> None:
        self._identity, self._agent, self._spool, self._tell, self._now_ms = identity, agent, spool, tell, now_ms
        self._link = agent.collector
        self._name = agent.name or host_name()
        self._peer = peer
        self._backoff = Backoff(uniform)
        self._pinned: Pinned | None = None
        self._cursor: int | None = None  # what we send follows it; None: what is acknowledged
        self._epoch = spool.epoch
        self._limit, self._taken = MAX_EVENTS, 0
        self._suspect = 0  # a seq that was refused alone, once
        self._may_refuse = True
        self._holes = 0
        self._token_tried = ""
        self._due_ms = 0  # of the next heartbeat
        self._offset_ms: int | None = None
        self._stopped = ""  # "refused" | "fork" | "": why nothing is sent until something changes
        self._last_error = ""
        self._next_try_ms: int | None = None
        self._last_receipt: dict[str, int] | None = None
        self.counts: Counter[str] = Counter()
        self._woken = threading.Event()
        self.register = RegisterFeed(identity, agent, tell, now_ms=now_ms, uniform=uniform)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def start(self, stop: threading.Event) -> list[threading.Thread]:
        """Tell the register held from before, then start; to end, set `stop` and call `wake`.

        Returns the threads worth waiting for: not the one that asks for the register, which may sit in a long poll and has
        nothing to lose. None without a URL.
        """
        self.register.tell_held()
        if not self._link.url:
            return []
        thread = threading.Thread(target=self.run, args=(stop,), name="sender", daemon=True)
        thread.start()
        threading.Thread(target=self.register.run, args=(stop,), name="register", daemon=True).start()
        return [thread]

    def wake(self) -> None:
        """Something was appended, or `stop` was set."""
        self._woken.set()

    def run(self, stop: threading.Event) -> None:
        """Send until `stop`; then once more, if the collector took the last batch."""
        try:
            while not stop.is_set():
                due = self.step()
                if due.wait_s <= 0:
                    continue
                self._rest(due, stop)
            if not self._last_error and not self._stopped and self._spool.head[0] > self._spool.acknowledged:
                self.step()
        finally:
            self.close()

    def _rest(self, due: Next, stop: threading.Event) -> None:
        end = time.monotonic() + due.wait_s
        while not stop.is_set() and (left := end - time.monotonic()) > 0:
            if self._woken.wait(left):
                self._woken.clear()
                if due.wakeable and not stop.wait(COALESCE_S):
                    return

    def close(self) -> None:
        """Close the connection."""
        self.register.wake()
        if self._peer is not None:
            self._peer.close()

    def status(self) -> dict[str, Any]:
        """For `status`. `last_receipt` is {seq, at_ms} or None, `next_try` ms or None, `stopped` "", "refused" or "fork"."""
        return {
            "url": self._link.url,
            "enrolled": self._pinned is not None,
            "last_receipt": self._last_receipt,
            "backlog": self._spool.head[0] - self._spool.acknowledged,
            "last_error": self._last_error,
            "next_try": self._next_try_ms,
            "stopped": self._stopped,
            "clock_offset_ms": self._offset_ms,
            "counts": dict(self.counts),
            "register": self.register.status(),
        }

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> Next:
        """One exchange with the collector, or none if nothing is due. Never raises for what the world does."""
        self._next_try_ms = None
        try:
            return self._step()
        except Unreachable as error:
            self.counts["unreachable"] += 1
            return self._failed(str(error))
        except (SpoolError, IdentityError) as error:
            self.counts["state"] += 1
            return self._failed(str(error))
        except Refused as error:
            self.counts["refused"] += 1
            return self._stop("refused", str(error))
        except Exception as error:
            # A surprise must not end the sending for good; it is counted, shown in `status` and logged with its place.
            log.exception("sender: unexpected")
            self.counts["unexpected"] += 1
            return self._failed(f"the sender met an unexpected {type(error).__name__}; see the log and report it")

    def _step(self) -> Next:
        if self._spool.epoch != self._epoch:
            self._epoch, self._cursor, self._suspect, self._stopped = self._spool.epoch, None, 0, ""
        if self._peer is None:
            self._peer = Collector(self._link.url, self._link.ca_file)
        found = self._identity.pinned()
        if found is None and self._pinned is not None:
            # Removed under us: what was pinned still holds. It is put back as soon as there is a directory to put it in.
            found = self._pinned
            with contextlib.suppress(IdentityError):
                self._identity.pin(found)
        if found != self._pinned:
            # Enrolled, or enrolled anew by another process: whatever stopped us may be over.
            self._pinned, self._stopped, self._last_error = found, "", ""
        token = token_of(self._agent)
        if (self._pinned is None or self._stopped == "refused") and token and token != self._token_tried:
            return self._join(self._peer, token)
        if self._pinned is None:
            if not self._stopped:
                self._last_error = f"{self._link.url}: not enrolled yet; set agent.collector.token or run sekisho-agent enroll"
            return Next(self._link.heartbeat, wakeable=False)
        if self._stopped:
            return Next(self._link.heartbeat, wakeable=False)
        batch = self._spool.next_batch(self._cursor, self._limit, BATCH_BYTES)
        if not batch.lines and self._now_ms() < self._due_ms <= self._now_ms() + self._link.heartbeat * 1000:
            return Next((self._due_ms - self._now_ms()) / 1000)
        return self._send(self._peer, self._pinned, batch)

    def _join(self, peer: Collector, token: str) -> Next:
        former = self._pinned
        try:
            pinned, register = join(peer, self._identity, token, self._name, ca_file=self._link.ca_file, now_ms=self._now_ms())
        except Refused:
            self._token_tried = token  # it will not be accepted later either; another one may be
            raise
        if former and former.key != pinned.key and former.token_digest == token_digest(token):
            self._token_tried = token
            why = "another key than the one pinned; if that is meant, run sekisho-agent enroll"
            raise Refused(f"{peer.url}: answers with {why}")
        self._token_tried = token
        self._identity.pin(pinned)
        self._pinned, self._stopped, self._last_error = pinned, "", ""
        self._backoff.worked()
        self.counts["enrolled"] += 1
        if register is not None:
            self.register.accept(register)
        self.register.wake()
        return NOW

    def _send(self, peer: Collector, pinned: Pinned, batch: Batch) -> Next:
        head = batch.head(self._now_ms())
        head.sig = chain.sign(chain.head_bytes(head), self._identity.key)
        if batch.lines:
            self._save_head(head)
        body = gzip.compress(batch_body(head, batch.lines), _LEVEL, mtime=0)
        headers = {
            "Sekisho-Agent": batch.agent,
            "Content-Type": "application/x-ndjson",
            "Content-Encoding": "gzip",
        }
        asked_ms = self._now_ms()
        answer = peer.ask("POST", "/v1/batches", body, headers)
        if answer.status == 200:
            return self._received(pinned, batch, answer, (asked_ms + self._now_ms()) // 2)
        if answer.status == 401:
            self.counts["refused"] += 1
            why = plain(answer.problem().detail) or "does not know this agent; enroll it again"
            due = self._stop("refused", f"{peer.url}: {why}")
            token = token_of(self._agent)
            return NOW if token and token != self._token_tried else due
        if answer.status == 409:
            return self._conflict(batch, answer.problem())
        if answer.status in (413, 422):
            return self._unwelcome(batch, answer)
        self.counts[f"status_{answer.status}"] += 1
        return self._failed(_spoken(peer.url, answer), answer.retry_after_s or 0.0)

    def _save_head(self, head: Head) -> None:
        try:
            self._spool.save_head(head)
        except SpoolError as error:
            if not error.retry:
                raise
            self.counts["head_not_kept"] += 1  # the disk is full or read-only: all the more reason to send what is here

    # -- what each answer means ----------------------------------------------------------------------------------------

    def _received(self, pinned: Pinned, batch: Batch, answer: Answer, middle_ms: int) -> Next:
        try:
            receipt = msgspec.json.decode(answer.body, type=Receipt)
            chain.check(chain.receipt_bytes(receipt), receipt.sig, pinned.public_key)
        except NotWhole:
            if self._repinned(pinned):
                return NOW
            self.counts["bad_signature"] += 1
            why = "the collector's signature does not fit the key that was pinned; see who answers there"
            return self._failed(f"{self._link.url}: {why}, or enroll again")
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self.counts["bad_receipt"] += 1
            return self._failed(f"{self._link.url}: answers with no receipt; is this a collector?")
        ours = self._spool.hash_at(receipt.last)
        same_chain = (receipt.agent, receipt.epoch) == (batch.agent, batch.epoch)
        if not same_chain or receipt.last < batch.last or ours is None or ours.hex() != receipt.hash:
            self.counts["stale_receipt"] += 1
            why = "the receipt is not for what was sent, an old or another machine's; nothing is released"
            return self._failed(f"{self._link.url}: {why}")
        now_ms = self._now_ms()
        if receipt.last > self._spool.acknowledged or self._last_receipt is None:
            self._spool.release(receipt.last, receipt)
            head = Acknowledged(agent=receipt.agent, epoch=receipt.epoch, seq=receipt.last, hash=receipt.hash, at_ms=now_ms)
            self._remember(head)
        self._last_receipt = {"seq": receipt.last, "at_ms": now_ms}
        self._cursor = None if receipt.last >= self._spool.acknowledged else receipt.last
        self._due_ms = now_ms + int(self._link.heartbeat * 1000)
        self._holes, self._suspect, self._may_refuse, self._last_error = 0, 0, True, ""
        self._token_tried = ""  # should it forget us (restored from nothing), the token may be worth another try
        self._taken += 1
        if self._taken >= GROW_AFTER:
            self._limit, self._taken = min(MAX_EVENTS, self._limit * 2), 0
        self._backoff.worked()
        self.counts["batches"] += 1
        self._measure_clock(answer, middle_ms)
        return NOW

    def _remember(self, head: Acknowledged) -> None:
        """Keep the receipt's head outside the spool, too, against a spool put back from a backup."""
        try:
            self._identity.acknowledge(head)
        except IdentityError:
            self.counts["receipt_not_kept"] += 1  # a full or read-only disk, which the recorder tells of; sending goes on

    def _repinned(self, pinned: Pinned) -> bool:
        """Whether the collector changed its key and the pinned one vouches for the new: it is then pinned instead."""
        newest = newest_key(self._peer, pinned.public_key) if self._peer is not None else None
        if newest is None:
            return False
        self._pinned = pinned.succeeded(newest)
        self._identity.pin(self._pinned)
        self.counts["key_changed"] += 1
        return True

    def _measure_clock(self, answer: Answer, middle_ms: int) -> None:
        if answer.date_ms is None:
            return
        offset_ms = answer.date_ms + 500 - middle_ms  # a Date is cut to whole seconds
        if self._offset_ms is None or abs(offset_ms - self._offset_ms) >= CLOCK_STEP_MS:
            self._offset_ms = offset_ms
            self._tell(Clock(at_ms=self._now_ms(), offset_ms=offset_ms))

    def _conflict(self, batch: Batch, problem: Problem) -> Next:
        """409. Not signed, so it can make us send again or stop, but never release anything."""
        if problem.reason == "fork":
            return self._fork(batch, problem)
        expected = problem.expected
        if problem.reason != "hole" or expected is UNSET or expected < 1 or problem.epoch not in (UNSET, batch.epoch):
            self.counts["status_409"] += 1
            return self._failed(f"{self._link.url}: answers 409 without saying what it holds; look at the collector's log")
        self.counts["holes"] += 1
        held = expected - 1
        ours = self._spool.hash_at(held)
        if held > self._spool.head[0] or (ours and problem.hash is not UNSET and problem.hash != ours.hex()):
            return self._fork(batch, problem)
        if ours is None or (held < self._spool.acknowledged and not self._spool.rewind(held)):
            # The collector lost more than the spool still has digests for: nothing can ever follow what it holds.
            self._spool.begin_epoch(self._now_ms(), "collector_lost", expected)
            return NOW
        self._cursor = held
        self._holes += 1
        if expected == batch.first or self._holes > 1:
            return self._failed(f"{self._link.url}: asks again for event {expected}, which it was sent")
        return NOW

    def _fork(self, batch: Batch, problem: Problem) -> Next:
        self.counts["forks"] += 1
        expected = None if problem.expected is UNSET else problem.expected
        detail = {"epoch": batch.epoch, "first": batch.first, "last": batch.last, "expected": expected}
        self._tell(Tampered(at_ms=self._now_ms(), what="fork", detail={key: value for key, value in detail.items() if value}))
        why = "holds another history of this machine (restored from an image? a copied key?)"
        return self._stop("fork", f"{self._link.url}: {why}; compare with sekisho-agent verify, then enroll again")

    def _unwelcome(self, batch: Batch, answer: Answer) -> Next:
        """413, 422: find the event it will not take, and send that one's digest instead; the others must not wait for it."""
        self.counts[f"status_{answer.status}"] += 1
        why = plain(answer.problem().detail) or f"answers {answer.status}"
        many = len(batch.lines)
        if many > 1:
            self._limit, self._taken = max(1, many // 2), 0
            return NOW
        sentence = f"{self._link.url}: refuses event {batch.first}: {why}" if many else f"{self._link.url}: {why}"
        if many and self._may_refuse and self._suspect == batch.first:
            # Once only until something is accepted: a collector that refuses everything must not make us give up everything.
            self._may_refuse, self._suspect = False, 0
            self._spool.refuse(batch.first)
            return NOW
        self._suspect = batch.first
        return self._failed(sentence, answer.retry_after_s or 0.0)

    def _failed(self, sentence: str, at_least_s: float = 0.0) -> Next:
        self._last_error = sentence
        wait_s = self._backoff.failed(at_least_s)
        self._next_try_ms = self._now_ms() + int(wait_s * 1000)
        return Next(wait_s, wakeable=False)

    def _stop(self, why: str, sentence: str) -> Next:
        self._stopped, self._last_error = why, sentence
        return Next(self._link.heartbeat, wakeable=False)


def _spoken(url: str, answer: Answer) -> str:
    if answer.status == 429:
        return f"{url}: asks to be sent less; waiting"
    if answer.status >= 500:
        return f"{url}: can't take events now ({answer.status}); waiting"
    if 300 <= answer.status < 400:
        return f"{url}: redirects ({answer.status}); set agent.collector.url to where it is"
    return f"{url}: answers {answer.status}; is agent.collector.url right?"
