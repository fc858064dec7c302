"""A developer plugs media that do not exist."""

import os
from pathlib import Path

import pytest

from agent import simulate

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real mounts")


def test_a_folder_and_a_descriptor_are_a_medium(tmp_path: Path) -> None:
    stick = simulate.plug(
        tmp_path, "stick1", vendor='BUF"FALO\n', serial="60A44C413F8CF320", interfaces=["08:06:50", "03:01:01"]
    )
    (stick.path / "a.csv").write_text("1")
    assert [medium.descriptor for medium in simulate.present(tmp_path)] == [stick.descriptor]

    simulate.unplug(stick)
    assert simulate.present(tmp_path) == []
    again = simulate.plug(tmp_path, "stick1", serial="60A44C413F8CF320")
    assert (again.path / "a.csv").read_text() == "1", "a stick keeps its files while it is in a pocket"


def test_a_descriptor_counts_once_it_parses_whole(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    descriptor = tmp_path / "x.medium.toml"
    for half in ('kind = "stor', "kind = 3", 'kind = "teapot"', "\xff"):
        descriptor.write_text(half, encoding="latin-1")
        assert simulate.present(tmp_path) == [], half
    descriptor.write_text('kind = "phone"\nsomething_newer = 1\n')
    assert simulate.present(tmp_path)[0].descriptor.kind == "phone"


def test_a_descriptor_that_would_stall_or_fill_its_reader_is_passed_over(tmp_path: Path) -> None:
    for name in ("pipe", "link", "large"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe.medium.toml")
    (tmp_path / "link.medium.toml").symlink_to("/dev/zero")
    (tmp_path / "large.medium.toml").write_text("#" * (1 << 20))
    assert simulate.present(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65])
def test_a_name_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(simulate.SimulationError, match="can't be a medium's name"):
        simulate.plug(tmp_path, name)


def test_plugging_twice_says_so(tmp_path: Path) -> None:
    simulate.plug(tmp_path, "a")
    with pytest.raises(simulate.SimulationError, match="unplug it first"):
        simulate.plug(tmp_path, "a")


@root_only
@pytest.mark.parametrize("fs", ["tmpfs", "ext4"])
def test_a_medium_can_be_a_real_mount(tmp_path: Path, fs: simulate.FileSystem) -> None:
    stick = simulate.plug(tmp_path, "stick1", fs=fs)
    try:
        assert os.path.ismount(stick.path)
        (stick.path / "kept").write_text("1")
    finally:
        simulate.unplug(stick)
    assert not os.path.ismount(stick.path)
    if fs == "ext4":
        again = simulate.plug(tmp_path, "stick1", fs=fs, read_only=True)
        try:
            assert (again.path / "kept").read_text() == "1"
            with pytest.raises(OSError, match="Read-only"):
                (again.path / "more").write_text("1")
        finally:
            simulate.unplug(again)


@root_only
def test_pulling_a_medium_in_use_says_what_to_do(tmp_path: Path) -> None:
    stick = simulate.plug(tmp_path, "stick1", fs="tmpfs")
    with (stick.path / "open").open("w"), pytest.raises(simulate.SimulationError, match="close the programs that use it"):
        simulate.unplug(stick)
    assert simulate.present(tmp_path), "it is still plugged in"
    simulate.unplug(stick)
