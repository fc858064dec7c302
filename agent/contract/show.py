"""One event as one line for people: the same in both command lines, in English and Japanese.

Owns: which piece of an event goes into which place of its sentence (those are in `words`), how media, doubts, losses and
blindness are written, and colours. Every foreign text goes through `columns.harmless`. Pure: language, zone, colour,
width are arguments. Must not know: terminals, files, where the event came from.
"""

from collections.abc import Callable, Mapping
from datetime import tzinfo
from typing import Any

import msgspec
from msgspec import UNSET

from agent.contract.codes import CODES, SEVERITIES
from agent.contract.columns import display_width, fit, harmless, pad, size_text, time_text, window_text
from agent.contract.event import MediumInfo, Seen, read
from agent.contract.words import BLIND, DISGUISED, REASONS, TAMPERED, TEXTS, Language

__all__ = ["display_width", "grantee", "harmless", "line", "machine", "medium_text", "pad", "what", "who"]

_COLOURS = {1: "", 2: "", 3: "\x1b[33m", 4: "\x1b[31m", 5: "\x1b[1;31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_UPDATE = 2
"""OCSF activity of a finding that is raised again: protected files reached the medium."""
_DENIED = 2
"""OCSF action_id of what was refused"""
_OPERATIONS = ("reads", "writes", "deletes", "renames")


def medium_text(medium: MediumInfo) -> str:
    """ "Kingston DataTraveler 3.0 (60A44C…)": vendor, model and the beginning of the serial number, or the key."""
    names = [text for text in (medium.vendor, medium.model) if text is not UNSET and text]
    if len(names) == 2 and names[1].lower().startswith(names[0].lower()):
        names = names[1:]
    name = " ".join(names) or (medium.label if medium.label is not UNSET and medium.label else "") or medium.key
    serial = medium.serial if medium.serial is not UNSET else ""
    if serial:
        name += f" ({serial[:6]}…)" if len(serial) > 7 else f" ({serial})"
    return harmless(name)


class _Pieces(dict[str, str]):
    """What a sentence may name, computed when it does."""

    def __init__(self, seen: Seen, lang: Language, zone: tzinfo | None) -> None:
        super().__init__()
        self.seen, self.ours, self.zone = seen, seen.unmapped.sekisho, zone
        self.lang, self.texts = lang, TEXTS[lang]

    def __missing__(self, name: str) -> str:
        make: Callable[[], str] = getattr(self, f"_{name}")
        return make()

    def _code(self) -> str:
        return harmless(self.seen.metadata.event_code)

    def _more(self) -> str:
        return self.texts["more"].format(harmless(self.seen.message)) if self.seen.message else ""

    def _medium(self) -> str:
        if self.ours.medium is not UNSET:
            return medium_text(self.ours.medium)
        named = self.seen.peripheral_device.get("name")
        return harmless(named) if isinstance(named, str) else self.texts["something"]

    def _target(self) -> str:
        """Where it went: a medium, else the way and the far end."""
        if self.ours.medium is not UNSET:
            return medium_text(self.ours.medium)
        way = harmless(self.ours.way) if self.ours.way is not UNSET else self.texts["something"]
        way = self.texts.get(f"way.{way}", way)
        dest = self.ours.dest
        far = UNSET if dest is UNSET else dest.peer if dest.peer is not UNSET else dest.path
        return self.texts["far"].format(harmless(far), way) if far is not UNSET else way

    def _mount(self) -> str:
        mount = self.ours.medium.mount if self.ours.medium is not UNSET else UNSET
        return harmless(mount) if mount is not UNSET else self.texts["something"]

    def _fs(self) -> str:
        fs = self.ours.medium.fs if self.ours.medium is not UNSET else UNSET
        return f" ({harmless(fs)})" if fs is not UNSET else ""

    def _read_only(self) -> str:
        return self.texts["read_only"] if self.ours.medium is not UNSET and self.ours.medium.read_only is True else ""

    def _decision(self) -> str:
        decision = self.ours.medium.decision if self.ours.medium is not UNSET else UNSET
        if decision is UNSET:
            return ""
        return self.texts.get(decision, f", {harmless(decision)}")

    def _since(self) -> str:
        since = self.ours.medium.since if self.ours.medium is not UNSET else UNSET
        return self.texts.get(f"since.{since}", "") if since is not UNSET else ""

    def _amounts(self) -> str:
        medium = self.ours.medium
        if medium is UNSET or medium.bytes_in is UNSET or medium.bytes_out is UNSET:
            return ""
        return self.texts["amounts"].format(size_text(medium.bytes_in), size_text(medium.bytes_out))

    def _modes(self) -> str:
        modes = self.ours.medium.modes if self.ours.medium is not UNSET else UNSET
        return harmless(", ".join(modes), 80) if modes is not UNSET and modes else self.texts["something"]

    def _disguise(self) -> str:
        reasons = self.ours.detail.get("reasons")
        said = [self._word(DISGUISED, each) for each in reasons if isinstance(each, str)] if isinstance(reasons, list) else []
        return self.texts["more"].format("; ".join(said)) if said else self._more()

    def _simulated(self) -> str:
        return self.texts["simulated"] if self.ours.simulated else ""

    def _source(self) -> str:
        if self.ours.protected is not UNSET:
            label, rel = self.ours.protected.label, self.ours.protected.rel
            return harmless(f"{label}/{rel}" if rel is not UNSET else label)
        if self.ours.source is not UNSET:
            return harmless(self.ours.source.path)
        return self._dest()

    def _dest(self) -> str:
        path = self.ours.dest.path if self.ours.dest is not UNSET else UNSET
        if path is not UNSET:
            return harmless(path)
        for name in ("path", "name"):
            text = self.seen.file.get(name)
            if isinstance(text, str) and text:
                return harmless(text)
        ext = self.seen.file.get("ext")
        return self.texts["a_file_of"].format(harmless(f".{ext}")) if isinstance(ext, str) and ext else self.texts["a_file"]

    def _label(self) -> str:
        return harmless(self.ours.protected.label) if self.ours.protected is not UNSET else self._source()

    def _size(self) -> str:
        count = self.ours.bytes
        if count is UNSET and self.ours.dest is not UNSET:
            count = self.ours.dest.size
        if count is UNSET:
            size = self.seen.file.get("size")
            count = size if type(size) is int else UNSET
        return f" {size_text(count)}" if count is not UNSET else ""

    def _program(self) -> str:
        """The program's name; empty if nothing but a number is known of the process."""
        process = self.ours.process
        if process is UNSET:
            return ""
        argv = process.argv if process.argv is not UNSET else []
        path = process.exe if process.exe is not UNSET else argv[0] if argv else ""
        return harmless(path.rpartition("/")[2])

    def _by(self) -> str:
        if self.ours.process is UNSET:
            return ""
        return self.texts["by"].format(self["program"]) if self["program"] else self.texts["by.unknown"]

    def _doubt(self) -> str:
        """How sure the join and the person are, where they are not simply sure; "by an unknown program" says it already."""
        doubts = [self.texts[self.ours.link]] if self.ours.link in ("time", "content") else []
        weak = self.ours.attribution
        if weak == "session" or (weak == "unknown" and self["by"] != self.texts["by.unknown"]):
            doubts.append(self.texts[f"attribution.{weak}"])
        return "".join(doubts)

    def _operations(self) -> str:
        found = []
        for name in _OPERATIONS:
            count = self.ours.detail.get(name)
            number = len(count) if isinstance(count, list) else count
            if type(number) is int and number:
                found.append(self.texts[f"op.{name}"].format(number))
        return self.texts["list"].join(found) or (harmless(self.seen.message) if self.seen.message else self.texts["op.none"])

    def _access(self) -> str:
        """Who may get at a protected directory (the first time), or may now and may no longer."""
        first, said = self.ours.detail.get("first") is True, []
        for key, text in (
            (("now", "{}"),) if first else (("gained", self.texts["access.gained"]), ("lost", self.texts["access.lost"]))
        ):
            listed = self.ours.detail.get(key)
            grants = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
            for may in ("read", "write", "all"):
                whom = [grantee(each.get("who"), each.get("people"), self.lang) for each in grants if each.get("may") == may]
                if whom:
                    said.append(text.format(self.texts[f"may.{may}"].format(self.texts["list"].join(whom[:12]))))
        setuid = self.ours.detail.get("setuid")
        if type(setuid) is int and not first:
            said.append(self.texts["access.setuid"].format(setuid))
        return "; ".join(said) or self.texts["access.none"]

    def _sensor(self) -> str:
        name = self.ours.detail.get("sensor")
        return harmless(name, 40) if isinstance(name, str) and name else self.texts["something"]

    def _coverage(self) -> str:
        """What a sensor does not see. One that is well tells of itself only once it has recovered."""
        listed, well = self.ours.detail.get("blind"), self.ours.detail.get("ok") is True
        codes = [code for code in listed if isinstance(code, str)] if isinstance(listed, list) else []
        if self.ours.detail.get("sensor") == "config":
            return self.texts["config.taken" if well else "config.refused"]
        if not codes and well:
            return self.texts["sees.all"]
        said = self.texts["list"].join(self._word(BLIND, code) for code in codes[:12])
        return self.texts["sees.but" if well else "sees.not"].format(said or self.texts["something"])

    def _word(self, table: dict[str, tuple[str, str]], code: str) -> str:
        """The words of a stable code; one newer than the table is shown as it is."""
        return table[code][self.lang == "ja"] if code in table else harmless(code, 80)

    def _what(self) -> str:
        what = self.ours.detail.get("what")
        return self.texts["more"].format(self._word(TAMPERED, what)) if isinstance(what, str) and what else self._more()

    def _jump(self) -> str:
        for key, text in (("suspended_ms", "suspended"), ("jump_ms", "jump")):
            value_ms = self.ours.detail.get(key)
            if type(value_ms) is int and abs(value_ms) < 1 << 53:
                return self.texts[text].format(value_ms / 1000)
        return self.texts["jump.some"]

    def _lost(self) -> str:
        lost = self.ours.lost
        if lost is UNSET or lost.count is UNSET:
            return self.texts["lost.some"]
        return self.texts["lost.count"].format(count=lost.count)

    def _span(self) -> str:
        """From when to when; 0 is a beginning nobody knows."""
        lost = self.ours.lost
        since, until = (lost.since, lost.until) if lost is not UNSET else (0, self.seen.time)
        kind = "span.until" if since <= 0 else "span.at" if since == until else "span"
        return self.texts[kind].format(since=time_text(since, self.zone), until=time_text(until, self.zone))

    def _why(self) -> str:
        return self._word(REASONS, self.ours.lost.reason) if self.ours.lost is not UNSET else self.texts["something"]

    def _by_app(self) -> str:
        """Of an act: the program or token, where no person is known; a person stands in a column of their own."""
        name = self.seen.actor.get("app_name")
        return self.texts["by"].format(harmless(name, 64)) if isinstance(name, str) and name else ""

    def _chosen(self) -> str:
        """By which filter records were looked at, and how often if more than once."""
        given, count = self.ours.detail.get("filter"), self.ours.detail.get("count")
        pairs = [harmless(f"{key}={value}", 80) for key, value in given.items()] if isinstance(given, dict) else []
        often = self.texts["chosen.times"].format(count) if type(count) is int and count > 1 else ""
        return (self.texts["list"].join(pairs[:12]) or self.texts["chosen.all"]) + often

    def _erased(self) -> str:
        count = self.ours.detail.get("count")
        return str(count) if type(count) is int else "?"

    def _last_seen(self) -> str:
        at = self.ours.detail.get("last_seen")
        return time_text(at, self.zone) if type(at) is int else self.texts["never"]

    def _did(self) -> str:
        """How far a medium was stopped."""
        listed = self.ours.detail.get("did")
        codes = [f"did.{code}" for code in listed if isinstance(code, str)] if isinstance(listed, list) else []
        return self.texts["list"].join(self.texts[code] for code in codes if code in self.texts) or self.texts["did.nothing"]

    def _unlocked_until(self) -> str:
        at = self.ours.detail.get("until")
        return time_text(at, self.zone) if type(at) is int else "?"

    def _times(self) -> str:
        """How many refusals one event stands for, if not for one."""
        return self.texts["chosen.times"].format(self.seen.count) if self.seen.count > 1 else ""

    def _limit(self) -> str:
        return harmless(self.ours.limit.name) if self.ours.limit is not UNSET else "?"

    def _limit_bytes(self) -> str:
        return size_text(self.ours.limit.bytes) if self.ours.limit is not UNSET else "?"

    def _limit_files(self) -> str:
        return str(self.ours.limit.files) if self.ours.limit is not UNSET else "?"

    def _window(self) -> str:
        return window_text(self.ours.limit.window) if self.ours.limit is not UNSET else "?"


def grantee(who: Any, people: Any, lang: Language) -> str:
    """Whom an entry of the rights lets in: "group contractors (14 people)"."""
    texts = TEXTS[lang]
    kind, _, name = who.partition(":") if isinstance(who, str) else ("", "", "")
    text = texts[f"who.{kind}"].format(harmless(name, 64)) if f"who.{kind}" in texts else texts["something"]
    if type(people) is not int or people < 1 or kind == "user":
        return text
    return texts["who.person" if people == 1 else "who.people"].format(text, people)


def what(seen: Seen, lang: Language = "en", zone: tzinfo | None = None) -> str:
    """What happened, as one sentence without time, machine or person."""
    code = seen.metadata.event_code
    key = code if code in CODES else "other"
    if key == "other" and code.startswith("copy.") and seen.unmapped.sekisho.limit is not UNSET:
        key = "copy"
    if code == "medium.unapproved" and seen.type_uid % 100 == _UPDATE:
        key = "medium.unapproved.update"
    act = seen.unmapped.sekisho.detail.get("act")
    if code == "medium.unapproved" and act in ("stopped", "released", "unlocked"):
        key = f"medium.unapproved.{act}"
    if code in ("medium.attached", "medium.detached"):
        key += _which(seen)
    if code == "file.written" and seen.action_id == _DENIED:
        key = "file.written.refused"
    return TEXTS[lang][key].format_map(_Pieces(seen, lang, zone))


def _which(seen: Seen) -> str:
    """Which sentence: of a card or disc in what is there, of a phone in another mode, of what went unseen, or the plain one."""
    medium = seen.unmapped.sekisho.medium
    if seen.unmapped.sekisho.detail.get("time") == "unknown":
        return ".untimed" if seen.metadata.event_code == "medium.detached" else ""
    if medium is UNSET:
        return ""
    if medium.part in ("card", "disc"):
        return f".{medium.part}"
    return ".switched" if medium.switched_from is not UNSET and seen.metadata.event_code == "medium.attached" else ""


def who(seen: Seen) -> str:
    """The login user, "-" if none is known."""
    login = seen.unmapped.sekisho.login
    if login is not UNSET:
        return harmless(login.user, 64) if login.user is not UNSET and login.user else f"uid {login.uid}"
    user = seen.actor.get("user")
    name: Any = user.get("name") if isinstance(user, dict) else None
    return harmless(name, 64) if isinstance(name, str) and name else "-"


def machine(seen: Seen, names: Mapping[str, str] | None = None) -> str:
    """The machine's name, else the beginning of its id. One that `names` knows by its id is called so, and not otherwise."""
    known = (names or {}).get(str(seen.device.get("uid")))
    if known:
        return harmless(known, 64)
    for key, limit in (("hostname", 64), ("uid", 12)):
        text = seen.device.get(key)
        if isinstance(text, str) and text:
            return harmless(text, limit)
    return "-"


def line(
    event: bytes | Seen,
    *,
    lang: Language = "en",
    zone: tzinfo | None = None,
    colour: bool = False,
    width: int | None = None,
    names: Mapping[str, str] | None = None,
) -> str:
    """One event as one line: time, severity, machine, login user, what happened.

    `zone` None is UTC. With a `width` (columns of a terminal) the fields stand in columns; without, single spaces. What
    happened is never cut: the decision stands at its end, and a terminal can wrap. `names`: see `machine`. Bytes that are
    no event are shown as such, harmlessly, cut to the width.
    """
    texts = TEXTS[lang]
    try:
        seen = event if isinstance(event, Seen) else read(event)
    except msgspec.MsgspecError:
        raw = event if isinstance(event, bytes) else b""
        return fit(f"? {harmless(raw.decode('utf-8', 'replace'))}", width or 10_000)
    grade = texts.get(f"severity.{seen.severity_id}", SEVERITIES[5] if seen.severity_id > 5 else "-")
    fields = [time_text(seen.time, zone), grade, machine(seen, names), who(seen)]
    if width is not None:
        fields = [pad(fields[0], 19), pad(fields[1], 8), pad(fit(fields[2], 24), 12), pad(fit(fields[3], 20), 10)]
    text = " ".join((*fields, what(seen, lang, zone)))
    if not colour:
        return text
    start = len(fields[0])
    body = text[start:]
    tone = _COLOURS.get(seen.severity_id, _COLOURS[5])
    return f"{_DIM}{text[:start]}{_RESET}{tone}{body}{_RESET if tone else ''}"
