"""Break-glass codes: one medium on one machine for some hours, read out over the telephone to a machine without network.

Owns: the form of a code and its verification. A code is four groups of six characters (Crockford's base32: no I, L, O, U;
those who type them anyway are understood). In each group five carry data and the sixth checks them, so that a mistyped or
swapped group is named. The 100 bits, in order:
    24 minutes since 2026-01-01 UTC of issue · 10 quarters of an hour it holds · 1 read-only · 9 number · 56 authentication
The authentication is the beginning of HMAC-SHA-256 over machine, medium and the 44 bits before, under a secret that both ends
compute (X25519 of the agent's and the collector's keys): an Ed25519 signature alone would take 103 characters.
Nothing here has a clock or a memory: the time, what the machine has seen of time, and the codes used up are arguments.
"""

import hashlib
import hmac
import unicodedata
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from nacl import bindings
from nacl.exceptions import CryptoError

if TYPE_CHECKING:
    from nacl.signing import SigningKey

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
GROUPS, DATA = 4, 5
EPOCH_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z."""
MINUTE_MS, STEP_MS = 60_000, 15 * 60_000
MAX_FOR_MS = 7 * 86_400_000
"""A code holds for a week at most: who needs longer needs an approval."""
SKEW_MS = 10 * 60_000
"""How far the machine's clock may be behind the collector's, and may be set back, before codes are not taken."""
NUMBERS = 1 << 9
_MAC_BITS = 56
_VALUE = {each: n for n, each in enumerate(ALPHABET)} | {"I": 1, "L": 1, "O": 0}

Why = Literal["mistyped", "not_for_this", "too_early", "over", "used", "clock_back"]
SENTENCES: dict[Why, str] = {
    "mistyped": "group {group} is mistyped or in another's place; have it read out once more",
    "not_for_this": "the code is not for this machine and a medium that is plugged in here; ask for one with: media unlock",
    "too_early": "the code was made for later than this machine's clock shows; set the clock",
    "over": "the code's time is over; ask for a new one",
    "used": "the code was used here already; ask for a new one",
    "clock_back": "this machine's clock was set back since it last knew the time; set it right",
}
"""Why a code is not taken, each with the sentence for people."""


class BadCode(Exception):
    """A code that is not taken; `why` is stable, str() the sentence. `group` counts from 1, 0 if it is none's fault."""

    def __init__(self, why: Why, group: int = 0) -> None:
        super().__init__(SENTENCES[why].format(group=group))
        self.why, self.group = why, group


class Unlock(Struct, frozen=True):
    """A code that holds: for which medium, from when until when (ms); `id` names it in records, and does not give it away."""

    id: str
    key: str
    issued_ms: int
    until_ms: int
    read_only: bool


def shared_secret(own: "SigningKey", other: bytes) -> bytes:
    """What agent and collector both know and nobody else: `own` Ed25519 key and the `other`'s public one (32 bytes).

    Both are taken to X25519 (RFC 7748) as libsodium does; the result is for codes alone. Raises ValueError if `other` is none.
    """
    try:
        private = bindings.crypto_sign_ed25519_sk_to_curve25519(bytes(own) + bytes(own.verify_key))
        public = bindings.crypto_sign_ed25519_pk_to_curve25519(other)
        joint = bindings.crypto_scalarmult(private, public)
    except (CryptoError, TypeError, ValueError):
        raise ValueError("not an Ed25519 public key") from None
    return hashlib.sha256(b"sekisho/unlock-secret/v1\n" + joint).digest()


def make(secret: bytes, agent: str, key: str, *, at_ms: int, for_ms: int, number: int, read_only: bool = False) -> str:
    """The code that lets medium `key` be used on `agent` from now (`at_ms`) for `for_ms`, rounded up to quarters of an hour.

    `number` (below NUMBERS) tells codes of one minute apart: a random one. Raises ValueError for times no code can say.
    """
    minutes, steps = (at_ms - EPOCH_MS) // MINUTE_MS, -(-for_ms // STEP_MS)
    if not (0 <= minutes < 1 << 24 and 0 < for_ms <= MAX_FOR_MS and 0 <= number < NUMBERS):
        raise ValueError("a code holds for up to seven days")
    said = ((minutes << 10 | steps) << 1 | read_only) << 9 | number
    bits = said << _MAC_BITS | _mac(secret, agent, key, said)
    digits = [bits >> 5 * n & 31 for n in range(GROUPS * DATA - 1, -1, -1)]
    groups = [digits[n * DATA : (n + 1) * DATA] for n in range(GROUPS)]
    return "-".join("".join(ALPHABET[each] for each in [*group, _check(group, n)]) for n, group in enumerate(groups))


def check(
    secret: bytes, agent: str, keys: Iterable[str], text: str, *, now_ms: int, seen_ms: int, used: Container[str]
) -> Unlock:
    """What the code `text`, as somebody typed it, unlocks of the media `keys` on `agent`. Raises BadCode.

    `seen_ms`: the latest time this machine has known for sure (its newest event, receipt or register), against a clock that was
    set back. `used`: ids of the codes that were used up here; one must be kept there until its `until_ms` + SKEW_MS.
    """
    bits = _bits(text)
    said, mac = bits >> _MAC_BITS, bits & (1 << _MAC_BITS) - 1
    found = None
    for key in keys:
        if hmac.compare_digest(_mac(secret, agent, key, said).to_bytes(7), mac.to_bytes(7)):
            found = key
    if found is None:
        raise BadCode("not_for_this")
    issued_ms = EPOCH_MS + (said >> 20) * MINUTE_MS
    until_ms = issued_ms + (said >> 10 & 1023) * STEP_MS
    id = hashlib.sha256(f"sekisho/unlock-id/v1\n{agent}\n{found}\n{bits}".encode()).hexdigest()[:16]
    if now_ms < seen_ms - SKEW_MS:
        raise BadCode("clock_back")
    if now_ms < issued_ms - SKEW_MS:
        raise BadCode("too_early")
    if max(now_ms, seen_ms) >= until_ms:
        raise BadCode("over")
    if id in used:
        raise BadCode("used")
    return Unlock(id, found, issued_ms, until_ms, bool(said >> 9 & 1))


def _mac(secret: bytes, agent: str, key: str, said: int) -> int:
    data = f"sekisho/unlock/v1\n{agent}\n{said}\n{key}".encode()
    return int.from_bytes(hmac.digest(secret, data, "sha256")[: _MAC_BITS // 8])


def _bits(text: str) -> int:
    """The data of a typed code. Case, blanks, dashes and full-width characters (input methods make them) do not matter."""
    plain = unicodedata.normalize("NFKC", text[:200]).upper()
    typed = [each for each in plain if not each.isspace() and unicodedata.category(each) != "Pd" and each not in "ー−."]
    bits = 0
    for n in range(GROUPS):
        values = [_VALUE.get(each, -1) for each in typed[n * (DATA + 1) : (n + 1) * (DATA + 1)]]
        if len(values) != DATA + 1 or min(values) < 0 or _check(values[:DATA], n) != values[DATA]:
            raise BadCode("mistyped", n + 1)
        for each in values[:DATA]:
            bits = bits << 5 | each
    if len(typed) > GROUPS * (DATA + 1):
        raise BadCode("mistyped", GROUPS)
    return bits


def _check(values: list[int], group: int) -> int:
    """The sixth character: a sum over GF(32) with a weight for each place, so that one wrong character is noticed, and
    two that were swapped; another start for each group, so that two groups in each other's place are, too."""
    total = group + 1
    for each in values:
        total = _double(total) ^ each
    return _double(total)


def _double(value: int) -> int:
    """Times x in GF(32) by x^5 + x^2 + 1."""
    value <<= 1
    return value ^ 0b100101 if value & 32 else value
