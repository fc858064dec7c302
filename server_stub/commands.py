"""What the commands do that ask a collector: tail, query, agents, token. Called by `cli`, which prints their errors.

Owns: from arguments to a route and from its answer to text. `tail -f` outlives the collector: it comes back with the
last cursor it saw, so nothing is missed or shown twice. Must not know: how the collector is reached (`client`).
"""

import argparse
import contextlib
import csv
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, tzinfo
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET

from agent.contract import columns, show
from agent.contract.event import Seen, read
from agent.contract.words import BLIND, TEXTS, Language
from server_stub import config, words
from server_stub import query as grammar
from server_stub.client import Client, Direct, Failed, reach
from server_stub.config import ConfigError
from server_stub.judged import language
from server_stub.query import BadQuery

RETRY_S = 1.0


def say(text: str) -> None:
    """One line to stdout, at once: a pipe's reader must not wait for our buffer."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def local_zone() -> tzinfo | None:
    """This machine's time zone, as of now."""
    return datetime.now(UTC).astimezone().tzinfo


def client(args: argparse.Namespace) -> Client:
    """The way to the collector that the arguments name."""
    # A URL needs no configuration: workstations of administrators have none.
    settings = config.defaults() if args.url and not args.config else config.load(args.config)
    return reach(settings, args.url, args.token, args.ca_file)


def _params(args: argparse.Namespace) -> dict[str, str]:
    """The filters, times made absolute by this machine's clock and zone: "today" is the asker's."""
    now, zone = time.time_ns() // 1_000_000, local_zone()
    given = {name: getattr(args, name) for name in ("agent", "user", "medium", "way", "event", "severity", "since", "until")}
    given["q"] = args.grep
    wanted = grammar.parse(given, now, zone)
    for name in ("since", "until"):
        if (at := getattr(wanted, name)) is not None:
            # As many digits as tell milliseconds from a date like 20261123; no event is older than 1970.
            given[name] = f"{max(at, 0):015d}"
    return {name: value for name, value in given.items() if value}


def _shown(args: argparse.Namespace) -> dict[str, str]:
    """The filters of what is shown to people who did not ask for certain events: all but who looked at them."""
    return {"event": "!record.viewed", **_params(args)}


class Names:
    """The names that agents enrolled with, by id: what an event calls its host is only what that agent says.

    Asked for once, and again for an id that is new since; not of the store itself, which can answer one thing at a time.
    """

    def __init__(self, asked: Client) -> None:
        self.asked = asked
        self.known = self._ask()

    def _ask(self) -> dict[str, str]:
        names: dict[str, str] = self.asked.get("/v1/agents?only=names").get("names", {})
        return names

    def of(self, seen: Seen) -> dict[str, str]:
        """The table, good for this event. Raises Failed."""
        agent = str(seen.device.get("uid"))
        if agent not in self.known and not isinstance(self.asked, Direct):
            # "" is nobody's name: the collector's own id is asked for once, too.
            self.known = {agent: "", **self.known, **self._ask()}
        return self.known


class Printer:
    """Events to stdout in one of the forms short, json, cat. `names` is for the first of them."""

    def __init__(self, form: str, lang: Language, names: Names | None = None) -> None:
        self.form, self.lang, self.zone, self.names = form, lang, local_zone(), names
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR")

    def know(self, asked: Client) -> None:
        """Have `asked` say what machines are called, if the form shows it. Raises Failed."""
        if self.form == "short":
            self.names = Names(asked)

    def event(self, raw: bytes) -> None:
        """One event, at once."""
        if self.form == "json":
            text = raw.decode("utf-8")
        elif self.form == "cat":
            text = self._sentence(raw)
        else:
            text = self._line(raw)
        say(text)

    def _line(self, raw: bytes) -> str:
        event: bytes | Seen = raw
        with contextlib.suppress(msgspec.MsgspecError):  # what is no event is shown as that
            event = read(raw)
        names = self.names.of(event) if self.names and isinstance(event, Seen) else None
        return show.line(event, lang=self.lang, zone=self.zone, colour=self.colour, width=self._width(), names=names)

    def gap(self, data: bytes) -> None:
        """Something was skipped: said where the events are, so that nobody overlooks it."""
        gap = msgspec.json.decode(data)
        if self.form == "json":
            say(msgspec.json.encode({"gap": gap}).decode())
            return
        reason = columns.harmless(str(gap.get("reason")))
        say(words.say(self.lang, "gap" if gap.get("count") else "gap_some", count=gap.get("count"), reason=reason))

    def _sentence(self, raw: bytes) -> str:
        try:
            return show.what(read(raw), self.lang, self.zone)
        except msgspec.MsgspecError:
            return show.line(raw)

    def _width(self) -> int | None:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, 60) if self.terminal else None


def sse(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes, str]]:
    """(event, data, last event id) of a stream of Server-Sent Events (HTML, 9.2.6); those without data too, event ""."""
    kind, data, cursor = "message", b"", ""
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            yield (kind if data else ""), data, cursor
            kind, data = "message", b""
        elif field == b"id":
            cursor = value.decode("ascii", "replace")
        elif field == b"data":
            data = data + b"\n" + value if data else value
        elif field == b"event":
            kind = value.decode("ascii", "replace")


def tail(args: argparse.Namespace) -> int:
    """The newest events, and those to come."""
    if not 0 <= args.lines <= grammar.MAX_LIMIT:
        raise BadQuery(f"-n must be from 0 to {grammar.MAX_LIMIT}")
    params, printer = _shown(args), Printer(args.output, language(args))
    if not args.follow:
        if args.lines:
            asked = client(args)
            printer.know(asked)
            answer = msgspec.json.decode(
                _get(asked, "/v1/events", {**params, "limit": args.lines, "order": "desc"}), type=_Page
            )
            for raw in reversed(answer.events):
                printer.event(bytes(raw))
        return 0
    client(args)  # what is wrong with the arguments or the configuration is wrong for good
    follower = _Follower(args, params, printer)
    while True:
        follower.once()
        time.sleep(RETRY_S)


class _Page(msgspec.Struct):
    events: list[msgspec.Raw]
    next: str | None = None


class _Follower:
    """One `tail -f`, over as many connections as it takes."""

    def __init__(self, args: argparse.Namespace, params: dict[str, str], printer: Printer) -> None:
        self.args, self.params, self.printer = args, params, printer
        self.cursor, self.told = "", False

    def once(self) -> None:
        """Follow until the connection ends; raise Failed only if trying again is of no use."""
        try:
            asked = client(self.args)
            self.printer.know(asked)
            if isinstance(asked, Direct):
                self._stored(asked)
                raise Failed(f"{asked.where}: no collector is served here")
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": self.cursor} if self.cursor else {})}
            target = "/v1/events/stream?" + urlencode({**self.params, "last": self.args.lines})
            for frame in sse(asked.lines(target, headers)):
                self.told = False
                self._show(*frame)
        except ConfigError as error:
            # A collector is being started or stopped this moment: it has the store, but no socket. Anything else about
            # the configuration would have been said when the command began.
            self._wait_for_it(str(error))
        except Failed as error:
            if error.status and error.status not in (429, 502, 503, 504):
                raise
            self._wait_for_it(str(error))
        else:
            self._wait_for_it("the collector ended the connection")

    def _stored(self, asked: Direct) -> None:
        """Begin with what the store holds: the stream's frames up to the one that says it is at the end."""
        if self.cursor:
            return
        target = "/v1/events/stream?" + urlencode({**self.params, "last": self.args.lines})
        with contextlib.closing(asked.lines(target, {"Accept": "text/event-stream"})) as lines:
            for kind, data, cursor in sse(lines):
                self._show(kind, data, cursor)
                if not kind:
                    return

    def _show(self, kind: str, data: bytes, cursor: str) -> None:
        self.cursor = cursor
        if kind == "gap":
            self.printer.gap(data)
        elif kind:
            self.printer.event(data)

    def _wait_for_it(self, why: str) -> None:
        if not self.told:
            sys.stderr.write(f"sekisho-collector: {why}; waiting for it to come back\n")
        self.told = True


def _get(asked: Client, path: str, params: dict[str, Any]) -> bytes:
    return asked.request("GET", f"{path}?{urlencode(params)}")


def query(args: argparse.Namespace) -> int:
    """All events that match."""
    params, asked = _shown(args), client(args)
    if args.lines < 0:
        raise BadQuery("-n must be 0 (all) or more")
    if args.group_by:
        return _counts(args, params, asked)
    limit: dict[str, Any] = {"limit": args.lines} if args.lines else {}
    names = Names(asked) if args.output != "json" else None
    lines = asked.lines("/v1/events?" + urlencode({**params, **limit}), {"Accept": "application/x-ndjson"})
    if args.output in ("short", "json"):
        printer = Printer(args.output, language(args), names)
        for raw in lines:
            printer.event(raw)
        return 0
    rows = (_row(raw, names) for raw in lines)
    if args.output == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(HEADS)
        writer.writerows([_cell(value) for value in row] for row in rows)
    else:
        say(columns.table([[_cell(value) for value in row] for row in rows], words.heads(language(args), *HEADS)))
    return 0


HEADS = [
    "time",
    "severity",
    "machine",
    "user",
    "event",
    "label",
    "file",
    "medium",
    "serial",
    "bytes",
    "program",
    "decision",
    "uid",
]


def _row(raw: bytes, names: Names | None) -> list[Any]:
    seen = read(raw)
    ours = seen.unmapped.sekisho
    medium, process, protected = ours.medium, ours.process, ours.protected
    at = (
        datetime.fromtimestamp(seen.time / 1000, local_zone()).isoformat(timespec="seconds")
        if seen.time < 1 << 47
        else seen.time
    )
    return [
        at,
        seen.severity_id,
        show.machine(seen, names.of(seen) if names else None),
        show.who(seen),
        seen.metadata.event_code,
        protected.label if protected is not UNSET else None,
        protected.rel if protected is not UNSET else None,
        show.medium_text(medium) if medium is not UNSET else None,
        medium.serial if medium is not UNSET else None,
        ours.bytes,
        process.exe if process is not UNSET else None,
        medium.decision if medium is not UNSET else None,
        seen.metadata.uid,
    ]


def _cell(value: Any) -> str:
    """A cell that no spreadsheet takes for a formula and no terminal for a command."""
    return "" if value is None or value is UNSET else columns.guarded(columns.harmless(str(value)))


def _counts(args: argparse.Namespace, params: dict[str, str], asked: Client) -> int:
    rows = msgspec.json.decode(_get(asked, "/v1/counts", {**params, "by": args.group_by}))["counts"]
    if args.output == "json":
        for row in rows:
            say(msgspec.json.encode(row).decode())
    elif args.output == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow([args.group_by, "events", "bytes"])
        writer.writerows([_cell(row["value"]), row["events"], row["bytes"]] for row in rows)
    else:
        cells = [[row["value"] or "-", str(row["events"]), columns.size_text(row["bytes"])] for row in rows]
        say(columns.table(cells, words.heads(language(args), args.group_by, "events", "bytes")))
    return 0


def _json_lines(rows: list[Any]) -> int:
    for row in rows:
        say(msgspec.json.encode(row).decode())
    return 0


def agents(args: argparse.Namespace) -> int:
    """The machines."""
    rows = client(args).get("/v1/agents")["agents"]
    if args.output == "json":
        return _json_lines(rows)
    zone, lang = local_zone(), language(args)
    cells = []
    for row in rows:
        at, state = columns.time_text(row["last_seen"], zone), words.say(lang, row["state"])
        cells.append([row["name"], state, at, row["version"] or "-", _unseen(row, lang), row["agent"]])
    say(columns.table(cells, words.heads(lang, "machine", "state", "last_heard", "version", "does_not_see", "agent")))
    return 0


def _unseen(row: dict[str, Any], lang: Language) -> str:
    """What a machine does not see, in words; a failing sensor that names nothing is named itself."""
    said = [BLIND[code][lang == "ja"] if code in BLIND else code for code in row["blind"]]
    said += [str(each.get("sensor")) for each in row["sensors"] if not each.get("ok") and not each.get("blind")]
    return TEXTS[lang]["list"].join(said) or "-"


def until_ms(text: str) -> int | None:
    """The end of a validity: a day counts to its end; "never" or nothing is None. Raises BadQuery."""
    if text in ("", "never"):
        return None
    at = grammar.parse_time(text, time.time_ns() // 1_000_000, local_zone())
    return at + 86_400_000 if len(text) == 10 and text.count("-") == 2 else at


def token_create(args: argparse.Namespace) -> int:
    """Make a token and print it alone."""
    if args.uses is not None and not args.enroll:
        raise BadQuery("--uses is for --enroll; a role's token may be used until it ends or is revoked")
    uses = None if not args.enroll or args.uses == 0 else args.uses or 1
    body = {"role": "enroll" if args.enroll else args.role, "note": args.note, "until": until_ms(args.until), "uses": uses}
    say(msgspec.json.decode(client(args).request("POST", "/v1/tokens", body))["token"])
    return 0


def token_list(args: argparse.Namespace) -> int:
    """All tokens."""
    rows = client(args).get("/v1/tokens")["tokens"]
    if args.output == "json":
        return _json_lines(rows)
    zone, lang = local_zone(), language(args)
    cells = []
    for row in rows:
        counted = words.say(lang, "uses", **row) if row["uses"] else str(row["used"])
        uses = counted if row["role"] == "enroll" else "-"
        until = columns.time_text(row["until"], zone) if row["until"] else words.say(lang, "never")
        cells.append([row["id"], row["role"], uses, columns.time_text(row["created_at"], zone), until, row["note"] or "-"])
    say(columns.table(cells, words.heads(lang, "id", "role", "used", "made", "ends", "note")))
    return 0


def token_revoke(args: argparse.Namespace) -> int:
    """End a token."""
    client(args).request("DELETE", f"/v1/tokens/{quote(args.id, safe='')}")
    return 0
