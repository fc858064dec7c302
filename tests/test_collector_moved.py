"""A site that moves from SQLite to PostgreSQL, and one in PostgreSQL that is put back from a backup: the log stays that log."""

import base64
import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from agent.contract import chain, wire
from agent.pytest_plugin import _environment
from server_stub.migrate import WHOLE
from server_stub.store.postgres import PostgresStore
from server_stub.store.sqlite import SqliteStore
from tests import postgres, second_verifier
from tests.collector_client import Client
from tests.house import Collector
from tests.test_collector_many import Load, Site, check_log, enrolled

if lacking := postgres.missing():
    pytest.skip(lacking, allow_module_level=True)


@pytest.fixture(autouse=True)
def client_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """pg_dump of the version that the tests run."""
    monkeypatch.setenv("PATH", f"{postgres.PLACES[0]}:{os.environ['PATH']}")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    made.stop()


def call(*args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "server_stub.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def reconfigured(house: Collector, database: str) -> None:
    with house.config_file.open("a") as file:
        file.write(f'database = "{database}"\n')
    house.database = database


def test_a_site_moves_while_its_agents_go_on(house: Collector, postgres_node: postgres.Node, tmp_path: Path) -> None:
    agents, key = enrolled(house.port, 4)
    house.run("media", "approve", "usb:1", "--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never")
    first = Client(house.port, "ws-first")
    first.enrol()
    first.append_some(300)
    status, receipt = first.send(1, 250)
    assert status == 200
    note = tmp_path / "note"
    note.write_text(house.run("witness", "show"))
    whole = tmp_path / "before.zip"
    house.run("export", "-o", str(whole))
    load = Load(agents, key)
    load.more(300)
    database, chance = postgres_node.database(), random.Random(5)
    command = [sys.executable, "-m", "server_stub.cli", "migrate", "--to", database, "-c", str(house.config_file)]
    for _ in range(6):
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=_environment())
        load.more(40)
        time.sleep(chance.random() * 0.4)
        running.kill()
        running.wait()
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    load.more(100)
    assert running.poll() is None, "it waits for the collector to be stopped"
    half = Collector(_made(tmp_path / "half"), database)
    code, said = call("tail", "-c", str(half.config_file))
    assert code == 1 and ("half filled" in said or "alone with it" in said)
    house.stop()
    assert running.wait(60) == 0
    told = running.communicate()[1]
    assert "the tree over them is the one it was" in told
    code, said = call("serve", "-c", str(house.config_file))
    assert code == 1 and "was moved to postgresql://" in said, "no second log grows under the same key"
    reconfigured(house, database)
    house.start()
    load.more(100)
    load.stop()
    site = Site(tmp_path, database, 0)
    load.held_by(site)
    check_log(site)
    assert first.send(1, 250) == (200, receipt), "an old receipt is the receipt still"
    got = wire.Receipt(**receipt)
    chain.check(chain.receipt_bytes(got), got.sig, base64.b64decode(first.enrol()[1]["key"]))
    assert first.send(251)[0] == 200
    path = tmp_path / "after.zip"
    house.run("export", "-o", str(path))
    code, said = call("verify", str(path), "--checkpoint", str(note))
    assert code == 0, said
    assert second_verifier.verify(str(path)) == ("whole", None)
    assert call("verify", str(whole))[0] == 0
    assert [each["key"] for each in json.loads("[" + ",".join(house.run("media", "list", "--json").splitlines()) + "]")] == [
        "usb:1"
    ]


def _made(place: Path) -> Path:
    place.mkdir()
    return place


def test_a_store_that_was_altered_is_not_moved(house: Collector, postgres_node: postgres.Node) -> None:
    agent = Client(house.port)
    agent.enrol()
    agent.append_some(300)
    assert agent.send()[0] == 200
    house.stop()
    with house.store() as store:
        (raw,) = store.execute("SELECT raw FROM events WHERE pos = 9").fetchone()
        store.execute("UPDATE events SET raw = ? WHERE pos = 9", (raw.replace(b"sato", b"mori"),))
    code, said = call("migrate", "--to", postgres_node.database(), "-c", str(house.config_file))
    assert code == 1 and "altered" in said
    house.start()


def test_a_database_that_holds_another_log_is_refused(house: Collector, postgres_node: postgres.Node, tmp_path: Path) -> None:
    other = Collector(_made(tmp_path / "other"), postgres_node.database())
    other.start()
    other.stop()
    code, said = call("migrate", "--to", other.database, "-c", str(house.config_file))
    assert code == 1 and "holds another log" in said


def test_a_backup_of_postgresql_made_under_load_restores_to_a_whole_log(tmp_path: Path, postgres_node: postgres.Node) -> None:
    house = Collector(tmp_path, postgres_node.database())
    house.start()
    try:
        agents, key = enrolled(house.port, 3)
        load = Load(agents, key)
        load.more(200)
        copy = tmp_path / "copy.dump"
        house.run("backup", str(copy))
        assert oct(copy.stat().st_mode & 0o777) == "0o600"
        load.more(100)
        load.stop()
        code, said = call("restore", str(copy), "-c", str(house.config_file))
        assert code == 1 and "stop them first" in said
        house.stop()
        house.run("restore", str(copy))
        house.start()
        for agent in agents:
            status, answer = agent.send(len(agent.lines) + 1, len(agent.lines))
            if status == 409:
                assert answer["reason"] == "hole"
                assert agent.send(answer["expected"])[0] == 200
        site = Site(tmp_path, house.database, 0)
        load.held_by(site)
        check_log(site)
        path = tmp_path / "b.zip"
        house.run("export", "-o", str(path))
        assert call("verify", str(path))[0] == 0
        assert [
            name
            for (name,) in site.rows(
                "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'before_restore_%%'",
            )
        ]
    finally:
        house.stop()


def test_whole_months_go_as_files_and_keep_their_proofs(tmp_path: Path, postgres_node: postgres.Node) -> None:
    house = Collector(tmp_path, postgres_node.database())
    house.start()
    try:
        agent = Client(house.port)
        agent.enrol()
        agent.append_some(400)
        assert agent.send()[0] == 200
        note = tmp_path / "note"
        note.write_text(house.run("witness", "show"))
        house.stop()
        house.aged(1_700_000_000_000, "pos <= 200")  # 2023-11
        house.aged(1_703_000_000_000, "pos > 200 AND pos <= 350")  # 2023-12
        house.start()
        with psycopg.connect(house.database) as db:
            before = db.execute("SELECT pg_relation_filenode('events_2023_11'), count(*) FROM events_2023_11").fetchall()[0]
        assert before[1] == 200
        assert "350" in house.run("retain", "--older-than", "100d")
        with psycopg.connect(house.database) as db:
            sql = "SELECT pg_relation_filenode('events_2023_11'), count(*), count(code) FROM events_2023_11"
            after = db.execute(sql).fetchall()[0]
            assert after[0] != before[0] and after[1:] == (200, 0), "the month's file is another, and holds digests alone"
            assert db.execute("SELECT count(*) FROM erased").fetchall() == [(350,)]
        assert len(house.events(event="file.*")) == 50
        path = tmp_path / "b.zip"
        house.run("export", "-o", str(path))
        code, said = call("verify", str(path), "--checkpoint", str(note))
        assert code == 0, said
        with psycopg.connect(house.database) as db:
            months = {
                name for (name,) in db.execute("SELECT relname FROM pg_class WHERE relname LIKE 'events_20%%'").fetchall()
            }
        now = time.gmtime()
        ahead = f"events_{now.tm_year + now.tm_mon // 12}_{now.tm_mon % 12 + 1:02}"
        assert ahead in months, "next month's partition is there already"
    finally:
        house.stop()


def test_both_stores_have_the_same_tables_and_all_are_moved(tmp_path: Path, postgres_node: postgres.Node) -> None:
    SqliteStore(tmp_path / "collector.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "collector.db")) as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        ours = {name: {row[1] for row in file.execute(f"PRAGMA table_info({name})")} for name in tables}
    url = postgres_node.database()
    PostgresStore(url).close()
    with psycopg.connect(url) as db:
        sql = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
        theirs: dict[str, set[str]] = {}
        for table, column in db.execute(sql).fetchall():
            theirs.setdefault(table, set()).add(column)
    for table, columns in ours.items():
        assert columns <= theirs[table], table
    moved = {"events", "heads", "nodes", *WHOLE}
    assert moved == set(ours), "a table that migrate forgets"
    for table, listed in WHOLE.items():
        assert {column.strip() for column in listed.split(",")} == ours[table]
