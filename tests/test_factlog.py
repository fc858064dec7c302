"""The record of facts: its owner's alone, without secrets, and no harm to the watch when the disk is full."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent.core import facts
from agent.core.facts import Process, ProcSeen, Tick
from agent.factlog import FactLog, NotPrivate


def recorded(path: Path) -> list[facts.AnyFact]:
    return list(facts.read(path.read_bytes().splitlines()))


def test_what_is_recorded_comes_back_but_no_password(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    argv = ["zip", "-P", "hunter2", "/media/a/x.zip", "a.csv"]
    FactLog(str(path)).write(ProcSeen(at_ms=5, process=Process(pid=7, argv=argv, exe="/usr/bin/zip")))
    assert b"hunter2" not in path.read_bytes()
    (seen,) = recorded(path)
    assert isinstance(seen, ProcSeen)
    assert seen.process.argv == ["zip", "-P", "***", "/media/a/x.zip", "a.csv"]
    assert argv[2] == "hunter2", "the fact itself goes on unchanged"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_record_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    path.touch(mode=0o644)
    path.chmod(0o644)
    with pytest.raises(NotPrivate, match="chmod 600"):
        FactLog(str(path))


_FILLS = """
import resource, signal, sys
from agent.core.facts import Tick
from agent.factlog import FactLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = FactLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for at in range(10):
    log.write(Tick(at_ms=at))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write(Tick(at_ms=10))
"""


def test_where_the_disk_was_full_the_record_says_what_is_missing_and_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", _FILLS, path], check=True, cwd=root)
    told = [fact.at_ms for fact in recorded(path) if isinstance(fact, Tick)]
    assert told == [*range(len(told) - 1), 10]
    assert b"# %d facts are missing" % (11 - len(told)) in path.read_bytes()
