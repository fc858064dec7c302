"""The register of approved media: asked for by long poll, checked, kept for when there is no network, told as a fact.

Owns: `register.json` in the state directory (a `SignedRegister`, as received), the version held, and when the collector last
confirmed it (the file's time of modification, kept to the minute). Only what the pinned key signed counts, from the network
and from the file alike; an older version than the one held is refused and told as tampering, for whoever replays last year's
register brings a revoked medium back. Must not know: what an approval means (`core/register.py`).
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from agent.collector import Collector, Refused, Unreachable, plain, signed_headers
from agent.config import Agent
from agent.contract import chain
from agent.contract.chain import NotWhole
from agent.contract.wire import SignedRegister
from agent.core.facts import Approval, Fact, Register, RegisterConfirmed, Tampered
from agent.identity import Identity, IdentityError, write_file

log = logging.getLogger(__name__)

BASE_S, CAP_S = 1.0, 300.0
POLL_S = 30.0
"""How long the collector may keep a request that has no news."""
CONFIRM_EVERY_MS = 60_000
"""How often it is told and kept that the register held is still in force."""


class BadRegister(Exception):
    """A register that is not to be believed; the sentence says why."""


class Held(Struct):
    """A `RegisterBody` as far as this machine needs it: of 10,000 approvals only what decides becomes objects."""

    version: int
    issued_at: int
    approvals: list[Approval] = []
    groups: dict[str, list[str]] = {}


def open_register(data: bytes, *public_keys: bytes) -> Held:
    """The register in `data` (JSON of a `SignedRegister`), once one of these keys signed it. Raises BadRegister."""
    try:
        signed = msgspec.json.decode(data, type=SignedRegister)
        chain.check_any(f"sekisho/register/v1\n{signed.body}".encode(), signed.sig, public_keys)
        return msgspec.json.decode(signed.body, type=Held)
    except NotWhole:
        raise BadRegister("the register is not signed by the pinned collector; it is not used") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise BadRegister("the register can't be read; it is not used") from None


class RegisterFeed:
    """Keeps the register current. `tell` gets Register and Tampered facts; it must not block."""

    def __init__(
        self,
        identity: Identity,
        agent: Agent,
        tell: Callable[[Fact], None],
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        uniform: Callable[[float, float], float] = random.uniform,
        peer: Collector | None = None,
    ) -> None:
        self._identity, self._link, self._tell, self._now_ms, self._uniform = identity, agent.collector, tell, now_ms, uniform
        self._path = identity.state_dir / "register.json"
        self._peer = peer
        self._lock = threading.Lock()
        self._version = -1
        self._refused: int | None = None  # a version that was told as rolled back already
        self._failures = 0
        self._last_error = ""
        self._entries = self._issued_ms = self._confirmed_ms = self._told_ms = 0
        self._woken = threading.Event()
        self.counts: Counter[str] = Counter()

    @property
    def version(self) -> int:
        """Of the register held; -1 if there is none."""
        return self._version

    def status(self) -> dict[str, Any]:
        """For `status`. `confirmed`: when the collector last said that this version is in force (ms); `age_s` since then."""
        held = {"version": self._version, "entries": self._entries, "issued_at": self._issued_ms}
        if self._confirmed_ms:
            age_s = max(self._now_ms() - self._confirmed_ms, 0) // 1000
            held |= {"confirmed": self._confirmed_ms, "age_s": age_s}
        return {**held, "last_error": self._last_error, "counts": dict(self.counts)}

    def tell_held(self) -> None:
        """Tell the register kept from before, if the pinned key signed it; an altered one is told as tampering."""
        try:
            pinned = self._identity.pinned()
            data, kept_ms = self._path.read_bytes(), self._path.stat().st_mtime_ns // 1_000_000
        except FileNotFoundError:
            return
        except (OSError, IdentityError) as error:
            self._last_error = str(error)
            return
        if pinned is None:
            return
        try:
            body = open_register(data, *pinned.kept_keys)
        except BadRegister as error:
            self._last_error = f"{self._path}: {error}"
            self._tell(Tampered(at_ms=self._now_ms(), what="register_altered", detail={"path": str(self._path)}))
            return
        self._hold(body, kept_ms)

    def _hold(self, body: Held, confirmed_ms: int) -> None:
        self._version, self._entries, self._issued_ms = body.version, len(body.approvals), body.issued_at
        self._confirmed_ms = self._told_ms = confirmed_ms
        now_ms = self._now_ms()
        self._tell(
            Register(
                at_ms=now_ms,
                version=body.version,
                approvals=body.approvals,
                groups=body.groups,
                confirmed_ms=min(confirmed_ms, now_ms),
            )
        )

    def _confirm(self) -> None:
        """The collector has nothing newer. Told and kept once a minute: a machine asks twice as often."""
        now_ms = self._now_ms()
        self._confirmed_ms = now_ms
        if self._version >= 0 and not 0 <= now_ms - self._told_ms < CONFIRM_EVERY_MS:
            self._told_ms = now_ms
            self._keep_time(now_ms)
            self._tell(RegisterConfirmed(at_ms=now_ms))

    def _keep_time(self, at_ms: int) -> None:
        with contextlib.suppress(OSError):  # a file that is gone or a full disk: it only looks older after a restart
            os.utime(self._path, ns=(at_ms * 1_000_000, at_ms * 1_000_000))

    def accept(self, data: bytes) -> bool:
        """Judge a register that was sent; keep and tell it if it is newer. False if it is not to be believed."""
        with self._lock:
            pinned = self._identity.pinned()
            try:
                if pinned is None:
                    raise BadRegister("a register came before this agent was enrolled; it is not used")
                body = open_register(data, pinned.public_key)
            except BadRegister as error:
                self.counts["bad"] += 1
                self._last_error = str(error)
                return False
            if body.version < self._version:
                self.counts["rolled_back"] += 1
                self._last_error = f"the collector sent register {body.version}, older than {self._version}; it is not used"
                if self._refused != body.version:
                    self._refused = body.version
                    detail = {"held": self._version, "sent": body.version}
                    self._tell(Tampered(at_ms=self._now_ms(), what="register_rollback", detail=detail))
                return False
            if body.version > self._version:
                write_file(self._path, data)
                now_ms = self._now_ms()
                self._keep_time(now_ms)
                self._refused = None
                self.counts["received"] += 1
                self._hold(body, now_ms)
            self._last_error = ""
            return True

    def step(self) -> float:
        """One long poll; seconds to wait before the next. Never raises for what the world does."""
        try:
            return self._step()
        except (Unreachable, Refused, IdentityError) as error:
            return self._failed(str(error))
        except Exception as error:
            # As in the sender: counted, shown in `status`, logged with its place, and tried again.
            log.exception("register: unexpected")
            self.counts["unexpected"] += 1
            return self._failed(f"asking for the register met an unexpected {type(error).__name__}; see the log and report it")

    def _step(self) -> float:
        if self._identity.pinned() is None:
            return self._link.heartbeat
        if self._peer is None:
            self._peer = Collector(self._link.url, self._link.ca_file)
        target = f"/v1/register?after={self._version}" if self._version >= 0 else "/v1/register"
        headers = signed_headers(self._identity, "GET", target, self._now_ms())
        answer = self._peer.ask("GET", target, None, headers, POLL_S)
        if answer.status in (204, 304):
            self._failures, self._last_error = 0, ""
            self._confirm()
            return 0.0
        if answer.status != 200:
            why = plain(answer.problem().detail) or "look at the collector's log"
            return self._failed(
                f"{self._link.url}: answers {answer.status} to a request for the register: {why}", answer.retry_after_s
            )
        before = self._version
        if not self.accept(answer.body):
            return self._failed(self._last_error)
        self._failures = 0
        # No news before its time was up: an impatient collector must not make us ask in a circle.
        return 0.0 if self._version > before else self._uniform(1.0, 2.0)

    def _failed(self, sentence: str, at_least_s: float | None = None) -> float:
        self._last_error = sentence
        self.counts["failed"] += 1
        bound = min(CAP_S, BASE_S * 2 ** min(self._failures, 16))
        self._failures += 1
        return min(at_least_s or 0.0, 3600.0) + self._uniform(0, bound)

    def wake(self) -> None:
        """This agent was enrolled, or `stop` was set."""
        self._woken.set()

    def run(self, stop: threading.Event) -> None:
        """Ask until `stop`."""
        try:
            while not stop.is_set():
                if self._woken.wait(self.step()):
                    self._woken.clear()
        finally:
            if self._peer is not None:
                self._peer.close()
