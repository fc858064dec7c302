"""What the commands `media …` do: the register of approved media as a table, as CSV, and one approval at a time.

Owns: from arguments or a file's rows to the routes of the register. Must not know: how the collector is reached.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from agent.contract import columns
from agent.contract.wire import ApprovalEntry
from server_stub import words
from server_stub.client import Client, Failed
from server_stub.commands import client, local_zone, say, until_ms
from server_stub.judged import language
from server_stub.query import BadQuery

HEADS = ["key", "owner", "approver", "purpose", "until", "machines", "dirs", "read_only", "revoked", "reason"]


class _Register(msgspec.Struct):
    media: list[ApprovalEntry]


def _entries(asked: Client) -> list[ApprovalEntry]:
    return msgspec.json.decode(asked.request("GET", "/v1/media"), type=_Register).media


def listing(args: argparse.Namespace) -> int:
    """Every medium in the register."""
    rows = _entries(client(args))
    if args.output == "json":
        for row in rows:
            say(msgspec.json.encode(row).decode())
        return 0
    zone, lang, cells = local_zone(), language(args), []
    for row in rows:
        until = columns.time_text(row.until - 1, zone) if row.until else words.say(lang, "no_end")
        state = "revoked" if row.revoked else "read_only" if row.read_only else "approved"
        cells.append([row.key, row.owner, row.approver, until, words.say(lang, state, reason=row.reason), row.purpose])
    say(columns.table(cells, words.heads(lang, "key", "owner", "approver", "until", "state", "purpose")))
    return 0


def _put(asked: Client, key: str, body: dict[str, Any]) -> None:
    asked.request("PUT", f"/v1/media/{quote(key, safe='')}", body)


def approve(args: argparse.Namespace) -> int:
    """Approve one medium."""
    if bool(args.key) == bool(args.from_event):
        raise BadQuery("name the medium by its KEY or by --from-event, one of them")
    asked = client(args)
    key = args.key or _key_of(asked, args.from_event)
    body = {
        "owner": args.owner,
        "approver": args.approver,
        "purpose": args.purpose,
        "until": until_ms(args.until),
        "machines": args.machines,
        "dirs": args.dirs,
        "read_only": args.read_only,
    }
    _put(asked, key, body)
    sys.stderr.write(f"approved {columns.harmless(key)}" + "\n")
    return 0


def _key_of(asked: Client, uid: str) -> str:
    event = asked.get(f"/v1/events/{quote(uid, safe='')}")
    key = event.get("unmapped", {}).get("sekisho", {}).get("medium", {}).get("key")
    if not key:
        raise Failed("that event is about no medium; take one like medium.attached or file.copied_out")
    return str(key)


def revoke(args: argparse.Namespace) -> int:
    """Withdraw one approval."""
    client(args).request("DELETE", f"/v1/media/{quote(args.key, safe='')}?reason={quote(args.reason, safe='')}")
    sys.stderr.write(f"revoked {columns.harmless(args.key)}" + "\n")
    return 0


def save(args: argparse.Namespace) -> int:
    """The register as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HEADS, extrasaction="ignore")
    writer.writeheader()
    for row in _entries(client(args)):
        lists = {"machines": ";".join(row.machines), "dirs": ";".join(row.dirs)}
        flags = {"read_only": "yes" if row.read_only else "", "revoked": "yes" if row.revoked else ""}
        writer.writerow({**msgspec.structs.asdict(row), **lists, **flags, "until": row.until or "never"})
    try:
        if args.output:
            Path(args.output).write_text(text.getvalue(), "utf-8")
        else:
            sys.stdout.write(text.getvalue())
    except OSError as error:
        raise Failed(f"{args.output}: can't be written ({error.strerror}); choose another place") from None
    return 0


def load(args: argparse.Namespace) -> int:
    """Approve every medium of a CSV file; nothing is changed if a line can't be used."""
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise Failed(f"{args.file}: can't be read ({error.strerror}); name a file that can") from None
    except UnicodeDecodeError:
        raise Failed(f"{args.file}: is not UTF-8; save it as CSV in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text))
    missing = {"key", "owner", "approver"} - set(reader.fieldnames or [])
    if missing:
        raise Failed(f"{args.file}:1: lacks the column {', '.join(sorted(missing))}; the head line is: {','.join(HEADS)}")
    wanted: list[tuple[str, dict[str, Any]]] = []
    for row in reader:
        at = f"{args.file}:{reader.line_num}"
        cells = {name: (row.get(name) or "").strip() for name in HEADS}
        if not (cells["key"] and cells["owner"] and cells["approver"]):
            raise Failed(f"{at}: needs a key, an owner and an approver; nothing was imported")
        try:
            until = until_ms(cells["until"])
        except BadQuery as error:
            raise Failed(f"{at}: {error}; nothing was imported") from None
        body: dict[str, Any] = {name: cells[name] for name in ("owner", "approver", "purpose")} | {
            "until": until,
            "machines": [part for part in cells["machines"].split(";") if part],
            "dirs": [part for part in cells["dirs"].split(";") if part],
            "read_only": cells["read_only"].lower() in ("yes", "true", "1"),
        }
        body |= {"revoked": cells["revoked"].lower() in ("yes", "true", "1"), "reason": cells["reason"]}
        wanted.append((cells["key"], body))
    asked = client(args)
    for key, body in wanted:
        _put(asked, key, body)
    sys.stderr.write(f"imported {len(wanted)} media\n")
    return 0
