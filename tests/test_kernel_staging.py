"""The tripwire and the watch on writes, on a real kernel: the first open arms, nobody else is held, and it ends."""

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.core.facts import Closed, Fact, Opened
from agent.sense import likeness
from agent.sense.arming import Arming
from agent.sense.fanotify import Fanotify
from agent.sense.holder import Holder
from agent.sense.interest import LINGER_MS, READER_MS, Interest
from agent.sense.processes import Processes
from tests.kernel_lab import ROOT, until

pytestmark = ROOT


class Lab:
    """A protected directory, the sensors that watch it and what is written elsewhere, and a clock of its own."""

    def __init__(self, folder: Path, hold: bool = True) -> None:
        self.folder, self.protected, self.outside = folder, folder / "protected", folder / "outside"
        self.protected.mkdir()
        self.outside.mkdir()
        self.source = self.protected / "a.csv"
        subprocess.run(["sh", "-c", f"seq 40 > {self.source}"], check=True)
        self.files, self.holder = Fanotify(), Holder()
        self.processes = Processes(1)
        own = [str(folder / "state")]
        self.arming = Arming(self.files.marks, self.files.paths, self.holder if hold else None, self.processes.parent, own)
        self.files.watch_tree(str(self.protected))
        self._clock = itertools.count(1, 20_000)
        self.now_ms = 1
        systems = [b"/"] + [b"/dev/shm"] * os.path.ismount("/dev/shm")
        self.arming.watch(systems)
        self.files.ignore = self.arming.ignore = {os.getpid(), self.holder.pid}
        self.arming.step(self.now_ms)

    def facts(self) -> list[Fact]:
        """All that is told by now, opens before writes; not what others write on the same file system meanwhile."""
        held = list(self.holder.drain(self.now_ms))
        written = self.arming.take()
        told = [*held, *self.files.drain(self.now_ms)]
        self.processes.catch_up(self.now_ms)
        for fact in told:
            if isinstance(fact, Opened):
                self.arming.read(fact.pid, self.now_ms)
        told += self.arming.facts(written, self.now_ms, lambda pid: None)
        ours = (f"{self.folder}/", f"/dev/shm/sekisho-{os.getpid()}")
        return [fact for fact in told if not isinstance(fact, Closed) or fact.path.startswith(ours)]

    def rest(self) -> None:
        """Let time pass until the watch has ended."""
        deadline = time.monotonic() + 10
        while self.arming.armed:
            self.now_ms = next(self._clock)
            self.facts()
            self.arming.step(self.now_ms)
            assert time.monotonic() < deadline, "the watch never ended"
            time.sleep(0.002)  # for the small process to answer

    def closed(self) -> dict[str, int]:
        """Path and pid of what was finished elsewhere since."""
        return {fact.path: fact.pid for fact in self.facts() if isinstance(fact, Closed)}

    def close(self) -> None:
        self.processes.close()
        self.holder.close()
        self.arming.close()
        self.files.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.close()


def start(*command: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True)


@pytest.mark.parametrize("program", ["cp", "mv"])
def test_every_single_copy_out_of_rest_is_seen(lab: Lab, program: str) -> None:
    apart = program == "mv" and os.path.ismount("/dev/shm")
    there = Path("/dev/shm") / f"sekisho-{os.getpid()}" if apart else lab.outside / "x"
    missed = []
    for number in range(60):
        lab.rest()
        if program == "mv":
            subprocess.run(["sh", "-c", f"seq {number} 60 > {lab.source}"], check=True, start_new_session=True)
            lab.facts()
            lab.rest()
        copy = start(program, lab.source, there)
        copy.wait()
        if lab.closed().get(str(there)) != copy.pid:
            missed.append(number)
        there.unlink(missing_ok=True)
    assert not missed


def test_every_one_of_eight_copies_at_once_is_seen(lab: Lab) -> None:
    for _ in range(10):
        lab.rest()
        copies = {str(lab.outside / str(number)): start("cp", lab.source, lab.outside / str(number)) for number in range(8)}
        pids = {path: copy.pid for path, copy in copies.items() if copy.wait() == 0}
        assert lab.closed() == pids


def test_a_pipelines_other_stages_are_known_from_the_first_open(lab: Lab) -> None:
    lab.rest()
    start("bash", "-c", f"cat {lab.source} | gzip | cat > {lab.outside}/x.gz; true").wait()
    written = until(lambda: iter(lab.facts()), lambda told: any(isinstance(fact, Closed) for fact in told))
    assert [fact.path for fact in written if isinstance(fact, Closed)] == [str(lab.outside / "x.gz")]


FAMILY = {2: 1, 10: 2, 20: 10, 30: 20, 31: 20, 40: 31, 11: 2, 21: 11, 70: 21}
"""pid → parent: 2 a login, 10 and 11 its terminals, 20 a script in one that runs 30 and 31, 21 a build in the other"""


def test_interest_is_in_readers_and_those_who_may_have_got_it_from_them() -> None:
    interest = Interest(lambda pid: FAMILY.get(pid, 0))
    interest.read(30, 1)
    assert [pid for pid in FAMILY if interest.concerns(pid)] == [10, 20, 30, 31, 40]
    interest.read(70, 1)
    assert interest.concerns(21), "who became a reader's parent, too"


def test_interest_ends_with_the_readers() -> None:
    interest = Interest(lambda pid: FAMILY.get(pid, 0))
    reader = start("sleep", "60")
    interest.read(reader.pid, 1)
    assert interest.left(READER_MS) and not interest.left(READER_MS + 2)
    interest.read(reader.pid, 1)
    reader.kill()
    reader.wait()
    assert interest.left(2), "what a pipe still holds"
    assert not interest.left(LINGER_MS + 10)


def test_an_open_is_held_once_and_not_again_while_armed(lab: Lab) -> None:
    lab.rest()
    trips = lab.arming._trips
    for _ in range(50):
        start("cat", lab.source).wait()
    lab.facts()
    assert lab.arming.armed and lab.arming._trips == trips + 1


def test_a_file_in_a_directory_made_later_trips_as_well(lab: Lab) -> None:
    start("sh", "-c", f"mkdir {lab.protected}/new; cp {lab.source} {lab.protected}/new/b.csv").wait()
    until(lambda: iter(lab.facts()), lambda told: bool(told))
    lab.rest()
    copy = start("cp", lab.protected / "new/b.csv", lab.outside / "b")
    copy.wait()
    assert lab.closed() == {str(lab.outside / "b"): copy.pid}


def test_a_copy_that_is_followed_trips_too(lab: Lab) -> None:
    start("cp", lab.source, lab.outside / "one").wait()
    (fact,) = [each for each in lab.facts() if isinstance(each, Closed)]
    assert list(lab.files.follow_staged(fact.key, fact.path, 1)) == []
    lab.rest()
    copy = start("cp", lab.outside / "one", lab.outside / "two")
    copy.wait()
    assert lab.closed() == {str(lab.outside / "two"): copy.pid}


def test_a_copy_tells_of_its_renaming_and_its_end(lab: Lab) -> None:
    start("cp", lab.source, lab.outside / "one").wait()
    (fact,) = [each for each in lab.facts() if isinstance(each, Closed)]
    list(lab.files.follow_staged(fact.key, fact.path, 1))
    start("mv", lab.outside / "one", lab.outside / "two").wait()
    start("rm", lab.outside / "two").wait()
    told = [each for each in lab.facts() if not isinstance(each, Opened)]
    assert [type(each).__name__ for each in told if getattr(each, "key", b"") == fact.key][-1] == "Deleted"


def test_births_tell_new_files_from_old(lab: Lab) -> None:
    old = lab.outside / "old"
    old.write_text("x")
    time.sleep(0.02)  # a tick of the kernel's clock, before and after
    before_ms = time.time_ns() // 1_000_000
    time.sleep(0.02)
    start("cp", lab.source, lab.outside / "new").wait()
    start("cp", lab.source, old).wait()
    born = {fact.path: fact.born_ms for fact in lab.facts() if isinstance(fact, Closed)}
    if None in born.values():
        pytest.skip("this file system keeps no times of birth")
    assert born[str(lab.outside / "new")] >= before_ms > born[str(old)]  # type: ignore[operator]


# -- do two files share bytes ----------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(3):
        path = tmp_path / f"{number}.csv"
        path.write_text("".join(f"{row},{number},name {row * 7919 % 10007}\n" for row in range(4_000)))
        made.append(path)
    return made


def compare(copy: Path, *sources: Path) -> str:
    total = sum(path.stat().st_size for path in sources if path.exists())
    return likeness.compare(os.fsencode(copy), [(os.fsencode(path), None) for path in sources], total)


@pytest.mark.parametrize(
    ("made", "alike"),
    [
        ("cat {0}", "same"),
        ("cat {0} {1} {2}", "same"),
        ("head -c 9000 {0}", "same"),
        ("tail -c 9000 {0}", "same"),
        ("base64 {0}", "same"),
        ("xxd -p {0} || od -An -v -tx1 {0} | tr -d ' '", "same"),
        ("tar c {0} {1} {2}", "same"),
        ("cat {0} {1} {2} | gzip -9", "packed"),
        ("cat {0} {1} {2} | xz -9", "packed"),
        ("head -c $(stat -c %s {0}) /dev/urandom", "packed"),
        ("head -c 3000 /dev/urandom", "other"),
        ("head -c 3000000 /dev/urandom", "other"),
        ("head -c $(stat -c %s {0}) /dev/zero", "other"),
        ("seq 100000 120000", "other"),
        ("wc {0} {1} {2}", "other"),
        ("sha256sum {0} {1}", "other"),
    ],
)
def test_what_two_files_have_in_common(texts: list[Path], tmp_path: Path, made: str, alike: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["bash", "-c", f"({made.format(*texts)}) > {copy}"], check=True, stderr=subprocess.DEVNULL)
    assert compare(copy, *texts) == alike


def test_a_piece_from_far_inside_a_large_file_is_known(tmp_path: Path) -> None:
    large, piece = tmp_path / "large", tmp_path / "piece"
    large.write_bytes(os.urandom(24 << 20))
    with large.open("rb") as file:
        file.seek(17 << 20)
        piece.write_bytes(file.read(3 << 20))
    assert compare(piece, large) == "part"


def test_what_is_gone_is_said(texts: list[Path], tmp_path: Path) -> None:
    assert compare(tmp_path / "none", *texts) == "gone"
    assert compare(texts[0], tmp_path / "none") == "unknown"


def test_a_look_at_large_files_is_short(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(os.urandom(40 << 20) + b"x" * len(path.name))
    began = time.perf_counter()
    assert compare(one, other) in ("packed", "other")
    assert time.perf_counter() - began < 1.0
