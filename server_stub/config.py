"""The collector's settings: the `[collector]` table of the one configuration file, and where its files lie.

Owns: defaults of places (key, store, socket, lock) below `state_dir`, and the rule that plain HTTP stays on loopback.
The file itself is parsed by `agent.config`, so that both programs read one file by one set of rules and name a wrong
key in the same words: this import is the one exception to "the collector imports only `agent.contract`".
Must not know: stores, sockets, HTTP.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from agent import __version__ as VERSION  # noqa: N812 - it is a constant to us
from agent import config as shared
from agent.config import ConfigError, Witness, parse_seconds

__all__ = ["VERSION", "ConfigError", "Settings", "Witness", "load", "parse_seconds", "settings"]


class Settings(Struct, kw_only=True, frozen=True):
    """What the collector runs with; all paths absolute, `silent_after_ms` in milliseconds."""

    host: str
    port: int
    state_dir: Path
    key_file: Path
    tls_cert: str
    tls_key: str
    enroll_token: str
    silent_after_ms: int
    postgres: str = ""
    retention_ms: int = 0
    expiring_ms: int = 7 * 86_400_000
    witness_every_s: float = 3600.0
    smtp: str = ""
    mail_from: str = ""
    witnesses: tuple[shared.Witness, ...] = ()
    cosign: tuple[str, ...] = ()

    @property
    def store_file(self) -> Path:
        """The SQLite database."""
        return self.state_dir / "collector.db"

    @property
    def socket(self) -> Path:
        """The local socket of a served collector: whoever may open it (0600) is its administrator."""
        return self.state_dir / "collector.sock"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes the store."""
        return self.state_dir / "lock"


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name for `path` that fits into a socket's address (unix(7): 108 bytes), however deep its directory lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def split_listen(listen: str) -> tuple[str, int]:
    """ "127.0.0.1:8443", "[::1]:8443", ":8443" → host and port. Raises ValueError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f'"listen" is "{listen}"; write it like "127.0.0.1:8443"')
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)  # noqa: S104 - the user's own wish


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def settings(collector: shared.Collector, source: str) -> Settings:
    """Judge the `[collector]` table that came from file `source`. Raises ConfigError."""
    try:
        host, port = split_listen(collector.listen)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    if bool(collector.tls_cert) != bool(collector.tls_key):
        raise ConfigError(f'{source}: "tls_cert" and "tls_key" belong together; give both or neither')
    if not collector.tls_cert and not is_loopback(host):
        raise ConfigError(
            f'{source}: "listen" is "{collector.listen}", which others can reach, but there is no TLS;'
            ' set "tls_cert" and "tls_key", or listen on 127.0.0.1'
        )
    postgres = collector.database if collector.database.startswith(("postgresql://", "postgres://")) else ""
    if collector.database != "sqlite" and not postgres:
        raise ConfigError(
            f'{source}: "database" is "{collector.database}"; write "sqlite", or an address like'
            ' "postgresql://sekisho@db.example/sekisho"'
        )
    if collector.silent_after < 0.1:
        raise ConfigError(f'{source}: "silent_after" must be at least "100ms"')
    if 0 < collector.retention < 86_400:
        raise ConfigError(f'{source}: "retention" must be "1d" or more, or "0s" to keep everything')
    if collector.witness_every < 1:
        raise ConfigError(f'{source}: "witness_every" must be at least "1s"')
    if collector.smtp and not re.match(r"smtps?://[^/]", collector.smtp):
        raise ConfigError(f'{source}: "smtp" must be like "smtp://mail.example:587" or "smtps://mail.example"')
    for each in collector.witness:
        if each.file and not Path(each.file).is_absolute():
            raise ConfigError(
                f'{source}: the witness file "{each.file}" must be an absolute path; a service has no folder of its own'
            )
        if sum(map(bool, (each.url, each.file, each.mail))) != 1 or bool(each.url) != bool(each.key):
            raise ConfigError(
                f'{source}: each [[collector.witness]] names one of "url" (with its "key"), "file" and "mail"; mend the'
                " one that does not"
            )
        if each.mail and not (collector.smtp and collector.mail_from):
            raise ConfigError(f'{source}: a witness by mail needs "smtp" and "mail_from" in [collector]')
    state = Path(collector.state_dir)
    return Settings(
        host=host,
        port=port,
        state_dir=state,
        key_file=Path(collector.key_file) if collector.key_file else state / "signing.key",
        tls_cert=collector.tls_cert,
        tls_key=collector.tls_key,
        enroll_token=collector.enroll_token,
        silent_after_ms=int(collector.silent_after * 1000),
        postgres=postgres,
        retention_ms=int(collector.retention * 1000),
        expiring_ms=int(collector.expiring * 1000),
        witness_every_s=float(collector.witness_every),
        smtp=collector.smtp,
        mail_from=collector.mail_from,
        witnesses=tuple(collector.witness),
        cosign=tuple(each.key for each in collector.cosign),
    )


def defaults() -> Settings:
    """The settings of no file at all."""
    return settings(shared.Collector(), "the defaults")


def load(path: str | None) -> Settings:
    """The settings from `path`, else $SEKISHO_CONFIG, else the usual file, else the defaults. Raises ConfigError."""
    named = path or os.environ.get("SEKISHO_CONFIG")
    if named is None and not Path(shared.DEFAULT_PATH).exists():
        return defaults()
    config = shared.load(named or shared.DEFAULT_PATH)
    return settings(config.collector, config.source)
