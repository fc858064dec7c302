"""Opens that are refused while they are held, by the real kernel: who may, who may not, and what if the answerer dies."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core import facts
from agent.sense import kernel
from agent.sense.holder import Holder
from agent.sense.refusing import Refusing, Rule
from tests.kernel_lab import EXT4, ROOT, medium, until

pytestmark = [ROOT, EXT4]
Make = Callable[[bool], Holder]


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Path]:
    with medium(tmp_path) as mount:
        (mount / "there.txt").write_text("old")
        yield mount


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Holder] = []

    def start(closed: bool) -> Holder:
        holder = Holder.trial()
        made.append(holder)
        holder.may_refuse(Refusing(closed))
        return holder

    yield start
    for holder in made:
        holder.close()


def shell(command: str, timeout: float = 20.0) -> tuple[int, str]:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout, check=False)
    return done.returncode, done.stderr


def refused(holder: Holder) -> list[facts.Refused]:
    told = until(lambda: holder.drain(1), lambda told: any(isinstance(each, facts.Refused) for each in told))
    return [each for each in told if isinstance(each, facts.Refused)]


def test_what_may_only_be_read_is_read_and_not_written(stick: Path, make: Make) -> None:
    holder = make(False)
    assert holder.refuse({os.fsencode(stick): Rule("writes", False)}) == {}
    assert shell(f"cat {stick}/there.txt && ls {stick}")[0] == 0
    for attempt in ("echo x > {0}/new", "echo x >> {0}/there.txt", "cp /etc/passwd {0}/copy"):
        code, said = shell(attempt.format(stick))
        assert code != 0 and "Operation not permitted" in said, attempt
    assert (stick / "there.txt").read_text() == "old"
    told = refused(holder)
    assert {each.path for each in told} >= {f"{stick}/new", f"{stick}/copy"}
    assert not any(each.source for each in told)
    holder.refuse({})
    assert shell(f"echo new > {stick}/there.txt")[0] == 0


def test_openat2_is_told_from_its_own_struct(stick: Path, make: Make) -> None:
    script = (
        "import ctypes, os, struct, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def openat2(flags):\n"
        "    how = struct.pack('=QQQ', flags, 0, 0)\n"
        "    fd = libc.syscall(437, -100, sys.argv[1].encode(), how, 24)\n"
        "    return 0 if fd >= 0 else ctypes.get_errno()\n"
        "print(openat2(os.O_RDONLY), openat2(os.O_RDWR))\n"
    )
    holder = make(False)
    holder.refuse({os.fsencode(stick): Rule("writes", False)})
    done = subprocess.run([sys.executable, "-c", script, f"{stick}/there.txt"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", str(errno.EPERM)]


def test_a_refused_medium_opens_nothing_but_for_the_agent_itself(stick: Path, make: Make) -> None:
    holder = make(False)
    holder.refuse({os.fsencode(stick): Rule("all", False)})
    assert "Operation not permitted" in shell(f"cat {stick}/there.txt")[1]
    assert "Operation not permitted" in shell(f"ls {stick}")[1]
    assert (stick / "there.txt").read_text() == "old"


def test_directories_of_a_folder_are_refused_and_its_neighbours_are_not(tmp_path: Path, make: Make) -> None:
    folder, beside = tmp_path / "stick", tmp_path / "beside"
    (folder / "inner").mkdir(parents=True)
    beside.mkdir()
    holder = make(False)
    for each in (folder, folder / "inner", beside):
        holder.hold_folder(os.fsencode(each), False)
    holder.refuse({os.fsencode(folder): Rule("writes", True)})
    assert "Operation not permitted" in shell(f"echo x > {folder}/a")[1]
    assert "Operation not permitted" in shell(f"echo x > {folder}/inner/a")[1]
    assert shell(f"echo x > {beside}/a")[0] == 0


@pytest.mark.parametrize(
    ("command", "goes"),
    [
        ("cp {root}/a.csv {stick}/a.csv", False),
        ("cat {root}/a.csv > {stick}/a.csv", False),
        ("tar cf - -C {root} . | gzip > {stick}/a.tgz", False),
        ("gzip -c < {root}/a.csv | cat > {stick}/a.gz", False),
        ("dd if={root}/a.csv of={stick}/a.csv", False),
        ("cp {other}/b.csv {stick}/b.csv", True),
        ("cp /etc/passwd {stick}/passwd", True),
        ("cat {stick}/there.txt {root}/a.csv", True),
    ],
)
def test_who_read_an_excluded_directory_writes_nothing_there(
    stick: Path, tmp_path: Path, make: Make, command: str, goes: bool
) -> None:
    root, other = tmp_path / "customers", tmp_path / "drawings"
    for folder, name in ((root, "a.csv"), (other, "b.csv")):
        folder.mkdir()
        (folder / name).write_text(os.urandom(20_000).hex())
    holder = make(False)
    holder.lay_tripwire(-1)
    holder.tripwire("mark", [os.fsencode(root), os.fsencode(other)])
    holder.refuse({os.fsencode(stick): Rule("tainted", False, (os.fsencode(root) + b"/",))})
    code, said = shell("set -o pipefail; " + command.format(root=root, other=other, stick=stick))
    written = [each for each in stick.iterdir() if each.name != "there.txt" and each.is_file() and each.stat().st_size > 5_000]
    if goes:
        assert code == 0, said
    else:
        assert "Operation not permitted" in said or "not permitted" in said
        assert not written


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_an_answerer_that_dies_or_stands_still_keeps_nobody_waiting(
    stick: Path, make: Make, number: signal.Signals, closed: bool
) -> None:
    holder = make(closed)
    holder.refuse({os.fsencode(stick): Rule("writes", False)})
    assert shell(f"echo x > {stick}/new")[0] != 0
    began = time.monotonic()
    before = holder.refusers
    os.kill(before[0], number)
    code, _ = shell(f"echo x > {stick}/new2", 10.0)  # nobody calls `check` meanwhile: the agent may be busy
    took = time.monotonic() - began
    assert took < 5.0
    assert (code != 0) is closed
    holder.check(1)
    deadline = time.monotonic() + 10
    while before[0] in holder.refusers or shell(f"echo x > {stick}/new3")[0] == 0:
        assert time.monotonic() < deadline, "it never refuses again"
        holder.check(1)
    assert shell(f"cat {stick}/there.txt")[0] == 0


def test_the_agent_that_goes_away_leaves_nobody_waiting(stick: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from agent.sense.holder import Holder\n"
        "from agent.sense.refusing import Refusing, Rule\n"
        "holder = Holder.trial()\n"
        "holder.may_refuse(Refusing(True))\n"
        "holder.refuse({sys.argv[1].encode(): Rule('all', False)})\n"
        "print(holder.refusers[0], flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", script, str(stick)], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    try:
        assert int(agent.stdout.readline()) > 0
        assert shell(f"cat {stick}/there.txt")[0] != 0
        os.kill(agent.pid, signal.SIGSTOP)  # a stopped agent changes nothing: the small process answers
        assert shell(f"cat {stick}/there.txt")[0] != 0
    finally:
        agent.kill()
        agent.wait()
        agent.stdout.close()
    deadline = time.monotonic() + 5
    while shell(f"cat {stick}/there.txt")[0] != 0:
        assert time.monotonic() < deadline, "the kernel does not let go"


@pytest.mark.parametrize("kind", ["a file system", "a folder"])
def test_whoever_is_killed_while_many_open_files_nobody_waits_for_ever(
    stick: Path, tmp_path: Path, make: Make, kind: str
) -> None:
    """Held by one process and judged by another at once, beside an armed tripwire: the kernel counts who waits for one group on
    the marks of others on the same file, and closing those waits for that count."""
    holder = make(True)
    root, medium_, systems = tmp_path / "protected", stick, os.fsencode(tmp_path)
    root.mkdir()
    (root / "a.csv").write_text("secret")
    writes = kernel.fanotify_init(kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_FID)
    holder.lay_tripwire(writes)
    holder.tripwire("mark", [os.fsencode(root)])
    holder.tripwire("systems", [systems])
    holder.tripwire("set")
    if kind == "a folder":
        medium_ = tmp_path / "folder"
        medium_.mkdir()
        (medium_ / "there.txt").write_text("old")
        holder.hold_folder(os.fsencode(medium_), False)
        holder.flush()
    else:
        holder.watch(str(medium_))
    holder.refuse({os.fsencode(medium_): Rule("writes", kind == "a folder")})
    here = f"for n in 1 2 3 4 5 6 7 8; do cat {medium_}/there.txt {root}/a.csv; echo x > {medium_}/n$n; done"
    openers = [
        subprocess.Popen(["bash", "-c", f"while :; do {here}; done >/dev/null 2>&1"], process_group=0) for _ in range(10)
    ]
    try:
        for turn in range(40):
            victims = [holder.pid, *holder.refusers]
            for pid in victims if turn % 4 == 3 else [victims[turn % len(victims)]]:
                os.kill(pid, signal.SIGKILL)
            assert shell(f"cat {medium_}/there.txt", 10) == (0, ""), "who only reads is never refused, nor waits for ever"
            holder.check(1)
            holder.tripwire("set")
            holder._starts.clear()  # this is no crash loop
    finally:
        for opener in openers:
            os.killpg(opener.pid, signal.SIGKILL)
            opener.wait(10)
        os.close(writes)
