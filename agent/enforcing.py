"""Mode "enforce" in the daemon: the core's wishes on their way to the hand, and what is left over of them.

Owns: when the wishes are asked for anew, and the hand's life over reloads, stops and crashes. Must not know what is wished
(`core/stopping.py`) or how it is done (`act/`). One way: fact → core → `Core.stops` → hand → what it did, as a fact.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from agent import config
from agent.act.hand import Hand
from agent.act.journal import NAME, Journal
from agent.core import facts
from agent.core.facts import Fact
from agent.core.stopping import EnforcePolicy, Stop
from agent.senses import Senses

STIRRING = frozenset(
    {
        *(facts.Plugged, facts.Unplugged, facts.Mounted, facts.Unmounted, facts.Register, facts.RegisterConfirmed),
        *(facts.Unlocked, facts.Acted, facts.Config, facts.Tick),
    }
)
"""After these another medium may have to be stopped, or released."""


def policy_of(agent: config.Agent) -> EnforcePolicy:
    """The core's policy by the configuration."""
    said = agent.enforce
    return EnforcePolicy(
        on=agent.mode == "enforce",
        unapproved=said.unapproved,
        unknown=said.unknown,
        phones=said.phones,
        keyboards=said.keyboards,
        network_adapters=said.network_adapters,
        directories=said.directories,
    )


class Enforcing:
    """`step` once a turn. `stops` asks the core; `tell` takes facts from any thread. There is a hand only if one is needed."""

    def __init__(self, agent: config.Agent, senses: Senses, stops: Callable[[int], list[Stop]], tell: Callable[[Fact], None]):
        self._agent, self._senses, self._stops, self._tell = agent, senses, stops, tell
        self._hand: Hand | None = None
        self._before: list[Stop] | None = None
        self._due = self._forced = True
        self.reload(agent)

    def reload(self, agent: config.Agent) -> None:
        """Another configuration is in force."""
        self._agent, self._due, self._forced = agent, True, True
        closed = agent.enforce.on_failure == "closed" and agent.mode == "enforce"
        if self._hand is None and (agent.mode == "enforce" or Path(agent.state_dir, NAME).exists()):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            own = [agent.state_dir, sys.prefix, str(Path(__file__).parent), *(each.path for each in agent.protect)]
            self._senses.may_refuse(closed)
            self._hand = Hand(Journal(agent.state_dir, boot), own, closed, self._senses.refuse, self._tell)
        elif self._hand is not None and self._hand.closed != closed:
            self._senses.may_refuse(closed)  # the rules are set anew with the next step
            self._hand.closed = closed

    def stir(self, kind: type[Fact]) -> None:
        """A fact of STIRRING came."""
        self._due = True
        self._forced = self._forced or kind is not facts.Tick

    def step(self, now_ms: int) -> None:
        """Hand the wishes on if they may be others."""
        if self._hand is None or not self._due:
            return
        wished = self._stops(now_ms)
        if wished != self._before or (wished and self._forced):
            self._hand.want(wished, now_ms)
        self._before, self._due, self._forced = wished, False, False

    def coverage(self, now_ms: int) -> Iterator[facts.Coverage]:
        """What is not stopped though it should be."""
        if self._hand is not None and self._agent.mode == "enforce":
            yield self._hand.coverage(now_ms)

    def close(self, within_s: float) -> None:
        """Undo what was done, or let it stand, as the configuration says."""
        if self._hand is not None:
            self._hand.close(within_s)
