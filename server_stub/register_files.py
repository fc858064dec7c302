"""`media import` and `media export`: the register as a file, and lists that other programs keep.

Owns: reading and writing files, the two passes of an import (first what every row would do, then, if nothing is refused, the
doing), and saying what is wrong with file, line and column. Must not know: columns (`sheet`), other programs' formats
(`usbguard`, `udevdb`), the rules.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import msgspec

from agent.contract import columns
from server_stub import sheet, udevdb, usbguard
from server_stub.bulk import Row
from server_stub.client import Client, Failed
from server_stub.commands import client, local_zone, until_ms
from server_stub.query import BadQuery
from server_stub.register import rows_of

CHUNK = 1_000
"""Rows in one request."""
_MOST_TOLD = 100
"""Faults that are printed, at most."""
Lines = list[tuple[int, Row]]


def save(args: argparse.Namespace) -> int:
    """The register as CSV."""
    rows = [msgspec.convert(each, Row) for each in _rows(client(args))]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(sheet.heads(args.lang == "ja"))
    zone = local_zone()
    writer.writerows(sheet.cells(row, zone) for row in rows)
    try:
        if args.output:
            with Path(args.output).open("w", encoding="utf-8-sig" if args.bom else "utf-8", newline="") as file:
                file.write(text.getvalue())
        else:
            sys.stdout.write(("\ufeff" if args.bom else "") + text.getvalue())
    except OSError as error:
        raise Failed(f"{args.output}: can't be written ({error.strerror}); choose another place") from None
    return 0


def _rows(asked: Client) -> list[dict[str, Any]]:
    """What stands in the register, as rows of a list: states as stored, those of time and use left out."""
    known = set(Row.__struct_fields__)
    made = []
    for row in rows_of(asked, {}):
        stored = {"expiring": "approved", "expired": "approved", "used": "approved"}.get(row["state"], row["state"])
        made.append({name: value for name, value in row.items() if name in known} | {"state": stored})
    return made


def load(args: argparse.Namespace) -> int:
    """Put a list into the register; nothing is changed if a row can't be used."""
    try:
        data = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        text = sheet.decode(data, args.encoding)
    except OSError as error:
        raise Failed(f"{args.file}: can't be read ({error.strerror}); name a file that can") from None
    except sheet.NotText as error:
        raise Failed(f"{args.file}: {error}") from None
    if args.form == "csv":
        rows, faults = sheet.read(text, local_zone())
    else:
        rows, faults = (_usbguard if args.form == "usbguard" else _udev)(text, args)
    _stop_for(args.file, faults)
    asked = client(args)
    told = _sent(asked, rows, dry_run=True)
    refused = [
        sheet.Fault(line, each.get("column", ""), each["why"])
        for (line, _), each in zip(rows, told, strict=True)
        if each["outcome"] == "refused"
    ]
    _stop_for(args.file, refused)
    if args.dry_run:
        _show(rows, told)
    else:
        told = _sent(asked, rows, dry_run=False)
    counts = {name: sum(each["outcome"] == name for each in told) for name in ("new", "changed", "same")}
    what = "would import" if args.dry_run else "imported"
    sys.stderr.write(
        f"{what} {len(rows)} media: {counts['new']} new, {counts['changed']} changed, {counts['same']} as they were\n"
    )
    return 0


def _stop_for(file: str, faults: list[sheet.Fault]) -> None:
    """Say all that is wrong, and that nothing was done. Raises Failed."""
    if not faults:
        return
    faults = sorted(faults, key=lambda each: each.line)
    said = [
        f"{file}:{each.line}: " + (f"{each.column}: " if each.column else "") + columns.harmless(each.why) for each in faults
    ]
    more = [f"and {len(said) - _MOST_TOLD} more"] if len(said) > _MOST_TOLD else []
    raise Failed("\n".join([*said[:_MOST_TOLD], *more]) + "\nnothing was imported")


def _sent(asked: Client, rows: Lines, *, dry_run: bool) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for at in range(0, len(rows), CHUNK):
        body = {"act": "import", "rows": [row for _, row in rows[at : at + CHUNK]], "dry_run": dry_run}
        told += msgspec.json.decode(asked.request("POST", "/v1/media", body))["rows"]
    return told


def _show(rows: Lines, told: list[dict[str, Any]]) -> None:
    for (line, row), each in zip(rows, told, strict=True):
        if each["outcome"] != "same":
            fields = f" ({', '.join(each['fields'])})" if each["outcome"] == "changed" else ""
            sys.stdout.write(f"{line}: {each['outcome']} {columns.harmless(row.key)}{fields}\n")


# -- lists of other programs -----------------------------------------------------------------------------------------------


def _row(args: argparse.Namespace, key: str, name: str, *, allow: bool = True) -> Row:
    """A medium that another program knows; of people it knows nothing, so they are said with the command."""
    if not args.owner or not args.approver:
        raise BadQuery(f"--format {args.form} knows nothing of people; give --owner and --approver for all of them")
    return Row(
        key=key,
        owner=args.owner,
        department=args.department,
        approver=args.approver,
        purpose=args.purpose or columns.harmless(name, 200),
        machines=args.machines,
        until=until_ms(args.until),
        state="approved" if allow else "revoked",
        reason="" if allow else "blocked by a rule of usbguard",
    )


def _usbguard(text: str, args: argparse.Namespace) -> tuple[Lines, list[sheet.Fault]]:
    rows: Lines = []
    faults: list[sheet.Fault] = []
    seen: dict[str, int] = {}
    for each in usbguard.read(text):
        if isinstance(each, tuple):
            line, error = each
            faults.append(sheet.Fault(line, f"column {error.column}", f"no rule of usbguard: {error}"))
            continue
        for note in each.notes:
            sys.stderr.write(f"{args.file}:{each.line}: {columns.harmless(note)}\n")
        for key in each.keys:
            # usbguard takes the first rule that matches: a later one for the same device says nothing.
            if (first := seen.setdefault(key, each.line)) == each.line:
                rows.append((each.line, _row(args, key, each.name, allow=each.allow)))
            else:
                sys.stderr.write(
                    f"{args.file}:{each.line}: not carried over: line {first} decides on {columns.harmless(key)}\n"
                )
    return rows, faults


def _udev(text: str, args: argparse.Namespace) -> tuple[Lines, list[sheet.Fault]]:
    rows: Lines = []
    for each in udevdb.read(text):
        if not each.key or each.key.endswith(":noserial"):
            why = "has no serial number of its own" if each.key else "the export lacks what its key is made of; plug it in"
            sys.stderr.write(f"{args.file}:{each.line}: {columns.harmless(each.name or each.key)}: not carried over: {why}\n")
        else:
            rows.append((each.line, _row(args, each.key, each.name)))
    return rows, []
