"""Who a pid is, while it lives and after; who opens files on a stick, held for a moment; what is mounted where."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.contract.event import path_text
from agent.core.facts import Fact, Lost, Mounted, Process, ProcGone, ProcSeen, Unmounted
from agent.sense import holder as holder_module
from agent.sense import passwd
from agent.sense.holder import Holder
from agent.sense.mounts import Mounts
from agent.sense.processes import Processes
from tests.kernel_lab import EXT4, ROOT, medium, run, until

pytestmark = ROOT
SATO = 1000


@pytest.fixture
def processes() -> Iterator[Processes]:
    table = Processes(0)
    yield table
    table.close()


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Path]:
    with medium(tmp_path) as mount:
        yield mount


@pytest.fixture
def holder() -> Iterator[Holder]:
    sensor = Holder()
    yield sensor
    sensor.close()


def _login(uid: int) -> None:
    Path("/proc/self/loginuid").write_text(str(uid))


def seen(facts: list[Fact]) -> list[Process]:
    return [fact.process for fact in facts if isinstance(fact, ProcSeen)]


def holding(holder: Holder, mount: Path) -> None:
    """Wait until opens on the stick are held."""
    holder.watch(str(mount))

    def asked() -> Iterator[Fact]:
        with open(mount / "probe", "w"):
            pass
        subprocess.run(["touch", mount / "probe"], check=True)
        holder.check(1)
        return holder.drain(1)

    until(asked, lambda facts: bool(seen(facts)))


def looked_at(processes: Processes, pid: int, argv: list[str]) -> Process:
    """Look, within one second by the sensor's clock, until the process is this program."""

    def look() -> Iterator[Fact]:
        yield from processes.drain(1)
        yield ProcSeen(at_ms=1, process=processes.look(pid, 1))

    def settled(facts: list[Fact]) -> bool:
        looks = seen(facts)
        return looks[-1].argv == argv and any(looks[-1] is before for before in looks[:-1])

    return seen(until(look, settled))[-1]


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_living_process_is_known_exactly(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "held"
    file.write_text("12345")
    with file.open() as held, subprocess.Popen(["sleep", "60"], stdin=held, preexec_fn=lambda: _login(SATO)) as child:
        found = looked_at(processes, child.pid, ["sleep", "60"])
        child.kill()
    assert (found.known, found.argv, found.ppid, found.uid, found.loginuid) == ("exact", ["sleep", "60"], os.getpid(), 0, SATO)
    assert Path(found.exe).name in ("sleep", "coreutils") and found.user == "root" and found.start > 0
    assert [(each.path, each.size) for each in found.files if each.path == path_text(os.fsencode(file))] == [(str(file), 5)]
    assert found.parents[0].pid == os.getpid() and found.parents[-1].pid in (0, 1)


def test_who_was_looked_at_is_remembered_after_the_end_and_the_end_is_told(processes: Processes) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        alive = looked_at(processes, child.pid, ["sleep", "60"])
        child.kill()
    assert processes.look(child.pid, 2) == alive
    gone = until(lambda: processes.drain(5000), lambda facts: bool(facts))
    assert [(fact.pid, fact.start) for fact in gone if isinstance(fact, ProcGone)] == [(child.pid, alive.start)]


def test_a_process_gone_before_anybody_looked_still_has_its_login_user_and_parent(processes: Processes) -> None:
    script = "/bin/true & echo $!; wait; echo done; read line"
    with subprocess.Popen(
        script, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: _login(SATO)
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        assert shell.stdout.readline() == "done\n"
        found = processes.look(pid, 1)
        shell.communicate("\n")
    assert (found.known, found.loginuid, found.ppid, found.uid) == ("cached", SATO, shell.pid, 0)
    assert found.exe == "" and found.argv == [], "it had execed: its parent's are not its own"


def test_nobody_is_made_up(processes: Processes) -> None:
    found = processes.look(4_194_303, 1)
    assert (found.known, found.loginuid, found.exe, found.parents) == ("unknown", None, "", [])


def test_an_exec_makes_what_was_known_stale(processes: Processes) -> None:
    with subprocess.Popen("read line; exec sleep 60", shell=True, stdin=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        looked_at(processes, child.pid, ["/bin/sh", "-c", "read line; exec sleep 60"])
        child.stdin.write("\n")
        child.stdin.flush()
        looked_at(processes, child.pid, ["sleep", "60"])
        child.kill()
    assert processes.look(child.pid, 2).known == "exact"


def test_a_program_that_became_another_unseen_is_not_called_exact(processes: Processes) -> None:
    with subprocess.Popen("read line; exec true", shell=True, stdin=subprocess.PIPE, text=True) as child:
        looked_at(processes, child.pid, ["/bin/sh", "-c", "read line; exec true"])
        child.communicate("\n")
    assert processes.look(child.pid, 2).known == "cached"


@EXT4
def test_of_500_short_lived_copies_none_is_without_its_login_user(
    processes: Processes, holder: Holder, stick: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("x" * 4096)
    holding(holder, stick)
    script = f"for i in $(seq 500); do cp {tmp_path}/a {stick}/$i & echo $!; wait; done"
    shell = subprocess.Popen(script, shell=True, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: _login(SATO))
    held: dict[int, Process] = {}
    while shell.poll() is None:
        list(processes.drain(1))
        held.update({each.pid: processes.learn(each, 1) for each in seen(list(holder.drain(1)))})
        select.select([holder.fileno()], [], [], 0.01)
    assert shell.stdout is not None
    pids = [int(line) for line in shell.stdout.read().split()]
    shell.stdout.close()
    held.update({each.pid: processes.learn(each, 1) for each in seen(list(holder.drain(1)))})
    found = [processes.look(pid, 1) for pid in pids]
    assert len(pids) == 500 and {each.loginuid for each in found} == {SATO}
    exact = [each for each in found if each.known == "exact" and each.argv[:1] == ["cp"]]
    assert len(exact) >= 495, f"only {len(exact)} of 500 were held long enough to read their argv"


def test_a_slow_name_service_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def slow(uid: int) -> object:
        answer.wait(10)
        return SimpleNamespace(pw_name=f"directory-{uid}")

    monkeypatch.setattr(passwd.pwd, "getpwuid", slow)
    people = passwd.Passwd("/dev/null")
    assert people.name(70001) == ""
    answer.set()

    def named() -> Iterator[Fact]:
        if people.name(70001):
            yield ProcGone(at_ms=1, pid=1)

    until(named, bool)
    assert people.name(70001) == "directory-70001"
    people.close()


# -- the holder --------------------------------------------------------------------------------------------------------


@EXT4
def test_a_pipes_other_end_is_learnt_with_the_writer(holder: Holder, stick: Path) -> None:
    holding(holder, stick)
    run(f"cat /etc/passwd - < /dev/null | (read x; echo $x; cat) > {stick}/out")
    shells = [each for each in seen(until(lambda: holder.drain(1), lambda facts: len(seen(facts)) > 1)) if each.pipes]
    pipes = [set(each.pipes) for each in shells]
    assert any(one & other for place, one in enumerate(pipes) for other in pipes[place + 1 :]), shells


@EXT4
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_holder_holds_nobody_up(holder: Holder, stick: Path, blow: signal.Signals) -> None:
    holding(holder, stick)
    before = holder.pid
    os.kill(before, blow)
    started = time.monotonic()
    with subprocess.Popen(["cp", "/etc/passwd", stick / "copy"]) as copy:

        def facts() -> Iterator[Fact]:
            holder.check(1)
            yield from holder.drain(1)
            select.select([], [], [], 0.02)

        told = until(facts, lambda facts: copy.poll() is not None and any(isinstance(fact, Lost) for fact in facts))
    assert copy.returncode == 0 and time.monotonic() - started < holder_module.STALL_S + 2
    assert [fact.reason for fact in told if isinstance(fact, Lost)] == ["holder_stalled"]
    assert holder.pid not in (0, before) and holder.coverage(1).ok


@EXT4
def test_a_held_stick_can_be_unmounted_at_any_time(holder: Holder, stick: Path, tmp_path: Path) -> None:
    holding(holder, stick)
    for _ in range(20):
        run(f"cp /etc/passwd {stick}/x; umount {stick}; mount -o loop {tmp_path}/stick.img {stick}")
        holder.unwatch(str(stick))
        holder.watch(str(stick))
    holding(holder, stick)


@EXT4
def test_a_storm_of_one_program_is_let_through(holder: Holder, stick: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(2000):
        (tmp_path / "many" / str(number)).write_text("x")
    holding(holder, stick)
    run(f"cp -r {tmp_path}/many {stick}/")
    until(lambda: holder.drain(1), lambda facts: any(each.argv[:1] == ["cp"] for each in seen(facts)))
    holding(holder, stick)  # holds again soon after


def test_a_kernel_without_permission_events_is_said_and_not_asked_again(
    holder: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = holder_module._BOOT.replace("holding.main", "holding.kernel.FAN_CLASS_CONTENT = 1 << 30; holding.main")
    monkeypatch.setattr(holder_module, "_BOOT", without)
    holder.watch(str(tmp_path))

    def facts() -> Iterator[Fact]:
        holder.check(1)
        yield from holder.drain(1)
        if not holder.pid:
            yield ProcGone(at_ms=1, pid=0)

    assert [type(fact) for fact in until(facts, bool)] == [ProcGone]
    said = holder.coverage(1)
    assert not said.ok and said.blind == ["short_lived_writers"] and "no permission events" in said.why


@EXT4
def test_a_pipe_by_name_on_a_stick_holds_nobody_up(holder: Holder, stick: Path) -> None:
    os.mkfifo(stick / "fifo")
    holding(holder, stick)
    run(f"timeout 5 sh -c 'echo through > {stick}/fifo & cat {stick}/fifo; wait'")


def test_the_small_process_dies_with_the_agent(tmp_path: Path) -> None:
    script = "import sys; from agent.sense.holder import Holder; h = Holder(); h.watch(sys.argv[1]); print(h.pid, flush=True)"
    command = [sys.executable, "-c", script + "; sys.stdin.read()", str(tmp_path)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        small = int(agent.stdout.readline())
        agent.kill()

    def gone() -> Iterator[Fact]:
        if not Path(f"/proc/{small}").exists() or "State:\tZ" in Path(f"/proc/{small}/status").read_text():
            yield ProcGone(at_ms=1, pid=small)

    until(gone, bool)


# -- mounts ------------------------------------------------------------------------------------------------------------


def test_a_mount_wakes_the_poll_and_is_told_and_untold(tmp_path: Path) -> None:
    mounts = Mounts()
    cold = list(mounts.drain(1))
    assert all(isinstance(fact, Mounted) and fact.cold for fact in cold) and any(
        fact.mount == "/" for fact in cold if isinstance(fact, Mounted)
    )
    poll = select.poll()
    poll.register(mounts.fileno(), Mounts.EVENTS)
    poll.poll(0)
    place = tmp_path / "a b\\c"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "my disk", place], check=True)
    try:
        assert poll.poll(5000)
        (fact,) = [
            each for each in mounts.drain(2) if isinstance(each, Mounted) and each.mount == path_text(os.fsencode(place))
        ]
        assert isinstance(fact, Mounted) and not fact.cold and not fact.read_only
        assert (fact.mount, fact.fs, fact.source) == (path_text(os.fsencode(place)), "tmpfs", "my disk")
        assert mounts.mount_at(str(place)) == ("tmpfs", False) and mounts.mount_at(str(tmp_path)) is None
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        again = [each for each in mounts.drain(3) if isinstance(each, Mounted) and each.mount_id == fact.mount_id]
        assert [each.read_only for each in again] == [True]
    finally:
        subprocess.run(["umount", place], check=True)
    assert fact.mount_id in [each.mount_id for each in mounts.drain(4) if isinstance(each, Unmounted)]
    mounts.close()


@EXT4
def test_a_stick_mounted_in_another_namespace_is_found_through_who_uses_it(tmp_path: Path, stick: Path) -> None:
    run(f"umount {stick}")
    mounts = Mounts()
    list(mounts.drain(1))
    script = f"mount -o loop {tmp_path}/stick.img {stick} && echo there && read line"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "there\n"
        ours = {each.mount for each in mounts.drain(2) if isinstance(each, Mounted)}
        assert str(stick) not in ours, "our own namespace tells nothing of it"
        (fact,) = [each for each in mounts.also(other.pid, 3) if isinstance(each, Mounted) and each.mount == str(stick)]
        assert fact.namespace > 0
        assert list(mounts.also(other.pid, 4)) == [] and list(mounts.also(os.getpid(), 4)) == []
        other.communicate("\n")
    mounts.close()


def test_who_became_another_program_before_word_of_the_hold_came_has_not_the_old_name(processes: Processes) -> None:
    beside = Processes(0)
    try:
        with subprocess.Popen("read line; exec true", shell=True, stdin=subprocess.PIPE, text=True) as child:
            held = looked_at(beside, child.pid, ["/bin/sh", "-c", "read line; exec true"])
            at_ns = time.monotonic_ns()
            child.communicate("\n")
    finally:
        beside.close()
    processes.learn(held, 1, at_ns)
    found = processes.look(child.pid, 2)
    assert (found.known, found.exe) == ("cached", "")
