"""`python -m tests.ways_out [TABLE] [-k TEXT] [--runs N] [-o text|json|md]`: run a table of ways out, and say what was told.

Exit codes: 0 all that was carried out was told rightly but for 1 % at most, and nothing else; 1 not so; 2 usage.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ways_out import judge, page, table
from tests.ways_out.lab import Lab, LabError
from tests.ways_out.run import Runner

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    asked = argparse.ArgumentParser(
        prog="python -m tests.ways_out", description="The matrix of ways out, against a real agent."
    )
    asked.add_argument(
        "table", nargs="?", type=Path, default=HERE / "ways.toml", help="a table of ways (default: ways.toml here)"
    )
    asked.add_argument("-k", dest="wanted", default="", metavar="TEXT", help="only ways whose name or group holds TEXT")
    asked.add_argument("--runs", type=int, default=1, metavar="N", help="do everything N times")
    asked.add_argument("--quick", action="store_true", help="only the rows marked quick, each on one file system")
    asked.add_argument("-o", dest="form", choices=("text", "json", "md"), default="text", help="how to print (default: text)")
    asked.add_argument("--seed", type=int, default=None, help="of names and sizes (default: the time)")
    asked.add_argument("--record", type=Path, metavar="FILE", help="also keep every fact in FILE, for sekisho-agent replay")
    asked.add_argument("--root", type=Path, metavar="DIR", help="make the lab below DIR (default: /var/tmp)")
    asked.add_argument("--from", dest="former", type=Path, metavar="FILE", help="run nothing: print a former run's -o json")
    args = asked.parse_args(argv)
    try:
        ways = table.read(args.table)
        cases = table.cases(ways, args.runs, args.wanted, args.quick)
        if args.former:
            return _print(args.form, *_former(args.former, ways))
    except table.TableError as error:
        print(error, file=sys.stderr)
        return 2
    if not cases:
        print(f'{args.table}: no way\'s name or group holds "{args.wanted}"', file=sys.stderr)
        return 2
    seed = int(time.time()) if args.seed is None else args.seed
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sekisho-ways-", dir=args.root or "/var/tmp", ignore_cleanup_errors=True) as root:
        done = 0

        def told(doing: judge.Doing) -> None:
            nonlocal done
            done += 1
            if sys.stderr.isatty():
                print(f"\r\033[K{done}/{len(cases)} {doing.id}", end="", file=sys.stderr, flush=True)

        try:
            with Lab(Path(root), args.record.resolve() if args.record else None) as lab:
                doings = Runner(lab, random.Random(seed), told).run(cases)
        except LabError as error:
            print(error, file=sys.stderr)
            return 2
        events = lab.events
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    about = {"machine": page.machine(), "seed": seed, "seconds": int(time.monotonic() - began)}
    return _print(args.form, cases, judge.judge(doings, events), about)


def _former(file: Path, ways: list[table.Way]) -> tuple[list[table.Case], list[judge.Verdict], dict[str, Any]]:
    """What a former run said. Raises TableError."""
    try:
        *rows, last = [json.loads(line) for line in file.read_text().splitlines()]
        pairs = [page.from_dict(row, {way.name: way for way in ways}) for row in rows]
        about = {name: last[name] for name in ("machine", "seed", "seconds")}
    except (OSError, ValueError, KeyError) as error:
        raise table.TableError(f"{file}: is not what -o json made of this table ({error})") from None
    return [case for case, _ in pairs], [verdict for _, verdict in pairs], about


def _print(form: str, cases: list[table.Case], verdicts: list[judge.Verdict], about: dict[str, Any]) -> int:
    totals = page.totals(cases, verdicts)
    if form == "json":
        for case, verdict in zip(cases, verdicts, strict=True):
            print(json.dumps(page.as_dict(case, verdict), ensure_ascii=False))
        print(json.dumps({"totals": totals, **about}, ensure_ascii=False))
    elif form == "md":
        print(page.markdown(cases, verdicts, about["seconds"], about["machine"]), end="")
    else:
        print(page.text(cases, verdicts))
        print(f"seed {about['seed']}, {about['seconds']} s")
    return 0 if totals["recall"] >= 0.99 and not totals["false_joins"] and not totals["broken"] else 1


if __name__ == "__main__":
    sys.exit(main())
