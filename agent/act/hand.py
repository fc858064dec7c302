"""The hand that stops: carries out the core's wishes, and tells what it did. The one place where Sekisho changes a machine.

Owns: the difference between what is wished (`Stop`s, always all of them) and what is in force, the order of deeds, and a thread
for them: a remount waits until the medium has taken what was written to it. What must hold at once, the refusing of opens, is
done by the caller's thread before. What the machine lives on is exempt (`exempt.py`). Must not judge: why a medium is stopped
is the core's, how a deed is done is `filesystems`' and `usbports`'.

Every deed stands in the journal before it is done. On stopping it is undone ("open") or stands ("closed"); after a crash the
next agent finds it in the journal and goes on with it, or undoes what is not wished any more.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from agent.act import filesystems, usbports
from agent.act.exempt import system_devices
from agent.act.journal import Act, Done, Journal
from agent.contract.event import path_bytes, path_text
from agent.core.facts import Acted, Coverage, Fact
from agent.core.stopping import Stop, StoppedMount
from agent.sense.refusing import Rule

_AGAIN_S, _LOOK_S = 1.0, 5.0
_KINDS = {"refuse": "all", "read_only": "writes", "directories": "tainted"}
_CODES = {"refuse": "no_opens", "read_only": "no_writes", "directories": "directories"}
_ORDER: tuple[Act, ...] = ("read_only", "node", "deauthorized")
Refuse = Callable[[dict[bytes, Rule]], dict[bytes, str]]


class Hand:
    """`want` from the daemon's thread whenever the wishes may have changed; `tell` is called from any thread.

    `own` are paths that the machine and the agent live on, `closed`: what was done stands when the agent stops.
    """

    def __init__(self, journal: Journal, own: list[str], closed: bool, refuse: Refuse, tell: Callable[[Fact], None]) -> None:
        self._journal, self._own, self.closed = journal, own, closed
        self._refuse, self._tell = refuse, tell
        self._stops: list[Stop] = []
        self._guarded: dict[str, str] = {}
        self._unguarded: dict[str, str] = {}
        self._exempt: dict[str, str] = {}
        self._settled: frozenset[str] = frozenset()
        self._held: dict[str, dict[str, None]] = {}
        self._failed: dict[str, dict[str, None]] = {}
        self._left_to_usbguard = False
        self._now_ms = 0
        self._news = threading.Condition()
        self._wanted = self._ending = False
        self._thread: threading.Thread | None = None

    def want(self, stops: Iterable[Stop], now_ms: int) -> None:
        """These media are to be stopped, and no others. What opens are refused holds when this returns."""
        asked = list(stops)
        table = filesystems.mounted() if asked else {}
        system = system_devices(table, self._own) if asked else {}
        exempt = {stop.medium.id: why for stop in asked if (why := _carries(stop, table, system))}
        kept = [stop for stop in asked if stop.medium.id not in exempt]
        rules, guarded = self._rules(kept)
        unguarded: dict[str, str] = {}
        failed = self._refuse(rules)
        for stop in kept:
            whys = [failed[raw] for raw in _places(stop) if raw in failed]
            if whys:
                unguarded[stop.medium.id] = f"{stop.medium.name}: opens can't be refused ({whys[0]})"
                guarded.pop(stop.medium.id, None)
        with self._news:
            self._exempt, self._guarded, self._unguarded, self._now_ms = exempt, guarded, unguarded, now_ms
            self._stops, self._wanted = kept, True
            if self._thread is None and (kept or self._journal.done):
                self._thread = threading.Thread(target=self._work, name="hand", daemon=True)
                self._thread.start()
            self._news.notify()

    def coverage(self, now_ms: int) -> Coverage:
        """What should be stopped and is not, and why."""
        with self._news:
            failed = [sentence for sentences in self._failed.values() for sentence in sentences]
            unguarded, exempt = list(self._unguarded.values()), list(self._exempt.values())
            left = self._left_to_usbguard
        blind = ["not_stopped"] * bool(failed) + ["opens_not_refused"] * bool(unguarded)
        ok = not blind
        blind += ["exempt_media"] * bool(exempt) + ["left_to_usbguard"] * left
        why = "; ".join([*failed, *unguarded, *(f"{each}, so it is left alone" for each in exempt)])
        if left:
            why += ("; " if why else "") + "USBGuard runs: which devices are let on the bus is left to it"
        return Coverage(at_ms=now_ms, sensor="enforce", ok=ok, sees=["enforcement"] if ok else [], blind=blind, why=why)

    def close(self, within_s: float) -> None:
        """Undo what is in force, or let it stand; a remount that takes longer goes on to its end without us."""
        with self._news:
            if not self.closed:
                self._stops, self._guarded, self._wanted = [], {}, True
            self._ending = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join(within_s)

    def _rules(self, stops: list[Stop]) -> tuple[dict[bytes, Rule], dict[str, str]]:
        rules, guarded = dict[bytes, Rule](), dict[str, str]()
        for stop in stops:
            roots = tuple(path_bytes(root).rstrip(b"/") + b"/" for root in stop.roots)
            for raw, mount in zip(_places(stop), stop.mounts, strict=True):
                if stop.level != "read_only" or mount.reach not in self._settled:
                    rules[raw] = Rule(_KINDS[stop.level], mount.folder, roots)
                    guarded[stop.medium.id] = _CODES[stop.level]
        return rules, guarded

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        patience: float | None = None
        while True:
            with self._news:
                if not self._wanted and not self._ending:
                    self._news.wait(patience)
                stops, guarded, now_ms = self._stops, self._guarded, self._now_ms
                ending, self._wanted = self._ending, False
                if ending and self.closed:
                    return
            again = self._reconcile(stops, guarded, now_ms)
            if ending:
                return
            patience = _AGAIN_S if again else _LOOK_S if stops else None

    def _reconcile(self, stops: list[Stop], guarded: dict[str, str], now_ms: int) -> bool:
        """Undo what is not wished, do what is; True if something failed that may go well later."""
        table = filesystems.mounted()
        by_dev = {found.dev: found for found in table.values()}
        guard = any(stop.usb for stop in stops) and usbports.usbguard_runs()
        wished = {(each.act, each.target): each for stop in stops for each in _wished(stop, table, guard)}
        failed: dict[str, dict[str, None]] = {}
        targets: dict[str, list[str]] = {}
        left = [done for at, done in self._journal.done.items() if at not in wished]
        for done in sorted(left, key=lambda each: -_ORDER.index(each.act)):  # a file system can't be writable before its device
            self._try(done, False, by_dev, failed)
        for done in sorted(wished.values(), key=lambda each: _ORDER.index(each.act)):
            if self._try(done, True, by_dev, failed):
                targets.setdefault(done.medium, []).append(done.shown or done.target)
        settled = {path_text(found.mount) for found in filesystems.mounted().values() if found.read_only}
        held = {stop.medium.id: _holds(stop, self._journal, guarded.get(stop.medium.id, ""), settled) for stop in stops}
        reaches = frozenset(mount.reach for stop in stops for mount in stop.mounts if mount.reach in settled)
        with self._news:
            news = self._news_of(held, failed, targets, now_ms)
            unsettled, self._settled = self._settled != reaches, reaches
            self._held, self._failed, self._left_to_usbguard = held, failed, guard
        for fact in news:
            self._tell(fact)
        if unsettled and not news:
            self._tell(Acted(at_ms=now_ms, id=""))
        return bool(failed)

    def _try(self, done: Done, do: bool, by_dev: dict[str, filesystems.Found], failed: dict[str, dict[str, None]]) -> bool:
        """Do or undo one thing. True if it is as wished now by our doing."""
        try:
            return self._act(done, do, by_dev)
        except OSError as error:
            what = "made read-only" if done.act != "deauthorized" else "taken off the bus"
            what = what if do else "released"
            why = error.strerror or str(error)
            failed.setdefault(done.medium, {})[f"{done.shown or done.target} can't be {what} ({why})"] = None
            return False

    def _act(self, done: Done, do: bool, by_dev: dict[str, filesystems.Found]) -> bool:
        change, now = self._means(done, by_dev)
        ours = (done.act, done.target) in self._journal.done
        if now is None:
            self._journal.strike(done)  # unmounted, unplugged: nothing to be done or undone
            return False
        if now is do:
            if not do:
                self._journal.strike(done)
            elif not ours and done.act == "read_only" and self._by_node(done.medium):
                self._journal.write(done)  # mounted read-only because its device was so, by us
                return True
            return ours and do
        if do:
            self._journal.write(done)
        try:
            change(do)
        except OSError:
            if do and not ours:
                self._journal.strike(done)
            raise
        if not do:
            self._journal.strike(done)
        return True

    def _by_node(self, medium: str) -> bool:
        return any(each.act == "node" and each.medium == medium for each in self._journal.done.values())

    @staticmethod
    def _means(done: Done, by_dev: dict[str, filesystems.Found]) -> tuple[Callable[[bool], None], bool | None]:
        """(how it is done or undone, whether it is so now; None if what it was done to is gone)."""
        if done.act == "read_only":
            found = by_dev.get(done.target)
            if found is None:
                return lambda _: None, None
            found = found._replace(mount_read_only=done.mount_read_only)
            return lambda do: filesystems.set_read_only(found, do), found.read_only
        if done.act == "node":
            try:
                now = filesystems.node_is_read_only(done.target)
            except OSError:
                return lambda _: None, None
            return lambda do: filesystems.set_node_read_only(done.target, do), now
        file = Path(done.target)
        allowed = usbports.is_authorized(file)
        return lambda do: usbports.authorize(file, not do), None if allowed is None else not allowed

    def _news_of(self, held: dict[str, Any], failed: dict[str, Any], targets: dict[str, list[str]], now_ms: int) -> list[Acted]:
        news = []
        for medium in dict.fromkeys((*self._held, *held, *failed)):
            before, now = self._held.get(medium, {}), held.get(medium, {})
            fresh = [each for each in failed.get(medium, ()) if each not in self._failed.get(medium, ())]
            if before != now or fresh:
                undid = [code for code in before if code not in now]
                news.append(
                    Acted(at_ms=now_ms, id=medium, did=[*now], undid=undid, targets=targets.get(medium, []), failed=fresh)
                )
        return news


def _places(stop: Stop) -> list[bytes]:
    """The path of each mount; of a folder without links, as its directories are known."""
    raw = [path_bytes(mount.reach) for mount in stop.mounts]
    return [os.path.realpath(each) if mount.folder else each for each, mount in zip(raw, stop.mounts, strict=True)]


def _found(mount: StoppedMount, table: dict[int, filesystems.Found]) -> filesystems.Found | None:
    """The line of mountinfo of a mount that can be remounted from here; a simulated one has no id of the kernel's."""
    if mount.folder or not mount.ours:
        return None
    known = table.get(mount.mount_id)
    if known is None:
        path = path_bytes(mount.reach)
        known = next((found for found in reversed(table.values()) if found.mount == path), None)
    return known


def _carries(stop: Stop, table: dict[int, filesystems.Found], system: dict[str, str]) -> str:
    """Why a medium is exempt; empty if it is not."""
    devs = [found.dev for mount in stop.mounts if (found := _found(mount, table)) is not None]
    for number in (*stop.medium.nodes, *devs):
        if number in system:
            return f"{stop.medium.name} carries {system[number]}"
    return ""


def _wished(stop: Stop, table: dict[int, filesystems.Found], guard: bool) -> Iterator[Done]:
    medium = stop.medium
    if stop.level in ("read_only", "refuse"):
        for mount in stop.mounts:
            if (found := _found(mount, table)) is not None:
                yield Done("read_only", found.dev, medium.id, path_text(found.mount), found.mount_read_only)
        for node in medium.nodes if medium.kind != "optical" else ():
            if path := filesystems.node_path(node):
                yield Done("node", path, medium.id)
    file = usbports.port(medium.id) if stop.usb and not guard else None
    if file is not None:
        yield Done("deauthorized", str(file), medium.id)


def _holds(stop: Stop, journal: Journal, guarded: str, settled: set[str]) -> dict[str, None]:
    """What holds of this medium now, as codes in a fixed order."""
    acts = {done.act for done in journal.done.values() if done.medium == stop.medium.id}
    mounts = [mount for mount in stop.mounts if not mount.folder]
    codes = ["deauthorized"] * ("deauthorized" in acts)
    if stop.level != "directories" and ("node" in acts or mounts) and all(mount.reach in settled for mount in mounts):
        codes.append("read_only")
        guarded = "" if guarded == "no_writes" and len(mounts) == len(stop.mounts) else guarded
    return dict.fromkeys([*codes, *([guarded] if guarded else [])])
