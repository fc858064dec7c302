"""sekisho-agent: arguments → one call → a sentence or JSON. The only room of the agent that prints and exits.

Exit codes: 0 done, 1 found bad (check, verify), 2 usage or configuration, 3 degraded, 4 not running (status, media).
Data goes to stdout, talk to stderr. Modules are imported where they are needed: `--help` must not wait for a sensor.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from agent import __version__

if TYPE_CHECKING:
    from agent.config import Config
    from agent.words import Language

DONE, BAD, USAGE, DEGRADED, NOT_RUNNING = 0, 1, 2, 3, 4


def fail(sentence: str, code: int = USAGE) -> NoReturn:
    """Say one sentence on stderr and exit."""
    print(f"sekisho-agent: {sentence}", file=sys.stderr)
    raise SystemExit(code)


def _config(args: argparse.Namespace) -> "Config":
    from agent import config

    path = args.config or os.environ.get("SEKISHO_CONFIG") or config.DEFAULT_PATH
    try:
        return config.load(path)
    except config.ConfigError as error:
        fail(str(error))


def _run(args: argparse.Namespace) -> int:
    from agent.daemon import Daemon, StartError

    try:
        return Daemon(_config(args), record=args.record).run()
    except StartError as error:
        fail(str(error), BAD)


def _check(args: argparse.Namespace) -> int:
    from agent import checkup, words
    from agent.contract import show

    results = checkup.check(_config(args))
    if args.output == "json":
        for result in results:
            print(json.dumps(result.as_dict(), ensure_ascii=False))
    else:
        lang = _language()
        colours = {"ok": "32", "blind": "33", "error": "31"}
        width = max(show.display_width(words.say(lang, verdict)) for verdict in colours)
        for result in results:
            word = show.pad(words.say(lang, result.verdict), width)
            print(f"{_paint(word, colours[result.verdict])}  {result.about(lang)}: {result.says(lang)}")
            if advice := result.advice(lang):
                print(f"{' ' * width}  → {advice}")
    return BAD if any(result.verdict == "error" for result in results) else DONE


def _status(args: argparse.Namespace) -> int:
    from agent import checkup

    try:
        status = checkup.ask(_config(args).agent.state_dir)
    except checkup.NotRunning as error:
        if args.output == "json":
            print(json.dumps({"running": False, "why": str(error)}, ensure_ascii=False))
            return NOT_RUNNING
        fail(str(error), NOT_RUNNING)
    healthy = bool(status["healthy"])
    if args.output == "json":
        print(json.dumps(status, ensure_ascii=False))
    else:
        print("\n".join(checkup.lines(status, _language(), _paint)))
    return DONE if healthy else DEGRADED


def _media(args: argparse.Namespace) -> int:
    from agent import checkup, words

    try:
        media = checkup.ask(_config(args).agent.state_dir)["media"]
    except checkup.NotRunning as error:
        fail(str(error), NOT_RUNNING)
    if args.output == "json":
        for medium in media:
            print(json.dumps(medium, ensure_ascii=False))
    elif not media:
        print(words.say(_language(), "no_media"))
    else:
        print("\n".join((*checkup.media_table(media, _language()), *checkup.media_stories(media, _language()))))
    return DONE


def _events(args: argparse.Namespace) -> int:
    import time

    from agent.spoolfile import SpoolError, last_seq, read_events

    state_dir = _config(args).agent.state_dir
    tell = _teller(args.output)
    try:
        wanted = 10 if args.lines is None else args.lines
        after = 0 if args.lines is None and not args.follow else max(0, last_seq(state_dir) - wanted)
        while True:
            for seq, data in read_events(state_dir, after):
                tell(data)
                after = seq
            sys.stdout.flush()
            if not args.follow:
                return DONE
            time.sleep(0.25)
    except SpoolError as error:
        fail(str(error), BAD)


def _access(args: argparse.Namespace) -> int:
    import time

    from msgspec import structs

    from agent import words
    from agent.contract import columns, show
    from agent.sense import SensorError
    from agent.sense.rights import look

    lang, code, rows = _language(), DONE, list[list[str]]()
    for each in _config(args).agent.protect:
        try:
            account = look(os.path.realpath(each.path), time.time_ns() // 1_000_000)
        except SensorError as error:
            print(f"sekisho-agent: {error}", file=sys.stderr)
            code = BAD
            continue
        if args.output == "json":
            grants = [structs.asdict(grant) for grant in account.grants]
            print(json.dumps({"label": each.label, **structs.asdict(account), "grants": grants}, ensure_ascii=False))
        label = each.label or each.path
        for grant in account.grants:
            whom, files = show.grantee(grant.who, grant.people, lang), str(grant.files) if grant.files else ""
            rows.append([show.harmless(label), words.say(lang, f"may.{grant.may}"), whom, files])
        if not account.grants:
            rows.append([show.harmless(label), "", words.say(lang, "access_none"), ""])
    if args.output != "json" and rows:
        heads = [words.say(lang, f"col.{name}") for name in ("protected", "may", "who", "files")]
        print(columns.table(rows, heads))
    return code


def _verify(args: argparse.Namespace) -> int:
    from msgspec import structs

    from agent import identity, spoolfile, words
    from agent.contract.chain import NotWhole

    state_dir = _config(args).agent.state_dir
    try:
        whole = spoolfile.verify(state_dir, identity.public_key(state_dir))
    except NotWhole as error:
        if args.output == "json":
            print(json.dumps({"whole": False, "seq": error.seq, "why": error.why}, ensure_ascii=False))
        else:
            key = "verify.bad_event" if error.seq else "verify.bad"
            print(words.say(_language(), key, seq=error.seq, why=error.why))
        return BAD
    except (spoolfile.SpoolError, identity.IdentityError) as error:
        fail(str(error), BAD)
    if args.output == "json":
        print(json.dumps({"whole": True, **structs.asdict(whole)}))
    else:
        lang = _language()
        key = "verify.none" if whole.last < whole.first else "verify.whole"
        digests = words.say(lang, "verify.digests", count=whole.digests) if whole.digests else ""
        signed = words.say(lang, "verify.vouched" if whole.vouched else "verify.unvouched", seq=whole.vouched)
        print(words.say(lang, key, **structs.asdict(whole) | {"digests": digests, "signed": signed}))
    return DONE


def _enroll(args: argparse.Namespace) -> int:
    from agent import identity, sender

    config = _config(args)
    try:
        if args.new_key:
            _renew(config.agent.state_dir)
        pinned = sender.enroll(config.agent, args.url, args.token, args.ca_file)
    except (identity.IdentityError, sender.Refused) as error:
        fail(str(error), BAD)
    print(f"enrolled as {pinned.agent}; the collector's key {pinned.key} is pinned")
    return DONE


def _renew(state_dir: str) -> None:
    """Put the present key aside, if nothing depends on it any more."""
    from agent import checkup, identity, spoolfile
    from agent.contract.chain import NotWhole
    from agent.spool import SpoolError

    try:
        checkup.ask(state_dir)
    except checkup.NotRunning:
        pass
    else:
        fail("the agent is running with the key it has; stop it first: systemctl stop sekisho-agent", BAD)
    try:
        held, sent = spoolfile.verify(state_dir), identity.load(state_dir).acknowledged()
        waiting = held.last - (sent.seq if sent and sent.epoch == held.epoch else 0)
    except (SpoolError, NotWhole) as error:
        fail(f"{error}; a key is changed over a sound spool only", BAD)
    if waiting:
        fail(f"{waiting} events were not sent yet; start the agent and let it send them, then stop it", BAD)
    former = identity.renew(state_dir)
    print(f"the key of {former} was put aside")


def _replay(args: argparse.Namespace) -> int:
    import uuid

    from agent import daemon
    from agent.contract import event
    from agent.core import facts
    from agent.core.pipeline import Core

    core = Core(daemon.core_config(_config(args) if args.config else daemon.bare_config(), "0" * 32), lambda: uuid.uuid4().hex)
    seq, tell = 0, _teller(args.output)
    try:
        source: Any = sys.stdin.buffer if args.facts == "-" else Path(args.facts).open("rb")  # noqa: SIM115
        for fact in facts.read(source):
            for made in core.feed(fact):
                seq += 1
                tell(event.seal(made, seq, 0, bytes(32)))
    except facts.BadFact as error:
        fail(f"{args.facts}: {error}; facts are recorded by `sekisho-agent run --record FILE`")
    except OSError as error:
        fail(f"{args.facts}: can't be read ({error.strerror})")
    return DONE


def _enforce(args: argparse.Namespace) -> int:
    import time

    from agent import config, dryrun
    from agent.core import facts
    from agent.spoolfile import SpoolError, read_events

    site = _config(args)
    try:
        since_ms = 0 if args.since == "all" else time.time_ns() // 1_000_000 - int(config.parse_seconds(args.since) * 1000)
        if args.facts:
            with Path(args.facts).open("rb") as recorded:
                events = dryrun.replayed(site, recorded)
        else:
            events = [data for _, data in read_events(site.agent.state_dir)]
    except ValueError as error:
        fail(f"--since {error}, or all")
    except facts.BadFact as error:
        fail(f"{args.facts}: {error}; facts are recorded by `sekisho-agent run --record FILE`")
    except OSError as error:
        fail(f"{args.facts}: can't be read ({error.strerror})")
    except SpoolError as error:
        fail(str(error), BAD)
    found = dryrun.judge(site.agent, events, since_ms)
    if args.output == "json":
        for row in found:
            print(json.dumps(row.as_dict(), ensure_ascii=False))
    else:
        print("\n".join(dryrun.table(found, _language(), args.since)))
    return DONE


def _unlock(args: argparse.Namespace) -> int:
    import secrets
    import time

    from agent import checkup, identity, unlocking, words

    state_dir = _config(args).agent.state_dir
    try:
        checkup.ask(state_dir)
        said = unlocking.ask(state_dir, args.code, secrets.token_hex(8))
    except checkup.NotRunning as error:
        fail(str(error), NOT_RUNNING)
    except identity.IdentityError as error:
        fail(str(error), BAD)
    lang = _language()
    if said is None:
        fail(words.say(lang, "unlock.no_answer"), NOT_RUNNING)
    if args.output == "json":
        from msgspec import structs

        answer = structs.asdict(said)
        del answer["mark"]
        print(json.dumps({"unlocked": not said.why, **answer}, ensure_ascii=False))
    elif said.why:
        fail(words.say(lang, f"unlock.{said.why}", group=said.group), BAD)
    else:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(said.until_ms / 1000))
        key = "unlock.read_only" if said.read_only else "unlock.done"
        print(words.say(lang, key, key=said.key, until=until))
    return BAD if said.why else DONE


def _sim(args: argparse.Namespace) -> int:
    from msgspec import structs

    from agent import simulate
    from agent.contract.show import harmless

    root = args.dir or _config(args).agent.media.simulated_dir
    if not root:
        fail("agent.media.simulated_dir is empty; set it in the configuration, or name a directory with --dir")
    try:
        if args.act == "plug":
            claims = {key: value for key in ("vendor", "model", "serial") if (value := getattr(args, key)) is not None}
            medium = simulate.plug(root, args.name, fs=args.fs, kind=args.kind, read_only=args.read_only, **claims)
            print(medium.path)
        elif args.act == "unplug":
            for medium in simulate.present(root):
                if medium.name == args.name:
                    simulate.unplug(medium)
                    return DONE
            fail(f'no medium "{args.name}" is plugged into {root}; `sekisho-agent sim list` shows which are', BAD)
        else:
            for medium in simulate.present(root):
                said = structs.asdict(medium.descriptor)
                if args.output == "json":
                    print(json.dumps({"name": medium.name, "path": str(medium.path), **said}, ensure_ascii=False))
                else:
                    rows = (medium.name, said["kind"], f"{said['vendor']} {said['model']}", said["serial"], str(medium.path))
                    print("\t".join(map(harmless, rows)))
    except simulate.SimulationError as error:
        fail(str(error), BAD)
    return DONE


def _count(text: str) -> int:
    """A number of lines, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of lines; give 0 or more')
    return int(text)


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _language() -> "Language":
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "ja" if locale.startswith("ja") else "en"


def _teller(output: str) -> Callable[[bytes], None]:
    """Prints events: their exact bytes for `json`, else a line each, in columns and colours on a terminal."""
    from datetime import datetime

    from agent.contract import show

    terminal = sys.stdout.isatty()
    colour = terminal and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns if terminal else None
    zone, lang = datetime.now().astimezone().tzinfo, _language()

    def tell(data: bytes) -> None:
        if output == "json":
            sys.stdout.buffer.write(data + b"\n")
        else:
            sys.stdout.write(show.line(data, lang=lang, zone=zone, colour=colour, width=width) + "\n")

    return tell


def parser() -> argparse.ArgumentParser:
    """The whole command line; the reference is held to it."""
    common = argparse.ArgumentParser(add_help=False)  # -c is taken before and after each command's name
    where = "configuration (default: $SEKISHO_CONFIG, /etc/sekisho/config.toml)"
    common.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help=where)
    top = argparse.ArgumentParser(prog="sekisho-agent", description="Watches what leaves protected directories, and proves it.")
    top.add_argument("--version", action="version", version=f"sekisho-agent {__version__}")
    top.add_argument("-c", "--config", metavar="FILE", help=where)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    formed = argparse.ArgumentParser(add_help=False)
    formed.add_argument("-o", "--output", choices=("short", "json"), default="short", help="json: one object a line")
    formed.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")

    def command(name: str, act: Callable[[argparse.Namespace], int], tells: str, form: bool = True) -> argparse.ArgumentParser:
        parents = [common, formed] if form else [common]
        made = commands.add_parser(name, parents=parents, help=tells, description=tells)
        made.set_defaults(act_on=act)
        return made

    run = command("run", _run, "the daemon, in the foreground", form=False)
    run.add_argument("--record", metavar="FILE", help="also append every fact to FILE, for `replay`")
    command("check", _check, "read configuration and machine; say what will be seen and what not")
    command("status", _status, "sensors, coverage, queue, spool, last receipt, memory")
    command("media", _media, "media present now, each with its decision and why")
    command("access", _access, "who may read and write in the protected directories, and by which entry")
    events = command("events", _events, "what this machine recorded")
    events.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    events.add_argument("-n", "--lines", type=_count, metavar="N", help="only the last N (default: all; 10 with -f)")
    command("verify", _verify, "the local chain and signatures; names the first bad event")
    enroll = command("enroll", _enroll, "make the key, join a collector, pin its key", form=False)
    enroll.add_argument("url", metavar="URL")
    enroll.add_argument("--token", required=True, metavar="T")
    enroll.add_argument("--new-key", action="store_true", help="under a new key; the old one is put aside")
    enroll.add_argument("--ca-file", default="", metavar="FILE", help="the authority that signed the collector's certificate")
    replay = command("replay", _replay, "run recorded facts through the pure core; print the events")
    replay.add_argument("facts", metavar="FACTS", help="a file of facts, or - for stdin")
    enforce = command("enforce", _enforce, "what mode enforce would have stopped; needs --dry-run")
    enforce.add_argument("--dry-run", action="store_true", required=True, help="look back only; nothing is stopped by this")
    enforce.add_argument("--since", default="7d", metavar="TIME", help="how far back: 24h, 7d, all (default: 7d)")
    enforce.add_argument("--facts", metavar="FILE", help="judge recorded facts instead of this machine's own records")
    unlock = command("unlock", _unlock, "use a medium for some hours by a break-glass code, without network")
    unlock.add_argument("code", metavar="CODE", help="as read out by whoever runs the collector")
    sim = command("sim", _sim, "simulated media", form=False)
    sim.add_argument("--dir", metavar="DIR", help="the directory (default: agent.media.simulated_dir)")
    acts = sim.add_subparsers(dest="act", required=True, metavar="plug|unplug|list")
    plug = acts.add_parser("plug", parents=[common], help="plug a medium in")
    plug.add_argument("name", metavar="NAME")
    plug.add_argument(
        "--kind", default="storage", choices=("storage", "phone", "optical", "keyboard", "network", "reader", "other")
    )
    plug.add_argument("--vendor")
    plug.add_argument("--model")
    plug.add_argument("--serial")
    plug.add_argument("--fs", default="folder", choices=("folder", "tmpfs", "ext4"))
    plug.add_argument("--read-only", action="store_true")
    acts.add_parser("unplug", parents=[common], help="pull a medium").add_argument("name", metavar="NAME")
    acts.add_parser("list", parents=[common, formed], help="media plugged in")
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point of `sekisho-agent`."""
    args = parser().parse_args(argv)
    try:
        code: int = args.act_on(args)
    except BrokenPipeError:  # `sekisho-agent events | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except KeyboardInterrupt:
        code = 130
    except PermissionError as error:
        fail(f"{error.filename}: may not be read or written by this user; try with sudo", BAD)
    return code


if __name__ == "__main__":
    sys.exit(main())
