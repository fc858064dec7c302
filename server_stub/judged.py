"""What the command `verify` does: a verdict said in words, or as JSON, and the exit code (0 whole, 1 not, 2 no bundle).

Owns: the order of what is said: first the verdict, then whose key it rests on, then what it does not cover. Loads neither the
collector nor its client: it is for those who have a bundle and nothing else. Must not know: how a bundle is checked (`verify`).
"""

import argparse
import locale
import os
import sys
from typing import cast

import msgspec

from agent.contract import columns
from agent.contract.words import Language
from server_stub import verify as checking
from server_stub import words
from server_stub.verify import NoBundle, Verdict


def language(args: argparse.Namespace) -> Language:
    """As `--lang` says, where there is one, else the locale's."""
    if getattr(args, "lang", None):
        return cast(Language, args.lang)
    name = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "ja" if locale.normalize(name).startswith("ja") else "en"


def verify(args: argparse.Namespace) -> int:
    """Check a bundle; 0 if it is whole, 1 if not."""
    try:
        verdict = checking.verify(args.file, args.key, args.checkpoint)
    except NoBundle as error:
        sys.stderr.write(f"sekisho-collector: {columns.harmless(str(error))}\n")
        return 2
    if args.output == "json":
        lines = [msgspec.json.encode(as_object(verdict)).decode()]
    else:
        lines = [columns.harmless(line) for line in said(verdict, language(args))]
    sys.stdout.write("".join(line + "\n" for line in lines))
    return 0 if verdict.bad is None else 1


def as_object(verdict: Verdict) -> dict[str, object]:
    """The verdict for programs. `key` is "given" or "from the bundle"; `bad` is null or names the first event that is."""
    bad = verdict.bad
    first = None
    if bad is not None:
        place = bad.place._asdict() if bad.place else {}
        found = {"found": bad.found._asdict()} if bad.found else {}
        first = {"kind": bad.kind, **place, "line": bad.line, "why": bad.why, **found}
    return {
        "whole": bad is None,
        "origin": verdict.origin,
        "size": verdict.size,
        "filter": verdict.filter,
        "lines": verdict.lines,
        "events": verdict.events,
        "machines": verdict.machines,
        "key": "given" if verdict.given else "from the bundle",
        "collector": verdict.keys,
        "compared": verdict.compared,
        "uncovered": verdict.uncovered,
        "bad": first,
    }


def said(verdict: Verdict, lang: Language) -> list[str]:
    """The verdict for people."""
    bad = verdict.bad
    if bad is None:
        counts = {"events": verdict.events, "lines": verdict.lines, "machines": verdict.machines}
        lines = [words.say(lang, "whole", **counts, origin=verdict.origin, size=verdict.size)]
        if verdict.filter:
            given = ", ".join(f"{name}={value}" for name, value in verdict.filter.items())
            lines.append(words.say(lang, "part", filter=given))
    elif bad.place is None:
        lines = [words.say(lang, "bad", what=words.say(lang, bad.kind), why=bad.why)]
    else:
        what = words.say(lang, bad.kind)
        lines = [words.say(lang, "bad_event", what=what, **bad.place._asdict(), line=bad.line, why=bad.why)]
    if verdict.given:
        lines.append(words.say(lang, "key_given"))
    elif verdict.keys:
        lines.append(words.say(lang, "key_bundle", key=verdict.keys[-1]))
    if verdict.compared:
        lines.append(words.say(lang, "compared", sizes=", ".join(map(str, verdict.compared))))
    if verdict.uncovered:
        lines.append(words.say(lang, "uncovered", names=", ".join(verdict.uncovered)))
    return lines
