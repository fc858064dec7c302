"""What an admin installs: units that systemd accepts and scores, an install script that can be run twice and undone."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent import config
from agent.pytest_plugin import Agent, Media
from tests.house import until

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
UNITS = ["sekisho-agent.service", "sekisho-collector.service"]

needs_systemd_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is missing: apt-get install systemd"
)


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}))


def setting(unit: str, key: str) -> list[str]:
    """All values of a key in a unit file."""
    return re.findall(rf"^{key}=(.*)$", (PACKAGING / unit).read_text(), re.MULTILINE)


@needs_systemd_analyze
def test_systemd_finds_nothing_wrong_with_the_units() -> None:
    done = run(PACKAGING / "verify-units.sh")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_systemd_analyze
@pytest.mark.parametrize(("unit", "at_most"), [("sekisho-agent.service", 4.6), ("sekisho-collector.service", 1.5)])
def test_the_services_are_shut_in_as_far_as_their_work_allows(unit: str, at_most: float) -> None:
    done = run("systemd-analyze", "security", "--no-pager", "--offline=true", PACKAGING / unit)
    score = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= at_most, done.stdout
    said = f"scores {score[1]}" if "collector" in unit else f"agent's scores {score[1]}"
    assert said in (ROOT / "docs" / "operations.md").read_text(), f"operations.md says another score than {score[1]}"


def test_the_agent_keeps_what_its_sensors_need() -> None:
    text = (PACKAGING / "sekisho-agent.service").read_text()
    blinding = (
        "PrivateDevices PrivateTmp PrivateNetwork PrivateUsers ProtectHome ProtectProc ProcSubset ProtectClock DeviceAllow"
    )
    assert not [key for key in blinding.split() if re.search(rf"^{key}=", text, re.MULTILINE)]
    assert set(setting("sekisho-agent.service", "CapabilityBoundingSet")[0].split()) == {
        *("CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SETUID", "CAP_SETGID")
    }
    allowed = set(setting("sekisho-agent.service", "SystemCallFilter")[0].split())
    assert {"fanotify_init", "fanotify_mark", "open_by_handle_at", "perf_event_open", "setns"} <= allowed
    assert setting("sekisho-agent.service", "SystemCallFilter")[-1].split() == ["setresuid", "setresgid", "setgroups"]
    assert setting("sekisho-agent.service", "RestrictNamespaces") == ["net"], "sockets of containers are asked for in there"
    assert "AF_NETLINK" in setting("sekisho-agent.service", "RestrictAddressFamilies")[0]


@pytest.mark.parametrize("unit", UNITS)
def test_a_hung_service_is_killed_and_comes_back(unit: str) -> None:
    assert setting(unit, "Type") == ["notify"]
    assert setting(unit, "Restart") == ["always"]
    assert setting(unit, "WatchdogSignal") == ["SIGKILL"], "a stopped process ignores SIGABRT"
    assert int(setting(unit, "WatchdogSec")[0].removesuffix("s")) <= 30
    assert setting(unit, "StartLimitIntervalSec") == ["0"]


def test_every_setting_left_out_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    comment = (PACKAGING / "sekisho-agent.service").read_text().split("# Missing on purpose:")[1].split("[Install]")[0]
    names = re.findall(r"\b(?:Private|Protect|Proc|Device)[A-Z]\w+", comment)
    assert len(names) >= 9
    assert not [name for name in names if f"`{name}`" not in page]


def test_install_sh_explains_itself_to_whoever_mistypes() -> None:
    done = run(PACKAGING / "install.sh", "--agnet")
    assert done.returncode == 2
    assert 'unknown option "--agnet"' in done.stderr
    assert "--collector" in done.stderr
    assert run(PACKAGING / "install.sh").returncode == 2
    assert run(PACKAGING / "install.sh", "--agent", "--purge").returncode == 2


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both programs installed below a directory, as for an image."""
    root = tmp_path_factory.mktemp("root")
    done = run(PACKAGING / "install.sh", "--agent", "--collector", "--root", root)
    if done.returncode and "pip could not install" in done.stderr:
        pytest.skip("no package index can be reached: install.sh --root needs one")
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_an_installed_tree_has_both_programs_their_units_and_a_closed_configuration(installed: Path) -> None:
    for command in ("sekisho-agent", "sekisho-collector"):
        link = installed / "usr/local/bin" / command
        assert os.readlink(link) == f"/opt/sekisho/bin/{command}"
        script = installed / "opt/sekisho/bin" / command
        assert script.read_text().splitlines()[0] == "#!/opt/sekisho/bin/python", (
            "the script must name its place on the machine"
        )
        assert run(installed / "opt/sekisho/bin/python", script, "--version").returncode == 0
    for unit in UNITS:
        assert (installed / "etc/systemd/system" / unit).is_file()
        assert (installed / "etc/systemd/system/multi-user.target.wants" / unit).is_symlink()
    for name in ("config.toml", "collector.toml"):
        path = installed / "etc/sekisho" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        config.parse(path.read_text(), name)
    hints = (installed / "etc/sekisho/config.toml").read_text()
    config.parse(re.sub(r"^# (?=\[|\w+ = )", "", hints, flags=re.MULTILINE))


def test_installing_again_keeps_the_sites_configuration_and_removing_keeps_the_records(installed: Path) -> None:
    settings = installed / "etc/sekisho/config.toml"
    settings.write_text('[agent]\nname = "ours"\n')
    state = installed / "var/lib/sekisho"
    state.mkdir(parents=True)
    (state / "agent.key").write_bytes(b"k")
    again = run(PACKAGING / "install.sh", "--agent", "--root", installed)
    assert again.returncode == 0, again.stderr
    assert "ours" in settings.read_text()
    gone = run(PACKAGING / "install.sh", "--uninstall", "--root", installed)
    assert gone.returncode == 0, gone.stderr
    assert not (installed / "opt/sekisho").exists()
    assert not list(installed.rglob("sekisho-*"))
    assert settings.exists() and (state / "agent.key").exists()
    purged = run(PACKAGING / "install.sh", "--uninstall", "--purge", "--root", installed)
    assert purged.returncode == 0
    assert not settings.exists() and not state.exists()


EJECT = """
set -e
mount -t tmpfs none "$1"; mount --make-shared "$1"; mkdir "$1/stick"
truncate -s 4M "$1/image"; mkfs.ext4 -q "$1/image"; mount -o loop "$1/image" "$1/stick"
mkfifo "$1/ready" "$1/go"
unshare -m --propagation slave sh -c '
    echo > "$0/ready"; read _ < "$0/go"; grep -c "$0/stick " /proc/self/mountinfo || true' "$1" > "$1/seen" &
read _ < "$1/ready"
umount "$1/stick"
losetup -j "$1/image" > "$1/still"
echo > "$1/go"; wait
cat "$1/still" "$1/seen"
umount "$1"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root is needed to mount a loop device")
@pytest.mark.skipif(
    not shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin:/bin"),
    reason="mkfs.ext4 is missing: apt-get install e2fsprogs",
)
def test_a_service_with_its_own_mounts_does_not_keep_a_stick_from_being_ejected(tmp_path: Path) -> None:
    """What PrivateMounts= does: a slave copy of the mounts. Unmounting outside must free the device."""
    if run("unshare", "-m", "true").returncode:
        pytest.skip("mount namespaces can't be made here")
    done = run("sh", "-c", EJECT, "sh", tmp_path, env={"PATH": SBIN})
    subprocess.run(["umount", str(tmp_path / "stick"), str(tmp_path)], capture_output=True)
    if "failed to setup loop device" in done.stderr:
        pytest.skip("no loop device can be had here")
    assert done.stdout == "0\n", done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("man"), reason="man is missing: apt-get install man-db")
@pytest.mark.parametrize("page", sorted((PACKAGING / "man").glob("*.8")), ids=lambda page: page.name)
def test_man_pages_are_clean_and_list_every_command(page: Path) -> None:
    done = run("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", page, env={"LC_ALL": "C.UTF-8", "MANROFFSEQ": ""})
    assert done.returncode == 0 and not done.stderr, done.stderr


CONFINE = """
import ctypes, os, sys
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 24, 38, 65, 1
libc = ctypes.CDLL(None, use_errno=True)
kept = {int(number) for number in sys.argv[1].split(",")}
last = int(open("/proc/sys/kernel/cap_last_cap").read())
for number in range(last + 1):
    if number not in kept:
        assert libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)  # since Linux 6.3
os.execv(sys.argv[2], sys.argv[2:])
"""
CAPABILITIES = {"CAP_DAC_READ_SEARCH": 2, "CAP_SETGID": 6, "CAP_SETUID": 7}
CAPABILITIES |= {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN)")
def test_the_units_capabilities_are_enough_to_see_everything(tmp_path: Path, sekisho_media: Media) -> None:
    """The agent with the bounding set of its unit and a mount namespace of its own, as systemd would start it."""
    names = setting("sekisho-agent.service", "CapabilityBoundingSet")[0].split()
    numbers = ",".join(str(CAPABILITIES[name]) for name in names)
    agent = Agent(tmp_path, sekisho_media)
    (agent.protected / "a.csv").write_text("1,佐藤\n" * 1000)
    daemon = [sys.executable, "-m", "agent.cli", "run", "-c", str(agent.config_file)]
    # The service manager makes the machine's mounts shared; a build machine's may be private, so these are made so here.
    media = str(sekisho_media.root)
    run("mount", "--bind", media, media)
    run("mount", "--make-shared", media)
    confined = ["unshare", "-m", "--propagation", "slave", sys.executable, "-c", CONFINE, numbers, *daemon]
    with agent.log.open("ab") as log:
        running = subprocess.Popen(confined, stdout=log, stderr=log, cwd=ROOT)
    try:
        until(agent.status, lambda: f"it does not start:\n{agent.log.read_text()}")
        stick = sekisho_media.plug("stick1", fs="tmpfs", serial="60A44C")
        until(lambda: str(stick.path) in agent.status()["watched_media"], "the stick is not watched")
        subprocess.run(["cp", str(agent.protected / "a.csv"), str(stick.path)], check=True)
        copied = agent.wait_for("file.copied_out")
        assert copied["unmapped"]["sekisho"]["process"]["exe"].endswith("/cp")
        assert copied["unmapped"]["sekisho"]["attribution"] == "exact"
        blind = set(agent.status()["blind"])
        assert not blind & {"process", "login_user", "short_lived_writers", "short_lived_processes", "raw_devices"}, blind
    finally:
        running.terminate()
        code = running.wait(20)
        sekisho_media.close()
        run("umount", "-R", media)
    assert code == 0
