"""Break-glass at the agent: a code typed at this machine, judged by the running agent, without any network.

Owns: how a code gets from `sekisho-agent unlock` to the daemon and the answer back (two files in the state directory, which
only root may enter), how often one may try, and which times and keys a code is judged by. The form of codes and their check are
`contract/unlock.py`'s, what an unlocked medium may is the core's. A code is durable in the spool before it has an effect.
"""

import time
from collections.abc import Callable, Container
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.contract import unlock
from agent.core.facts import Unlocked
from agent.identity import Identity, IdentityError, write_file

ASKED, SAID = "unlock.asked", "unlock.said"
TRIES, WITHIN_MS = 5, 60_000
_PATIENCE_S, _STEP_S = 10.0, 0.05


class Asked(Struct):
    """What the command line leaves: the code as typed, and a mark by which it knows its answer."""

    code: str
    mark: str


class Said(Struct):
    """The daemon's answer. `why` is empty if the code was taken, else one of `unlock.Why`, "no_collector" or "too_often"."""

    mark: str
    why: str = ""
    group: int = 0
    key: str = ""
    until_ms: int = 0
    read_only: bool = False


def ask(state_dir: str, code: str, mark: str) -> Said | None:
    """Hand a code to the running agent and wait for its answer; None if there was none. Raises IdentityError."""
    said = Path(state_dir, SAID)
    said.unlink(missing_ok=True)
    write_file(Path(state_dir, ASKED), msgspec.json.encode(Asked(code, mark)))
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            found = msgspec.json.decode(said.read_bytes(), type=Said)
        except (OSError, msgspec.MsgspecError):
            time.sleep(_STEP_S)
            continue
        if found.mark == mark:
            said.unlink(missing_ok=True)
            return found
        time.sleep(_STEP_S)
    Path(state_dir, ASKED).unlink(missing_ok=True)
    return None


class Desk:
    """The daemon's side: call `look` about once a second."""

    def __init__(self, state_dir: str, identity: Identity) -> None:
        self._asked, self._said, self._identity = Path(state_dir, ASKED), Path(state_dir, SAID), identity
        self._tries: list[int] = []
        self._latest_ms = 0

    def look(
        self, now_ms: int, keys: list[str], known_ms: int, used: Container[str], durable: Callable[[Unlocked], bool]
    ) -> None:
        """Judge a code that was typed, if there is one. `keys`: media present; `known_ms`: a time that is surely past;
        `durable` takes the fact of a good one and says whether it is on disk."""
        self._latest_ms = max(self._latest_ms, now_ms)
        try:
            asked = msgspec.json.decode(self._asked.read_bytes(), type=Asked)
        except (OSError, msgspec.MsgspecError):
            return
        self._asked.unlink(missing_ok=True)
        said = self._judge(asked, now_ms, keys, max(self._latest_ms, known_ms), used, durable)
        try:
            write_file(self._said, msgspec.json.encode(said))
        except IdentityError:
            return  # the disk is full: whoever asked is told that nobody answered, and can look at `media`

    def _judge(
        self,
        asked: Asked,
        now_ms: int,
        keys: list[str],
        seen_ms: int,
        used: Container[str],
        durable: Callable[[Unlocked], bool],
    ) -> Said:
        self._tries = [at_ms for at_ms in self._tries if 0 <= now_ms - at_ms < WITHIN_MS]
        if len(self._tries) >= TRIES:
            return Said(asked.mark, why="too_often")
        self._tries.append(now_ms)
        try:
            pinned = self._identity.pinned()
            received = self._identity.acknowledged()
        except IdentityError:
            pinned = received = None
        if pinned is None:
            return Said(asked.mark, why="no_collector")
        seen_ms = max(seen_ms, received.at_ms if received is not None else 0)
        refused: unlock.BadCode | None = None
        for key in pinned.kept_keys:
            secret = unlock.shared_secret(self._identity.key, key)
            try:
                good = unlock.check(secret, self._identity.agent, keys, asked.code, now_ms=now_ms, seen_ms=seen_ms, used=used)
            except unlock.BadCode as error:
                refused = refused if refused is not None and error.why == "not_for_this" else error
                continue
            fact = Unlocked(at_ms=now_ms, id=good.id, key=good.key, until_ms=good.until_ms, read_only=good.read_only)
            if not durable(fact):
                return Said(asked.mark, why="not_recorded")
            return Said(asked.mark, key=good.key, until_ms=good.until_ms, read_only=good.read_only)
        assert refused is not None  # there is always the pinned key
        return Said(asked.mark, why=refused.why, group=refused.group)
