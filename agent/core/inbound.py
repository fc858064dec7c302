"""What came from media onto the machine: which file elsewhere was made of which file on a medium, and what was run from one.

Question: was this brought in, from where, and how sure is that? Owns: who opened what on media (the same joins as for what
leaves, the other way round: a destination is any finished write that does not lie on a medium), the files that may be made of
it while an edge looks at them (`asked`, answered by `facts.Traced`), what was told already, and which programs were seen to
run from a medium. Opening alone tells nothing: a file that was only viewed was not brought in. Must not know approvals, the
shape of events, or how it is looked. From `pipeline` (facts, told apart by place) to `judging` (`Brought`).

A copy of the same name and size by who opened it is told without a comparison. Otherwise bytes must say it; and of an archive
the archive's own list of names and sizes, or, where it is packed as a whole, that the file is new and its writer had the
archive open: that is told with little confidence.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeVar

from agent.contract.codes import Link
from agent.core.facts import Closed, Lost, MediumRead, Moved, OpenFile, Sized, Traced
from agent.core.grading import Left
from agent.core.joins import Joins, Settled, Written
from agent.core.media import Mount
from agent.core.people import Entry, People
from agent.core.reads import Read

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
How = Literal["copied", "extracted", "moved", "executed", "script"]
MOST_ASKED = 4_096
_WAIT_MS = 60_000
_MOST_TOLD = 4_096
_TOLD_MS = 60_000
_MOST_RAN = 1_024
_MOST_MOUNTS = 256
_COMPARED = 16
_NEAR = 4
"""Files on media that a writer opened last, and of each who feeds it, which may be archives that it unpacks."""
_PLAIN = 0.75
_BORN_MS = 1_000
"""A file is new if it was made no longer than this before its source was opened."""
_SURE = {"copied": 0.9, "extracted": 0.9, "unpacked": 0.6, "script": 0.95, "perhaps_script": 0.6}
"""How sure a look is: an archive that was not looked into, and a script that does not name who runs it, are likely, no more."""


class Trace(NamedTuple):
    """Look whether the file `key`, last known at `path`, was made of one of `sources` (path as opened, size if known).

    `plain`: it is, only whether it can be run is asked. `joined`: its bytes may be those of the sources; else only an archive
    explains it. `new`: it was made after they were opened. `run_by`: it lies on the medium; is it a script that this runs?
    """

    key: bytes
    path: str
    sources: list[tuple[str, int | None]]
    total: int
    plain: bool = False
    joined: bool = True
    new: bool = False
    run_by: str = ""


class Brought(NamedTuple):
    """A file of a medium that is on the machine now, or was run from there (then `path` is empty)."""

    mount: Mount
    source: str
    source_size: int | None
    path: str
    size: int | None
    bytes: int | None
    pid: int
    at_ms: int
    how: How
    link: Link
    confidence: float
    program: bool = False
    is_dir: bool = False


class _Pending(NamedTuple):
    written: Written
    sources: list[Left]
    plain: bool


class Inbound:
    """`opened` on a medium, `written` elsewhere, `moved` from it, `ran`; each yields what is known by then, as does `due`.

    `asked` and `wanted` are emptied by whoever asks the edge. What nobody could look at, for want of room, is `lost`.
    """

    def __init__(self, people: People, on_medium: Callable[[OpenFile], bool]) -> None:
        self._people = people
        self._joins = Joins(people, on_medium, lambda file: None)
        self.wanted = self._joins.wanted
        self.asked: list[Trace] = []
        self._unlooked_count = self._lost_ms = 0
        self._pending: dict[bytes, _Pending] = {}
        self._scripts: dict[bytes, Brought] = {}
        self._mounts: dict[str, Mount] = {}
        self._born: dict[bytes, int] = {}
        self._told: dict[tuple[bytes, str], tuple[int | None, int]] = {}
        self._ran: dict[tuple[int, int, str], None] = {}

    @property
    def idle(self) -> bool:
        """Whether nobody has anything of a medium in hand."""
        return not len(self._joins.reads)

    @property
    def due_ms(self) -> int | None:
        """When something settles next."""
        return self._joins.due_ms

    # -- facts in ------------------------------------------------------------------------------------------------------

    def opened(self, fact: MediumRead, mount: Mount) -> None:
        """A file on a medium was opened."""
        end = fact.path.rfind("/") + 1
        self._keep(mount)
        self._joins.read(fact.pid, fact.path[:end], fact.path[end:], mount.under, None, None, fact.at_ms)
        entry = self._people.who(fact.pid)
        if entry is not None and fact.key and _first_operand(entry.process.argv) == fact.path[end:]:
            self._ask_script(fact, mount, entry)

    def made(self, key: bytes, at_ms: int) -> None:
        """A file was made elsewhere, where its birth is told."""
        _put(self._born, key, at_ms, MOST_ASKED)

    def written(self, fact: Closed) -> list[Brought]:
        """A file that lies on no medium was finished."""
        if fact.born_ms is None:
            fact = Closed(at_ms=fact.at_ms, pid=fact.pid, key=fact.key, path=fact.path, size=fact.size)
            fact.born_ms = self._born.get(fact.key)
        if fact.born_ms is not None:
            _put(self._born, fact.key, fact.born_ms, MOST_ASKED)
        return self._consider(self._joins.elsewhere(fact))

    def sized(self, fact: Sized) -> list[Brought]:
        """A size that was wanted."""
        return self._consider(self._joins.sized(fact))

    def due(self, now_ms: int, back: bool) -> list[Brought]:
        """What has settled by now."""
        return self._consider(self._joins.due(now_ms, back)) if self._joins.due_ms is not None else []

    def moved(self, fact: Moved, mount: Mount) -> Brought:
        """A file or directory of a medium was renamed to a place on the machine: both lie on one file system."""
        self._remember(fact.key, fact.old_path, fact.size, fact.at_ms)
        return Brought(
            *(mount, fact.old_path, fact.size, fact.path, fact.size, fact.size, fact.pid, fact.at_ms, "moved", "process", 1.0),
            is_dir=fact.is_dir,
        )

    def ran(self, entry: Entry | None, pid: int, path: str, mount: Mount, at_ms: int) -> Iterator[Brought]:
        """A file on a medium was executed. Told once a process."""
        life = (pid, entry.process.start if entry is not None else 0, path)
        if life not in self._ran:
            _put(self._ran, life, None, _MOST_RAN)
            size = self._size_of(pid, path)
            yield Brought(mount, path, size, "", None, None, pid, at_ms, "executed", "process", 1.0, program=True)

    def traced(self, fact: Traced) -> Iterator[Brought]:
        """An edge looked."""
        script = self._scripts.pop(fact.key, None)
        if script is not None:
            if fact.how in ("script", "perhaps_script"):
                yield script._replace(confidence=_SURE[fact.how], source_size=fact.size, at_ms=fact.at_ms)
            return
        pending = self._pending.pop(fact.key, None)
        if pending is None:
            return
        written, sources, plain = pending
        if fact.how == "gone":
            told = sources if plain else []
        elif fact.how in ("extracted", "unpacked"):
            told = [each for each in sources if each.read.opened == fact.source][:1]
        else:
            told = sources if fact.how == "copied" or (fact.how == "unknown" and plain) else []
        sure = _SURE.get(fact.how, 0.0)
        path, size = (written.path, written.size) if fact.how == "gone" else (fact.path, fact.size)
        made = written._replace(path=path, size=size)
        how: How = "extracted" if fact.how in ("extracted", "unpacked") else "copied"
        for left in told:
            confidence = max(left.confidence, sure) if how == "copied" else sure
            yield from self._tell(made, left._replace(confidence=confidence), how, fact.program)

    def sweep(self, now_ms: int) -> Iterator[Brought]:
        """What nobody answered in time: told if it is plain, else counted."""
        for key, pending in list(self._pending.items()):
            if not 0 <= now_ms - pending.written.at_ms <= _WAIT_MS:
                del self._pending[key]
                self._unlooked_count += not pending.plain
                yield from self._unlooked(pending)
        for key, script in list(self._scripts.items()):
            if not 0 <= now_ms - script.at_ms <= _WAIT_MS:
                del self._scripts[key]

    def lost(self, now_ms: int) -> Lost | None:
        """What could not be looked at, since this was last told."""
        count, since_ms = self._unlooked_count + self._joins.reads.forgotten, self._lost_ms or now_ms
        self._unlooked_count = self._joins.reads.forgotten = 0
        self._lost_ms = now_ms
        return Lost(at_ms=now_ms, reason="inbound_full", since_ms=since_ms, until_ms=now_ms, count=count) if count else None

    def everything(self) -> Iterator[Brought]:
        """The agent stops: what can be told without a look."""
        yield from self._consider(self._joins.everything())
        self.asked.clear()
        pending, self._pending = self._pending, {}
        for each in pending.values():
            yield from self._unlooked(each)

    def forget(self, pid: int) -> None:
        """A process is over for good, or its pid began a new life."""
        self._joins.forget(pid)

    def clock_set(self, by_ms: int, now_ms: int) -> None:
        """See `Reads.clock_set`."""
        self._joins.reads.clock_set(by_ms, now_ms)

    # -- what may have been brought in -------------------------------------------------------------------------------

    def _consider(self, settled: Iterable[Settled]) -> list[Brought]:
        """Ask for a look at each; what is plain is told without one where there is no room."""
        asked = (self._ask(each) for each in settled if isinstance(each, Written) and each.size)
        return [brought for pending in asked if pending is not None for brought in self._unlooked(pending)]

    def _ask(self, written: Written) -> _Pending | None:
        best: dict[str, Left] = {}
        for each in written.left:
            if each.link != "time" and each.read.opened != written.path:
                known = best.get(each.read.opened)
                if known is None or each.confidence > known.confidence:
                    best[each.read.opened] = each
        name = written.path.rpartition("/")[2]
        joined = list(best.values())
        plain = len(joined) == 1 and joined[0].confidence >= _PLAIN and joined[0].read.name == name
        sources = joined if plain else [*joined, *(each for each in self._near(written) if each.read.opened not in best)]
        if not sources or self._known(written, sources[0]):
            return None
        if len(self._pending) >= MOST_ASKED:
            self._unlooked_count += not plain
            return _Pending(written, sources, plain)
        self._pending[written.key] = _Pending(written, sources, plain)
        born_ms = self._born.get(written.key)
        new = born_ms is not None and born_ms >= min(each.read.since[1] for each in sources) - _BORN_MS
        total = sum(each.read.size or 0 for each in joined)
        paths = [(each.read.opened, each.read.size) for each in sources[: _COMPARED + _NEAR]]
        self.asked.append(Trace(written.key, written.path, paths, total, plain, bool(joined), new))
        return None

    def _near(self, written: Written) -> Iterator[Left]:
        """The last files on media that the writer opened, or who feeds it: one may be an archive."""
        upstream = self._people.kin(written.pid)
        below = (entry.process.pid for entry in self._people.descendants(written.pid, 0, 16))
        for pid in dict.fromkeys(chain((written.pid,), upstream, below)):
            of = self._joins.reads.of(pid)
            link: Link = "process" if pid == written.pid else "pipeline"
            for read in islice(reversed(of.fresh), _NEAR) if of is not None else ():
                yield Left(read, written.size, link, 0.0, pid)

    def _ask_script(self, fact: MediumRead, mount: Mount, entry: Entry) -> None:
        process = entry.process
        life = (process.pid, process.start, fact.path)
        if life in self._ran or fact.key in self._pending:
            return
        _put(self._ran, life, None, _MOST_RAN)
        about = (mount, fact.path, None, "", None, None, fact.pid, fact.at_ms)
        _put(self._scripts, fact.key, Brought(*about, "script", "process", 0.0, program=True), MOST_ASKED)
        self.asked.append(Trace(fact.key, fact.path, [], 0, run_by=process.exe))

    def _unlooked(self, pending: _Pending) -> Iterator[Brought]:
        if pending.plain:
            yield from self._tell(pending.written, pending.sources[0], "copied", False)

    def _tell(self, written: Written, left: Left, how: How, program: bool) -> Iterator[Brought]:
        mount = self._mounts.get(left.read.root)
        if mount is None or self._known(written, left):
            return
        self._remember(written.key, left.read.opened, written.size, written.at_ms)
        link: Link = "process" if left.link == "lineage" else left.link
        count = written.size if how == "extracted" else left.bytes
        yield Brought(
            *(mount, left.read.opened, left.read.size, written.path, written.size, count, written.pid, written.at_ms),
            *(how, link, left.confidence),
            program=program,
        )

    def _known(self, written: Written, left: Left) -> bool:
        """Whether just this was told a moment ago: many programs close a file more than once."""
        size, at_ms = self._told.get((written.key, left.read.opened), (None, 0))
        return size == written.size and 0 <= written.at_ms - at_ms <= _TOLD_MS

    def _remember(self, key: bytes, source: str, size: int | None, at_ms: int) -> None:
        _put(self._told, (key, source), (size, at_ms), _MOST_TOLD)

    def _keep(self, mount: Mount) -> None:
        if self._mounts.get(mount.under) is not mount:
            _put(self._mounts, mount.under, mount, _MOST_MOUNTS)

    def _size_of(self, pid: int, path: str) -> int | None:
        of = self._joins.reads.of(pid)
        named: Iterator[Read] = of.named(path.rpartition("/")[2]) if of is not None else iter(())
        return next((read.size for read in named if read.opened == path), None)


def _first_operand(argv: list[str]) -> str:
    """The name of the file that a command line names first, as `sh x.sh` and `python3 -u /media/x.py` do."""
    operand = next((each for each in argv[1:] if not each.startswith("-")), "")
    return operand.rpartition("/")[2]


def _put(table: dict[_Key, _Value], key: _Key, value: _Value, most: int) -> None:
    """Keep the newest."""
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
