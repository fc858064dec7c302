"""TOML → Structs: the agent's configuration. Units are parsed once; a wrong key gets its line and the nearest right one.

Owns: every key, its default (here alone) and its unit. Never looks at the machine beyond the file it is given, so that
`check` can judge a configuration written for another machine. The collector's configuration is read by the same rules.
"""

import difflib
import hashlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NewType
from urllib.parse import urlsplit

from msgspec import Struct, field
from msgspec.structs import fields

Bytes = NewType("Bytes", int)
"""A size, written "100MiB" in TOML."""
Seconds = NewType("Seconds", float)
"""A duration, written "10m" in TOML."""

WAYS = ("mount", "mtp", "usb", "network", "print", "bluetooth")
DEFAULT_PATH = "/etc/sekisho/config.toml"
_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DURATIONS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}


class ConfigError(Exception):
    """The configuration can't be used; str() is one sentence with file and line that says what to do."""


class Protect(Struct, kw_only=True):
    """`[[agent.protect]]`: a directory, with all below it, whose files are watched."""

    path: str
    label: str = ""


class CollectorLink(Struct, kw_only=True):
    """`[agent.collector]`: where events go. An empty `url`: they stay in the spool."""

    url: str = ""
    token: str = ""
    token_file: str = ""
    ca_file: str = ""
    heartbeat: Seconds = Seconds(60.0)


class Media(Struct, kw_only=True):
    """`[agent.media]`: how media are treated."""

    simulated_dir: str = ""
    require_approval: bool = True
    record_names: bool = False
    first_use: bool = True


class Limit(Struct, kw_only=True):
    """`[[agent.limit]]`: a finding `copy.<name>` once one login user carried out `bytes` or `files` within `window`."""

    name: str
    window: Seconds
    bytes: Bytes = Bytes(0)
    files: int = 0
    ways: list[str] = field(default_factory=list)


class Ways(Struct, kw_only=True):
    """`[agent.ways]`: which ways out that are no media are told of, and how severe a copy by one is."""

    network: typing.Literal["watch", "off"] = "watch"
    print: typing.Literal["watch", "off"] = "watch"
    bluetooth: typing.Literal["watch", "off"] = "watch"
    severity: typing.Literal["low", "medium", "high"] = "medium"


class Spool(Struct, kw_only=True):
    """`[agent.spool]`: how much disk the events may take."""

    max_bytes: Bytes = Bytes(256 << 20)


class Staging(Struct, kw_only=True):
    """`[agent.staging]`: copies made elsewhere on the machine. `hold`: the first opener of a protected file is held for it."""

    watch: bool = True
    hold: bool = True
    keep: Seconds = Seconds(90 * 86400.0)


class Access(Struct, kw_only=True):
    """`[agent.access]`: how often it is looked up who may read the protected directories, besides after changes; 0: never."""

    every: Seconds = Seconds(86400.0)


class Warn(Struct, kw_only=True):
    """`[agent.warn]`: what the modes "warn" and "enforce" add to what they tell the person at the machine."""

    contact: str = ""
    approval_url: str = ""


class Enforce(Struct, kw_only=True):
    """`[agent.enforce]`: what mode "enforce" does, and what it leaves behind when it fails or is stopped."""

    unapproved: typing.Literal["read_only", "refuse", "allow"] = "read_only"
    unknown: typing.Literal["allow", "read_only", "refuse"] = "allow"
    phones: typing.Literal["refuse", "allow"] = "refuse"
    keyboards: typing.Literal["allow", "refuse"] = "allow"
    network_adapters: typing.Literal["allow", "refuse"] = "allow"
    directories: typing.Literal["refuse", "allow"] = "refuse"
    on_failure: typing.Literal["open", "closed"] = "open"


def default_limits() -> list[Limit]:
    """The limits in force when the file names none: a burst in minutes, a drip over a month."""
    return [
        Limit(name="burst", bytes=Bytes(100 << 20), files=100, window=Seconds(600.0)),
        Limit(name="drip", bytes=Bytes(1 << 30), files=500, window=Seconds(30 * 86400.0)),
    ]


class Agent(Struct, kw_only=True):
    """`[agent]`. An empty `name` means the host name."""

    name: str = ""
    state_dir: str = "/var/lib/sekisho"
    mode: typing.Literal["observe", "warn", "enforce"] = "observe"
    protect: list[Protect] = field(default_factory=list)
    collector: CollectorLink = field(default_factory=CollectorLink)
    media: Media = field(default_factory=Media)
    ways: Ways = field(default_factory=Ways)
    limit: list[Limit] = field(default_factory=default_limits)
    spool: Spool = field(default_factory=Spool)
    staging: Staging = field(default_factory=Staging)
    warn: Warn = field(default_factory=Warn)
    enforce: Enforce = field(default_factory=Enforce)
    access: Access = field(default_factory=Access)


class Witness(Struct, kw_only=True):
    """`[[collector.witness]]`: who keeps our checkpoints. One of `url` (with `key`: another collector's), `file`, `mail`."""

    url: str = ""
    key: str = ""
    ca_file: str = ""
    file: str = ""
    mail: str = ""


class Cosign(Struct, kw_only=True):
    """`[[collector.cosign]]`: a log whose checkpoints this collector cosigns: its `key` as its `key show` prints it."""

    key: str


class Collector(Struct, kw_only=True):
    """`[collector]`. An empty `key_file` means `signing.key` in `state_dir`; a `retention` of 0: events are kept for ever.

    `expiring`: how long before its end an approval of a medium is said to end soon.
    """

    listen: str = "127.0.0.1:8443"
    state_dir: str = "/var/lib/sekisho-collector"
    database: str = "sqlite"
    tls_cert: str = ""
    tls_key: str = ""
    enroll_token: str = ""
    silent_after: Seconds = Seconds(300.0)
    key_file: str = ""
    retention: Seconds = Seconds(0.0)
    expiring: Seconds = Seconds(7 * 86400.0)
    witness_every: Seconds = Seconds(3600.0)
    smtp: str = ""
    mail_from: str = ""
    witness: list[Witness] = field(default_factory=list)
    cosign: list[Cosign] = field(default_factory=list)


class Config(Struct, kw_only=True):
    """The whole file. Agent and collector may share one; each reads its own table and checks both."""

    agent: Agent = field(default_factory=Agent)
    collector: Collector = field(default_factory=Collector)
    source: str = ""
    """Which file this came from (not a key)."""
    digest: str = ""
    """SHA-256 (hex) of the bytes that were read (not a key)."""


def parse_bytes(text: str) -> Bytes:
    """ "100MiB" → bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _SIZES:
        raise ValueError(f'"{text}" is not a size; write it like "100MiB" or "2GB"')
    return Bytes(int(Fraction(found[1]) * _SIZES[found[2].upper()]))


def parse_seconds(text: str) -> Seconds:
    """ "10m" → seconds. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if not found or found[2] not in _DURATIONS:
        raise ValueError(f'"{text}" is not a duration; write it like "90s", "10m", "24h" or "30d"')
    return Seconds(float(found[1]) * _DURATIONS[found[2]])


class _Reader:
    """Walks a parsed TOML document and a Struct type side by side; knows the text only to say where a key stands."""

    def __init__(self, text: str, name: str) -> None:
        self.lines, self.name = text.splitlines(), name

    def where(self, path: tuple[str | int, ...]) -> str:
        """ "file:line" of the key at `path`; a whole number in `path` counts tables of an array."""
        names = [str(part) for part in path if isinstance(part, str)]
        index = next((part for part in path if isinstance(part, int)), 0)
        table: list[str] = []
        seen = -1
        best = 0
        for number, line in enumerate(self.lines, 1):
            header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$", line)
            if header:
                table = [part.strip().strip("\"'") for part in header[2].split(".")]
                seen += header[1] == "[[" and table == names[: len(table)] and len(names) - len(table) <= 1
                if table == names[: len(table)] and (header[1] == "[" or seen == index):
                    best = number
                if table == names and (header[1] == "[" or seen == index):
                    return f"{self.name}:{number}"
                continue
            key = re.match(r"\s*([A-Za-z0-9_\"'.-]+)\s*=", line)
            spelt = [*table, *(part.strip("\"'") for part in key[1].split("."))] if key else []
            if spelt == names and (seen == index or not any(isinstance(part, int) for part in path)):
                return f"{self.name}:{number}"
        return f"{self.name}:{best}" if best else self.name

    def fail(self, path: tuple[str | int, ...], why: str) -> ConfigError:
        return ConfigError(f"{self.where(path)}: {why}")

    def struct(self, kind: type[Any], table: Any, path: tuple[str | int, ...]) -> Any:
        spoken = ".".join(str(part) for part in path if isinstance(part, str))
        if not isinstance(table, Mapping):
            raise self.fail(path, f"[{spoken}] must be a table")
        known = {item.name: item for item in fields(kind)}
        if kind is Config:
            known = {name: item for name, item in known.items() if name not in ("source", "digest")}
        hints = typing.get_type_hints(kind)
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.5)
                hint = f'did you mean "{near[0]}"?' if near else f"the keys are: {', '.join(known)}"
                inside = f" in [{spoken}]" if spoken else ""
                raise self.fail((*path, key), f'unknown key "{key}"{inside}; {hint}')
        values = {key: self.value(hints[key], value, (*path, key)) for key, value in table.items()}
        for name, item in known.items():
            if item.required and name not in values:
                raise self.fail(path, f'[[{spoken}]] lacks "{name}"; add it')
        return kind(**values)

    def value(self, kind: Any, value: Any, path: tuple[str | int, ...]) -> Any:
        key = path[-1]
        if kind in (Bytes, Seconds):
            if not isinstance(value, str):
                unit = '"100MiB"' if kind is Bytes else '"10m"'
                raise self.fail(path, f'"{key}" needs a unit, in quotes, like {unit}')
            try:
                return parse_bytes(value) if kind is Bytes else parse_seconds(value)
            except ValueError as error:
                raise self.fail(path, f'"{key}": {error}') from None
        origin = typing.get_origin(kind)
        if origin is list:
            if not isinstance(value, list):
                if typing.get_args(kind) == (str,):
                    raise self.fail(path, f'"{key}" must be a list of texts in quotes, like ["network"]')
                raise self.fail(path, f'"{key}" must be written as [[{".".join(str(p) for p in path)}]]')
            (item,) = typing.get_args(kind)
            if item is str:
                if not all(isinstance(each, str) for each in value):
                    raise self.fail(path, f'"{key}" must be a list of texts in quotes, like ["network"]')
                return value
            return [self.struct(item, each, (*path, number)) for number, each in enumerate(value)]
        if origin is typing.Literal:
            choices = typing.get_args(kind)
            if value not in choices:
                raise self.fail(path, f'"{key}" must be one of: {", ".join(choices)}')
            return value
        if isinstance(kind, type) and issubclass(kind, Struct):
            return self.struct(kind, value, path)
        assert isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
        if type(value) is not kind:
            words = {str: "a text in quotes", bool: "true or false", int: "a whole number"}
            raise self.fail(path, f'"{key}" must be {words[kind]}')
        return value


def _check(config: Config, reader: _Reader) -> None:
    """What single values can't show: names given twice, limits that limit nothing, relative paths."""
    agent = config.agent
    seen: set[str] = set()
    for number, limit in enumerate(agent.limit):
        path = ("agent", "limit", number)
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", limit.name) or limit.name == "staged":
            raise reader.fail(
                (*path, "name"), f'limit name "{limit.name}" must be lower-case letters, digits and _, and not "staged"'
            )
        if limit.name in seen:
            raise reader.fail((*path, "name"), f'two limits are named "{limit.name}"; give each its own name')
        if limit.bytes <= 0 and limit.files <= 0:
            raise reader.fail(path, f'limit "{limit.name}" has neither "bytes" nor "files"; give one')
        unknown = [way for way in limit.ways if way not in WAYS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], WAYS, 1, 0.5) or [", ".join(WAYS)]
            raise reader.fail((*path, "ways"), f'"{unknown[0]}" is no way out; did you mean "{near[0]}"?')
        if limit.window < 1:
            raise reader.fail((*path, "window"), f'limit "{limit.name}" needs a window of at least 1s')
        seen.add(limit.name)
    for number, protect in enumerate(agent.protect):
        if not protect.path.startswith("/"):
            raise reader.fail(("agent", "protect", number, "path"), f'"{protect.path}" must be an absolute path')
    for path_key, value in (("state_dir", agent.state_dir), ("state_dir", config.collector.state_dir)):
        if not value.startswith("/"):
            table = "agent" if value is agent.state_dir else "collector"
            raise reader.fail((table, path_key), f'"{value}" must be an absolute path')
    if agent.media.simulated_dir and not agent.media.simulated_dir.startswith("/"):
        raise reader.fail(("agent", "media", "simulated_dir"), f'"{agent.media.simulated_dir}" must be an absolute path')
    if agent.collector.heartbeat < 1:
        raise reader.fail(("agent", "collector", "heartbeat"), '"heartbeat" must be at least "1s"')
    if agent.warn.approval_url and not re.match(r"(https?://|mailto:)\S+$", agent.warn.approval_url):
        raise reader.fail(
            ("agent", "warn", "approval_url"), f'"{agent.warn.approval_url}" must begin with https://, http:// or mailto:'
        )
    if agent.staging.keep < 60:
        raise reader.fail(("agent", "staging", "keep"), '"keep" must be at least "1m"')
    if agent.spool.max_bytes < 1 << 20:
        raise reader.fail(("agent", "spool", "max_bytes"), '"max_bytes" must be at least "1MiB"')
    url = agent.collector.url
    if url and not re.match(r"https://|http://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?(/|$)", url):
        raise reader.fail(("agent", "collector", "url"), f'"{url}" must begin with https:// (http:// is for loopback only)')
    try:
        bad_url = bool(url) and (not urlsplit(url).hostname or urlsplit(url).port == 0)
    except ValueError:
        bad_url = True
    if bad_url:
        raise reader.fail(("agent", "collector", "url"), f'"{url}" is no address; write it like "https://host:8443"')


def parse(text: str, name: str = "config.toml") -> Config:
    """The configuration in `text`; `name` is what errors call the file. Raises ConfigError."""
    reader = _Reader(text, name)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{name}:{line[1] if line else len(reader.lines)}: not valid TOML: {error}") from None
    config: Config = reader.struct(Config, document, ())
    _check(config, reader)
    for protect in config.agent.protect:
        protect.path = str(Path(protect.path))
        protect.label = protect.label or Path(protect.path).name
    config.source = name
    return config


def load(path: str) -> Config:
    """Read and parse the file at `path`. Raises ConfigError, also if it can't be read."""
    try:
        data = Path(path).read_bytes()
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); name a file with -c or SEKISHO_CONFIG") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8; save it as UTF-8") from None
    site = parse(text, path)
    site.digest = hashlib.sha256(data).hexdigest()
    return site
