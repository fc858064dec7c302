"""Which media must be stopped now, and how far: medium × verdict × policy → `Stop`. The wish; `agent/act` carries it out.

Question: what may happen with this medium? Owns: the policy's levels, and that every wish is whole: the set of all Stops is
asked for anew whenever something changed, so whoever acts compares it with what is in force and needs no history. Must not
know mount(2), USB or how opens are refused, nor what is exempt on this machine. Pure, as all of the core.

Levels, weakest first: "directories": nobody who read certain protected files may write to it; "read_only": nobody may write;
"refuse": nobody may open anything, and what has no file system in use is taken off its bus.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from msgspec import Struct

from agent.contract.codes import Decision, MediumKind
from agent.core.media import Media, Medium
from agent.core.places import ProtectedDir
from agent.core.policy import BAD
from agent.core.register import MediaRegister, Verdict

Rule = Literal["allow", "read_only", "refuse"]
OnBus = Literal["allow", "refuse"]
Level = Literal["directories", "read_only", "refuse"]
_TYPES = re.compile(r"03:..:01")
"""A boot keyboard's interface (USB HID 1.11), also one that a stick has beside its own"""


class EnforcePolicy(Struct, frozen=True, kw_only=True):
    """`[agent.enforce]` as the core needs it. `on`: the mode is "enforce"; all else says what would hold if it were."""

    on: bool = False
    unapproved: Rule = "read_only"
    unknown: Rule = "allow"
    phones: OnBus = "refuse"
    keyboards: OnBus = "allow"
    network_adapters: OnBus = "allow"
    directories: OnBus = "refuse"


class StoppedMount(NamedTuple):
    """A file system of a stopped medium. `reach`: the path by which the agent gets there; `folder`: a plain folder plays it;
    `ours`: it is mounted in the agent's own mount namespace."""

    reach: str
    mount_id: int
    folder: bool
    ours: bool


class Stop(Struct, frozen=True, kw_only=True):
    """A medium that must not be used as it could be. `usb`: it is to be taken off the bus; `roots`: of which protected
    directories nothing may be written to it (level "directories")."""

    medium: Medium
    level: Level
    verdict: Verdict
    usb: bool = False
    mounts: tuple[StoppedMount, ...] = ()
    roots: tuple[str, ...] = ()


def rule_of(policy: EnforcePolicy, decision: Decision) -> Rule:
    """What the policy says of file systems on a medium with this decision."""
    if decision in BAD:
        return policy.unapproved
    return policy.unknown if decision == "unknown" else "allow"


def off_the_bus(policy: EnforcePolicy, kind: MediumKind, interfaces: Iterable[str], decision: Decision) -> bool:
    """Whether a device of this kind, with these USB interfaces, is to be de-authorized whatever is mounted from it."""
    if rule_of(policy, decision) == "allow":
        return False
    types = policy.keyboards == "refuse" and (kind == "keyboard" or any(map(_TYPES.match, interfaces)))
    carries = policy.phones == "refuse" and kind == "phone"
    return types or carries or (policy.network_adapters == "refuse" and kind == "network")


def level_of(policy: EnforcePolicy, medium: Medium, verdict: Verdict, writing: Verdict) -> Level | None:
    """How far a medium is to be stopped; None: not at all. `writing` is the register's verdict for writing to it."""
    if off_the_bus(policy, medium.kind, medium.interfaces, verdict.decision):
        return "refuse"
    rule = rule_of(policy, verdict.decision)
    if medium.kind == "keyboard" or not medium.nodes:
        return None  # nothing on it can be mounted
    if rule != "allow":
        return rule
    if verdict.decision == "approved" and writing.decision in BAD:
        return "read_only"  # whatever the policy for media without approval: this one may be read
    return None


def stops(
    policy: EnforcePolicy, media: Media, register: MediaRegister, protect: Iterable[ProtectedDir], at_ms: int
) -> Iterator[Stop]:
    """All that must be stopped at `at_ms`, in the order in which it was plugged in."""
    if not policy.on:
        return
    for medium in media.present.values():
        verdict, writing = register.decide(medium.key, at_ms), register.decide(medium.key, at_ms, (), True)
        level = level_of(policy, medium, verdict, writing)
        roots: tuple[str, ...] = ()
        if level is None and verdict.decision == "approved" and policy.directories == "refuse":
            decided = ((root, register.decide(medium.key, at_ms, (root.path, root.label), True)) for root in protect)
            roots = tuple(root.path for root, judged in decided if judged.decision in BAD)
            level = "directories" if roots else None
        if level is None:
            continue
        there = [each for each in media.of(medium) if each.way != "network"]
        mounts = tuple(
            StoppedMount(each.under[:-1] or "/", each.mount_id, each.fs == "folder", not each.namespace) for each in there
        )
        usb = off_the_bus(policy, medium.kind, medium.interfaces, verdict.decision) or (level == "refuse" and not mounts)
        shown = writing if level == "read_only" and verdict.decision == "approved" else verdict
        yield Stop(medium=medium, level=level, verdict=shown, usb=usb, mounts=mounts, roots=roots)
