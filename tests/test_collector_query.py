"""The grammar of filters: what a person may write, and that none of it ever becomes SQL."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_stub import query, tree
from server_stub.intake import row_of
from server_stub.query import BadQuery, Filter
from server_stub.store import Store, StoreError
from server_stub.store.sqlite import SqliteStore
from tests.collector_client import Client, copied, draft

JST = timezone(timedelta(hours=9))
NOW = int(datetime(2026, 11, 23, 15, 30, tzinfo=JST).timestamp() * 1000)


def at(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=JST).timestamp() * 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("now", NOW),
        ("-1h", NOW - 3_600_000),
        ("-90s", NOW - 90_000),
        ("-2w", NOW - 14 * 86_400_000),
        ("today", at(2026, 11, 23)),
        ("yesterday", at(2026, 11, 22)),
        ("2026-11-01", at(2026, 11, 1)),
        ("2026-11-01 09:15", at(2026, 11, 1, 9, 15)),
        ("2026-11-01T00:15:00Z", at(2026, 11, 1, 9, 15)),
        ("1795000000000", 1795000000000),
    ],
)
def test_times_are_read_as_journalctl_reads_them(text: str, ms: int) -> None:
    assert query.parse_time(text, NOW, JST) == ms


@pytest.mark.parametrize("text", ["soon", "-1y", "2026-13-01", "1", "-", "'; DROP TABLE events", "9999999999999999"])
def test_what_is_no_time_is_said(text: str) -> None:
    with pytest.raises(BadQuery, match="is no time"):
        query.parse_time(text, NOW, JST)


def test_severities_have_names_and_numbers() -> None:
    assert [query.parse_severity(text) for text in ("info", "LOW", "3", "high", "5", "informational")] == [1, 2, 3, 4, 5, 1]
    for wrong in ("", "0", "6", "urgent"):
        with pytest.raises(BadQuery):
            query.parse_severity(wrong)


@pytest.fixture(scope="module", autouse=True, params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    global STORE
    if request.param == "sqlite":
        STORE = SqliteStore(tmp_path_factory.mktemp("store") / "collector.db")
    else:
        url = request.getfixturevalue("postgres_node").database()
        from server_stub.store.postgres import PostgresStore

        STORE = PostgresStore(url)
    agent = Client(0, "ws-1")
    made = [
        draft(agent=agent.id, at=1000, **copied("2014-06.csv", user="sato")),
        draft(agent=agent.id, at=2000, **copied("100%_done.csv", user="ito")),
        draft("medium.attached", agent=agent.id, at=3000, medium=copied("")["medium"]),
        draft("agent.tampered", agent=agent.id, at=4000),
        draft(agent=agent.id, at=5000, **copied('顧客 \\ "リスト".csv', user="sato", bytes=7)),
    ]
    session = STORE.session()
    session.begin()
    session.add(1, [row_of(agent.append(each), agent.id, agent.hashes[-1]) for each in made], 0)
    session.grown(tree.Frontier())
    session.commit()
    yield STORE
    STORE.close()


STORE: Store


def found(**given: str) -> list[int]:
    wanted = query.parse(given, NOW, JST)
    sql, values = query.sql(wanted, after=None, descending=False, limit=100, dialect=STORE.dialect)
    rows = [row[0] for row in STORE.rows(sql, values)]
    tail_sql, tail_values = query.tail(wanted, after=0, upto=100, limit=100, dialect=STORE.dialect)
    assert [row[0] for row in STORE.rows(tail_sql, tail_values)] == rows
    return rows


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"user": "sato"}, [1, 5]),
        ({"user": "sat"}, []),
        ({"agent": "ws-1"}, [1, 2, 3, 4, 5]),
        ({"agent": "ws-2"}, []),
        ({"event": "file.copied_out"}, [1, 2, 5]),
        ({"event": "medium.*,agent.tampered"}, [3, 4]),
        ({"event": "copy.%"}, []),
        ({"way": "mount"}, [1, 2, 5]),
        ({"way": "mtp"}, []),
        ({"severity": "critical"}, [4]),
        ({"medium": "60A44C"}, [1, 2, 3, 5]),
        ({"medium": "usb:0951"}, [1, 2, 3, 5]),
        ({"medium": "_"}, []),
        ({"since": "1970-01-01T00:00:02Z", "until": "1970-01-01T00:00:04Z"}, [2, 3]),
        ({"q": "2014-06"}, [1]),
        ({"q": "kingston"}, [1, 2, 3, 5]),
        ({"q": "KINGSTON"}, []),
        ({"q": "%"}, [2]),
        ({"q": "_done"}, [2]),
        ({"q": "顧客"}, [5]),
        ({"q": '"リスト"'}, [5]),
        ({"q": "顧客 \\ "}, [5]),
        ({"user": "sato", "q": "2014"}, [1]),
    ],
)
def test_filters_find_what_they_say(given: dict[str, str], positions: list[int]) -> None:
    assert found(**given) == positions


@given(
    st.dictionaries(
        st.sampled_from(["agent", "user", "medium", "way", "event", "q"]),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    )
)
@settings(max_examples=300, deadline=None)
def test_no_text_ever_becomes_sql(texts: dict[str, str]) -> None:
    try:
        wanted = query.parse(texts, NOW, JST)
    except BadQuery:
        return
    sql, values = query.sql(wanted, after=None, descending=False, limit=5, dialect=STORE.dialect)
    like = Filter(**dict.fromkeys(texts, "x"))
    other, _ = query.sql(like, after=None, descending=False, limit=5, dialect=STORE.dialect)
    if "event" not in texts and "q" not in texts:
        assert sql == other, "the SQL depends on which filters are given, not on what they say"
    assert sql.count("?") == len(values)
    STORE.rows(sql, values)
    assert STORE.rows("SELECT count(*) FROM events") == [(5,)]


@pytest.mark.parametrize("nasty", ["' OR '1'='1", '"; DROP TABLE events; --', "\\", "%' --", "?", "x' UNION SELECT 1,2 --"])
def test_the_usual_injections_find_nothing(nasty: str) -> None:
    for name in ("agent", "user", "medium", "way"):
        assert found(**{name: nasty}) == []
    assert STORE.rows(*query.sql(Filter(event=nasty), after=None, descending=False, limit=5, dialect=STORE.dialect)) == []
    with pytest.raises(BadQuery, match="no event code"):
        query.parse({"event": nasty}, NOW, JST)


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Filter(user="sato"), "events_user"),
        (Filter(medium="usb:"), "events_medium"),
        (Filter(severity=4), "events_grave"),
        (Filter(since=1, until=2), None),
    ],
)
def test_every_index_has_a_question_that_uses_it(wanted: Filter, index: str | None) -> None:
    if STORE.shared:
        pytest.skip("PostgreSQL plans by what is in the tables: five rows need no index")
    sql, values = query.sql(wanted, after=None, descending=True, limit=100)
    plan = " ".join(row[3] for row in STORE.rows("EXPLAIN QUERY PLAN " + sql, values))
    print(plan)
    assert index is None or index in plan
    by_uid = " ".join(row[3] for row in STORE.rows("EXPLAIN QUERY PLAN " + query.by_uid("x")[0], ["x"]))
    assert "events_uid" in by_uid


def test_a_store_of_a_newer_collector_is_refused_with_what_to_do(tmp_path: Path) -> None:
    made = SqliteStore(tmp_path / "collector.db")
    made.rows("PRAGMA user_version = 99")
    made.close()
    with pytest.raises(StoreError, match=r"collector.db: made by a newer version .*layout 99.*; update this one"):
        SqliteStore(tmp_path / "collector.db")


def test_counts_add_up_by_field() -> None:
    sql, values = query.counts(Filter(event="file.copied_out"), "user", STORE.dialect)
    assert STORE.rows(sql, values) == [("sato", 2, 4_200_007), ("ito", 1, 4_200_000)]
    for field in query.FIELDS:
        assert STORE.rows(*query.counts(Filter(), field, STORE.dialect))
    with pytest.raises(BadQuery, match="the fields are"):
        query.counts(Filter(), "raw; DROP TABLE events")


def test_numbers_are_checked() -> None:
    assert query.parse_number("", "limit", 7, 1, 10) == query.parse_number(None, "limit", 7, 1, 10) == 7
    for wrong in ("0", "11", "x", "-1", "1e3", "9" * 30, "１"):
        with pytest.raises(BadQuery):
            query.parse_number(wrong, "limit", 7, 1, 10)


def test_utc_and_local_days_differ() -> None:
    assert query.parse_time("today", NOW, JST) != query.parse_time("today", NOW, UTC)
    assert msgspec.json.encode(query.parse({"since": "today"}, NOW, JST))
