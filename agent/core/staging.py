"""Copies elsewhere: is a file that somebody wrote outside really made of what he read, and what follows when it leaves.

Question: is this a staged copy? Owns: the files that may be one (a join by process or pipeline says so) while they wait to be
compared with their sources, the rule that decides, and how the reads of a copy become those of its sources. A join alone is
not enough here: whoever opens a protected file writes other files as well (settings, recent files, thumbnails, indexes), and
nothing of them is a copy. So the edge looks at the bytes (`asked`, answered by `facts.Compared`). Must not know paths'
places, events, or how it looks. From `pipeline` (what was written elsewhere) to `pipeline` and `lineage`.
"""

from collections.abc import Iterable
from typing import NamedTuple

from agent.core.facts import Compared
from agent.core.grading import Left
from agent.core.joins import Written
from agent.core.lineage import Lineage, Source, Staged
from agent.core.reads import Folder, ReadStaged

MOST_ASKED = 4_096
_WAIT_MS = 60_000
_PLAIN = 0.75
"""A join that is sure enough where the sources are gone (mv), so that nothing can be compared any more."""
_COMPARED = 16
"""Sources whose bytes are looked for: an archive is judged by some of its members."""


class Ask(NamedTuple):
    """Compare the file `key`, last known at `path`, with these `sources` (path as it was opened, size if known)."""

    key: bytes
    path: str
    sources: list[tuple[str, int | None]]
    total: int
    """bytes of all sources together, also of those that are not named"""


class Copy(NamedTuple):
    """A staged copy was found: who made it, and each source with how it is in there."""

    written: Written
    left: list[Left]


class Staging:
    """`consider` what was written elsewhere, `answered` once it was compared. `asked` is emptied by whoever asks the edge."""

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage
        self._pending: dict[bytes, Written] = {}
        self.asked: list[Ask] = []
        self.unasked = 0
        """Files that were not compared for want of room"""

    def consider(self, written: Written) -> None:
        """A file was written elsewhere by somebody who may have had protected bytes in hand."""
        left = _best(each for each in written.left if each.link != "time" and each.read.opened != written.path)
        known = self._lineage.staged(written.key)
        if not written.size or (not left and known is None):
            if known is not None:
                self._lineage.end(written.key)  # truncated
            return
        if left:
            total = sum(each.read.size or 0 for each in left)
            sources = [(each.read.opened, each.read.size) for each in left[:_COMPARED]]
        else:
            assert known is not None
            total = sum(each.size or 0 for each in known.sources)
            sources = [(each.path, each.size) for each in known.sources[:_COMPARED]]
        if len(self._pending) >= MOST_ASKED:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            self.unasked += 1
        self._pending[written.key] = written._replace(left=left)
        self.asked.append(Ask(written.key, written.path, sources, total))

    def answered(self, fact: Compared) -> Copy | None:
        """A file was compared. What it is a copy of, if that is new."""
        written = self._pending.pop(fact.key, None)
        if written is None:
            return None
        left = written.left
        overwritten = fact.alike == "other" or (fact.alike == "packed" and not left)  # by who had nothing to pack
        plain = len(left) == 1 and left[0].confidence >= _PLAIN and left[0].read.size in (None, written.size)
        gone = fact.alike == "gone"
        if (gone and not plain) or (overwritten and self._lineage.staged(fact.key) is not None):
            self._lineage.end(fact.key)
            return None
        if not left or (fact.alike not in ("same", "part", "packed") and not (plain and fact.alike in ("unknown", "gone"))):
            return None
        sure = {"same": 0.9, "part": 0.9, "packed": 0.7}.get(fact.alike, 0.0)
        spread = _best(self.spread(left))
        sources = tuple(dict.fromkeys(Source(each.read.path, each.read.root, each.read.size) for each in spread))
        via = next(((*copy.via, each.read.via) for each in left if (copy := self._copy_read(each)) is not None), ())
        size = written.size or 0 if gone else fact.size
        staged = Staged(fact.path, size, sources, via, "", fact.at_ms, fact.alike == "part")
        if not self._lineage.stage(fact.key, staged, fact.at_ms if gone else 0):
            return None
        told = written._replace(path=fact.path, size=size)
        if staged.part:
            spread = [each._replace(bytes=size) for each in spread]
        return Copy(told, [each._replace(confidence=max(each.confidence, sure)) for each in spread])

    def unanswered(self) -> list[Written]:
        """What was asked and not answered: `asked` and they are empty then."""
        self.asked.clear()
        pending, self._pending = list(self._pending.values()), {}
        return pending

    def at_once(self, written: Written) -> Copy | None:
        """The same without a comparison, as the agent stops: what can be told by name and size."""
        self.consider(written)
        self.asked.clear()
        if any(each.read.name != written.path.rpartition("/")[2] for each in written.left):
            self._pending.pop(written.key, None)
        return self.answered(
            Compared(at_ms=written.at_ms, key=written.key, path=written.path, size=written.size or 0, alike="unknown")
        )

    def spread(self, many: list[Left]) -> list[Left]:
        """The same reads, each of a copy as reads of its sources: what left of them is in proportion to what left of it."""
        if self._lineage.no_copies or not any(left.read.via for left in many):
            return many
        out: list[Left] = []
        parts: dict[str, int] = {}
        for left in many:
            copy = self._copy_read(left)
            if copy is None:
                out.append(left)
                continue
            read = left.read
            share = 1.0 if not copy.size or left.bytes is None else min(1.0, left.bytes / copy.size)
            if copy.part and copy.sources[0].size:
                share *= min(1.0, copy.size / copy.sources[0].size)
            for source in copy.sources:
                folder = Folder(read.folder.path, source.root)
                made = ReadStaged(
                    folder, read.name, (source.size, None), read.since, read.last, read.fresh, source.path, copy.via, copy.uid
                )
                size = None if source.size is None else round(source.size * share)
                if copy.part and size is not None:
                    parts[source.path] = size = min(parts.get(source.path, 0) + size, source.size or 0)
                out.append(left._replace(read=made, bytes=size, link=left.link if left.link == "time" else "lineage"))
        best = _best(out)  # whoever read a copy and is kin to its maker is one way, not two; but parts add up
        return [each._replace(bytes=max(each.bytes or 0, parts.get(each.read.path, 0))) if parts else each for each in best]

    def _copy_read(self, left: Left) -> Staged | None:
        via = left.read.via
        copy = self._lineage.staged_at(via) if via else None
        return copy if copy is not None and any(each.path == left.read.path for each in copy.sources) else None

    def sweep(self, now_ms: int) -> None:
        """Give up what nobody answered."""
        for key, written in list(self._pending.items()):
            if not 0 <= now_ms - written.at_ms <= _WAIT_MS:
                del self._pending[key]
                self.unasked += 1


def _best(many: Iterable[Left]) -> list[Left]:
    """Of several ways to the same protected file the best one: what the writer read itself, then the surest."""
    best: dict[str, Left] = {}
    for each in many:
        known = best.get(each.read.path)
        if known is None or (each.link != "pipeline", each.confidence) > (known.link != "pipeline", known.confidence):
            best[each.read.path] = each
    return list(best.values())
