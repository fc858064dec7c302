"""The generated parts of docs/reference.md: made from the code, so that the page can't go stale.

Owns: the tables between `<!-- NAME -->` and `<!-- /NAME -->`. `python -m tests.reference` rewrites them in place;
`tests/test_house.py` fails while page and code differ.
"""

import argparse
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import NODEFAULT, UNSET, Struct, UnsetType

from agent.contract import codes, event, wire
from agent.core import facts

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def first_sentences(kind: type) -> str:
    """A docstring as one line."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split())


def type_name(hint: Any) -> str:
    """A type as readers of JSON call it."""
    if hint is UnsetType or hint is type(None):
        return ""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"{type_name(args[0])}[]"
    if origin is dict or hint is dict:
        return "object"
    if args:
        return " or ".join(dict.fromkeys(filter(None, map(type_name, args))))
    known = {str: "string", int: "integer", float: "number", bool: "boolean", bytes: "base64"}
    known |= {msgspec.Raw: "object", Any: "any"}
    return known.get(hint) or f"`{hint.__name__}`"


def fields_line(kind: type[Struct]) -> str:
    """ "`key` string, `mount` string?, …"; a question mark: may be absent."""
    hints = typing.get_type_hints(kind)
    said = []
    for item in msgspec.structs.fields(kind):
        if kind.__struct_config__.tag_field == item.encode_name:
            continue
        optional = item.default is UNSET or not (item.default is NODEFAULT and item.default_factory is NODEFAULT)
        said.append(f"`{item.encode_name}` {type_name(hints[item.name])}{'?' if optional else ''}")
    return ", ".join(said)


def events() -> Iterator[str]:
    yield "| event code | class, activity | usual severity | tells |"
    yield "|---|---|---|---|"
    for name, row in [*codes.CODES.items(), ("copy.<limit>", codes.COPY_LIMIT)]:
        activity = f"{row.class_uid} {codes.CLASS_NAMES[row.class_uid]}: {row.activity_id} {row.activity_name}"
        yield f"| `{name}` | {activity} | {codes.SEVERITIES[row.severity]} | {row.tells} |"


def structs(*kinds: type[Struct]) -> Iterator[str]:
    yield "| object | fields (`?`: absent when not known) | |"
    yield "|---|---|---|"
    for kind in kinds:
        yield f"| **{kind.__name__}** | {fields_line(kind)} | {first_sentences(kind)} |"


def sekisho() -> Iterator[str]:
    yield from structs(
        event.Sekisho,
        event.MediumInfo,
        event.ProtectedInfo,
        event.SourceInfo,
        event.DestInfo,
        event.LoginInfo,
        event.ProcessInfo,
        event.ParentInfo,
        event.LimitInfo,
        event.LostInfo,
    )


def wire_types() -> Iterator[str]:
    yield from structs(
        wire.Enrol,
        wire.Enrolled,
        wire.Head,
        wire.Folded,
        wire.Receipt,
        wire.Problem,
        wire.SignedRegister,
        wire.RegisterBody,
        wire.ApprovalEntry,
    )


def fact_types() -> Iterator[str]:
    kinds = typing.get_args(facts.AnyFact)
    yield from structs(*kinds, facts.Process, facts.Parent, facts.OpenFile, facts.Device, facts.Block, facts.Approval)


def _help(parser: argparse.ArgumentParser, depth: int = 0) -> Iterator[str]:
    formatter = argparse.HelpFormatter(prog=parser.prog, width=110)
    formatter.add_usage(parser.usage, parser._actions, [], prefix="")
    yield " ".join(formatter.format_help().split())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                says = next((str(each.help) for each in action._choices_actions if each.dest == name), "")
                lines = list(_help(child, depth + 1))
                yield lines[0] + (f"\n    {says}" if says else "")
                yield from lines[1:]


def commands() -> Iterator[str]:
    from agent import cli as agent_cli
    from server_stub import cli as collector_cli

    for made in (agent_cli.parser(), collector_cli.parser()):
        yield "```"
        yield from _help(made)
        yield "```"


PARTS = {"commands": commands, "events": events, "sekisho": sekisho, "wire": wire_types, "facts": fact_types}


def _literal(text: str) -> str:
    """`text` as the template of `re.sub` that stands for it."""
    return text.replace("\\", r"\\")


def with_parts(page: str) -> str:
    """`page` with every generated part as the code has it now."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(page), f"docs/reference.md lacks the marks <!-- {name} --> and <!-- /{name} -->"
        text = "\n".join(make()) + "\n"
        page = pattern.sub(rf"\g<1>{_literal(text)}\g<2>", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_parts(PAGE.read_text()))
    sys.exit(0)
