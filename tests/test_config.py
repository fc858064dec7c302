"""A person writes the configuration; what is wrong in it is said with file, line, key and the nearest right key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config

WHOLE = """
[agent]
name = "ws-042"
mode = "warn"
[[agent.protect]]
path = "/srv/customers/"
label = "顧客マスタ"
[[agent.protect]]
path = "/srv/designs"
[agent.media]
record_names = true
[[agent.limit]]
name = "day"
bytes = "1.5GiB"
window = "24h"
[agent.spool]
max_bytes = "64MiB"
[collector]
silent_after = "90s"
"""


def refused(text: str) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.parse(text, "site.toml")
    return str(caught.value)


def test_units_become_numbers_once() -> None:
    site = config.parse(WHOLE)
    assert [(each.path, each.label) for each in site.agent.protect] == [
        ("/srv/customers", "顧客マスタ"),
        ("/srv/designs", "designs"),
    ]
    assert [(each.name, each.bytes, each.files, each.window) for each in site.agent.limit] == [("day", 1610612736, 0, 86400.0)]
    assert site.agent.spool.max_bytes == 64 << 20
    assert site.collector.silent_after == 90.0


def test_an_empty_file_means_the_defaults() -> None:
    site = config.parse("")
    assert [each.name for each in site.agent.limit] == ["burst", "drip"]
    assert site.agent.media.require_approval and not site.agent.media.record_names
    assert site.agent.collector.heartbeat == 60.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[agent]\n\nlimts = 1", 'site.toml:3: unknown key "limts" in [agent]; did you mean "limit"?'),
        ("[agnet]\nname = 'x'", 'site.toml:1: unknown key "agnet"; did you mean "agent"?'),
        ("[agent]\nname = 3", 'site.toml:2: "name" must be a text in quotes'),
        ("[agent.media]\nrecord_names = 1", 'site.toml:2: "record_names" must be true or false'),
        ("[agent]\nmode = 'strict'", 'site.toml:2: "mode" must be one of: observe, warn, enforce'),
        ("[agent.spool]\nmax_bytes = 5", 'site.toml:2: "max_bytes" needs a unit, in quotes, like "100MiB"'),
        ("[agent.spool]\nmax_bytes = '5 potatoes'", 'site.toml:2: "max_bytes": "5 potatoes" is not a size'),
        ("[agent.spool]\nmax_bytes = '5KiB'", 'site.toml:2: "max_bytes" must be at least "1MiB"'),
        ("[agent.collector]\nheartbeat = '1 minute'", 'site.toml:2: "heartbeat": "1 minute" is not a duration'),
        ("[agent.collector]\nurl = 'http://far.example'", "must begin with https://"),
        ("[[agent.limit]]\nname = 'a'\nwindow = '1h'", 'site.toml:1: limit "a" has neither "bytes" nor "files"'),
        ("[[agent.limit]]\nwindow = '1h'", 'site.toml:1: [[agent.limit]] lacks "name"; add it'),
        (
            "[[agent.limit]]\nname='a'\nwindow='1h'\nfiles=1\n[[agent.limit]]\nname='a'\nwindow='2h'\nfiles=1",
            "site.toml:6: two limits",
        ),
        ("[[agent.limit]]\nname='staged'\nwindow='1h'\nfiles=1", 'site.toml:2: limit name "staged"'),
        ("[[agent.protect]]\npath='/a'\n[[agent.protect]]\npath='b'", 'site.toml:4: "b" must be an absolute path'),
        ("agent = 3", "[agent] must be a table"),
        ("[agent]\nprotect = 'x'", '"protect" must be written as [[agent.protect]]'),
        ("[agent]\nname = 'x'\nname = 'y'", "site.toml:3: not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, said: str) -> None:
    assert said in refused(text)


def test_a_file_that_cannot_be_read_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="-c or SEKISHO_CONFIG"):
        config.load(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b'[agent]\nname = "caf\xe9"\n')
    with pytest.raises(config.ConfigError, match="save it as UTF-8"):
        config.load(str(tmp_path / "latin.toml"))


@given(st.text(max_size=200))
def test_no_text_whatever_raises_anything_else(text: str) -> None:
    try:
        config.parse(text)
    except config.ConfigError:
        return


TOML_VALUES = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
KEYS = st.sampled_from(
    ["agent", "collector", "protect", "limit", "media", "spool", "name", "path", "window", "mode", "bytes", "x"]
)


@given(
    st.dictionaries(
        KEYS, st.dictionaries(KEYS, TOML_VALUES | st.dictionaries(KEYS, TOML_VALUES, max_size=3), max_size=3), max_size=3
    )
)
def test_no_document_of_right_keys_and_wrong_values_raises_anything_else(document: dict[str, object]) -> None:
    reader = config._Reader("", "x")
    try:
        reader.struct(config.Config, document, ())
    except config.ConfigError:
        return


@given(st.integers(0, 10**12), st.sampled_from(["B", "KiB", "MiB", "GB", ""]))
def test_sizes_keep_their_value(number: int, unit: str) -> None:
    scale = {"B": 1, "KiB": 1024, "MiB": 1 << 20, "GB": 10**9, "": 1}[unit]
    assert config.parse_bytes(f"{number}{unit}") == number * scale
