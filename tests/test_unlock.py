"""Break-glass codes: only the very machine, medium and time, typed by people, once."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from agent.contract import chain, unlock
from agent.contract.unlock import BadCode

COLLECTOR, AGENT = SigningKey(b"c" * 32), SigningKey(b"a" * 32)
SECRET = unlock.shared_secret(COLLECTOR, bytes(AGENT.verify_key))
ME = chain.agent_id(bytes(AGENT.verify_key))
STICK, NOW = "usb:0951:1666:60A44C413F8CF320", 1_795_000_000_000
HOUR = 3_600_000

keys = st.text(min_size=1, max_size=80)
times = st.integers(unlock.EPOCH_MS, unlock.EPOCH_MS + 30 * 365 * 86_400_000)
spans = st.integers(1, unlock.MAX_FOR_MS)
numbers = st.integers(0, unlock.NUMBERS - 1)


def made(**other) -> str:
    given = {"at_ms": NOW, "for_ms": 4 * HOUR, "number": 7} | other
    return unlock.make(SECRET, ME, STICK, **given)


def why(text: str, *, secret=SECRET, agent=ME, present=(STICK,), now=NOW, seen=0, used=()) -> tuple[str, int]:
    with pytest.raises(BadCode) as refused:
        unlock.check(secret, agent, present, text, now_ms=now, seen_ms=seen, used=used)
    return refused.value.why, refused.value.group


def test_both_ends_know_the_secret_and_nobody_else_does():
    assert unlock.shared_secret(AGENT, bytes(COLLECTOR.verify_key)) == SECRET
    assert unlock.shared_secret(SigningKey(b"b" * 32), bytes(COLLECTOR.verify_key)) != SECRET
    with pytest.raises(ValueError, match="public key"):
        unlock.shared_secret(AGENT, b"short")


@given(key=keys, at=times, span=spans, number=numbers, read_only=st.booleans())
def test_a_code_unlocks_what_it_was_made_for(key, at, span, number, read_only):
    code = unlock.make(SECRET, ME, key, at_ms=at, for_ms=span, number=number, read_only=read_only)
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{6}(-[0-9A-HJKMNP-TV-Z]{6}){3}", code)
    got = unlock.check(SECRET, ME, ["usb:other", key], code, now_ms=at, seen_ms=at, used=())
    assert (got.key, got.read_only) == (key, read_only)
    assert at - 60_000 < got.issued_ms <= at and span - 60_000 <= got.until_ms - got.issued_ms < span + unlock.STEP_MS


@given(at=st.integers(0, 23), into=st.sampled_from(unlock.ALPHABET))
def test_one_wrong_character_is_noticed_and_its_group_named(at, into):
    code = made().replace("-", "")
    typed = code[:at] + into + code[at + 1 :]
    if typed != code:
        assert why(typed) == ("mistyped", at // 6 + 1)


@given(at=st.integers(0, 22))
def test_two_swapped_characters_are_noticed(at):
    code = list(made().replace("-", ""))
    code[at], code[at + 1] = code[at + 1], code[at]
    typed = "".join(code)
    if typed != made().replace("-", ""):
        assert why(typed)[0] == "mistyped"


@given(one=st.integers(0, 3), other=st.integers(0, 3))
def test_groups_in_each_others_place_are_noticed(one, other):
    groups = made().split("-")
    groups[one], groups[other] = groups[other], groups[one]
    if groups != made().split("-"):
        assert why("-".join(groups))[0] == "mistyped"


@pytest.mark.parametrize(
    "habit",
    [
        str.lower,
        lambda code: code.replace("-", " "),
        lambda code: code.replace("-", ""),
        lambda code: code.replace("0", "o").replace("1", "l"),
        lambda code: code.replace("1", "I"),
        lambda code: "".join(chr(ord(each) + 0xFEE0) if each.isalnum() else "ー" for each in code),
        lambda code: f"  {code}\n",
    ],
)
def test_how_people_type_does_not_matter(habit):
    for number in range(40):
        typed = habit(made(number=number))
        assert unlock.check(SECRET, ME, [STICK], typed, now_ms=NOW, seen_ms=0, used=()).key == STICK


@given(text=st.text(max_size=300))
def test_whatever_is_typed_is_answered_by_a_reason(text):
    assert why(text)[0] in unlock.SENTENCES


@pytest.mark.parametrize("count", [0, 6, 23, 25, 30])
def test_a_code_of_another_length_is_mistyped(count):
    assert why((made().replace("-", "") + "000000")[:count])[0] == "mistyped"


def test_another_machine_another_medium_another_secret():
    code = made()
    other = SigningKey(b"b" * 32)
    assert why(code, agent=chain.agent_id(bytes(other.verify_key))) == ("not_for_this", 0)
    assert why(code, present=["usb:0951:1666:OTHER"]) == ("not_for_this", 0)
    assert why(code, present=[]) == ("not_for_this", 0)
    assert why(code, secret=unlock.shared_secret(other, bytes(COLLECTOR.verify_key))) == ("not_for_this", 0)


@given(changed=st.integers(1, (1 << 44) - 1))
def test_longer_hours_written_into_a_code_do_not_authenticate(changed):
    """Somebody who knows the form gives himself another time, with right check characters: the authentication does not fit."""
    bits = unlock._bits(made()) ^ changed << 56
    digits = [bits >> 5 * n & 31 for n in range(19, -1, -1)]
    groups = [digits[n * 5 : n * 5 + 5] for n in range(4)]
    typed = "".join(unlock.ALPHABET[each] for n, group in enumerate(groups) for each in [*group, unlock._check(group, n)])
    assert why(typed) == ("not_for_this", 0)


def test_time():
    code = made()
    assert why(code, now=NOW + 4 * HOUR + 60_000) == ("over", 0)
    assert unlock.check(SECRET, ME, [STICK], code, now_ms=NOW + 4 * HOUR - 120_000, seen_ms=NOW, used=())
    assert why(code, now=NOW - HOUR) == ("too_early", 0)
    assert unlock.check(SECRET, ME, [STICK], code, now_ms=NOW - 9 * 60_000, seen_ms=0, used=()), "clocks differ a little"


def test_a_clock_that_was_turned_back_does_not_bring_a_code_back():
    code, later = made(), NOW + 5 * HOUR
    assert why(code, now=NOW + HOUR, seen=later) == ("clock_back", 0)
    assert why(code, now=NOW + 4 * HOUR - 120_000, seen=NOW + 4 * HOUR + 60_000) == ("over", 0), "what was seen is later"


def test_a_code_is_used_once():
    code = made()
    first = unlock.check(SECRET, ME, [STICK], code, now_ms=NOW, seen_ms=NOW, used=())
    assert why(code, used={first.id}) == ("used", 0)
    again = unlock.check(SECRET, ME, [STICK], made(number=8), now_ms=NOW, seen_ms=NOW, used={first.id})
    assert again.id != first.id, "a new code of the same minute is another one"


@pytest.mark.parametrize("wrong", [{"for_ms": 0}, {"for_ms": unlock.MAX_FOR_MS + 1}, {"at_ms": 0}, {"number": 512}])
def test_times_that_no_code_can_say(wrong):
    with pytest.raises(ValueError, match="seven days"):
        made(**wrong)
