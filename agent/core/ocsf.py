"""The one room that knows OCSF's shape (schema 1.8.0): from what the core decided to `contract.event.Event`.

Question: how is it said? Owns: which attribute carries what, profiles, the English titles of findings and messages, and
privacy in writing: of unprotected files only extension and size; command lines only as `masks` lets them through. Must not
know why something happened or what came before it. Parts that many events share (host, product, process, login) are
encoded once, and copies that differ only in their file come as `contract.form.Filled`: the values, and one form for all.

`actor.user` is the login user. If the kernel has none, no user is named: then `actor.process`, at least `actor.app_name`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from agent.contract.codes import CODES, COPY_LIMIT, INFO, LOW, OCSF_VERSION, PRODUCT, Attribution, Code
from agent.contract.event import (
    DestInfo,
    Event,
    LimitInfo,
    LoginInfo,
    LostInfo,
    MediumInfo,
    Metadata,
    ProcessInfo,
    ProtectedInfo,
    Sekisho,
    SourceInfo,
    Unmapped,
)
from agent.contract.form import NUMBER, TEXT, AnyEvent, Filled, Form, Series
from agent.core import facts
from agent.core.grading import Left
from agent.core.history import Summary
from agent.core.inbound import Brought
from agent.core.joins import Arrival, Written
from agent.core.limits import Passed
from agent.core.masks import extension, unnamed
from agent.core.media import Medium, Mount, clean
from agent.core.people import Entry
from agent.core.places import ProtectedDir, below
from agent.core.policy import Raise
from agent.core.reads import GONE, Read
from agent.core.register import Verdict
from agent.core.rights import Drift
from agent.core.rights import severity as drift_severity
from agent.core.spoken import Spoken, known_text, spoken_of, user_of
from agent.core.ways import Departure

TITLES = {
    "medium.unapproved": "Medium without a valid approval connected",
    "medium.unapproved/copied": "Protected data copied to a medium without a valid approval",
    "medium.unapproved/stopped": "Medium without a valid approval stopped",
    "medium.unapproved/released": "Medium released",
    "medium.unapproved/unlocked": "Medium unlocked by a break-glass code",
    "copy": "More protected data carried out than a limit allows",
    "device.disguised": "Device is not what it claims to be",
    "medium.first_use": "First medium of a person on this machine",
    "copy.staged": "Protected data carried out by way of a copy made elsewhere",
}
"""Titles of findings: short, English, never with names in them."""

_PERIPHERAL_TYPES = {"storage": 1, "reader": 1, "optical": 1, "keyboard": 2}
_REGULAR, _FOLDER = 1, 2
_REMOVABLE, _REMOTE, _CD_ROM = 1, 3, 4
_FINDING_NEW = 1
_OPENED = 14
"""OCSF has no activity "execute" for files"""
_RULE, _STATISTICAL = 1, 3
_ENDPOINT, _IN_TRANSIT = 1, 2
_HOST = ["host"]
_CONTROL = ["security_control"]
_ALLOWED, _DENIED = 1, 2
_BLOCKED, _RESTORED, _APPROVED = 2, 9, 8
_FAILURE, _RESOLVED = 2, 4
_MOST_CACHED = 256
_MOST_NAMED = 50
_encode = msgspec.json.encode
_COPIED_OUT = CODES["file.copied_out"]


class Attempt(NamedTuple):
    """An open that was refused: `path` on the medium ("": not known), the protected `source` that was to be copied ("": none),
    how sure that is, and how many alike this stands for."""

    path: str
    source: str
    confidence: float
    pid: int
    at_ms: int
    many: int


class Writer:
    """One method an event code. `offset_ms` is the distance to the collector's clock, once known."""

    def __init__(self, agent: str, name: str, version: str, device_type: int, new_uid: Callable[[], str]) -> None:
        self._new_uid = new_uid
        self.offset_ms: int | None = None
        host = {"type_id": device_type, "uid": agent} | ({"hostname": name} if name else {})
        self._host = Raw(_encode(host))
        product = {"name": PRODUCT, "vendor_name": PRODUCT, "version": version}
        self._product = Raw(_encode(product))
        self._nobody = Raw(_encode({"app_name": PRODUCT}))
        self._record_names = False
        self._roots: tuple[str, ...] = ()
        self._media: dict[tuple[Medium, str, Verdict], Raw] = {}
        self._copies, self._stagings = Series(), Series()
        self._latest: tuple[Medium | None, Mount | None, Verdict | None, Raw] = (None, None, None, self._nobody)

    def name(self, record_names: bool, roots: Iterable[str]) -> None:
        """Whether command lines may name any file; if not, which directories are protected, whose files they may name."""
        self._record_names, self._roots = record_names, tuple(roots)

    # -- media ---------------------------------------------------------------------------------------------------------

    def attached(
        self,
        medium: Medium,
        verdict: Verdict,
        severity: int,
        session: facts.Session,
        at_ms: int,
        cold: bool,
        story: dict[str, Any],
    ) -> Event:
        """`medium.attached`. `story`: fields of `MediumInfo` beside the medium itself."""
        event = self._medium_event("medium.attached", medium, None, verdict, session, at_ms, story)
        event.severity_id = severity
        if cold:
            event.unmapped.sekisho.detail = {"cold": True}
        return event

    def detached(self, medium: Medium, verdict: Verdict, session: facts.Session, at_ms: int, story: dict[str, Any]) -> Event:
        """`medium.detached`, with the whole `story`."""
        return self._medium_event("medium.detached", medium, None, verdict, session, at_ms, story)

    def mounted(
        self, mount: Mount, verdict: Verdict, session: facts.Session, at_ms: int, story: dict[str, Any] | None = None
    ) -> Event:
        """`medium.mounted`."""
        event = self._medium_event("medium.mounted", mount.medium, mount, verdict, session, at_ms, story)
        if mount.cold:
            event.unmapped.sekisho.detail = {"cold": True}
        if mount.autorun:
            detail = event.unmapped.sekisho.detail
            event.unmapped.sekisho.detail = {**({} if detail is UNSET else detail), "autorun": list(mount.autorun)}
            event.severity_id = LOW
        return event

    def unmounted(self, mount: Mount, verdict: Verdict, session: facts.Session, at_ms: int) -> Event:
        """`medium.unmounted`."""
        return self._medium_event("medium.unmounted", mount.medium, mount, verdict, session, at_ms)

    def doubted(
        self,
        code: str,
        medium: Medium,
        verdict: Verdict,
        session: facts.Session,
        at_ms: int,
        finding_uid: str,
        update: bool,
        severity: int,
        attached_uid: str,
        detail: dict[str, Any],
        message: str,
    ) -> Event:
        """`device.disguised` or `medium.first_use`: what is odd about a medium, on the evidence of its attachment."""
        event = self._medium_event(code, medium, None, verdict, session, at_ms)
        event.peripheral_device, event.severity_id = UNSET, severity
        event.unmapped.sekisho.detail = _writable(detail) or UNSET
        event.message = message or UNSET
        evidence = [{"uid": attached_uid, "type_uid": CODES["medium.attached"].type_uid}] if attached_uid else []
        self._finding(event, finding_uid, TITLES[code], code, _RULE, evidence)
        if update:
            event.activity_id, event.activity_name, event.type_uid = 2, "Update", event.class_uid * 100 + 2
        return event

    def _medium_event(
        self,
        code: str,
        medium: Medium,
        mount: Mount | None,
        verdict: Verdict,
        session: facts.Session,
        at_ms: int,
        story: dict[str, Any] | None = None,
    ) -> Event:
        event = self._event(code, CODES[code], at_ms, self._about(medium, mount, verdict))
        sekisho = event.unmapped.sekisho
        if story:
            told = _medium_info(medium, mount, verdict)
            for name, value in story.items():
                setattr(told, name, value)
            sekisho.medium = told
        event.device, event.actor, sekisho.attribution = self._host, self._nobody, "unknown"
        if session.uid is not None:
            user, name = user_of(session.uid, session.user), session.session
            event.actor, sekisho.attribution = Raw(_encode({"user": user})), "session"
            sekisho.login = LoginInfo(uid=session.uid, user=session.user or UNSET, session=name or UNSET)
        if mount is None:
            event.peripheral_device = _peripheral(medium)
        else:
            event.file = _volume(mount) | {"name": _last(mount.mount) or "/", "path": mount.mount, "type_id": _FOLDER}
        return event

    # -- files ---------------------------------------------------------------------------------------------------------

    def copied_out(
        self, arrival: Arrival, left: Left, root: ProtectedDir, entry: Entry | None, verdict: Verdict, severity: int
    ) -> AnyEvent:
        """`file.copied_out`: one source, one destination. From the second in a row that differs only in its file, by a form."""
        read, mount, size = left.read, arrival.mount, arrival.size
        source, path = read.path, _shown(mount, arrival.path)
        rel = below(root.path, source)
        spoken = spoken_of(entry) if entry is not None else None
        process: Raw | UnsetType = UNSET
        if spoken is not None:
            process = spoken.process if self._record_names else spoken.discreet(mount, (source, path), self._roots)
        has, inode = read.stat or GONE
        if type(read) is not Read or arrival.is_dir or has is None or inode is None or size is None or left.bytes is None:
            return self._copied_out(arrival, left, root, entry, verdict, severity, process)
        series, by = self._copies, (spoken, process, arrival.pid, entry.attribution if entry is not None else "")
        if not series.goes_on(by, mount, root, verdict, severity, left.link, left.confidence, self.offset_ms):
            return self._copied_out(arrival, left, root, entry, verdict, severity, process)
        if series.form is not None:
            uid = self._new_uid()
        else:
            example = self._copied_out(arrival, left, root, entry, verdict, severity, process)
            uid, about = example.uid, example.unmapped.sekisho
            about.protected = ProtectedInfo(path=root.path, label=root.label, rel=TEXT)
            about.source, about.dest = SourceInfo(path=TEXT, size=NUMBER, inode=NUMBER), DestInfo(path=TEXT, size=NUMBER)
            about.dest.peer = mount.peer or UNSET
            about.bytes = NUMBER
            example.file = {**(example.file or {}), "name": TEXT, "path": TEXT, "size": NUMBER}
            series.form = Form(example)
        name = _last(path) or "?"
        values = (rel, source, has, inode, path, size, left.bytes, name, path, size)
        return Filled(series.form, arrival.at_ms, uid, values)

    def _copied_out(
        self,
        arrival: Arrival,
        left: Left,
        root: ProtectedDir,
        entry: Entry | None,
        verdict: Verdict,
        severity: int,
        process: Raw | UnsetType,
    ) -> Event:
        read, mount, size = left.read, arrival.mount, arrival.size
        path = _shown(mount, arrival.path)
        sekisho = self._about(mount.medium, mount, verdict) if mount.way != "network" else Sekisho()
        sekisho.protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, read.path))
        sekisho.source = _source(read)
        sekisho.dest = DestInfo(path=path, size=UNSET if size is None else size, peer=mount.peer or UNSET)
        if left.bytes is not None:
            sekisho.bytes = left.bytes
        sekisho.way, sekisho.link, sekisho.confidence = mount.way, left.link, left.confidence
        event = self._event("file.copied_out", _COPIED_OUT, arrival.at_ms, sekisho)
        event.severity_id = severity
        self._by(event, entry, arrival.pid, True)
        if process is not UNSET:
            sekisho.process = process
        event.file = {
            **_volume(mount),
            "name": _last(path) or "?",
            "path": path,
            "type_id": _FOLDER if arrival.is_dir else _REGULAR,
        }
        if size is not None:
            event.file["size"] = size
        return event

    def sent_out(
        self,
        departure: Departure,
        left: Left,
        protected: ProtectedInfo,
        entry: Entry | None,
        medium: Medium | None,
        verdict: Verdict | None,
        severity: int,
    ) -> Event:
        """`file.copied_out` by a way that is no mount; `file` is the source, as nothing is known of a file at the other end."""
        read, path = left.read, left.read.path
        known = medium is not None and verdict is not None
        sekisho = self._about(medium, None, verdict) if known else Sekisho()  # type: ignore[arg-type]
        sekisho.protected, sekisho.source = protected, _source(read)
        if departure.peer:
            sekisho.dest = DestInfo(peer=departure.peer)
        if left.bytes is not None:
            sekisho.bytes = left.bytes
        sekisho.way, sekisho.link, sekisho.confidence = departure.way, left.link, left.confidence
        event = self._event("file.copied_out", _COPIED_OUT, departure.at_ms, sekisho)
        event.severity_id = severity
        self._by(event, entry, left.pid, True)
        if not self._record_names and entry is not None and isinstance(spoken := entry.encoded, Spoken):
            sekisho.process = spoken.discreet(None, (path, read.via or path), self._roots)
        event.file = {"name": _last(path) or "?", "path": path, "type_id": _REGULAR}
        if read.size is not None:
            event.file["size"] = read.size
        return event

    def staged(self, written: Written, left: Left, root: ProtectedDir, entry: Entry | None) -> AnyEvent:
        """`file.staged`: one source and the copy of it that was made elsewhere on the machine; in a row by a form, too."""
        read, path, size = left.read, written.path, written.size
        has, inode = read.stat or GONE
        spoken = spoken_of(entry) if entry is not None else None
        process: Raw | UnsetType = UNSET
        if spoken is not None:
            copied = (read.via or read.path, path)
            process = spoken.process if self._record_names else spoken.discreet(None, copied, self._roots)
        if type(read) is not Read or has is None or inode is None or size is None or left.bytes is None:
            return self._staged(written, left, root, entry, process)
        series, by = self._stagings, (spoken, process, written.pid, entry.attribution if entry is not None else "")
        if not series.goes_on(by, root, left.link, left.confidence, self.offset_ms):
            return self._staged(written, left, root, entry, process)
        rel = below(root.path, read.path)
        if series.form is not None:
            uid = self._new_uid()
        else:
            example = self._staged(written, left, root, entry, process)
            uid, about = example.uid, example.unmapped.sekisho
            about.protected = ProtectedInfo(path=root.path, label=root.label, rel=TEXT)
            about.source, about.dest = SourceInfo(path=TEXT, size=NUMBER, inode=NUMBER), DestInfo(path=TEXT, size=NUMBER)
            about.bytes = NUMBER
            example.file = {**(example.file or {}), "name": TEXT, "path": TEXT, "size": NUMBER}
            series.form = Form(example)
        values = (rel, read.path, has, inode, path, size, left.bytes, _last(path) or "?", path, size)
        return Filled(series.form, written.at_ms, uid, values)

    def _staged(self, written: Written, left: Left, root: ProtectedDir, entry: Entry | None, process: Raw | UnsetType) -> Event:
        read, path = left.read, written.path
        sekisho = Sekisho(source=_source(read))
        sekisho.protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, read.path))
        sekisho.dest = DestInfo(path=path, size=UNSET if written.size is None else written.size)
        if left.bytes is not None:
            sekisho.bytes = left.bytes
        sekisho.link, sekisho.confidence = left.link, left.confidence
        event = self._event("file.staged", CODES["file.staged"], written.at_ms, sekisho)
        self._by(event, entry, written.pid, True)
        if process is not UNSET:
            sekisho.process = process
        event.file = {"name": _last(path) or "?", "path": path, "type_id": _REGULAR}
        if written.size is not None:
            event.file["size"] = written.size
        return event

    def written(self, arrival: Arrival, entry: Entry | None, verdict: Verdict, named: bool) -> Event:
        """`file.written`: extension and size; name and place only if the site records names."""
        path = _shown(arrival.mount, arrival.path)
        ext = extension(path)
        sekisho = self._about(arrival.mount.medium, arrival.mount, verdict)
        sekisho.dest = DestInfo(path=path if named else UNSET, size=UNSET if arrival.size is None else arrival.size)
        sekisho.way = "mount"
        event = self._event("file.written", CODES["file.written"], arrival.at_ms, sekisho)
        self._by(event, entry, arrival.pid, named)
        event.file = _volume(arrival.mount) | {"name": unnamed(path), "type_id": _REGULAR}
        if named:
            event.file |= {"name": _last(path) or "?", "path": path}
        if ext:
            event.file["ext"] = ext
        if arrival.size is not None:
            event.file["size"] = arrival.size
        return event

    def brought_in(
        self,
        brought: Brought,
        entry: Entry | None,
        verdict: Verdict,
        severity: int,
        protected: ProtectedInfo | None,
        named: bool,
    ) -> Event:
        """`file.brought_in`: one file of a medium. Of what is not protected extension and size, unless the site records names;
        a file below a protected directory is named there. Without a destination (it was run) `file` is that on the medium."""
        mount, path = brought.mount, brought.path
        source = _shown(mount, brought.source)
        sekisho = self._about(mount.medium, mount, verdict)
        shown = source if named else f"{mount.mount.rstrip('/')}/{unnamed(source)}"
        size = UNSET if brought.source_size is None else brought.source_size
        sekisho.source = SourceInfo(path=shown, size=size)
        there = path if named or protected is not None else unnamed(path)
        if path:
            sekisho.dest = DestInfo(path=there if there.startswith("/") else UNSET)
            if brought.size is not None:
                sekisho.dest.size = brought.size
        if protected is not None:
            sekisho.protected = protected
        if brought.bytes is not None:
            sekisho.bytes = brought.bytes
        sekisho.way, sekisho.link, sekisho.confidence = mount.way, brought.link, brought.confidence
        sekisho.detail = {"how": brought.how} | ({"program": True} if brought.program else {})
        event = self._event("file.brought_in", CODES["file.brought_in"], brought.at_ms, sekisho)
        event.severity_id = severity
        if brought.how in ("executed", "script"):
            event.activity_id, event.activity_name, event.type_uid = _OPENED, "Open", event.class_uid * 100 + _OPENED
        self._by(event, entry, brought.pid, named)
        file = there if path else source if named else unnamed(source)
        event.file = {} if path else _volume(mount)
        event.file |= {"name": _last(file) or "?", "type_id": _FOLDER if brought.is_dir else _REGULAR}
        if file.startswith("/"):
            event.file["path"] = file
        elif ext := extension(path or source):
            event.file["ext"] = ext
        count = brought.size if path else brought.source_size
        if count is not None:
            event.file["size"] = count
        return event

    def history(self, summary: Summary, label: str, at_ms: int) -> Event:
        """`file.history`: one person, program, directory and window."""
        root = summary.whose.root
        detail: dict[str, Any] = dict(summary.counts)
        if summary.names:
            detail["files"] = [below(root, path) for path in summary.names]
        if summary.unnamed:
            detail["not_named"] = summary.unnamed
        sekisho = Sekisho(protected=ProtectedInfo(path=root, label=label), detail=detail)
        event = self._event("file.history", CODES["file.history"], at_ms, sekisho)
        entry = summary.entry
        self._by(event, entry, entry.process.pid if entry is not None else 0, False)
        event.file = {"name": _last(root) or "/", "path": root, "type_id": _FOLDER}
        event.count = sum(summary.counts.values())
        event.start_time, event.end_time = summary.since_ms, summary.until_ms
        return event

    def access(self, drift: Drift, label: str) -> Event:
        """`access.changed`: who may get at a protected directory now, and what of that is new."""
        account, touch = drift.account, drift.touch
        detail: dict[str, Any] = {"now": _grants(account.grants), "files": account.files}
        if drift.first:
            detail["first"] = True
        else:
            detail |= {"gained": _grants(drift.gained), "lost": _grants(drift.lost)}
        counts = {"changes": touch.changes if touch else 0, "setuid": drift.setuid, "unread": account.unread}
        detail |= {name: count for name, count in counts.items() if count}
        if account.unknown:
            detail["unknown"] = account.unknown
        sekisho = Sekisho(protected=ProtectedInfo(path=account.root, label=label), detail=_writable(detail))
        event = self._event("access.changed", CODES["access.changed"], account.at_ms, sekisho)
        event.severity_id = drift_severity(drift)
        self._by(event, touch.entry if touch else None, touch.pid if touch else 0, False)
        event.file = {"name": _last(account.root) or "/", "path": account.root, "type_id": _FOLDER}
        return event

    # -- findings ------------------------------------------------------------------------------------------------------

    def unapproved(
        self, due: Raise, medium: Medium, mount: Mount | None, verdict: Verdict, by: AnyEvent, types: list[int], at_ms: int
    ) -> Event:
        """`medium.unapproved`; its actor is that of the event `by` that led to it. `types`: type_uid of each evidence."""
        event = self._event("medium.unapproved", CODES["medium.unapproved"], at_ms, self._about(medium, mount, verdict))
        sekisho, said = event.unmapped.sekisho, by.unmapped.sekisho
        sekisho.login, sekisho.process, sekisho.attribution = said.login, said.process, said.attribution
        event.device, event.actor, event.severity_id = self._host, by.actor, due.severity
        title = TITLES["medium.unapproved/copied" if types[-1:] == [CODES["file.copied_out"].type_uid] else "medium.unapproved"]
        related = [{"uid": uid, "type_uid": kind} for uid, kind in zip(due.events, types[-len(due.events) :], strict=False)]
        self._finding(event, due.finding_uid, title, "medium.unapproved", _RULE, related)
        if due.update:
            event.activity_id, event.activity_name, event.type_uid = 2, "Update", event.class_uid * 100 + 2
        return event

    def stopped(
        self,
        medium: Medium,
        mount: Mount | None,
        verdict: Verdict,
        finding_uid: str,
        update: bool,
        detail: dict[str, Any],
        severity: int,
        at_ms: int,
    ) -> Event:
        """`medium.unapproved`: what was done to a medium, or was allowed past the register: `detail.act` says which."""
        event = self._event("medium.unapproved", CODES["medium.unapproved"], at_ms, self._about(medium, mount, verdict))
        event.unmapped.sekisho.detail, event.unmapped.sekisho.attribution = _writable(detail), "unknown"
        event.device, event.actor, event.severity_id = self._host, self._nobody, severity
        act = detail["act"]
        self._finding(event, finding_uid, TITLES[f"medium.unapproved/{act}"], "medium.unapproved", _RULE, [])
        event.metadata.profiles = _CONTROL
        event.action_id = _DENIED if act == "stopped" else _ALLOWED
        event.disposition_id = {"stopped": _BLOCKED, "released": _RESTORED}.get(act, _APPROVED)
        if act == "released":
            event.status_id, event.is_alert = _RESOLVED, False
        if update:
            event.activity_id, event.activity_name, event.type_uid = 2, "Update", event.class_uid * 100 + 2
        return event

    def refused(
        self,
        attempt: Attempt,
        mount: Mount,
        protected: ProtectedInfo | None,
        entry: Entry | None,
        verdict: Verdict,
        severity: int,
        named: bool,
    ) -> Event:
        """`file.written` that was denied: somebody wanted to open a file on a stopped medium, or to read for one."""
        path = _shown(mount, attempt.path)
        named = named or protected is not None
        sekisho = self._about(mount.medium, mount, verdict)
        if path:
            sekisho.dest = DestInfo(path=path if named else UNSET)
        sekisho.way = "mount"
        if protected is not None:
            sekisho.protected, sekisho.source = protected, SourceInfo(path=attempt.source)
            sekisho.link, sekisho.confidence = "process", attempt.confidence
        event = self._event("file.written", CODES["file.written"], attempt.at_ms, sekisho)
        event.severity_id = severity
        self._by(event, entry, attempt.pid, named)
        event.metadata.profiles = _CONTROL
        event.action_id, event.disposition_id, event.status_id = _DENIED, _BLOCKED, _FAILURE
        if attempt.many > 1:
            event.count = attempt.many
        file = path or mount.mount
        event.file = _volume(mount) | {"name": unnamed(file), "type_id": _REGULAR if path else _FOLDER}
        if named or not path:
            event.file |= {"name": _last(file) or "?", "path": file}
        if path and (ext := extension(path)):
            event.file["ext"] = ext
        return event

    def limit_passed(self, passed: Passed, by: AnyEvent, at_ms: int) -> Event:
        """`copy.<limit>`, on the evidence of the last events that count; `by` is the one that passed it."""
        limit, said = passed.limit, by.unmapped.sekisho
        sekisho = Sekisho(
            medium=said.medium,
            simulated=said.simulated,
            login=said.login,
            process=said.process,
            attribution=said.attribution,
            limit=LimitInfo(
                name=limit.name,
                window=limit.window_s,
                bytes=passed.bytes,
                files=passed.files,
                of_bytes=limit.bytes or UNSET,
                of_files=limit.files or UNSET,
            ),
        )
        event = self._event(f"copy.{limit.name}", COPY_LIMIT, at_ms, sekisho)
        event.device, event.actor = self._host, by.actor
        related = [{"uid": uid, "type_uid": CODES["file.copied_out"].type_uid} for uid in passed.events]
        self._finding(event, event.metadata.uid, TITLES["copy"], f"copy.{limit.name}", _STATISTICAL, related)
        return event

    def staged_out(self, by: AnyEvent, staged_uid: str, severity: int, at_ms: int) -> Event:
        """`copy.staged`, on the evidence of `by`, the `file.copied_out` of a copy, and of the event that told of the copy."""
        said = by.unmapped.sekisho
        sekisho = Sekisho(
            medium=said.medium,
            simulated=said.simulated,
            login=said.login,
            process=said.process,
            attribution=said.attribution,
            protected=said.protected,
            source=said.source,
            dest=said.dest,
            way=said.way,
            link=said.link,
            confidence=said.confidence,
        )
        event = self._event("copy.staged", CODES["copy.staged"], at_ms, sekisho)
        event.device, event.actor, event.severity_id = self._host, by.actor, severity
        evidence = [(staged_uid, "file.staged"), (by.uid, "file.copied_out")]
        related = [{"uid": uid, "type_uid": CODES[code].type_uid} for uid, code in evidence if uid]
        self._finding(event, event.metadata.uid, TITLES["copy.staged"], "copy.staged", _RULE, related)
        return event

    @staticmethod
    def _finding(event: Event, uid: str, title: str, rule: str, analytic: int, related: list[dict[str, Any]]) -> None:
        event.status_id, event.is_alert = _FINDING_NEW, True
        event.data_security = {
            "data_lifecycle_state_id": _IN_TRANSIT,
            "detection_system_id": _ENDPOINT,
            "policy": {"name": rule},
        }
        event.finding_info = {"uid": uid, "title": title, "analytic": {"type_id": analytic, "name": rule}}
        if related:
            event.finding_info |= {"related_events": related, "related_events_count": len(related)}

    # -- the agent itself ----------------------------------------------------------------------------------------------

    def life(self, code: str, at_ms: int, detail: dict[str, Any]) -> Event:
        """`agent.started`, `agent.stopped`, `agent.heartbeat`, `agent.config`."""
        event = self._event(code, CODES[code], at_ms, Sekisho(detail=_writable(detail) or UNSET))
        event.metadata.profiles, event.device, event.app = _HOST, self._host, self._product
        return event

    def sensors(self, fact: facts.Coverage) -> Event:
        """`agent.sensors`: what one sensor sees and does not."""
        detail = {"sensor": fact.sensor, "ok": fact.ok, "sees": fact.sees, "blind": fact.blind}
        said = "sees all it should" if fact.ok else f"does not see: {', '.join(fact.blind) or 'unknown'}"
        event = self._error("agent.sensors", fact.at_ms, f"{fact.sensor} {said}{f' ({fact.why})' if fact.why else ''}", detail)
        if fact.ok:
            event.severity_id = INFO
        return event

    def gap(self, fact: facts.Lost) -> Event:
        """`agent.gap`: what was lost."""
        count = "an unknown number of" if fact.count is None else str(fact.count)
        event = self._error("agent.gap", fact.at_ms, f"lost {count} records ({fact.reason})", {})
        event.unmapped.sekisho.lost = LostInfo(
            reason=clean(fact.reason) or "unknown",
            since=fact.since_ms,
            until=fact.until_ms,
            count=UNSET if fact.count is None else fact.count,
            first_seq=UNSET if fact.first_seq is None else fact.first_seq,
            last_seq=UNSET if fact.last_seq is None else fact.last_seq,
        )
        if fact.reason == "stopped":  # in order: every reboot is one
            event.severity_id = LOW
        return event

    def clock(self, fact: facts.Clock) -> Event:
        """`agent.clock`: the wall clock jumped, or the machine was suspended."""
        if fact.suspended_ms:
            why = f"the machine was suspended for {fact.suspended_ms} ms"
            return self._error("agent.clock", fact.at_ms, why, {"suspended_ms": fact.suspended_ms})
        return self._error("agent.clock", fact.at_ms, f"the clock jumped by {fact.jump_ms} ms", {"jump_ms": fact.jump_ms})

    def tampered(self, fact: facts.Tampered) -> Event:
        """`agent.tampered`: something of the agent's own was altered."""
        return self._error("agent.tampered", fact.at_ms, f"altered: {fact.what}", {"what": fact.what} | fact.detail)

    def _error(self, code: str, at_ms: int, message: str, detail: dict[str, Any]) -> Event:
        event = self._event(code, CODES[code], at_ms, Sekisho(detail=_writable(detail) or UNSET))
        event.metadata.profiles, event.device = _HOST, self._host
        event.message = message.encode("utf-8", "replace").decode()
        return event

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _event(self, code: str, row: Code, at_ms: int, sekisho: Sekisho) -> Event:
        if self.offset_ms is not None:
            sekisho.time_offset_ms = self.offset_ms
        return Event(
            class_uid=row.class_uid,
            category_uid=row.class_uid // 1000,
            activity_id=row.activity_id,
            activity_name=row.activity_name,
            type_uid=row.class_uid * 100 + row.activity_id,
            severity_id=row.severity,
            time=at_ms,
            metadata=Metadata(version=OCSF_VERSION, product=self._product, uid=self._new_uid(), event_code=code),
            unmapped=Unmapped(sekisho),
        )

    def _about(self, medium: Medium, mount: Mount | None, verdict: Verdict) -> Sekisho:
        about, on, judged, info = self._latest
        if about is not medium or on is not mount or judged != verdict:  # a hash over all of a medium costs a microsecond
            at = (medium, mount.mount if mount is not None else "", verdict)
            if len(self._media) >= _MOST_CACHED:
                self._media.clear()
            info = self._media.get(at) or self._media.setdefault(at, Raw(_encode(_medium_info(medium, mount, verdict))))
            self._latest = (medium, mount, verdict, info)
        return Sekisho(medium=info, simulated=True if medium.simulated else UNSET)

    def _by(self, event: Event, entry: Entry | None, pid: int, argv: bool) -> None:
        """By whose hand. `argv`: with the command line, which may name any file."""
        event.device = self._host
        sekisho = event.unmapped.sekisho
        if entry is None:
            event.actor = Raw(_encode({"process": {"pid": pid}})) if pid > 0 else self._nobody
            sekisho.attribution = "unknown"
            if pid > 0:
                sekisho.process = ProcessInfo(pid=pid)
            return
        spoken = spoken_of(entry)
        attribution: Attribution = entry.attribution
        event.actor, sekisho.login, sekisho.attribution = spoken.actor, spoken.login, attribution
        sekisho.process = spoken.process if argv else spoken.process_bare


def _source(read: Read) -> SourceInfo:
    source, stat, via = SourceInfo(path=read.path), read.stat or GONE, read.names
    if stat[0] is not None:
        source.size = stat[0]
    if stat[1] is not None:
        source.inode = stat[1]
    if via:
        source.via = via
    return source


def _medium_info(medium: Medium, mount: Mount | None, verdict: Verdict) -> MediumInfo:
    info = MediumInfo(
        key=medium.key,
        kind=medium.kind,
        bus=medium.bus or UNSET,
        vendor=medium.vendor or UNSET,
        model=medium.model or UNSET,
        serial=medium.serial or UNSET,
        vendor_id=medium.vendor_id or UNSET,
        product_id=medium.product_id or UNSET,
        interfaces=list(medium.interfaces) or UNSET,
        decision=verdict.decision,
        decision_reason=verdict.reason,
        approval=known_text(verdict.approval),
    )
    if verdict.stale_s:
        info.register_age_s = verdict.stale_s
    if medium.read_only:
        info.read_only = True
    if mount is not None:
        info.fs, info.fs_uuid, info.label = mount.fs or UNSET, mount.fs_uuid or UNSET, mount.label or UNSET
        info.mount, info.read_only = mount.mount, mount.read_only or medium.read_only
    return info


def _peripheral(medium: Medium) -> dict[str, Any]:
    kind = _PERIPHERAL_TYPES.get(medium.kind, 99)
    about: dict[str, Any] = {"name": medium.name, "uid": medium.key, "type_id": kind}
    if kind == 99:
        about["type"] = medium.kind.capitalize()
    about |= {"model": medium.model} if medium.model else {}
    about |= {"serial_number": medium.serial} if medium.serial else {}
    about |= {"vendor_name": medium.vendor} if medium.vendor else {}
    about |= {"vendor_id_list": [medium.vendor_id]} if medium.vendor_id else {}
    return about


def _volume(mount: Mount) -> dict[str, Any]:
    kind = _CD_ROM if mount.medium.kind == "optical" else _REMOVABLE if mount.way != "network" else _REMOTE
    about: dict[str, Any] = {"drive_type_id": kind}
    volume = mount.label or _last(mount.mount)
    return about | {"volume": volume} if volume else about


def _shown(mount: Mount, path: str) -> str:
    """The path as the person saw it, if the agent reaches the mount by another one."""
    if mount.under.startswith(mount.mount) or not path.startswith(mount.under):
        return path
    return f"{mount.mount.rstrip('/')}/{path[len(mount.under) :]}"


def _grants(grants: list[facts.Grant]) -> list[dict[str, Any]]:
    """Entries of the rights as an event tells them; people are named as far as they fit."""
    told = []
    for each in grants:
        grant: dict[str, Any] = {"who": each.who, "may": each.may}
        if each.people:
            grant |= {"people": each.people, "names": each.names[:_MOST_NAMED]}
        told.append(grant | ({"files": each.files} if each.files else {}))
    return told


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _writable(value: Any) -> Any:
    """Free detail as JSON can carry it."""
    if isinstance(value, dict):
        return {str(_writable(str(key))): _writable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(each) for each in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
