"""docs/attacks.md, attack by attack: what an attacker does to a real collector's files, and who finds it out by what.

The attacker has the collector's disk (and here root), not its machines. Names of tests are the page's anchors.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from agent.contract import chain, wire
from agent.pytest_plugin import _environment
from server_stub import tree
from tests import bundles, second_verifier
from tests.collector_client import Client, copied, draft
from tests.house import Collector, Table

PAGE = Path(__file__).parent.parent / "docs" / "attacks.md"


class Site:
    """A collector with two machines, a key copied to paper, and a witness's file that was written before the attack."""

    def __init__(self, root: Path) -> None:
        self.root, self.house, self.count = root, Collector(root), 0
        self.worm = root / "worm.txt"
        with self.house.config_file.open("a") as file:
            file.write(f'witness_every = "1h"\n[[collector.witness]]\nfile = "{self.worm}"\n')
        self.house.start()
        self.one, self.two = Client(self.house.port, "ws-1"), Client(self.house.port, "ws-2")
        for agent in (self.one, self.two):
            agent.enrol()
            for _ in range(3):
                agent.append_some(4)
                assert agent.send(len(agent.lines) - 3)[0] == 200
        self.key = root / "paper-key"
        self.key.write_text(self.house.run("key", "show"))
        self.house.run("witness", "send")

    def call(self, *args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "server_stub.cli", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment() | {"LANG": "C.UTF-8"}, timeout=60)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    def exported(self, *filters: str) -> Path:
        self.count += 1
        path = self.root / f"bundle-{self.count}.zip"
        self.house.run("export", "-o", str(path), *filters)
        return path

    def verdict(self, path: Path, *more: str) -> dict[str, Any]:
        code, text = self.call("verify", str(path), "--key", str(self.key), "-o", "json", *more)
        told = json.loads(text)
        assert code == (0 if told["whole"] else 1)
        return told

    def tamper(self, work: Callable[[Table], Any]) -> None:
        """With the collector stopped: the attacker edits its store."""
        self.house.stop()
        with self.house.store() as store:
            work(store)
        self.house.start()

    def tip(self, db: Table) -> None:
        """As cunning as it gets: what PostgreSQL's store says of the log's end is made to fit what is left of it."""
        if self.house.database == "sqlite":
            return
        edge = tree.Frontier()
        for (raw,) in db.execute("SELECT raw FROM events ORDER BY pos").fetchall():
            edge.add(tree.leaf_hash(raw))
        db.execute("UPDATE tip SET size = ?, roots = ?", (edge.size, b"".join(edge.roots)))


@pytest.fixture
def site(tmp_path: Path, store_kind: str) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.house.stop()


def pos_of(db: Table, agent: str, seq: int) -> int:
    return int(
        db.execute("SELECT pos FROM events JOIN chains ON id = chain WHERE agent = ? AND seq = ?", (agent, seq)).fetchone()[0]
    )


def names(told: dict[str, Any], kind: str, agent: str, seq: int) -> bool:
    bad = told["bad"]
    return not told["whole"] and (bad["kind"], bad["agent"], bad["seq"]) == (kind, agent, seq)


def test_an_honest_site_is_whole(site: Site) -> None:
    path = site.exported()
    told = site.verdict(path, "--checkpoint", str(site.worm))
    assert told["whole"] and told["key"] == "given" and told["compared"]
    assert second_verifier.verify(str(path))[0] == "whole"


def test_edit_a_row(site: Site) -> None:
    def edit(db: Table) -> None:
        raw = db.execute("SELECT raw FROM events WHERE pos = ?", (pos_of(db, site.two.id, 6),)).fetchone()[0]
        db.execute("UPDATE events SET raw = ? WHERE pos = ?", (raw.replace(b"sato", b"mori"), pos_of(db, site.two.id, 6)))

    site.tamper(edit)
    path = site.exported()
    assert names(site.verdict(path), "altered", site.two.id, 6)
    assert second_verifier.verify(str(path)) == ("altered", (site.two.id, 1, 6))
    code, said = site.call("witness", "send", "-c", str(site.house.config_file))
    assert code == 1 and "rewritten" in said


def test_delete_a_row(site: Site) -> None:
    with pytest.raises(AssertionError, match="hashes of the tree are missing"):
        site.tamper(lambda db: db.execute("DELETE FROM events WHERE pos = ?", (pos_of(db, site.one.id, 2),)))


def test_delete_a_row_and_close_the_ranks(site: Site) -> None:
    """Cunning: positions are moved up, so that nothing is missing by number."""

    def close(db: Table) -> None:
        gone = pos_of(db, site.one.id, 2)
        db.execute("DELETE FROM events WHERE pos = ?", (gone,))
        for table in ("events", "heads"):
            for (pos,) in db.execute(f"SELECT pos FROM {table} WHERE pos > ? ORDER BY pos", (gone,)).fetchall():
                db.execute(f"UPDATE {table} SET pos = pos - 1 WHERE pos = ?", (pos,))
        site.tip(db)

    site.tamper(close)
    path = site.exported()
    assert names(site.verdict(path), "removed", site.one.id, 2)


def test_drop_a_tail(site: Site) -> None:
    def drop(db: Table) -> None:
        size = pos_of(db, site.two.id, 8)
        db.execute("DELETE FROM events WHERE pos > ?", (size,))
        db.execute("DELETE FROM heads WHERE pos > ?", (size,))
        known = db.execute("SELECT hash FROM events WHERE pos = ?", (size,)).fetchone()[0]
        db.execute("UPDATE chains SET last = 8, hash = ? WHERE agent = ?", (known, site.two.id))
        site.tip(db)

    site.tamper(drop)
    path = site.exported()
    assert site.verdict(path)["whole"], "a shorter log is whole in itself: nothing in it can tell"
    told = site.verdict(path, "--checkpoint", str(site.worm))
    assert told["bad"]["kind"] in ("removed", "tree")
    code, said = site.call("witness", "send", "-c", str(site.house.config_file))
    assert code == 1 and ("was cut" in said or "rewritten" in said)
    # And the machine finds it out by itself: the collector lacks what it signed a receipt for. It is sent again.
    status, problem = site.two.send(13, 12)
    assert (status, problem["reason"], problem["expected"]) == (409, "hole", 9)
    assert site.two.send(9)[0] == 200


@pytest.mark.sqlite
def test_restore_an_old_database_backup(site: Site) -> None:
    old = site.root / "old.db"
    site.house.run("backup", str(old))
    site.one.append_some(3)
    assert site.one.send(13)[0] == 200
    site.house.run("witness", "send")
    site.house.stop()
    for path in site.house.state_dir.glob("collector.db*"):
        path.unlink()
    shutil.copy(old, site.house.state_dir / "collector.db")
    site.house.start()
    code, said = site.call("witness", "send", "-c", str(site.house.config_file))
    assert code == 1 and ("was cut" in said or "rewritten" in said)
    assert site.one.send(16, 15)[1]["expected"] == 13, "the machine is asked again for what it has a receipt for"
    assert site.one.send(13)[0] == 200


def test_fork_an_agent(site: Site) -> None:
    clone = Client(site.house.port, "ws-1", key=site.one.key)
    clone.lines, clone.hashes = [*site.one.lines[:8]], [*site.one.hashes[:9]]
    clone.append_some(6)
    status, problem = clone.send(9)
    assert (status, problem["reason"]) == (409, "fork")
    assert site.verdict(site.exported())["whole"], "the first history stands"


def test_replay_a_batch(site: Site) -> None:
    before = len(site.house.events(event="file.*"))
    again = site.one.batch(5, 8)
    assert site.one.post(again)[0] == site.one.post(again)[0] == 200
    assert len(site.house.events(event="file.*")) == before


def test_swap_two_agents_events(site: Site) -> None:
    def swap(db: Table) -> None:
        here, there = pos_of(db, site.one.id, 5), pos_of(db, site.two.id, 5)
        rows = {pos: db.execute("SELECT raw, hash FROM events WHERE pos = ?", (pos,)).fetchone() for pos in (here, there)}
        for pos, other in ((here, there), (there, here)):
            db.execute("UPDATE events SET raw = ?, hash = ? WHERE pos = ?", (*rows[other], pos))

    site.tamper(swap)
    path = site.exported()
    assert names(site.verdict(path), "reordered", site.one.id, 5)
    assert second_verifier.verify(str(path)) == ("reordered", (site.one.id, 1, 5))


def test_roll_back_the_register(site: Site) -> None:
    """The register that agents hold has a version; one that is older is not taken (tests/test_sender.py), and the log tells."""
    approve = ("media", "approve", "usb:1", "--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never")
    site.house.run(*approve)
    with site.house.store() as store:
        before = store.execute("SELECT value FROM meta WHERE name = 'register'").fetchone()[0]
    site.house.run("media", "revoke", "usb:1", "--reason", "lost")
    version = int(before.partition("\n")[0])

    def back(db: Table) -> None:
        db.execute("UPDATE meta SET value = ? WHERE name = 'register'", (before,))
        db.execute("UPDATE approvals SET entry = replace(entry, '\"revoked\":true', '\"revoked\":false')")

    site.tamper(back)
    target = f"/v1/register?after={version}"
    events = site.house.events(event="register.changed")
    told = [event["unmapped"]["sekisho"]["detail"] for event in events]
    assert [each["entry"].get("revoked", False) for each in told] == [False, True]
    assert told[-1]["version"] > version, "the log says that a newer register was in force"
    assert (
        site.one.ask(
            "GET",
            target.replace(str(version), str(version - 1)),
            None,
            site.one.signed(target.replace(str(version), str(version - 1))),
        )[0]
        == 200
    )
    site.house.run("media", "revoke", "usb:1", "--reason", "still lost")
    newest = site.house.events(event="register.changed")[-1]["unmapped"]["sekisho"]["detail"]["version"]
    assert newest > told[-1]["version"], "the next change is newer than any register that was given out"


def test_turn_the_clock(site: Site) -> None:
    """A machine's clock set back by days, and nothing said of it: by somebody who has its key."""
    late = Client(site.house.port, "ws-3")
    late.enrol()
    for at in (1_760_000_000_000, 1_760_000_001_000, 1_759_000_000_000):
        late.append(draft(agent=late.id, at=at, **copied("a.csv")))
    assert late.send()[0] == 200
    assert names(site.verdict(site.exported("--agent", "ws-3")), "back-dated", late.id, 3)


def test_steal_an_agents_key(site: Site) -> None:
    """Limited: what was accepted stays; not limited: from now on the thief can speak for the machine, until it is noticed."""
    thief = Client(site.house.port, "ws-1", key=site.one.key)
    thief.append_some(12)
    assert thief.send()[1]["reason"] == "fork", "the past can't be told again"
    thief.lines, thief.hashes = [*site.one.lines], [*site.one.hashes]
    thief.append_some(1)
    assert thief.send(13)[0] == 200, "the future can"
    site.one.append_some(1)
    assert site.one.send(13)[1]["reason"] == "fork", "and the machine itself finds it out at its next event"


def test_a_bundle_rebuilt_with_the_attackers_own_keys(site: Site, tmp_path: Path) -> None:
    room = tmp_path / "forged"
    room.mkdir()
    keys = [SigningKey(bytes([n]) * 32) for n in (7, 8, 9)]
    log = bundles.small_log(room, *keys)
    path = tmp_path / "forged.zip"
    path.write_bytes(log.bundle())
    log.close()
    code, said = site.call("verify", str(path), "--lang", "en")
    assert code == 0 and "taken from the bundle itself" in said, "consistent, and said to prove no more"
    told = site.verdict(path)
    assert told["bad"]["kind"] == "forged"
    # With the real key put beside theirs it is no better: no rotation joins the two.
    parts = bundles.members(path.read_bytes())
    held = json.loads(parts["keys.json"])
    real = site.house.get("/v1/log/keys")["keys"][0]
    for order in ([real, *held["collector"]], [*held["collector"], real]):
        path.write_bytes(bundles.packed(parts | {"keys.json": json.dumps(held | {"collector": order}).encode()}))
        assert site.verdict(path)["bad"]["kind"] == "forged"


def test_versions_apart(site: Site) -> None:
    """Wire types grow by fields with defaults: what one side does not know yet is passed over by the other."""
    newer = Client(site.house.port, "ws-9")
    body = {"token": "house-token", "name": "ws-9", "key": bundles.b64(newer.key), "of_a_later_version": {"x": 1}}
    status, told = newer.ask("POST", "/v1/enroll", json.dumps(body).encode())
    assert status == 200
    newer.append(draft(agent=newer.id, **copied("a.csv", detail={"of_a_later_version": 1})))
    head = json.loads(wire.batch_body(newer.head(1, 1), []).splitlines()[0]) | {"later": True}
    sent = b"\n".join((json.dumps(head).encode(), *newer.lines, b""))
    status, receipt = newer.post(sent, Content_Encoding="identity")
    assert status == 200
    old_fields = {name: receipt[name] for name in ("agent", "epoch", "last", "hash", "tree_size", "sig")}
    got = wire.Receipt(**old_fields)
    import base64

    chain.check(chain.receipt_bytes(got), got.sig, base64.b64decode(told["key"]))
    assert site.verdict(site.exported())["whole"]


def test_every_attack_of_the_page_has_its_test() -> None:
    """The page names the test that plays each attack; a golden image is tests/test_identity.py's."""
    text = PAGE.read_text("utf-8")
    named = set(re.findall(r"`(test_[a-z_]+)`", text))
    here = {name for name in globals() if name.startswith("test_")}
    elsewhere = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_[a-z_]+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert named <= elsewhere
    assert here - {"test_every_attack_of_the_page_has_its_test", "test_an_honest_site_is_whole"} <= named
