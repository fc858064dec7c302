"""The arguments of `sekisho-collector media …`. What the commands do is in `register` and `register_files`.

Owns: acts and options of the register of media. Must not know: routes, the collector.
"""

import argparse
from typing import Any

FORMS = ("table", "json", "csv")


def add(sub: Any, asking: argparse.ArgumentParser, states: tuple[str, ...]) -> None:
    """The command `media` with all its acts."""
    media = sub.add_parser("media", help="the register of approved media").add_subparsers(
        dest="act", required=True, metavar="ACT"
    )
    listing = media.add_parser("list", parents=[asking], help="approvals and requests, all or by filters")
    _form(listing)
    _filters(listing, states)
    ends = media.add_parser("expiring", parents=[asking], help="approvals that end soon, and who asked for them")
    ends.add_argument("--within", default="7d", metavar="TIME", help='how soon (default: "7d")')
    _form(ends)
    _filters(ends, states)
    ask = media.add_parser("request", parents=[asking], help="ask for an approval; prints the request's id")
    _medium(ask)
    _wish(ask, needed=False)
    approve = media.add_parser("approve", parents=[asking], help="approve a medium, or grant a request")
    approve.add_argument(
        "key", nargs="?", metavar="KEY|REQUEST", help="the medium's key, as events carry it, or a request's id"
    )
    approve.add_argument("--from-event", metavar="UID", help="take the key from this event")
    approve.add_argument("--approver", default="", help="who decided (default: you; an administrator may record another's)")
    approve.add_argument("--beside", action="store_true", help="besides what is approved for it, not instead of it")
    approve.add_argument(
        "--if-version", type=int, metavar="N", help="only if nobody changed it since the list showed this version"
    )
    _wish(approve, needed=False)
    deny = media.add_parser("deny", parents=[asking], help="refuse a request")
    deny.add_argument("key", metavar="REQUEST")
    _reason(deny)
    revoke = media.add_parser("revoke", parents=[asking], help="withdraw an approval")
    revoke.add_argument("key", metavar="KEY", help="the medium's key: all of its approvals; or an approval's id")
    _reason(revoke)
    for act, tells in (("lost", "report a medium lost"), ("found", "say that it was found")):
        each = media.add_parser(act, parents=[asking], help=tells)
        _medium(each)
        _reason(each)
    history = media.add_parser("history", parents=[asking], help="every change of a medium's approvals, from the log")
    history.add_argument("key", metavar="KEY")
    _form(history)
    history.add_argument("--lang", choices=("en", "ja"), help="language of the heads (default: from the locale)")
    code = media.add_parser("unlock", parents=[asking], help="a code that opens one medium on one machine that has no network")
    _medium(code)
    code.add_argument("--machine", required=True, metavar="NAME", help="its name or agent id")
    code.add_argument("--for", dest="hours", required=True, metavar="TIME", help='how long, like "4h"; 7d at most')
    code.add_argument("--read-only", action="store_true", help="for reading only")
    _reason(code)
    _groups(media, asking)
    _lists(media, asking)


def _form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=FORMS, default="table", help="a table, one JSON object a line, or CSV")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")


def _filters(parser: argparse.ArgumentParser, states: tuple[str, ...]) -> None:
    group = parser.add_argument_group("filters (all that are given must hold)")
    group.add_argument("--state", choices=states, default="", help="as of now")
    for name in ("owner", "department", "requester", "approver"):
        group.add_argument(f"--{name}", default="", metavar="NAME")
    group.add_argument("--machine", default="", metavar="NAME", help="that count on this machine, or group (@NAME)")
    group.add_argument("--key", default="", metavar="KEY", help="the beginning of a medium's key")
    parser.add_argument("--lang", choices=("en", "ja"), help="language of the heads (default: from the locale)")


def _medium(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY", help="the medium's key, as events carry it")
    parser.add_argument("--from-event", metavar="UID", help="take the key from this event")


def _reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why, for the record")


def _wish(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    parser.add_argument("--owner", required=needed, help="who may use it")
    parser.add_argument("--department", metavar="NAME", help="of the owner")
    parser.add_argument("--requester", default="", metavar="NAME", help="who asked (default: you)")
    parser.add_argument("--purpose", required=needed, help="what for")
    parser.add_argument("--since", default="", metavar="TIME", help="its first day, or an exact time (default: now)")
    parser.add_argument("--until", default=None, metavar="TIME", help='its last day, or an exact time; "never" for no end')
    parser.add_argument("--machines", nargs="+", metavar="NAME", help="only on these, or groups of them (@NAME); default: all")
    parser.add_argument("--dirs", nargs="+", metavar="LABEL", help="only for these protected directories (default: all)")
    parser.add_argument("--read-only", action="store_true", default=None, help="for reading only")
    parser.add_argument("--once", action="store_true", default=None, help="a pass for one plugging in on one machine")


def _groups(media: Any, asking: argparse.ArgumentParser) -> None:
    group = media.add_parser("group", help="groups of machines, for --machines @NAME").add_subparsers(
        dest="group_act", required=True, metavar="ACT"
    )
    _form(group.add_parser("list", parents=[asking], help="every group and its machines"))
    put = group.add_parser("set", parents=[asking], help="say which machines a group holds")
    put.add_argument("name", metavar="NAME")
    put.add_argument("machines", nargs="*", metavar="MACHINE", help="names or agent ids; - reads them from stdin, one a line")
    drop = group.add_parser("remove", parents=[asking], help="remove a group: what was approved for it counts nowhere then")
    drop.add_argument("name", metavar="NAME")


def _lists(media: Any, asking: argparse.ArgumentParser) -> None:
    load = media.add_parser("import", parents=[asking], help="put a list into the register: all of it, or nothing")
    load.add_argument("file", metavar="FILE", help='what "media export" wrote, or another program\'s; - for stdin')
    load.add_argument(
        "--format", dest="form", choices=("csv", "usbguard", "udev"), default="csv",
        help="udev: of `udevadm info --export-db` (default: csv)",
    )  # fmt: skip
    load.add_argument("--dry-run", action="store_true", help="only show what would change")
    load.add_argument("--encoding", default="", metavar="NAME", help="of a CSV file that is not UTF-8, like cp932")
    more = load.add_argument_group("for usbguard and udev, which know nothing of people")
    more.add_argument("--owner", default="", help="who may use them")
    more.add_argument("--department", default="", metavar="NAME")
    more.add_argument("--approver", default="", help="who approved them (default: you)")
    more.add_argument("--purpose", default="", help="what for")
    more.add_argument("--until", default="never", metavar="TIME", help="when the approvals end")
    more.add_argument("--machines", nargs="+", default=[], metavar="NAME", help="only on these")
    save = media.add_parser("export", parents=[asking], help="the register as CSV")
    save.add_argument("-o", "--output", metavar="FILE", help="default: stdout")
    save.add_argument("--bom", action="store_true", help="with a mark at the beginning, which Excel needs to know UTF-8")
    save.add_argument("--lang", choices=("en", "ja"), default="en", help="language of the head line (default: en)")
