"""sekisho-collector: arguments → one call → lines, a table or JSON. The only room here that prints and exits.

Owns: the commands and their options, exit codes (0 done, 1 found bad or not possible, 2 usage), colour and columns on a
terminal and plain text in a pipe, and errors as one sentence on stderr. What a command does is in `commands`; both are
imported only when asked for, so that `--help` is quick. Must not know: SQL, routes' insides, keys.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import Any

ROLES = ("viewer", "reviewer", "admin", "auditor")
FIELDS = ("user", "agent", "medium", "event", "label", "way", "program", "day")


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "-c", "--config", metavar="FILE", help="configuration (default: $SEKISHO_CONFIG, /etc/sekisho/config.toml)"
    )
    return common


def _asking() -> argparse.ArgumentParser:
    asking = argparse.ArgumentParser(add_help=False, parents=[_common()])
    asking.add_argument(
        "--url", default=os.environ.get("SEKISHO_URL", ""), help="a collector elsewhere (default: $SEKISHO_URL)"
    )
    asking.add_argument(
        "--token", default=os.environ.get("SEKISHO_TOKEN", ""), help="API token for it (default: $SEKISHO_TOKEN)"
    )
    asking.add_argument("--ca-file", default="", metavar="FILE", help="CA that signed its certificate (default: the system's)")
    return asking


def _table_or_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table", help="a table, or one JSON object a line")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")


def _filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters (all that are given must hold)")
    when = '"-1h", "today", "yesterday", "2026-11-23", "2026-11-23 10:00"'
    group.add_argument("-S", "--since", default="", metavar="TIME", help=f"not before: {when}")
    group.add_argument("-U", "--until", default="", metavar="TIME", help="before")
    group.add_argument(
        "-p", "--severity", default="", metavar="LEVEL", help="at least: info, low, medium, high, critical, or 1 to 5"
    )
    group.add_argument("--agent", default="", metavar="NAME", help="a machine, by name or agent id")
    group.add_argument("--user", default="", metavar="NAME", help="a login user")
    group.add_argument("--medium", default="", metavar="KEY", help="a medium, by the beginning of its key or serial number")
    group.add_argument("--way", default="", metavar="WAY", help="how it left: mount, mtp, usb, network, print or bluetooth")
    group.add_argument("--event", default="", metavar="CODE", help='like "file.copied_out", "copy.*,medium.*", "!agent.*"')
    group.add_argument("-g", "--grep", default="", metavar="TEXT", help="text in the event; in lower case, it ignores case")


def _tokens(sub: Any, asking: argparse.ArgumentParser) -> None:
    token = sub.add_parser("token", help="enrolment and API tokens").add_subparsers(dest="act", required=True, metavar="ACT")
    create = token.add_parser("create", parents=[asking], help="make one; prints the token alone, this once")
    kind = create.add_mutually_exclusive_group(required=True)
    kind.add_argument("--role", choices=ROLES, help="an API token that may do what this role may")
    kind.add_argument("--enroll", action="store_true", help="a token that lets agents join")
    create.add_argument("--uses", type=int, metavar="N", help="agents that may join with it (default: 1; 0: any number)")
    create.add_argument("--until", default="", metavar="TIME", help="when it ends (default: never)")
    create.add_argument("--note", default="", metavar="TEXT", help="what it is for; acts are recorded under this name")
    listing = token.add_parser("list", parents=[asking], help="all tokens (never the tokens themselves)")
    _table_or_json(listing)
    revoke = token.add_parser("revoke", parents=[asking], help="end one")
    revoke.add_argument("id", metavar="ID", help='as "token list" shows it')


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    from server_stub import register_cli
    from server_stub.config import VERSION
    from server_stub.records import STATES

    top = argparse.ArgumentParser(
        prog="sekisho-collector", description="Receives, verifies, keeps and shows what Sekisho's agents record."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asking = _asking()
    sub.add_parser("serve", parents=[_common()], help="run the collector, in the foreground")
    tail = sub.add_parser("tail", parents=[asking], help="the newest events, and with -f those to come")
    tail.add_argument("-f", "--follow", action="store_true", help="go on with events as they arrive")
    tail.add_argument("-n", "--lines", type=int, default=10, metavar="N", help="how many to begin with (default: 10)")
    tail.add_argument(
        "-o",
        "--output",
        choices=("short", "json", "cat"),
        default="short",
        help="a line each, exact JSON, or only what happened",
    )
    query = sub.add_parser("query", parents=[asking], help="all events that match, oldest first")
    query.add_argument("-o", "--output", choices=("short", "json", "csv", "table"), default="short", help="form of the answer")
    query.add_argument("--group-by", choices=FIELDS, help="count events and add up bytes by this instead")
    query.add_argument("-n", "--lines", type=int, default=0, metavar="N", help="at most so many (default: all)")
    for each in (tail, query):
        _filters(each)
        each.add_argument("--lang", choices=("en", "ja"), help="language of the lines (default: from the locale)")
    agents = sub.add_parser("agents", parents=[asking], help="the machines: last heard, version, what they do not see")
    _table_or_json(agents)
    register_cli.add(sub, asking, STATES)
    _tokens(sub, asking)
    _evidence(sub, asking)
    return top


def _evidence(sub: Any, asking: argparse.ArgumentParser) -> None:
    export = sub.add_parser("export", parents=[asking], help="a bundle of events that can be verified without the collector")
    export.add_argument("-o", "--output", metavar="FILE", help="default: stdout")
    export.add_argument("--size", type=int, metavar="N", help="the log as it was at this size (default: now)")
    _filters(export)
    verify = sub.add_parser(  # -c is taken as by every command; a bundle needs no configuration
        "verify", parents=[_common()], help="check a bundle offline; names the first event that does not fit"
    )
    verify.add_argument("file", metavar="FILE", help="what export wrote")
    verify.add_argument("--key", default="", metavar="FILE", help="the collector's public key, got another way than the bundle")
    verify.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="FILE",
        help="older checkpoints of it, from a witness",
    )
    _text_or_json(verify)
    verify.add_argument("--lang", choices=("en", "ja"), help="language of the lines (default: from the locale)")
    key = sub.add_parser("key", help="the key that signs the log").add_subparsers(dest="act", required=True, metavar="ACT")
    _text_or_json(key.add_parser("show", parents=[asking], help="the public key, for verify --key and for witnesses"))
    key.add_parser("rotate", parents=[_common()], help="make a new one that the old one vouches for (stop the collector first)")
    witness = sub.add_parser("witness", help="who keeps this log's checkpoints").add_subparsers(
        dest="act", required=True, metavar="ACT"
    )
    _text_or_json(witness.add_parser("send", parents=[asking], help="give the newest checkpoint to every witness, now"))
    show = witness.add_parser("show", parents=[asking], help="the newest checkpoint, to be printed or kept")
    show.add_argument("--cosigned", action="store_true", help="the newest that another collector cosigned")
    retain = sub.add_parser("retain", parents=[asking], help="erase the content of old events; their proofs stay")
    retain.add_argument("--older-than", required=True, metavar="AGE", help='since they were received, like "400d"')
    backup = sub.add_parser(
        "backup", parents=[_common()], help="copy the store, also while the collector runs (PostgreSQL: by pg_dump)"
    )
    backup.add_argument("file", metavar="FILE", help="must not exist; the signing key is not in it")
    migrate = sub.add_parser("migrate", parents=[_common()], help="move the store to PostgreSQL; agents need not be stopped")
    migrate.add_argument("--to", required=True, metavar="URL", help="an empty database: postgresql://USER@HOST/NAME")
    restore = sub.add_parser("restore", parents=[_common()], help="put a backup in the store's place; stop the collector first")
    restore.add_argument("file", metavar="FILE", help="what backup wrote")


def _text_or_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=("short", "json"), default="short", help="lines, or one JSON object a line")
    parser.add_argument("--json", dest="output", action="store_const", const="json", help="the same as -o json")


def _joined(argv: list[str]) -> list[str]:
    """`argv` with times like "-30d" joined to the option before them: argparse would take them for options."""
    done: list[str] = []
    for word in argv:
        before = done[-1] if done else ""
        if "--" in done or not re.fullmatch(r"-[0-9]+[a-z]+", word):
            done.append(word)
        elif len(before) > 3 and any(name.startswith(before) for name in ("--since", "--until")):
            done[-1] = f"{before}={word}"
        elif re.fullmatch(r"-[a-zA-Z]*[SU]", before):
            done[-1] = before + word
        else:
            done.append(word)
    return done


def _unreadable(args: argparse.Namespace) -> str:
    """The first argument that is not UTF-8, shown harmlessly; empty if there is none. Names of files may be any bytes."""
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if name not in ("config", "ca_file", "file", "output", "key", "checkpoint") and isinstance(text, str):
                try:
                    text.encode()
                except UnicodeEncodeError:
                    return ascii(text)[:60]
    return ""


def main(argv: list[str] | None = None) -> int:
    """The command line; its exit code."""
    args = parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if spoiled := _unreadable(args):
        print(f"sekisho-collector: the argument {spoiled} is not UTF-8; write it in UTF-8", file=sys.stderr)
        return 2
    from server_stub.client import Failed
    from server_stub.config import ConfigError
    from server_stub.query import BadQuery
    from server_stub.store import StoreError

    try:
        return _command(args)(args)
    except (ConfigError, BadQuery) as error:
        print(f"sekisho-collector: {error}", file=sys.stderr)
        return 2
    except (Failed, StoreError) as error:
        print(f"sekisho-collector: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if getattr(args, "follow", False) else 130
    except BrokenPipeError:
        # The reader of our pipe (head, less) has seen enough. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _serve(args: argparse.Namespace) -> int:
    import asyncio
    import logging

    from server_stub import config
    from server_stub.serve import serve

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    # A stranger's malformed request is no news: it was answered, and must not fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    settings = config.load(args.config)

    def ready(url: str) -> None:
        print(f"sekisho-collector: serving {url}, state in {settings.state_dir}", file=sys.stderr, flush=True)

    asyncio.run(serve(settings, ready))
    return 0


def _command(args: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    if args.command == "serve":
        return _serve
    if args.command == "verify":
        from server_stub import judged

        return judged.verify
    from server_stub import commands, evidence, moving, register, register_files

    table: dict[str, Callable[[argparse.Namespace], int]] = {
        "tail": commands.tail,
        "query": commands.query,
        "agents": commands.agents,
        "media list": register.listing,
        "media expiring": register.expiring,
        "media request": register.request,
        "media approve": register.approve,
        "media deny": register.deny,
        "media revoke": register.revoke,
        "media lost": register.lost,
        "media found": register.found,
        "media history": register.history,
        "media unlock": register.unlock,
        "media group": register.group,
        "media import": register_files.load,
        "media export": register_files.save,
        "export": evidence.export,
        "key show": evidence.key_show,
        "key rotate": evidence.key_rotate,
        "witness send": evidence.witness_send,
        "witness show": evidence.witness_show,
        "retain": evidence.retain,
        "backup": evidence.backup,
        "restore": evidence.restore,
        "migrate": moving.migrate,
        "token create": commands.token_create,
        "token list": commands.token_list,
        "token revoke": commands.token_revoke,
    }
    return table[f"{args.command} {args.act}" if "act" in args else args.command]


if __name__ == "__main__":
    sys.exit(main())
