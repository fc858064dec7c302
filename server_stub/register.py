"""What the commands `media …` do: approvals as tables, one request, decision or loss at a time, history, codes, groups.

Owns: from arguments to the routes of the register, and from answers to text. Lists from and to files are in `register_files`.
Must not know: how the collector is reached, the rules.
"""

import argparse
import csv
import re
import sys
import time
from collections.abc import Iterable
from datetime import tzinfo
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from agent.contract import columns
from agent.contract.words import Language
from server_stub import sheet, words
from server_stub.client import Client, Failed
from server_stub.commands import client, local_zone, say, until_ms
from server_stub.judged import language
from server_stub.query import BadQuery, parse_time

_HEADS = ("key", "owner", "department", "state", "until", "machines", "requester", "approver", "purpose", "id")
_TIME = re.compile(r"(\d{1,6})\s*(min|m|h|d|w)")
_MS = {"m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


def span_ms(text: str) -> int:
    """ "4h" → ms. Raises BadQuery."""
    found = _TIME.fullmatch(text.strip())
    if not found or not int(found[1]):
        raise BadQuery(f'"{text[:40]}" is no span of time; write it like "30m", "4h" or "7d"')
    return int(found[1]) * _MS[found[2]]


def _asked(args: argparse.Namespace) -> dict[str, str]:
    names = ("state", "owner", "department", "requester", "approver", "machine", "key")
    return {name: text for name in names if (text := getattr(args, name))}


def rows_of(asked: Client, given: dict[str, str]) -> list[dict[str, Any]]:
    """Approvals and requests that fit. Raises Failed."""
    found: list[dict[str, Any]] = asked.get(f"/v1/media?{urlencode(given)}")["media"]
    return found


def listing(args: argparse.Namespace) -> int:
    """Approvals and requests."""
    return _print(rows_of(client(args), _asked(args)), args)


def expiring(args: argparse.Namespace) -> int:
    """Those that end soon, the next one first."""
    rows = rows_of(client(args), {**_asked(args), "within": str(span_ms(args.within))})
    return _print(sorted(rows, key=lambda row: int(row.get("until") or 0)), args)


def _print(rows: list[dict[str, Any]], args: argparse.Namespace) -> int:
    if args.output == "json":
        for row in rows:
            # What readers of earlier versions look for is always there.
            say(msgspec.json.encode({"machines": [], "dirs": [], "read_only": False, "revoked": False, **row}).decode())
        return 0
    zone, lang = local_zone(), language(args)
    cells = [_cells(row, zone, lang) for row in rows]
    if args.output == "csv":
        _csv(_HEADS, cells)
    else:
        say(columns.table(cells, words.heads(lang, *_HEADS)))
    return 0


def _csv(heads: Iterable[str], rows: Iterable[list[str]]) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(heads)
    writer.writerows([sheet.guarded(columns.harmless(cell)) for cell in row] for row in rows)


def _cells(row: dict[str, Any], zone: tzinfo | None, lang: Language) -> list[str]:
    until = columns.time_text(row["until"] - 1, zone) if row.get("until") else words.say(lang, "no_end")
    state = words.say(lang, f"state_{row['state']}", reason=row.get("reason", ""))
    more = [words.say(lang, f"with_{name}") for name in ("read_only", "once") if row.get(name)]
    machines = " ".join(row.get("machines", [])) or words.say(lang, "all")
    said = [row.get(name, "") or "-" for name in ("requester", "approver", "purpose", "id")]
    return [
        row["key"],
        row.get("owner") or "-",
        row.get("department") or "-",
        ", ".join([state, *more]),
        until,
        machines,
        *said,
    ]


# -- acts ------------------------------------------------------------------------------------------------------------------


def _wish(args: argparse.Namespace) -> dict[str, Any]:
    """What was filled in; what was not stays as it is."""
    names = ("owner", "department", "purpose", "machines", "dirs", "read_only", "once", "requester")
    made = {name: got for name in names if (got := getattr(args, name)) not in (None, "")}
    if args.since:
        made["since"] = parse_time(args.since, time.time_ns() // 1_000_000, local_zone())
    if args.until is not None:
        made["until"] = until_ms(args.until)
    return made


def _named(args: argparse.Namespace) -> dict[str, str]:
    """The medium, by its key or an event."""
    if bool(args.key) == bool(args.from_event):
        raise BadQuery("name the medium by its KEY or by --from-event, one of them")
    return {"key": args.key} if args.key else {"from_event": args.from_event}


def _act(args: argparse.Namespace, act: str, **body: Any) -> Any:
    return msgspec.json.decode(client(args).request("POST", "/v1/media", {"act": act, **body}))


def _said(text: str) -> int:
    sys.stderr.write(text + "\n")
    return 0


def request(args: argparse.Namespace) -> int:
    """Ask for an approval; its id alone goes to stdout."""
    made = _act(args, "request", **_named(args), **_wish(args))
    say(made["id"])
    return _said(f"asked for an approval of {columns.harmless(made['key'])}; granted with: media approve {made['id']}")


def _is_id(text: str | None) -> bool:
    """Whether it is an approval's or a request's id: a medium's key has colons."""
    return re.fullmatch(r"[0-9a-f]{16}", text or "") is not None


def approve(args: argparse.Namespace) -> int:
    """Approve a medium, or grant a request."""
    named = _named(args)
    wish = _wish(args) | ({"approver": args.approver} if args.approver else {})
    if _is_id(args.key):
        seen = {"version": args.if_version} if args.if_version is not None else {}
        made = _act(args, "approve", id=args.key, **wish, **seen)
        return _said(f"approved {columns.harmless(made['key'])}, as {columns.harmless(made['requester'])} asked")
    missing = [name for name in ("owner", "purpose", "until") if getattr(args, name) is None]
    if missing:
        raise BadQuery(f"the following arguments are required: {', '.join('--' + name for name in missing)}")
    asked = client(args)
    key = named.get("key") or _key_of(asked, args.from_event)
    body = wish | ({"beside": True} if args.beside else {})
    headers = {} if args.if_version is None else {"If-Match": f'"{args.if_version}"'}
    asked.request("PUT", f"/v1/media/{quote(key, safe='')}", body, headers)
    return _said(f"approved {columns.harmless(key)}")


def _key_of(asked: Client, uid: str) -> str:
    event = asked.get(f"/v1/events/{quote(uid, safe='')}")
    key = event.get("unmapped", {}).get("sekisho", {}).get("medium", {}).get("key")
    if not key:
        raise Failed("that event is about no medium; take one like medium.attached or file.copied_out")
    return str(key)


def deny(args: argparse.Namespace) -> int:
    """Refuse a request."""
    made = _act(args, "deny", id=args.key, reason=args.reason)
    return _said(f"denied the request of {columns.harmless(made['requester'])} for {columns.harmless(made['key'])}")


def revoke(args: argparse.Namespace) -> int:
    """Withdraw one approval, or all of a medium."""
    if _is_id(args.key):
        _act(args, "revoke", id=args.key, reason=args.reason)
    else:
        client(args).request("DELETE", f"/v1/media/{quote(args.key, safe='')}?reason={quote(args.reason, safe='')}")
    return _said(f"revoked {columns.harmless(args.key)}")


def lost(args: argparse.Namespace) -> int:
    """Report a medium lost."""
    made = _act(args, "lost", **_named(args), reason=args.reason)
    return _said(f"reported lost: {columns.harmless(made['key'])}; if it turns up, that is a finding")


def found(args: argparse.Namespace) -> int:
    """Say that a lost medium was found."""
    made = _act(args, "found", **_named(args), reason=args.reason)
    return _said(f"found: {columns.harmless(made['key'])}; it has to be approved anew")


def unlock(args: argparse.Namespace) -> int:
    """Make a break-glass code; it alone goes to stdout."""
    body = {"machine": args.machine, "for_ms": span_ms(args.hours), "reason": args.reason}
    made = _act(args, "unlock", **_named(args), **body, **({"read_only": True} if args.read_only else {}))
    say(made["code"])
    until = columns.time_text(made["until"], local_zone())
    return _said(
        f"opens {columns.harmless(made['key'])} on {columns.harmless(args.machine)} once, until {until};"
        f" there: sekisho-agent unlock {made['code']}"
    )


# -- history and groups ----------------------------------------------------------------------------------------------------


def history(args: argparse.Namespace) -> int:
    """Every change of a medium's approvals, oldest first."""
    given = {"event": "register.changed", "medium": args.key}
    raws = client(args).lines(f"/v1/events?{urlencode(given)}", {"Accept": "application/x-ndjson"})
    if args.output == "json":
        for raw in raws:
            say(raw.decode())
        return 0
    zone, heads = local_zone(), ("time", "operation", "by", "from", "change", "id")
    cells = [_told(msgspec.json.decode(raw), zone) for raw in raws]
    if args.output == "csv":
        _csv(heads, cells)
    else:
        say(columns.table(cells, words.heads(language(args), *heads)))
    return 0


def _told(event: dict[str, Any], zone: tzinfo | None) -> list[str]:
    actor, source = event.get("actor", {}), event.get("src_endpoint", {})
    detail = event["unmapped"]["sekisho"].get("detail", {})
    who = actor.get("user", {}).get("name") or actor.get("app_name") or "-"
    operation = str(event.get("api", {}).get("operation", "-")).removeprefix("media.")
    after = detail.get("after") or {}
    what = _difference(detail.get("before") or {}, after, zone) or str(detail.get("reason") or event.get("message", ""))
    id = str(after.get("id") or detail.get("unlock") or "-")
    return [columns.time_text(event["time"], zone), operation, who, source.get("ip") or source.get("hostname") or "-", what, id]


def _difference(before: dict[str, Any], after: dict[str, Any], zone: tzinfo | None) -> str:
    """What differs, `name: before → after`."""
    quiet = ("id", "asked_at", "decided_at", "told", "used_at", "recorded_by")
    names = [name for name in dict.fromkeys([*after, *before]) if name not in quiet and before.get(name) != after.get(name)]
    return "; ".join(f"{name}: {_shown(name, before, zone)} → {_shown(name, after, zone)}" for name in names)


def _shown(name: str, said: dict[str, Any], zone: tzinfo | None) -> str:
    value = said.get(name)
    if value in (None, "", [], 0):
        return "approved" if name == "state" and said else "-"
    if name in ("since", "until"):
        return columns.time_text(int(value), zone)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def group(args: argparse.Namespace) -> int:
    """Groups of machines: list, set, remove."""
    asked = client(args)
    if args.group_act == "list":
        return _group_list(asked, args)
    target = f"/v1/groups/{quote(args.name, safe='')}"
    if args.group_act == "remove":
        asked.request("DELETE", target)
        return _said(f"removed the group {columns.harmless(args.name)}")
    machines = [line.strip() for line in sys.stdin if line.strip()] if args.machines == ["-"] else args.machines
    asked.request("PUT", target, {"machines": machines})
    return _said(f"the group {columns.harmless(args.name)} holds {len(machines)} machines")


def _group_list(asked: Client, args: argparse.Namespace) -> int:
    held: dict[str, list[str]] = asked.get("/v1/groups")["groups"]
    if args.output == "json":
        for name, machines in held.items():
            say(msgspec.json.encode({"name": name, "machines": machines}).decode())
        return 0
    cells = [[f"@{name}", str(len(machines)), " ".join(machines)] for name, machines in held.items()]
    if args.output == "csv":
        _csv(("group", "count", "machines"), cells)
    else:
        say(columns.table(cells, words.heads(language(args), "group", "count", "machines")))
    return 0
