"""The house stays as drawn: pure rooms stay pure, arrows run downhill, pages say what the code says.

Reads the source (ast) instead of running it: what a file imports is what it can do.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent import config
from agent.contract import codes
from tests import reference

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.relative_to(ROOT) for package in ("agent", "server_stub") for path in (ROOT / package).rglob("*.py"))
PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])

PURE = [
    path
    for path in SOURCES
    if path.parts[:2] in (("agent", "contract"), ("agent", "core"))
    or str(path)
    in {
        f"server_stub/{name}.py"
        for name in (
            *("intake", "tree", "query", "fleet", "bundle", "witness", "refusal"),
            *("records", "rulebook", "bulk", "sheet", "usbguard", "udevdb"),
        )
    }
]
IMPURE = {
    *("os", "sys", "io", "pathlib", "shutil", "tempfile", "glob", "fcntl", "mmap", "ctypes", "builtins.open"),
    *("socket", "ssl", "select", "selectors", "http", "urllib.request", "requests", "httpx", "starlette", "uvicorn"),
    *("sqlite3", "subprocess", "threading", "multiprocessing", "asyncio", "signal", "logging"),
    *("time", "random", "secrets", "uuid", "psutil", "pyudev", "watchdog"),
}
IMPURE_CALLS = {"open", "input", "print", "now", "utcnow", "today", "generate"}

EDGE_HELPERS = {
    "kernel",
    "marks",
    "paths",
    "looking",
    "fanotify_events",
    "procfs",
    "sockdiag",
    "cgroup",
    "pairs",
    "programs",
    "passwd",
    "sockdiag",
    "connects",
    "tracepoint",
    "urbs",
    "handles",
    "fusemount",
    "serving",
    "sharing",
    "inside",
    "interest",
    "likeness",
    "archives",
    "autorun",
    "refusal",
    "refusing",
    "tripwire",
    "describe",
    "behind",
}
"""In agent/sense: not edges, but parts that edges are made of. An edge may import these and no other edge."""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, but for imports that serve the type checker alone."""
    tree = ast.parse((ROOT / path).read_text(), str(path))
    checker_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checker_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name, not a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                there = ROOT / inner.replace(".", "/")
                yield inner if there.with_suffix(".py").exists() or there.is_dir() else str(node.module)


def own(path: Path) -> set[str]:
    """What a file imports of our own packages."""
    return {name for name in imports(path) if name.split(".")[0] in ("agent", "server_stub")}


def below(names: set[str], *allowed: str) -> set[str]:
    """Those of `names` that are not one of `allowed` nor inside it."""
    return {name for name in names if not any(name == ok or name.startswith(ok + ".") for ok in allowed)}


@pytest.mark.parametrize("path", PURE, ids=str)
def test_a_pure_room_knows_no_files_sockets_clock_or_chance(path: Path) -> None:
    reached = {name for name in imports(path) if name in IMPURE or name.split(".")[0] in IMPURE}
    assert not reached, f"{path} imports {sorted(reached)}"
    tree = ast.parse((ROOT / path).read_text())
    called = {
        (node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", ""), node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    assert not [(name, line) for name, line in called if name in IMPURE_CALLS]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[:2] == ("agent", "contract")], ids=str)
def test_the_contract_knows_only_itself(path: Path) -> None:
    assert not below(own(path), "agent.contract")


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[:2] == ("agent", "core")], ids=str)
def test_the_core_knows_the_contract_and_no_edge(path: Path) -> None:
    assert not below(own(path), "agent.core", "agent.contract")


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[:2] == ("agent", "sense")], ids=str)
def test_an_edge_yields_facts_and_imports_no_other_edge(path: Path) -> None:
    allowed = {"agent.sense", "agent.core.facts", "agent.contract.event"}
    allowed |= {f"agent.sense.{name}" for name in EDGE_HELPERS}
    allowed |= {"agent.simulate"} if path.stem == "simulated" else set()
    allowed |= {"agent.sense.holding"} if path.stem == "holder" else set()  # the process that holds, and who starts it
    assert not own(path) - allowed


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[:2] == ("agent", "act")], ids=str)
def test_a_hand_carries_out_wishes_and_knows_no_sensor(path: Path) -> None:
    allowed = {"agent.core.facts", "agent.core.stopping", "agent.contract.event", "agent.sense"}
    allowed |= {"agent.sense.kernel", "agent.sense.mounts", "agent.sense.refusing"}
    assert not below(own(path), "agent.act") - allowed


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "server_stub"], ids=str)
def test_the_collector_shares_the_contract_with_the_agent_and_nothing_else(path: Path) -> None:
    shared = {name for name in own(path) if name.startswith("agent")}
    allowed = ["agent.contract", "agent.__version__"]
    if path.name == "config.py":
        allowed.append("agent.config")
    assert not below(shared, *allowed) - {"agent"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "agent"], ids=str)
def test_the_agent_does_not_know_the_collector(path: Path) -> None:
    assert not [name for name in own(path) if name.startswith("server_stub")]


def test_the_network_has_one_client_and_the_key_one_reader() -> None:
    speakers = {str(path) for path in SOURCES if path.parts[0] == "agent" and "requests" in set(imports(path))}
    assert speakers <= {"agent/sender.py", "agent/collector.py"}
    readers = {str(path) for path in SOURCES if path.parts[0] == "agent" and "nacl.signing" in set(imports(path))} - {
        "agent/contract/chain.py"
    }
    assert readers <= {"agent/identity.py"}


def test_importing_the_agent_starts_nothing_and_loads_nothing() -> None:
    script = "import sys; before = set(sys.modules); import agent; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["agent"]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_room_has_a_note_on_its_door(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text())), f"{path} begins without a docstring"


def test_the_reference_is_what_the_code_says() -> None:
    page = reference.PAGE.read_text()
    assert reference.with_parts(page) == page, "docs/reference.md is stale: python -m tests.reference"


def test_every_event_code_and_word_is_explained() -> None:
    page = reference.PAGE.read_text()
    assert not [code for code in codes.CODES if f"`{code}`" not in page]


def test_every_way_of_losing_or_not_seeing_has_its_line_in_operations() -> None:
    text = "\n".join((ROOT / path).read_text() for path in SOURCES if path.parts[0] == "agent")
    reasons = set(re.findall(r'Lost\([^)]*reason="(\w+)"', text))
    lists = re.findall(r"\b(?:blind|BLIND) ?\+?= ?\[([^\]]*)\]|\bblind\.append\(([^)]*)\)", text)
    blind = {code for found in lists for code in re.findall(r'"(\w+)"', "".join(found))}
    page = (ROOT / "docs" / "operations.md").read_text()
    assert len(reasons) > 3 and len(blind) > 10, "the patterns of this test find nothing any more"
    assert not [code for code in sorted(reasons | blind) if f"`{code}`" not in page]


def test_the_changelog_says_truly_which_events_nothing_makes_yet() -> None:
    rooms = [path for path in SOURCES if path.parts[:2] != ("agent", "contract")]
    text = "\n".join((ROOT / path).read_text() for path in rooms) + ' f"agent.{change.now}" -> "agent.silent" "agent.back"'
    unmade = {code for code in codes.CODES if f'"{code}"' not in text}
    listed = (ROOT / "CHANGELOG.md").read_text().split("nothing makes yet:")[1].split(".\n")[0]
    assert set(re.findall(r"`([\w.]+)`", listed)) == unmade


def commands_of(module: str) -> set[str]:
    """The commands that `--help` lists."""
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    listed = done.stdout[done.stdout.index("COMMAND") :]
    return set(re.findall(r"^ {4}([a-z][a-z-]*)", listed, re.MULTILINE))


def test_pages_name_only_commands_that_exist() -> None:
    there = {"agent": commands_of("agent.cli"), "collector": commands_of("server_stub.cli")}
    assert "run" in there["agent"] and "serve" in there["collector"]
    texts = {str(path): (ROOT / path).read_text() for path in PAGES}
    texts |= {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "packaging").rglob("*") if path.is_file()}
    texts["config.example.toml"] = (ROOT / "config.example.toml").read_text()
    unknown = [
        (name, found[0])
        for name, text in texts.items()
        for found in re.finditer(r"sekisho-(agent|collector) ([a-z][a-z-]+)\b(?=[ `\n)\]|,;:.]|$)", text)
        if found[2] not in there[found[1]] and named_as_command(text, found)
    ]
    assert not unknown


def named_as_command(text: str, found: re.Match[str]) -> bool:
    """Whether the words stand as something to type: in backquotes, at the start of a line, or after a prompt."""
    before = text[: found.start()]
    line = before[before.rfind("\n") + 1 :]
    return line.strip() in ("", "sudo", "$", "#", "ExecStart=") or line.count("`") % 2 == 1


def blocks(text: str) -> Iterator[str]:
    """Lines of a page that stand in fenced or indented blocks: what readers copy into a shell."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def typed(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each `sekisho-agent …` and `sekisho-collector …` of a page, as (command, words): lines of its blocks, and what stands in
    backquotes. Not those with a choice or a gap to fill in (`plug|unplug`, `[-h]`, `media …`)."""
    lines = [re.sub(r"^[$#] ", "", line) for line in blocks(text)]
    fences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(sekisho-(?:agent|collector) [^`\n]+)`", fences)
    for line in lines:
        found = re.match(r"(?:sudo )?(sekisho-(?:agent|collector)) (.+)", line)
        if found and not re.search(r"[\[|…]", found[2]):
            yield found[1], shlex.split(found[2], comments=True)


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_every_command_line_on_a_page_is_accepted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agent import cli as agent_cli
    from server_stub import cli as collector_cli

    refused = []
    for command, words in typed((ROOT / path).read_text()):
        try:
            if command == "sekisho-agent":
                agent_cli.parser().parse_args(words)
            else:
                collector_cli.parser().parse_args(collector_cli._joined(words))
        except SystemExit as left:
            said = capsys.readouterr().err.strip().splitlines()
            unfinished = ("arguments are required", "expected one argument")  # prose names a command without its operands
            if left.code and not any(each in said[-1] for each in unfinished):
                refused.append((shlex.join([command, *words]), said[-1]))
    assert not refused


def test_the_command_lines_of_the_first_page_are_found() -> None:
    found = [shlex.join([command, *words]) for command, words in typed((ROOT / "README.md").read_text())]
    assert "sekisho-collector query --user sato --since -30d" in found
    assert "sekisho-collector token create --enroll -c /etc/sekisho/collector.toml" in found


def test_what_is_installed_holds_every_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert set(packed) == {".".join(path.parent.parts) for path in SOURCES if path.name == "__init__.py"}


def test_the_room_table_names_every_room() -> None:
    """Each row's first cell: rooms of the package that was named last in bold."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named: set[str] = set()
    package = ""
    for line in page.splitlines():
        if line.startswith("| ") and "must not know" not in line:
            cell = line.split("|")[1]
            if bold := re.search(r"\*\*`([\w/]+/)`\*\*", cell):
                package = bold[1]
            named |= {f"{package}{word}" for word in re.findall(r"`(\w+)`", cell)}
    there = {str(path.with_suffix("")) for path in SOURCES if path.stem != "__init__" and "store" not in path.parts}
    assert named == there | {"server_stub/store"}


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    text = (ROOT / path).read_text()
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    assert not [link for link in links if not (ROOT / path).parent.joinpath(link).exists()]
    ours = "agent|server_stub|tests|packaging|docs|demo|bench"
    files = re.findall(rf"`((?:{ours})/[\w./-]+\.(?:py|md|sh|toml|service|conf|sql))`", text)
    assert not [name for name in files if not (ROOT / name).exists()]


def test_the_example_configuration_shows_every_key_with_its_default() -> None:
    path = ROOT / "config.example.toml"
    shown = config.load(str(path))
    shown.source = shown.digest = ""
    assert msgspec.to_builtins(shown) == msgspec.to_builtins(config.Config())
    text = path.read_text()
    tables: dict[str, set[str]] = {}
    table = ""
    for line in text.splitlines():
        # The protected directories alone have no default to show: their table is in a comment, indented.
        line = line.removeprefix("#   ")
        if header := re.match(r"\[\[?([\w.]+)\]?\]", line):
            table = header[1]
        elif key := re.match(r"([a-z_]+) = ", line):
            tables.setdefault(table, set()).add(key[1])
    inner: dict[str, type[msgspec.Struct]] = {
        "agent": config.Agent,
        "agent.protect": config.Protect,
        "agent.collector": config.CollectorLink,
        "agent.media": config.Media,
        "agent.limit": config.Limit,
        "agent.ways": config.Ways,
        "agent.spool": config.Spool,
        "agent.staging": config.Staging,
        "agent.warn": config.Warn,
        "agent.enforce": config.Enforce,
        "agent.access": config.Access,
        "collector": config.Collector,
        "collector.witness": config.Witness,
        "collector.cosign": config.Cosign,
    }
    for name, kind in inner.items():
        plain = {item.name for item in msgspec.structs.fields(kind) if f"{name}.{item.name}" not in inner}
        assert tables[name] == plain, f"[{name}]"


def test_the_commented_example_works_once_uncommented() -> None:
    text = (ROOT / "config.example.toml").read_text()
    shown = config.parse(re.sub(r"^#   ", "", text, flags=re.MULTILINE))
    assert [each.label for each in shown.agent.protect] == ["顧客マスタ"]


def tracked() -> Iterator[Path]:
    """Every file of the project, tools' leavings excepted."""
    skipped = {".git", ".venv", "build", "dist", "__pycache__"}
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        left_by_tools = skipped & set(parts) or any(part.endswith(("_cache", ".egg-info", ".hypothesis")) for part in parts)
        if path.is_file() and not left_by_tools:
            yield path


def test_nothing_is_left_half_done_or_bound_to_one_machine() -> None:
    words = ["TO" + "DO", "FIX" + "ME", "X" * 3 + ":", "/wo" + "rk/", "/tmp/" + "w/"]
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [(str(path.relative_to(ROOT)), word) for word in words if word in text]
    assert not found
