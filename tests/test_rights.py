"""Who may read a protected directory: we read modes and ACLs as the kernel does, and the agent notices a chmod."""

import grp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.pytest_plugin import Agent, Media
from agent.sense import readers
from tests.house import LOGIN_UID, as_person, can_set_loginuid, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of other users")

UIDS, GIDS = st.sampled_from([101, 102, 103]), st.sampled_from([201, 202, 203])
MAY = st.integers(0, 7)


def acl(user: int, group: int, other: int, mask: int, named: list[tuple[int, int, int]]) -> bytes:
    """An access ACL as the kernel takes it: version 2, entries sorted by tag and id (acl(5), acl_xattr)."""
    none = 0xFFFFFFFF
    entries = [(1, user, none), *((tag, may, number) for tag, number, may in sorted(named) if tag == 2), (4, group, none)]
    entries += [(tag, may, number) for tag, number, may in sorted(named) if tag == 8]
    entries += [(16, mask, none), (32, other, none)]
    return (2).to_bytes(4, "little") + b"".join(readers._ENTRY.pack(*entry) for entry in entries)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory that everybody gets to; pytest's own are for one user."""
    made = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="rights-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def opened_by(uid: int, groups: set[int], path: Path, flags: int) -> bool:
    """Whether the kernel lets them."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(sorted(groups))
            os.setgid(999)
            os.setuid(uid)
            os.close(os.open(path, flags))
            os._exit(0)
        except PermissionError:
            os._exit(1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code < 2
    return code == 0


named = st.lists(
    st.one_of(st.tuples(st.just(2), UIDS, MAY), st.tuples(st.just(8), GIDS, MAY)), max_size=4, unique_by=lambda each: each[:2]
)


@given(UIDS, GIDS, MAY, MAY, MAY, MAY, st.none() | named, UIDS, st.sets(GIDS))
@settings(max_examples=150, deadline=None)
def test_we_read_rights_as_the_kernel_does(
    shared: Path,
    owner: int,
    group: int,
    user_may: int,
    group_may: int,
    other_may: int,
    mask: int,
    more: list[tuple[int, int, int]] | None,
    uid: int,
    groups: set[int],
) -> None:
    path = shared / "file"
    path.unlink(missing_ok=True)
    path.touch()
    os.chown(path, owner, group)
    path.chmod(user_may << 6 | group_may << 3 | other_may)
    if more is not None:
        os.setxattr(path, readers._ACCESS, acl(user_may, group_may, other_may, mask, more))
    rights = readers._rights(str(path), path.stat())
    for wanted, flags in ((readers.READ, os.O_RDONLY), (readers.WRITE, os.O_WRONLY)):
        said = bool(readers.granted(rights, uid, frozenset(groups), wanted))
        assert said == opened_by(uid, groups, path, flags), rights


def grants(told: dict[str, Any]) -> dict[tuple[str, str], tuple[list[str], int]]:
    return {(who, may): (names, files) for who, may, names, _, files in told["grants"] if may != "all"}


@pytest.mark.skipif(not shutil.which("setfacl"), reason="needs setfacl (acl)")
def test_a_folder_that_shuts_people_out_shuts_them_out_of_all_below(shared: Path) -> None:
    inner = shared / "customers" / "2014"
    inner.mkdir(parents=True)
    (inner / "a.csv").write_text("a")
    (inner / "a.csv").chmod(0o664)
    assert grants(readers.look(str(shared / "customers")))[("everyone", "read")] == ([], 1)
    inner.chmod(0o750)
    os.chown(inner, 0, grp.getgrnam("games").gr_gid)
    told = grants(readers.look(str(shared / "customers")))
    assert ("everyone", "read") in told and "games" not in str(told), "the members of games read it as others do"
    (inner / "a.csv").chmod(0o660)
    assert ("everyone", "read") not in grants(readers.look(str(shared / "customers")))
    subprocess.run(["setfacl", "-m", "u:daemon:r", inner / "a.csv"], check=True)
    assert ("user:daemon", "read") not in grants(readers.look(str(shared / "customers"))), "he does not get through the folder"
    subprocess.run(["setfacl", "-m", "u:daemon:x", inner], check=True)
    assert grants(readers.look(str(shared / "customers")))[("user:daemon", "read")] == (["daemon"], 1)


def test_it_runs_alone_and_says_what_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-I", readers.__file__, str(tmp_path), str(tmp_path / "nowhere")]
    told = [json.loads(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.splitlines()]
    assert told[0]["files"] == 0 and told[1]["error"] == "No such file or directory"


@pytest.mark.skipif(not shutil.which("cvtsudoers"), reason="needs cvtsudoers (sudo)")
def test_who_becomes_root_reads_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = tmp_path / "sudoers"
    rules.write_text(
        "root ALL=(ALL:ALL) ALL\n%games ALL=(ALL) NOPASSWD: ALL\ndaemon ALL=(root) ALL\n"
        "mail ALL=(root) /usr/bin/apt\nUser_Alias OPS = news, man\nOPS ALL=(ALL) ALL\nbin ALL=(daemon) ALL\n"
    )
    real = subprocess.run

    def with_rules(command: list[str], **more: Any) -> Any:
        return real([str(rules) if word == "/etc/sudoers" else word for word in command], **more)

    monkeypatch.setattr(readers.subprocess, "run", with_rules)
    found = {each[0] for each in readers.sudoers(readers.People(set()))}
    assert found == {"sudo:%games", "sudo:daemon", "sudo:news", "sudo:man"}


def test_the_agent_tells_who_may_read_and_who_opened_it_to_everybody(
    tmp_path: Path, sekisho_media: Media, shared: Path
) -> None:
    agent = Agent(tmp_path, sekisho_media)
    agent.protected.chmod(0o750)
    (agent.protected / "a.csv").write_text("a")
    (agent.protected / "a.csv").chmod(0o640)
    for parent in [*agent.protected.parents]:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    agent.start()
    try:
        first = agent.wait_for("access.changed")
        assert ours(first)["detail"]["first"] is True
        as_person(f"chmod 755 '{agent.protected}'; chmod 644 '{agent.protected}/a.csv'")
        opened = until(
            lambda: next((each for each in agent.events("access.changed") if ours(each)["detail"].get("gained")), None),
            lambda: str(agent.events("access.changed")),
            within_s=60,
        )
        assert opened["severity_id"] == 4
        assert {"who": "everyone", "may": "read", "files": 1} in ours(opened)["detail"]["gained"]
        assert ours(opened)["process"]["exe"].endswith("/chmod")
        if can_set_loginuid():
            assert ours(opened)["login"]["uid"] == LOGIN_UID
    finally:
        agent.stop()


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found
