"""On whose behalf a process runs: control groups as systemd and the runtimes name them, and what they say of images."""

import json
import os
from pathlib import Path

import pytest

from agent.sense.cgroup import Group, Images, parse
from agent.sense.processes import Processes

ID = "4f0d0b1a" * 8


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0::/user.slice/user-1000.slice/session-3.scope", Group(session="3")),
        ("0::/system.slice/cron.service", Group(unit="cron.service")),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-nautilus-7.scope", Group(unit="app-nautilus-7.scope")),
        ("0::/user.slice/user-1000.slice/user@1000.service/session.slice/gvfs.service", Group(unit="gvfs.service")),
        ("0::/system.slice/run-u42.service", Group(unit="run-u42.service")),
        (f"0::/system.slice/docker-{ID}.scope", Group(container=ID)),
        (f"0::/docker/{ID}", Group(container=ID)),
        (f"0::/machine.slice/libpod-{ID}.scope/container", Group(container=ID)),
        (f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", Group(container=ID)),
        (f"0::/kubepods/burstable/pod1/crio-{ID}.scope", Group(container=ID)),
        ("0::/lxc.payload.web-1/system.slice/cron.service", Group(unit="cron.service", container="web-1")),
        (r"0::/machine.slice/machine-build\x2dbox.scope/payload", Group(container="build-box")),
        (f"12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}", Group(container=ID)),
        ("0::/", Group()),
        ("", Group()),
        ("no such line\x00", Group()),
    ],
)
def test_a_control_group_tells_session_unit_and_container(line: str, expected: Group) -> None:
    found = parse(line.encode())
    assert (found.session, found.container) == (expected.session, expected.container)
    if expected.unit or not expected.container:
        assert found.unit == expected.unit


def test_the_runtime_says_which_image(tmp_path: Path) -> None:
    other = "ab" * 32
    docker, podman = tmp_path / ID, tmp_path / "containers.json"
    docker.write_text(json.dumps({"ID": ID, "Config": {"Image": "registry.example/report:2.1"}}))
    podman.write_text(
        json.dumps([{"id": other, "image": "sha256:77", "metadata": '{"image-name":"docker.io/library/debian:12"}'}])
    )
    images = Images(docker=str(tmp_path / "{}"), podman=str(podman))
    assert images.of(ID) == "registry.example/report:2.1"
    assert images.of(other) == "docker.io/library/debian:12"
    assert images.of("cd" * 32) == ""


@pytest.mark.parametrize("content", ["", "[1, 2", "[]", "3", '{"Config": 5}', '{"Config": {}}', "[" * 5000])
def test_state_files_that_are_broken_say_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / ID).write_text(content)
    (tmp_path / "list").write_text(content)
    assert Images(docker=str(tmp_path / "{}"), podman=str(tmp_path / "list")).of(ID) == ""


def test_a_name_that_is_no_id_is_not_made_a_path(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(json.dumps({"Config": {"Image": "trap"}}))
    assert Images(docker=str(tmp_path / "{}"), podman=str(tmp_path / "none")).of("../x") == ""


def test_a_live_process_has_the_group_that_the_kernel_says() -> None:
    processes = Processes(0)
    try:
        expected = parse(Path("/proc/self/cgroup").read_bytes())
        seen = processes.look(os.getpid(), 0)
    finally:
        processes.close()
    assert (seen.unit, seen.container) == (expected.unit, expected.container)
