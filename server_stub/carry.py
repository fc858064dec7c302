"""Carrying checkpoints to their witnesses: another collector, a file that is only appended to, a mailbox.

Owns: the three ways, and what is asked of each before it gets a new one: a file's last checkpoint, like another collector's,
must be of this log's past, or the log was rewritten and nothing is added. Must not know: routes, when it is time (`collector`).
"""

import http.client
import os
import smtplib
import ssl
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from agent.contract.chain import NotWhole
from server_stub import tree, witness
from server_stub.config import Witness, is_loopback
from server_stub.verify import NoBundle, read_notes

TIMEOUT_S = 30.0
MAX_ANSWER = 64 << 10


class NotCarried(Exception):
    """A witness did not take the checkpoint; str() is one sentence. `rewritten`: it holds one that contradicts this log."""

    def __init__(self, why: str, rewritten: bool = False) -> None:
        super().__init__(why)
        self.rewritten = rewritten


class Point(NamedTuple):
    """A signed checkpoint of this log, and all keys the log ever had."""

    note: str
    origin: str
    size: int
    keys: list[bytes]


def to_file(path: Path, point: Point, subtree: tree.Subtree) -> bool:
    """Append the checkpoint unless it is there; whether it was. Raises NotCarried."""
    try:
        if path.exists() and path.stat().st_size:
            check_notes(path, point, subtree)
            last = read_notes(str(path))[-1]
            if last[2] == point.size:
                return False
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "wb") as file:
            file.write(point.note.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NotCarried(f"{path}: the checkpoint can't be appended ({error.strerror}); see to its file system") from None
    except NoBundle as error:
        raise NotCarried(f"{error}; nothing is added to a file that is not one of checkpoints") from None
    return True


def check_notes(path: Path, point: Point, subtree: tree.Subtree) -> list[int]:
    """Sizes of the checkpoints in a text, all of them found to be of this log's past. Raises NotCarried, NoBundle."""
    sizes = []
    for note, origin, size in read_notes(str(path)):
        if origin != point.origin:
            raise NotCarried(f"{path}: holds a checkpoint of another log ({origin}); give each log a file of its own")
        for key in point.keys:
            try:
                _, root = tree.read_checkpoint(note, origin, key)
                break
            except NotWhole:
                continue
        else:
            raise NotCarried(f"{path}: its checkpoint of size {size} is not signed by this log; see who wrote there", True)
        if size > point.size:
            why = f"the log had {size} events and has {point.size}: it was cut, or restored from a backup"
            raise NotCarried(f"{path}: {why}", True)
        if tree.root_at(size, subtree) != root:
            raise NotCarried(f"{path}: the first {size} events are not those they were: the log was rewritten", True)
        sizes.append(size)
    return sizes


def to_mail(smtp: str, sender: str, address: str, point: Point) -> None:
    """Send the checkpoint. Raises NotCarried."""
    parts = urlsplit(smtp)
    message = EmailMessage()
    message["From"], message["To"] = sender, address
    message["Subject"] = f"Sekisho checkpoint {point.size} of {point.origin}"
    message["Message-ID"] = f"<{point.origin.replace('/', '.')}.{point.size}@sekisho>"
    message.set_content(
        f"{point.note}\nKeep this mail where the collector's administrators can't remove it. It proves later, by\n"
        "    sekisho-collector verify BUNDLE --checkpoint THIS-TEXT\nthat nothing in the log before it was changed.\n\n"
        "このメールは、収集サーバーの管理者が消せない場所に保管してください。これより前の記録が\n変更されていないことを、後から証明できます。\n"
    )
    host, port = parts.hostname or "", parts.port or (465 if parts.scheme == "smtps" else 25)
    try:
        context = ssl.create_default_context()
        if parts.scheme == "smtps":
            link: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=TIMEOUT_S, context=context)
        else:
            link = smtplib.SMTP(host, port, timeout=TIMEOUT_S)
        with link:
            if parts.scheme == "smtp" and link.has_extn("starttls"):
                link.starttls(context=context)
            if parts.username:
                link.login(unquote(parts.username), unquote(parts.password or ""))
            link.send_message(message)
    except (OSError, smtplib.SMTPException) as error:
        raise NotCarried(f"{address}: the mail server {host}:{port} did not take the checkpoint ({_plain(error)})") from None


def _plain(error: Exception) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(error))[:200]


def to_collector(peer: Witness, seen: int, point: Point, prove: Callable[[int], list[bytes]]) -> str:
    """The cosignature line of another collector; `seen` is the size it is thought to have cosigned. Raises NotCarried."""
    name, key = witness.read_vkey(peer.key)
    for _ in range(2):
        path = prove(seen) if 0 < seen < point.size else []
        status, answer = _post(peer, witness.body(seen, path, point.note))
        if status != 409:
            break
        held = answer.strip()
        if not held.isdecimal() or int(held) == seen:
            raise NotCarried(f"{peer.url}: holds another checkpoint of this size: the log was rewritten", True)
        seen = int(held)
        if seen > point.size:
            why = f"cosigned {seen} events, and the log has {point.size}: it was cut, or restored from a backup"
            raise NotCarried(f"{peer.url}: {why}", True)
    if status == 422:
        raise NotCarried(f"{peer.url}: what it cosigned before is not in this log: the log was rewritten", True)
    if status != 200:
        raise NotCarried(f"{peer.url}: answers {status} to a checkpoint; is this log in its [[collector.cosign]]?")
    for line in answer.splitlines():
        try:
            witness.check_cosignature(point.note, line, name, key)
            return line + "\n"
        except NotWhole:
            continue
    raise NotCarried(f"{peer.url}: its cosignature does not fit the key that is configured; see who answers there")


def _post(peer: Witness, data: bytes) -> tuple[int, str]:
    parts = urlsplit(peer.url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=peer.ca_file or None)
        link: http.client.HTTPConnection = http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=context)
    elif parts.scheme == "http" and is_loopback(host):
        link = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)
    else:
        raise NotCarried(f"{peer.url}: is no address of a witness; write https:// (http:// is for loopback only)")
    try:
        link.request("POST", parts.path.rstrip("/") + "/add-checkpoint", data)
        answer = link.getresponse()
        return answer.status, answer.read(MAX_ANSWER).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise NotCarried(f"{peer.url}: the witness does not answer ({_plain(error) or type(error).__name__})") from None
    finally:
        link.close()
