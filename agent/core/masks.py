"""What a command line may tell: secrets never, names of people's other files only if the site records names.

Question: may this word of an argv be written down? Owns: the table of programs and their options that carry a secret (below,
for an auditor to read), the general signs of a secret, the caps on a recorded command line, and what counts as the name of a
file in it. Must not know processes, events or which directories are protected: that is a function handed in. A line handed to
a shell (`sh -c "…"`) is taken apart and treated word by word, so is an argument with spaces in it.
From `people` (`masked`, once a process) and `ocsf` (`discreet`). When in doubt a word is hidden: the joined paths and sizes
are in the event anyway, the command line only shows how.
"""

import posixpath
import re
import shlex
from collections.abc import Callable, Collection, Iterator

from agent.core.media import clean

MAX_ARGS, MAX_ARG, MAX_ARGV = 64, 256, 4_096
_LOOKED_AT = 3 * MAX_ARG
_MAX_DEPTH = 3
_MASK, _MORE = "***", "…"

SECRETS: dict[str, dict[str, str]] = {
    "zip zipcloak zipnote unzip": {"-P": "short"},
    "7z 7za 7zr 7zz 7zzs": {"-p": "either"},
    "rar unrar": {"-hp": "either", "-p": "either"},
    "arj": {"-g": "rest"},
    "openssl": {
        "-k": "next",
        "-K": "next",
        "-pass": "source",
        "-passin": "source",
        "-passout": "source",
        "-password": "source",
        "-hmac": "next",
        "-macopt": "next",
    },
    "gpg gpg2 gpgsm": {"--passphrase": "next"},
    "ccrypt ccencrypt ccdecrypt ccat": {"-K": "short", "--key": "next", "-H": "short", "--key2": "next"},
    "mcrypt mdecrypt": {"-k": "short", "--key": "next"},
    "steghide veracrypt truecrypt": {"-p": "short"},
    "qpdf": {"--encrypt": "two"},
    "pdftk": {"user_pw": "next", "owner_pw": "next", "input_pw": "next"},
    "ssh-keygen": {"-N": "short", "-P": "short"},
    "keytool jarsigner": {"-storepass": "next", "-keypass": "next", "-srcstorepass": "next", "-deststorepass": "next"},
    "sshpass": {"-p": "short"},
    "curl": {
        "-u": "after :",
        "--user": "after :",
        "-U": "after :",
        "--proxy-user": "after :",
        "-E": "after :",
        "--cert": "after :",
        "-b": "short",
        "--cookie": "next",
        "--oauth2-bearer": "next",
    },
    "smbclient smbget smbcacls rpcclient net": {"-U": "after %", "--user": "after %"},
    "lftp": {"-u": "after ,", "--user": "after ,"},
    "mysql mysqldump mysqladmin mysqlimport mysqlcheck mysqlshow mysqlbinlog mariadb mariadb-dump": {"-p": "rest"},
    "mongo mongosh mongodump mongoexport mongorestore": {"-p": "short"},
    "redis-cli": {"-a": "short"},
    "ldapsearch ldapmodify ldapadd ldapwhoami": {"-w": "short"},
    "xfreerdp wlfreerdp": {"/p:": "rest"},
    "aws": {"aws_secret_access_key": "next", "aws_session_token": "next"},
    "sh bash dash ash ksh mksh zsh fish su runuser script flock": {"-c": "line"},
    "ssh scp sftp rsync": {},
}
"""Programs → their options → where the secret stands:

next      the next argument, or what follows `=`
short     the rest of the word or, if there is none, the next argument; other one-letter options may stand before it (`-rP s`)
either    the rest of the word or, if there is none, the next argument
rest      only the rest of the word
two       the next two arguments
source    as next, but `env:…`, `file:…`, `fd:…` and `stdin` only say where it is (openssl-passphrase-options(1))
after X   as short, but only what follows X, as in `user:secret`
line      no secret, but a line for a shell
"""

_UNTIL_COMMAND = "sshpass"
"""Its options end where the command that it runs begins: `sshpass -p s ssh -p 22 host`."""
_PROGRAMS = {name: options for names, options in SECRETS.items() for name in names.split()}
_WORDS = r"pass(?:word|wd|phrase|code)?|pwd|secret|token|api[_-]?key|apikey|access[_-]?key|auth|credentials?|private[_-]?key"
_ASSIGNED = re.compile(rf"(?i)((?:^|[?&;,\s])[A-Za-z0-9_-]*(?:{_WORDS})\s*[=:]\s*)([^\s&;,]+)")
_SETTING = re.compile(rf"(?i)(--?[a-z0-9_-]*(?:{_WORDS})=)(.+)$", re.DOTALL)
_VARIABLE = re.compile(rf"([A-Z0-9_]*(?i:{_WORDS})=)(.+)$", re.DOTALL)
_OPTION = re.compile(rf"(?i)--?(?:[a-z0-9]+[_-])*(?:{_WORDS})$")
_IN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:)(?!\d{1,5}(?:[/?#]|$))(\S+)(@)")
_KEY = re.compile(r"((?:AKIA|ASIA)[A-Z0-9]{4})[A-Z0-9]{12,}|\b(gh[pousr]_|github_pat_|glpat-|xox[a-z]-)[A-Za-z0-9_-]{10,}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization\s*:\s*(?:[a-z]+\s+)?|(?:set-)?cookie\s*:\s*)(\S.*)$", re.DOTALL)
_SHELL_WORD = re.compile(r"""(?:\$'(?:[^'\\]|\\.)*'|[^\s'"\\|&;<>()`]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""", re.DOTALL)
_QUOTED = re.compile(r"""\$'((?:[^'\\]|\\.)*)'|'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)""", re.DOTALL)
_BETWEEN = re.compile(r"[\s|&;<>()`]+")


# -- lines for a shell -------------------------------------------------------------------------------------------------


class _Unclear(ValueError):
    """A line that is not plainly words: a quote or a backslash has no end."""


def _pieces(line: str) -> Iterator[tuple[str, bool]]:
    """A shell's line in pieces, which together are the line: (text, is it a word?)."""
    at = 0
    while at < len(line):
        found = _BETWEEN.match(line, at)
        word = None if found else _SHELL_WORD.match(line, at)
        if found is not None:
            yield found.group(), False
        elif word is not None:
            yield word.group(), True
        else:
            raise _Unclear(line)
        at = (found or word).end()  # type: ignore[union-attr]


def _bare(word: str) -> str:
    """A shell's word without its quotes."""
    return _QUOTED.sub(_unquoted, word) if "'" in word or '"' in word or "\\" in word else word


def _unquoted(found: re.Match[str]) -> str:
    dollar, single, double, escaped = found.groups()
    if dollar is not None:
        return re.sub(r"\\(.)", r"\1", dollar, flags=re.DOTALL)
    if double is not None:
        return re.sub(r'\\(["\\$`])', r"\1", double)
    return single if single is not None else escaped or ""


# -- secrets -----------------------------------------------------------------------------------------------------------


def masked(argv: list[str]) -> list[str]:
    """argv fit to be recorded: secrets replaced by ***, cut to 64 arguments of 256 characters, 4096 in all."""
    out: list[str] = []
    left, scan = MAX_ARGV, _Scan(0)
    for number, raw in enumerate(argv):
        if number >= MAX_ARGS or left <= 0:
            out.append(_MORE)
            break
        text = scan.word(raw if len(raw) <= _LOOKED_AT else raw[:_LOOKED_AT])
        if not (text.isascii() and text.isprintable()):
            text = clean(text)
        text = text if len(text) <= MAX_ARG and len(raw) <= _LOOKED_AT else text[:MAX_ARG] + _MORE
        left -= len(text)
        out.append(text)
    return out


class _Scan:
    """Words of one command line, in order. Options of every program named so far count: `sudo zip -P s`, `xargs zip -P s`."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._options: list[dict[str, str]] = []
        self._outer: list[list[dict[str, str]]] = []
        self._ticked = False
        self._next = ""
        self._after_next = ""

    def between(self, text: str) -> None:
        """What stands between two words of a shell's line: `;`, `|` and `&` begin a command, brackets one inside another."""
        for sign in text:
            if sign == "`":
                self._ticked = not self._ticked
            if sign == "(" or (sign == "`" and self._ticked):
                self._outer.append(self._options)
                self._options = []
            elif sign in ")`" and self._outer:
                self._options = self._outer.pop()
            elif sign in ";|&\n" and not (sign == "&" and (">" in text or "<" in text)):
                self._options = []

    def word(self, word: str) -> str:
        """The word as it may be recorded."""
        how, self._next, self._after_next = self._next, self._after_next, ""
        if how and how != "line":
            return _value(word, how)
        options = _PROGRAMS.get(word.rpartition("/")[2])
        if options is not None:
            self._options = [each for each in self._options if each is not _PROGRAMS[_UNTIL_COMMAND]] + [options]
            return _plain(word)
        for known in self._options:
            for option, kind in known.items():
                if (shown := self._option(word, option, kind)) is not None:
                    return shown
        if _OPTION.match(word) is not None:
            self._next = "next"
            return word
        if how == "line" or any(each.isspace() for each in word):
            return _plain(self._line(word, how == "line"))
        return _plain(word)

    def _option(self, word: str, option: str, kind: str) -> str | None:
        """The word if it is this option; then what the next one is, is known."""
        if word == option:
            self._next, self._after_next = ("next", "next") if kind == "two" else (kind, "")
            if kind == "rest":
                self._next = ""
            return word
        if kind == "line":
            if re.fullmatch(r"-[A-Za-z]*c", word):
                self._next = kind
                return word
            return None
        if word.startswith(option + "=") and kind != "two":
            return f"{option}={_value(word[len(option) + 1 :], kind)}"
        if kind in ("rest", "either"):
            return option + _MASK if word.startswith(option) else None
        if len(option) != 2 or (kind != "short" and kind[:5] != "after"):
            return None
        cluster = re.match(rf"-[A-Za-z0-9]*?{re.escape(option[1:])}", word)
        if cluster is None or any(f"-{each}" in known for known in self._options for each in cluster.group()[1:-1]):
            return None  # or the argument of an option before it
        rest = word[cluster.end() :]
        if rest:
            return cluster.group() + _value(rest, kind)
        self._next = kind
        return word

    def _line(self, line: str, must: bool) -> str:
        """A line for a shell. One that can't be taken apart: its first word if it `must` be one, else masked between spaces."""
        if self._depth >= _MAX_DEPTH:
            return _first(line)
        inner = _Scan(self._depth + 1)
        out = []
        try:
            for piece, is_word in _pieces(line):
                out.append(inner._shell_word(piece) if is_word else piece)
                if not is_word:
                    inner.between(piece)
        except _Unclear:
            if must:
                return _first(line)
            inner = _Scan(_MAX_DEPTH)
            return "".join(inner._rough_word(each) for each in re.findall(r"\s+|\S+", line))
        return "".join(out)

    def _rough_word(self, piece: str) -> str:
        """A piece of a line whose quotes make no sense: they are passed over."""
        bare = piece.strip("'\"")
        shown = self.word(bare) if bare and not bare.isspace() else bare
        return piece if shown == bare else shown

    def _shell_word(self, piece: str) -> str:
        bare = _bare(piece)
        shown = self.word(bare)
        return piece if shown == bare else shlex.quote(shown) if any(each.isspace() for each in shown) else shown


def _first(line: str) -> str:
    first = line.split(maxsplit=1)[:1]
    return f"{_plain(first[0])} {_MORE}" if first else line


def _value(word: str, how: str) -> str:
    """What an option's argument may show."""
    if how == "source":
        kind, sign, _ = word.partition(":")
        return word if kind in ("env", "file", "fd") or word == "stdin" else f"pass:{_MASK}" if sign else _MASK
    if how[:5] == "after":
        name, sign, secret = word.partition(how[6:])
        return _plain(word) if not sign or not secret or secret.startswith("//") else f"{name}{sign}{_MASK}"
    return _MASK


def _plain(word: str) -> str:
    """A word without what is a secret whatever the program."""
    if "=" in word or ":" in word:
        setting = _SETTING.match(word) or _VARIABLE.match(word)
        if setting is not None:
            return setting.group(1) + _MASK
        word = _IN_URL.sub(rf"\1{_MASK}\3", _ASSIGNED.sub(rf"\1{_MASK}", _HEADER.sub(rf"\1{_MASK}", word)))
    return _BEARER.sub(rf"\1 {_MASK}", _KEY.sub(rf"\1\2{_MASK}", word))


# -- names of files ----------------------------------------------------------------------------------------------------

_FILES_ONLY = {
    name: commands
    for commands, names in (
        (0, "cp mv ln install rsync scp cat tee zip unzip gzip bzip2 xz zstd rm touch split base64 gpg ccrypt"),
        (1, "tar bsdtar 7z 7za 7zr 7zz rar unrar ar"),
    )
    for name in names.split()
}
"""Programs whose words are files, or may be; how many words that are not come first (`tar czf`, `7z a`)."""
_SHELLS = frozenset(name for name, options in _PROGRAMS.items() if "-c" in options)
_OF_SYSTEM = ("/usr/bin/", "/usr/sbin/", "/usr/lib/", "/bin/", "/sbin/", "/dev/")
_NO_NAME = re.compile(r"[\d./*~{}+;:-]*|-{1,2}[A-Za-z0-9-]*")
_ASSIGNS = re.compile(r"(--[A-Za-z][A-Za-z-]*=|(?:if|of)=|[A-Z][A-Z0-9_]*=)(.*)$", re.DOTALL)
_ON_A_HOST = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/\s]*)(/.*)?$", re.DOTALL)


def extension(path: str) -> str:
    """The extension, if it is one: short, letters and digits, so that it does not carry a name."""
    stem, dot, ext = path.rstrip("/").rpartition("/")[2].rpartition(".")
    return ext.lower() if dot and stem and len(ext) <= 10 and ext.isascii() and ext.isalnum() else ""


def unnamed(path: str) -> str:
    """A path that tells only its extension: `*.txt`, or `*`."""
    ext = extension(path)
    return f"*.{ext}" if ext else "*"


def place(word: str) -> str:
    """The path that a word of a command line means: absolute, or without what it is relative to (`./`, `~/`, `$DIR/`)."""
    path = posixpath.normpath(word) if word else word
    return re.sub(r"^(?:(?:\.\.|~\w*|\$\w+|\$\{\w+\})/)+|^//", lambda found: "/" if found.group() == "//" else "", path)


def discreet(argv: list[str], held: Collection[str], tell: Callable[[str], bool]) -> list[str]:
    """A masked argv without the names of files that `tell(place)` refuses; programs, options and the like are kept.

    `held`: base names of files that the process held open, which are names even if they don't look like it.
    """
    reader = _Discreet(held, tell, 0)
    return argv[:1] + [reader.word(word) for word in argv[1:]] if reader.program(argv[0] if argv else "") else []


class _Discreet:
    def __init__(self, held: Collection[str], tell: Callable[[str], bool], depth: int) -> None:
        self._held, self._tell, self._depth = held, tell, depth
        self._files_only = self._shell = self._line_next = False
        self._commands = 0

    def program(self, word: str) -> bool:
        """Take note of a program's name; True if there is a word at all."""
        name = word.rpartition("/")[2]
        if name in _FILES_ONLY:
            self._files_only, self._commands = True, _FILES_ONLY[name]
        self._shell = self._shell or name in _SHELLS
        return word != ""

    def word(self, word: str) -> str:
        """A word that is no program's name by its place."""
        line, self._line_next = self._line_next, False
        if line:
            return self._line(word)
        if self._shell and re.fullmatch(r"-[A-Za-z]*c", word):
            self._line_next = True
            return word
        command, self._commands = self._commands > 0, 0
        if _NO_NAME.fullmatch(word) or word in (_MASK, _MORE):
            return word
        of_system = word.startswith(_OF_SYSTEM) and ".." not in word
        if of_system or (not self._files_only and (word in _FILES_ONLY or word in _SHELLS)):
            self.program(word)
            return word
        if (assigns := _ASSIGNS.match(word)) is not None:
            return assigns.group(1) + self._name(assigns.group(2), False)
        if word[0] == "-":
            at = word.find("/")
            known = 0 < at <= 8 and word[1:at].isalnum() and self._tell(place(word[at:]))
            return word if known else word[:2] + self._name(word[2:], False)
        return self._name(word, self._files_only and not (command and word.isascii() and word.isalpha() and len(word) <= 8))

    def _name(self, word: str, surely: bool) -> str:
        """The word, or what is left of it if it is the name of a file that may not be told."""
        on_a_host = _ON_A_HOST.match(word)
        if on_a_host is not None and not word.startswith("file:"):
            return on_a_host.group(1) + ("/" + unnamed(on_a_host.group(2)) if on_a_host.group(2) else "")
        dotted = "." in word and not _NO_NAME.fullmatch(word)
        odd = not word.isascii() or any(each.isspace() for each in word)
        if not (surely or dotted or odd or "/" in word or word in self._held) or _NO_NAME.fullmatch(word):
            return word
        return word if self._tell(place(word)) else unnamed(word)

    def _line(self, line: str) -> str:
        """A line for a shell; where it can't be taken apart it ends."""
        if self._depth >= _MAX_DEPTH:
            return _MORE
        out, inner, first = [], _Discreet(self._held, self._tell, self._depth + 1), True
        try:
            for piece, is_word in _pieces(line):
                if not is_word:
                    out.append(piece)
                    if any(sign in ";|&(\n`" for sign in piece) and not (">" in piece or "<" in piece):
                        inner, first = _Discreet(self._held, self._tell, self._depth + 1), True
                    continue
                bare = _bare(piece)
                named = first and not _ASSIGNS.match(bare) and inner.program(bare)
                shown = bare if named and bare.isascii() and not set("./") & set(bare) else inner.word(bare)
                first = first and not named
                out.append(piece if shown == bare else shlex.quote(shown) if any(each.isspace() for each in shown) else shown)
        except _Unclear:
            out.append(_MORE)
        return "".join(out)
