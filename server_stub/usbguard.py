"""Rules of usbguard (usbguard-rules.conf(5)) as approvals: which medium each rule lets in, and what of it can't be carried.

Owns: the rule language (targets, attributes with their operators, strings, conditions, comments) and what a rule means for a
register that knows single media: an `allow` of one device with its serial number is an approval, a `block` or `reject` of one
is a revoked entry. Pure. Must not know: files, the collector. A rule is never made wider than it was: one for a whole model,
a port or a hash alone is not carried over, and that is said.
"""

import re
from collections.abc import Iterator

from msgspec import Struct

from agent.contract.mediakey import key_of

TARGETS = ("allow", "block", "reject")
OPERATORS = ("all-of", "one-of", "none-of", "equals", "equals-ordered", "match-all")
ATTRIBUTES = ("id", "hash", "parent-hash", "name", "serial", "via-port", "with-interface", "with-connect-type", "label")
_QUOTED = ("hash", "parent-hash", "name", "serial", "via-port", "with-connect-type", "label")
_TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|(\{|\})|([^\s{}"]+))')
_ID = re.compile(r"(\*|[0-9a-fA-F]{4}):(\*|[0-9a-fA-F]{4})")
_INTERFACE = re.compile(r"[0-9a-fA-F]{2}:(\*:\*|[0-9a-fA-F]{2}:(\*|[0-9a-fA-F]{2}))")
_NOT_CARRIED = {
    "hash": "the hash of its descriptors",
    "parent-hash": "the hub it hangs on",
    "via-port": "the port it is in",
    "with-interface": "its interfaces",
    "with-connect-type": "whether its port is fixed",
    "if": "its conditions",
}


class BadRule(ValueError):
    """A line is no rule; `column` counts from 1."""

    def __init__(self, column: int, why: str) -> None:
        super().__init__(why)
        self.column = column


class Rule(Struct, frozen=True):
    """One rule: attribute → operator and values, as written; conditions by the name "if"."""

    target: str
    attributes: dict[str, tuple[str, tuple[str, ...]]]


class Carried(Struct, frozen=True):
    """What becomes of one rule: for each medium of `keys` an approval (or, if not `allow`, a revoked entry), and `notes` about
    what could not be carried over."""

    line: int
    allow: bool
    keys: tuple[str, ...] = ()
    name: str = ""
    notes: tuple[str, ...] = ()


class _Words:
    """The tokens of a line, one by one, with the column of each."""

    def __init__(self, line: str) -> None:
        self._line, self._at = line, 0
        self.column = 1

    def peek(self) -> tuple[str, bool] | None:
        """The next token and whether it was quoted; None at the end."""
        at = self._at
        found = self.take()
        self._at = at
        return found

    def take(self) -> tuple[str, bool] | None:
        """The same, and go on."""
        if not self._line[self._at :].strip():
            return None
        found = _TOKEN.match(self._line, self._at)
        self.column = self._at + len(self._line[self._at :]) - len(self._line[self._at :].lstrip()) + 1
        if found is None:
            raise BadRule(self.column, "a string does not end")
        self._at = found.end()
        return (self._unescaped(found[1]), True) if found[1] is not None else (found[2] or found[3], False)

    def _unescaped(self, text: str) -> str:
        plain = text.replace('\\"', "").replace("\\\\", "")
        if "\\" in re.sub(r"\\x[0-9a-fA-F]{2}", "", plain):
            raise BadRule(self.column, 'a string holds an unknown escape; \\", \\\\ and \\xNN are known')
        made = re.sub(r'\\(x([0-9a-fA-F]{2})|["\\])', lambda m: chr(int(m[2], 16)) if m[2] else m[1], text)
        return made.encode("latin-1", "ignore").decode("utf-8", "replace") if "\\x" in text else made


def parse(line: str) -> Rule | None:
    """The rule of a line; None for a comment or an empty one. Raises BadRule."""
    words = _Words(line)
    first = words.peek()
    if first is None or first[0].startswith("#"):
        return None
    words.take()
    if first[1] or first[0] not in TARGETS:
        raise BadRule(words.column, f"begins with {first[0][:40]!a}; a rule begins with allow, block or reject")
    attributes: dict[str, tuple[str, tuple[str, ...]]] = {}
    while (word := words.take()) is not None:
        name, quoted = word
        if name.startswith("#") and not quoted:
            break
        # An id may stand without its name, right after the target.
        if not quoted and not attributes and _ID.fullmatch(name):
            attributes["id"] = ("equals", (name,))
            continue
        if quoted or (name not in ATTRIBUTES and name != "if"):
            raise BadRule(words.column, f"{name[:40]!a} is no attribute; known are {', '.join(ATTRIBUTES)}, if")
        if name in attributes:
            raise BadRule(words.column, f"{name} stands twice in this rule")
        attributes[name] = _values(words, name)
    return Rule(first[0], attributes)


def _values(words: _Words, name: str) -> tuple[str, tuple[str, ...]]:
    operator = "equals"
    word = words.take()
    if word is not None and not word[1] and word[0] in OPERATORS:
        operator, word = word[0], words.take()
        if word is None or word != ("{", False):
            raise BadRule(words.column, f"{operator} needs its values in braces")
    if word != ("{", False):
        value = _value(words, name, word)
        while name == "if" and value.count("(") > value.count(
            ")"
        ):  # a condition may hold blanks: allowed-matches(id 0951:1666)
            value += f" {_value(words, name, words.take())}"
        return operator, (value,)
    values = []
    while (word := words.take()) != ("}", False):
        values.append(_value(words, name, word))
    if not values:
        raise BadRule(words.column, f"{name} has no value in its braces")
    return operator, tuple(values)


def _value(words: _Words, name: str, word: tuple[str, bool] | None) -> str:
    if word is None:
        raise BadRule(words.column, f"{name} has no value")
    text, quoted = word
    if quoted != (name in _QUOTED) or text in ("{", "}"):
        raise BadRule(words.column, f"{name} takes {'a string in quotes' if name in _QUOTED else 'no quotes'}")
    if name == "id" and not (_ID.fullmatch(text) and not (text.startswith("*") and text != "*:*")):
        raise BadRule(words.column, f"{text[:40]!a} is no id of a device, like 0951:1666")
    if name == "with-interface" and not _INTERFACE.fullmatch(text):
        raise BadRule(words.column, f"{text[:40]!a} is no type of interface, like 08:06:50")
    return text


def carry(rule: Rule, line: int) -> Carried:
    """What becomes of a rule."""
    allow, said = rule.target == "allow", rule.attributes
    names = said.get("name", ("", ()))[1] or said.get("label", ("", ()))[1]
    name = names[0] if len(names) == 1 else ""
    notes = tuple(f"not carried over: {what}" for each, what in _NOT_CARRIED.items() if each in said)

    def none(why: str) -> Carried:
        return Carried(line, allow, (), name, (why, *notes))

    if "id" not in said:
        return none("names no device by its id; the register knows single media")
    if "if" in said:
        return none("holds only under conditions, which the register does not know")
    operator, ids = said["id"]
    if operator == "none-of" or (operator != "one-of" and len(ids) != 1):
        return none(f"matches devices by {operator} of {len(ids)} ids; the register names each medium")
    if any("*" in each for each in ids):
        return none("is for all devices of a maker; the register knows single media")
    if "serial" not in said:
        return none("names no serial number, so it is for all pieces of this model; approve each by its serial number")
    operator, serials = said["serial"]
    if operator == "none-of" or (operator != "one-of" and len(serials) != 1):
        return none(f"matches serial numbers by {operator}; the register names each medium")
    keys = [key_of("usb", "", "", serial, *each.split(":")) for each in ids for serial in serials]
    if any(key.endswith(":noserial") for key in keys):
        notes = ("has no serial number of its own: all pieces of this model share the key", *notes)
    return Carried(line, allow, tuple(dict.fromkeys(keys)), name, notes)


def read(text: str) -> Iterator[Carried | tuple[int, BadRule]]:
    """Each rule of a file with what becomes of it, or the line and what is wrong with it."""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if (rule := parse(line)) is not None:
                yield carry(rule, number)
        except BadRule as error:
            yield number, error
