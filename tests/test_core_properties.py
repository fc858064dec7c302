"""What must hold for the core whatever is told: it never raises, every event is OCSF, and windows count what they should."""

import itertools
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ocsf_check import problems

from agent.contract.event import path_text, read, seal
from agent.core import facts
from agent.core.limits import BUCKETS, Limits, WindowLimit
from agent.core.masks import masked
from agent.core.media import clean, clean_path
from agent.core.pipeline import Core, CoreConfig, ProtectedDir

T = 1_767_225_600_000
hostile = st.text(max_size=20) | st.sampled_from(
    ["", "\x00", "\udcff", "\ud800", "\u202e", "a/b", "..", "x" * 3000, "\\x", "\n"]
)
times = st.integers(T - 10_000, T + 90_000_000)
pids = st.integers(0, 6)
keys = st.sampled_from([b"", b"1", b"2", b"3", b"4", b"\xff\x00"])
sizes = st.none() | st.sampled_from([0, 1, 300, 5_000, 1 << 40]) | st.integers(-5, 1 << 50)
names = st.sampled_from(["a.csv", "b.csv", ".a.csv.x", "c.tgz", "d/a.csv", "あ.csv", "\udcfe", ""])
folders = st.sampled_from(["/srv/c", "/m/x", "/m/x/deep", "/srv/c/usb", "/home/u", "/srv/cc", ""])
paths = st.builds(lambda folder, name: f"{folder}/{name}", folders, names) | hostile
texts = st.lists(hostile, max_size=4)
processes = st.builds(
    facts.Process,
    pid=pids,
    start=st.integers(0, 3),
    ppid=pids,
    uid=st.none() | st.sampled_from([0, 1000]),
    loginuid=st.none() | st.sampled_from([1000, 1001, 0xFFFFFFFF]),
    login_user=hostile,
    session=hostile,
    exe=hostile,
    argv=texts,
    pipes=st.lists(st.integers(1, 3), max_size=3),
    files=st.lists(st.builds(facts.OpenFile, paths, st.integers(0, 5_000), keys), max_size=2),
    parents=st.lists(st.builds(facts.Parent, pids, st.integers(0, 3), hostile), max_size=3),
    known=st.sampled_from(["exact", "cached"]),
)
ids = st.sampled_from(["sim:x", "usb1", "usb2"])
blocks = st.builds(
    facts.Block,
    name=hostile,
    node=st.sampled_from(["8:1", "8:2", ""]) | hostile,
    kind=st.sampled_from(["disk", "partition", "crypt"]) | hostile,
    on=hostile,
    size=st.none() | st.integers(0, 2**73),
    fs=hostile,
    fs_uuid=hostile,
    label=hostile,
)
devices = st.builds(
    facts.Device,
    id=ids,
    bus=st.sampled_from(["usb", "mmc", "ata", ""]) | hostile,
    vendor=hostile,
    model=hostile,
    serial=hostile,
    interfaces=st.lists(st.sampled_from(["08:06:50", "06:01:01", "03:01:01", "09:00:00", "e0:01:03", "?"]), max_size=3),
    nodes=st.lists(st.sampled_from(["8:1", "8:2", "sim:x"]), max_size=2),
    simulated=st.booleans(),
    declared_kind=st.sampled_from(["", "phone", "storage", "optical", "reader", "nonsense"]),
    properties=st.dictionaries(st.sampled_from(["ID_CDROM", "ID_MTP_DEVICE", "x"]), st.just("1") | hostile, max_size=2),
    blocks=st.lists(blocks, max_size=2),
    networks=st.lists(hostile, max_size=2),
    port=hostile,
    hubs=st.lists(hostile, max_size=2),
    built_in=st.none() | st.booleans(),
    types=st.booleans(),
    since_ms=st.none() | times,
    hotplugged=st.none() | st.booleans(),
)
approvals = st.builds(
    facts.Approval,
    id=hostile,
    key=st.sampled_from(["usb:?:?:noserial", "mmc:?:?:noserial", "x"]),
    until_ms=st.none() | times,
    since_ms=st.sampled_from([0, T]),
    machines=texts,
    dirs=st.lists(st.sampled_from(["/srv/c", "客"]) | hostile, max_size=2),
    read_only=st.booleans(),
    revoked=st.booleans(),
)
mounts = st.sampled_from(["/m/x", "/m/x/deep", "/srv/c/usb", "/"]) | hostile
some_dict = st.dictionaries(hostile, st.integers() | hostile | texts, max_size=3)
file = {"at_ms": times, "pid": pids, "key": keys, "path": paths}
any_fact = st.one_of(
    st.builds(facts.Tick, at_ms=times),
    st.builds(facts.ProcSeen, at_ms=times, process=processes),
    st.builds(facts.ProcGone, at_ms=times, pid=pids, start=st.integers(0, 3)),
    st.builds(facts.Opened, **file, size=sizes, inode=sizes),
    st.builds(facts.Created, **file),
    st.builds(facts.Grown, **file, size=st.integers(-1, 9_000)),
    st.builds(facts.Closed, **file, size=sizes),
    st.builds(facts.Closed, **file, size=sizes),
    st.builds(facts.Deleted, **file),
    st.builds(facts.Moved, **file, old_path=paths, is_dir=st.booleans(), size=sizes),
    st.builds(facts.Attributes, **file, links=st.none() | st.integers(0, 3)),
    st.builds(facts.Found, **file, size=st.integers(0, 5_000)),
    st.builds(facts.Plugged, at_ms=times, device=devices, cold=st.booleans()),
    st.builds(facts.Unplugged, at_ms=times, id=ids),
    st.builds(facts.Transferred, at_ms=times, id=ids, bytes_in=st.integers(0, 2**63), bytes_out=st.integers(0, 2**63)),
    st.builds(
        facts.Mounted,
        at_ms=times,
        mount_id=st.integers(-2, 3),
        dev=st.sampled_from(["8:1", "8:2", "sim:x", ""]),
        mount=mounts,
        fs=hostile,
        label=hostile,
        reach=mounts,
    ),
    st.builds(facts.Unmounted, at_ms=times, mount_id=st.integers(-2, 3)),
    st.builds(facts.Session, at_ms=times, uid=st.none() | st.integers(0, 2000), user=hostile, session=hostile),
    st.builds(facts.Coverage, at_ms=times, sensor=hostile, ok=st.booleans(), blind=texts, why=hostile),
    st.builds(facts.Lost, at_ms=times, reason=hostile, since_ms=times, until_ms=times, count=st.none() | st.integers(0, 9)),
    st.builds(facts.Clock, at_ms=times, jump_ms=st.integers(-(10**12), 10**12), offset_ms=st.none() | st.integers(-9, 10**9)),
    st.builds(facts.Tampered, at_ms=times, what=hostile, detail=some_dict),
    st.builds(facts.Register, at_ms=times, version=st.integers(0, 5), approvals=st.lists(approvals, max_size=3)),
    st.builds(facts.Started, at_ms=times, boot_id=hostile, config_digest=hostile, previous=some_dict),
    st.builds(facts.Stopping, at_ms=times, reason=hostile),
    st.builds(facts.Summary, at_ms=times, detail=some_dict),
    st.builds(facts.Config, at_ms=times, config_digest=hostile),
)


def _core() -> Core:
    numbers = itertools.count(1)
    config = CoreConfig(
        agent="0" * 32,
        name="ws",
        version="1",
        protect=[ProtectedDir(path="/srv/c", label="客"), ProtectedDir(path="/srv/c/deep", label="d")],
        limits=[WindowLimit(name="burst", window_s=600, bytes=4_000, files=2), WindowLimit(name="one", window_s=1, files=1)],
        record_names=True,
    )
    return Core(config, lambda: f"u{next(numbers)}")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(any_fact, max_size=60), st.integers(0, 60))
def test_no_sequence_of_facts_makes_the_core_raise_or_write_anything_but_ocsf(story: list[Any], restart_at: int) -> None:
    core, seen = _core(), set()
    medium = facts.Device(id="sim:x", bus="usb", nodes=["sim:x"], simulated=True, declared_kind="storage")
    start = [facts.Plugged(at_ms=T, device=medium), facts.Mounted(at_ms=T, mount_id=-1, dev="sim:x", mount="/m/x")]
    for number, fact in enumerate([*start, *story, facts.Stopping(at_ms=T + 10**8)]):
        if number == restart_at:
            kept = core.state()
            core = _core()
            core.restore(kept)
            seen = set()
        for event in core.feed(fact):
            data = seal(event, 1, 0, bytes(32))
            read(data)
            decoded = json.loads(data)
            wrong = problems(decoded)
            assert not wrong, (wrong, data)
            assert event.metadata.uid not in seen
            seen.add(event.metadata.uid)
        core.watches(), core.media_now(fact.at_ms), core.counts(), core.due_ms, core.state_changed
    assert core.due_ms is None, "stopping tells everything"


LIMIT = WindowLimit(name="w", window_s=600, bytes=10_000, files=10)
adds = st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 5_000), st.sampled_from("abcdefghijkl")), max_size=80)


@given(adds)
def test_a_window_counts_all_of_its_seconds_and_at_most_a_bucket_more(steps: list[tuple[int, int, str]]) -> None:
    limits, told, now = Limits([LIMIT]), [], T
    for wait_ms, size, name in steps:
        now += wait_ms
        told.append((now, size, name))
        limits.add("p", now, size, name, "u")
        size_bytes, files = limits.counted("p", LIMIT, now)
        window_ms = LIMIT.window_s * 1000
        inside = [each for each in told if each[0] > now - window_ms]
        around = [each for each in told if each[0] > now - window_ms - window_ms // BUCKETS - 1]
        assert sum(each[1] for each in inside) <= size_bytes <= sum(each[1] for each in around)
        assert len({each[2] for each in inside}) <= files <= len({each[2] for each in around})


@given(adds)
def test_a_limit_fires_exactly_when_its_multiple_doubles(steps: list[tuple[int, int, str]]) -> None:
    limits, fired, now = Limits([LIMIT]), 0, T
    for wait_ms, size, name in steps:
        now += wait_ms
        passed = limits.add("p", now, size, name, "u")
        size_bytes, files = limits.counted("p", LIMIT, now)
        level = max(size_bytes // LIMIT.bytes, files // LIMIT.files)
        assert bool(passed) == (level >= max(2 * fired, 1))
        fired = 0 if level == 0 else 1 << (level.bit_length() - 1) if passed else fired


@given(adds, st.integers(0, 80))
def test_counters_are_the_same_after_a_restart(steps: list[tuple[int, int, str]], at: int) -> None:
    whole, parted, now = Limits([LIMIT]), Limits([LIMIT]), T
    for number, (wait_ms, size, name) in enumerate(steps):
        now += wait_ms
        if number == at:
            kept, parted = parted.to_bytes(), Limits([LIMIT])
            parted.from_bytes(kept)
        assert whole.add("p", now, size, name, "u") == parted.add("p", now, size, name, "u")


@given(st.lists(st.tuples(st.integers(-90_000_000, 90_000_000), st.integers(0, 99)), min_size=1, max_size=40))
def test_a_clock_that_jumps_back_loses_no_bytes(steps: list[tuple[int, int]]) -> None:
    limits, now, total, last = Limits([LIMIT]), T, 0, T
    for jump_ms, size in steps:
        now = max(now + jump_ms, 1)
        total = total + size if now <= last else size + limits.counted("p", LIMIT, now)[0]
        limits.add("p", now, size, "a", "u")
        assert limits.counted("p", LIMIT, now)[0] == total
        last = now


@given(st.binary(max_size=60))
def test_paths_from_the_kernel_stay_as_they_are_spelt(raw: bytes) -> None:
    assert clean_path(path_text(raw)) == path_text(raw)


@given(hostile)
def test_any_text_can_be_written(text: str) -> None:
    for cleaned in (clean(text), clean_path(text), *masked([text, text])):
        cleaned.encode()
    assert len(clean(text)) <= 256 and all(each.isprintable() for each in clean(text))
