"""One exchange with a collector over HTTPS: a request, a bounded answer, or one sentence why there is none.

Owns: the sessions of `requests` (imported when first needed, with `ssl` and `email`: together the agent's largest part), TLS
and proxies, time limits, signed requests, and enrolment. With `sender.py` and `registerfeed.py` it is the agent's only network
client. Must not know: the spool, back-off, what an answer means for the chain.

Certificates are checked against `ca_file`, else against the system's own store (not the one `requests` brings along). Proxies
from the environment serve https:// only, never loopback. http:// is for loopback only. Redirects are not followed.
"""

import base64
import hashlib
import importlib
import re
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from agent import identity as identities
from agent.config import Agent
from agent.contract import chain
from agent.contract.wire import Enrol, Enrolled, Problem, Rotation
from agent.identity import Identity, Pinned

if TYPE_CHECKING:
    from types import ModuleType

    import requests

MAX_ANSWER_BYTES = 16 << 20
CONNECT_S = 10.0
READ_S = 30.0
"""No byte for so long: given up."""
WHOLE_S = 120.0
"""The whole answer must be there by then, however it drips."""


class Unreachable(Exception):
    """No usable answer; str() is one sentence that says why and what to do."""


class Refused(Exception):
    """The collector won't have us; str() is one sentence that says why and what to do."""


class Answer(Struct, frozen=True):
    """An answer as it came. `date_ms`: its Date (RFC 9110; whole seconds), `retry_after_s`: how long to wait at least."""

    status: int
    body: bytes
    date_ms: int | None = None
    retry_after_s: float | None = None

    def problem(self) -> Problem:
        """Its RFC 9457 problem, an empty one if it is none."""
        try:
            return msgspec.json.decode(self.body, type=Problem)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return Problem(status=self.status)


def _requests() -> "ModuleType":
    """The module, imported when first needed and without its guessers of character sets: they take 3 MiB, and an answer of
    ours is UTF-8. It can do without (requests.compat), but warns."""
    if "requests" in sys.modules:
        return sys.modules["requests"]
    absent = {name: None for name in ("chardet", "charset_normalizer") if name not in sys.modules}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules.update(absent)  # type: ignore[arg-type]
        try:
            return importlib.import_module("requests")
        finally:
            for name in absent:
                del sys.modules[name]


def loopback(url: str) -> bool:
    """Whether `url` leads to this very machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127\.\d+\.\d+\.\d+", host) is not None


class Collector:
    """A collector's address and one kept-alive session to it. For one thread."""

    def __init__(self, url: str, ca_file: str = "", read_s: float = READ_S, whole_s: float = WHOLE_S) -> None:
        self.url, self._ca_file, self._read_s, self._whole_s = url.rstrip("/"), ca_file, read_s, whole_s
        if not (url.startswith("https://") or (url.startswith("http://") and loopback(url))):
            raise Refused(f'"{url}" is no collector\'s address: it must begin with https:// (http:// is for loopback only)')
        self._session: requests.Session | None = None

    def close(self) -> None:
        """Close its connections; it may be used again."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _open(self) -> "requests.Session":
        if self._session is None:
            from agent import __version__

            self._session = _requests().Session()
            self._session.trust_env = self.url.startswith("https://") and not loopback(self.url)
            self._session.headers.update({"User-Agent": f"sekisho-agent/{__version__}", "Accept": "application/json"})
        return self._session

    def _trust(self) -> str | bool:
        import ssl

        # Said with each request: REQUESTS_CA_BUNDLE would win over what a session says.
        paths = ssl.get_default_verify_paths()
        return self._ca_file or paths.cafile or paths.capath or True

    def ask(self, method: str, target: str, body: bytes | None, headers: dict[str, str], patience_s: float = 0) -> Answer:
        """One request for `target` (path and query). `patience_s`: how much longer than usual it may keep us waiting."""
        session, requests = self._open(), _requests()
        if self._ca_file and not Path(self._ca_file).exists():
            raise Unreachable(f"{self._ca_file}: agent.collector.ca_file is not there; copy the CA's certificate to it")
        try:
            with session.request(
                method,
                self.url + target,
                data=body,
                headers=headers,
                timeout=(CONNECT_S, self._read_s + patience_s),
                verify=self._trust(),
                allow_redirects=False,
                stream=True,
            ) as response:
                got = self._read(response, patience_s)
                return Answer(response.status_code, got, _date_ms(response), _retry_after_s(response))
        except requests.exceptions.SSLError as error:
            self.close()
            why = f"its certificate is refused ({_reason(error)}); set agent.collector.ca_file to the CA that signed it"
            raise Unreachable(f"{self.url}: {why}") from None
        except requests.exceptions.Timeout:
            self.close()
            raise Unreachable(f"{self.url}: no answer in time; is the collector overloaded?") from None
        except requests.exceptions.ConnectionError as error:
            self.close()
            raise Unreachable(
                f"{self.url}: can't be reached ({_reason(error)}); start the collector or mend the way to it"
            ) from None
        except requests.exceptions.ChunkedEncodingError:
            self.close()
            raise Unreachable(f"{self.url}: the answer broke off; mend the way to the collector") from None
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            self.close()
            what = type(error).__name__
            raise Unreachable(f"{self.url}: answers with no usable HTTP ({what}); is this a collector?") from None

    def _read(self, response: "requests.Response", patience_s: float) -> bytes:
        by = time.monotonic() + self._whole_s + patience_s
        got = bytearray()
        # One byte's worth of progress must not extend the time: hence the small pieces and our own clock.
        for piece in response.iter_content(8192):
            got += piece
            if len(got) > MAX_ANSWER_BYTES:
                self.close()
                raise Unreachable(f"{self.url}: the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB; is this a collector?")
            if time.monotonic() > by:
                self.close()
                raise Unreachable(f"{self.url}: the answer drips too slowly; mend the way to the collector")
        return bytes(got)


def signed_headers(identity: Identity, method: str, target: str, now_ms: int) -> dict[str, str]:
    """The headers that sign a request without a batch."""
    at = str(now_ms)
    sig = chain.sign(chain.request_bytes(method, target, identity.agent, at), identity.key)
    return {"Sekisho-Agent": identity.agent, "Sekisho-Time": at, "Sekisho-Signature": sig}


def token_of(agent: Agent) -> str:
    """The configured enrolment token, "" if none is there (yet)."""
    if agent.collector.token or not agent.collector.token_file:
        return agent.collector.token
    try:
        return Path(agent.collector.token_file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def token_digest(token: str) -> str:
    """What is kept of a token that was used, so that another one is noticed."""
    return hashlib.sha256(token.encode()).hexdigest()


def join(
    peer: Collector, identity: Identity, token: str, name: str, *, ca_file: str, now_ms: int
) -> tuple[Pinned, bytes | None]:
    """POST /v1/enroll: the collector to pin (not kept yet) and the register it sent along. Raises Refused, Unreachable."""
    key = base64.b64encode(identity.public_key).decode()
    body = msgspec.json.encode(Enrol(token, name, key))
    answer = peer.ask("POST", "/v1/enroll", body, {"Content-Type": "application/json"})
    if answer.status in (400, 401, 403, 409, 422):
        why = (
            plain(answer.problem().detail)
            or "the token is not accepted; get a new one with sekisho-collector token create --enroll"
        )
        raise Refused(f"{peer.url}: refuses to enroll this machine: {why}")
    if answer.status not in (200, 201):
        raise Unreachable(f"{peer.url}: answers {answer.status} to the enrolment; look at the collector's log")
    try:
        got = msgspec.json.decode(answer.body, type=Enrolled)
        if len(base64.b64decode(got.key, validate=True)) != 32:
            raise ValueError(got.key)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise Unreachable(f"{peer.url}: its answer to the enrolment can't be read; is this a collector?") from None
    if got.agent != identity.agent:
        raise Refused(f"{peer.url}: enrolled another agent than this one; is this a collector?")
    pinned = Pinned(url=peer.url, key=got.key, agent=identity.agent, name=name, ca_file=ca_file, enrolled_at=now_ms)
    pinned.token_digest = token_digest(token)
    return pinned, None if got.register is msgspec.UNSET else bytes(got.register)


class _Succession(Struct):
    rotations: list[Rotation] = []


def newest_key(peer: Collector, key: bytes) -> bytes | None:
    """The collector's present key if `key`, which is pinned, vouches for it; None if it has no other. Raises Unreachable."""
    answer = peer.ask("GET", "/v1/log/keys", None, {})
    try:
        told = msgspec.json.decode(answer.body, type=_Succession) if answer.status == 200 else _Succession()
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    newest = chain.successors(key, told.rotations)[-1]
    return None if newest == key else newest


def enroll(agent: Agent, url: str, token: str, ca_file: str = "") -> Pinned:
    """Join the collector at `url` and pin its key, whatever was pinned before: a person asked for it.

    Makes the identity if there is none. Raises Refused, with Unreachable's sentence too, and IdentityError.
    """
    identity = identities.load_or_create(agent.state_dir)
    peer = Collector(url, ca_file or agent.collector.ca_file)
    try:
        pinned, _ = join(peer, identity, token, agent.name or host_name(), ca_file=ca_file, now_ms=time.time_ns() // 1_000_000)
    except Unreachable as error:
        raise Refused(str(error)) from None
    finally:
        peer.close()
    identity.pin(pinned)
    return pinned


def host_name() -> str:
    """This machine's name."""
    import socket

    return socket.gethostname()


def _http_date_ms(text: str) -> int | None:
    """An HTTP-date (RFC 9110, 5.6.7) in ms, None if it is none."""
    import email.utils

    try:
        return int(email.utils.parsedate_to_datetime(text).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        return None


def _date_ms(response: "requests.Response") -> int | None:
    return _http_date_ms(response.headers.get("Date", ""))


def _retry_after_s(response: "requests.Response") -> float | None:
    """RFC 9110: seconds, or a date (then counted from the answer's own Date)."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    until, date = _http_date_ms(text), _date_ms(response)
    return None if until is None or date is None else max(0.0, (until - date) / 1000)


def _reason(error: Any) -> str:
    """The innermost cause of one of requests' nested errors, in the system's words."""
    seen: Any = error
    for _ in range(8):
        causes = (getattr(seen, "reason", None), *getattr(seen, "args", ()))
        inner = next((cause for cause in causes if isinstance(cause, Exception)), None)
        if inner is None:
            break
        seen = inner
    text = getattr(seen, "strerror", None) or getattr(seen, "verify_message", None) or str(seen)
    return plain(str(text).rpartition(": ")[2].partition(" (_ssl.c")[0])


def plain(text: str) -> str:
    """Foreign text made fit for a terminal and a log: printable, on one line, not long."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])
