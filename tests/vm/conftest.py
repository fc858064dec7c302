"""The real-hardware tier's stage: a Debian guest with USB, the agent installed in it as packaging installs it, and a
collector on the host behind TLS.

Owns: building the guest image and, once per state of the product, a guest with the agent installed (kept running beside
the image, so that each test starts in about a second); the collector's certificate and process; waiting for events.
Must not know any story. Run by `SEKISHO_VM=1 pytest tests/vm`; emulated code is ten times slower, so are the waits.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vm import CACHE, VM, LabError

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
DEADLINE_S = 90.0
INSTALLS = ["agent", "server_stub", "packaging", "pyproject.toml", "README.md", "LICENSE"]
TOKEN = "enrol-this-guest"
Event = dict[str, Any]
EVIDENCE = Path(os.environ.get("SEKISHO_VM_EVIDENCE") or CACHE / "evidence")
"""Where each story leaves the admin's screen: the lines of `sekisho-collector tail`"""

needs_a_guest = [
    pytest.mark.timeout(1800),  # the first story installs the guest
    pytest.mark.skipif(not os.environ.get("SEKISHO_VM"), reason="real USB in a guest: make test-vm (root, 3 GB of disk)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="real USB in a guest: building its image needs root"),
]
"""The marks of a module of stories."""

SETUP = """
set -e
mkdir -p /srv/customers/2014
for month in 06 07 08; do head -c 40000 /dev/urandom | base64 >/srv/customers/2014-$month.csv; done
head -c 60000000 /dev/urandom >/srv/customers/all.bin
for n in $(seq 40); do echo "row $n" >/srv/customers/2014/part$n.csv; done
chmod -R a+rX /srv/customers
mkdir -p /mnt/stick
"""


def product() -> dict[str, bytes]:
    """Every file that an installation takes, by its path in the repository."""
    found = {}
    for name in INSTALLS:
        for path in sorted((REPO / name).rglob("*")) if (REPO / name).is_dir() else [REPO / name]:
            if path.is_file() and "__pycache__" not in path.parts:
                found[str(path.relative_to(REPO))] = path.read_bytes()
    return found


def wheels() -> Path:
    """The agent's dependencies for the guest's Python (3.11), fetched once through this machine's own pip."""
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    needs = [*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel"]
    folder = CACHE / f"wheels-{hashlib.sha256(repr(needs).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        fresh = folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "-d",
            str(fresh),
            "--only-binary=:all:",
            "--python-version",
            "3.11",
        ]
        command += ["--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none"]
        for platform in ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64", "any"):
            command += ["--platform", platform]
        subprocess.run([*command, *needs], check=True)
        fresh.rename(folder)
    return folder


def install() -> str:
    """The name of a kept guest in which packaging/install.sh has installed this very checkout's agent; made if missing."""
    subprocess.run([HERE / "build_image.sh"], check=True)
    files, packages = product(), wheels()
    digest = hashlib.sha256(repr(sorted(files.items())).encode() + packages.name.encode())
    digest.update((CACHE / "stable" / "made_by").read_bytes() + SETUP.encode())
    name = f"agent-{digest.hexdigest()[:12]}"
    if (CACHE / "stable" / f"{name}.state").exists():
        return name
    for old in (CACHE / "stable").glob("agent-*"):
        old.unlink()
    with VM() as vm:
        for path, content in files.items():
            target = REPO / path
            vm.push(content, f"/root/sekisho/{path}", mode=0o755 if os.access(target, os.X_OK) else 0o644)
        vm.push(packages, "/root/wheels")
        vm.run("bash /root/sekisho/packaging/install.sh --agent --wheels /root/wheels --no-start", timeout=900)
        vm.run(SETUP)
        vm.freeze(name)
    return name


@pytest.fixture(scope="session")
def installed() -> str:
    """The kept guest that every story starts from."""
    return install()


class Collector:
    """A real `sekisho-collector serve` on the host, with a certificate for the name "collector", and what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.config = folder / "collector.toml"
        self._certify()
        self.config.write_text(
            f'[collector]\nlisten = "127.0.0.1:{self.port}"\nstate_dir = "{folder}/state"\nenroll_token = "{TOKEN}"\n'
            f'tls_cert = "{folder}/tls.crt"\ntls_key = "{folder}/tls.key"\n'
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def ca(self) -> bytes:
        """The authority that agents pin."""
        return (self.folder / "ca.crt").read_bytes()

    def start(self) -> None:
        """Serve, and wait until it does."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command("serve"), stdout=log, stderr=log, env=environment())
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    pytest.fail(f"the collector does not start:\n{(self.folder / 'log').read_text()}")
                time.sleep(0.05)

    def stop(self) -> None:
        """End it; what it holds stays."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def events(self) -> list[Event]:
        """All it holds, in the order in which it took them."""
        done = subprocess.run(self._command("query", "-o", "json"), capture_output=True, env=environment(), check=False)
        if done.returncode:
            pytest.fail(f"query failed: {done.stderr.decode()}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def screen(self) -> str:
        """What the admin's tail shows of all that came."""
        command = self._command("tail", "-n", "500")
        return subprocess.run(command, capture_output=True, env=environment(), check=False, text=True).stdout

    def admin(self, *what: str) -> str:
        """A command of the administrator's, as `media approve …`; what it printed."""
        done = subprocess.run(self._command(*what), capture_output=True, env=environment(), check=False, text=True)
        if done.returncode:
            pytest.fail(f"sekisho-collector {' '.join(what)}: {done.stderr}")
        return done.stdout

    def _command(self, *what: str) -> list[str]:
        return [sys.executable, "-m", "server_stub.cli", *what, "-c", str(self.config)]

    def _certify(self) -> None:
        def openssl(*words: str) -> None:
            done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, text=True, check=False)
            assert not done.returncode, f"openssl {words[0]}: {done.stderr}"

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl("req", "-x509", *key, "-days", "30", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.crt")
        openssl("req", *key, "-subj", "/CN=collector", "-keyout", "tls.key", "-out", "tls.csr")
        (self.folder / "san").write_text("subjectAltName=DNS:collector\nextendedKeyUsage=serverAuth\n")
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30", "-extfile", "san")
        openssl("x509", "-req", "-in", "tls.csr", "-out", "tls.crt", *signing)


class Workstation:
    """The guest with a running agent, and the collector that it talks to."""

    def __init__(self, vm: VM, collector: Collector) -> None:
        self.vm, self.collector = vm, collector

    def configure(self) -> None:
        """Write its configuration, start the agent, wait until the collector has heard from it."""
        self.vm.push(self.collector.ca, "/etc/sekisho/ca.crt")
        self.vm.push(
            f"""
[agent]
name = "ws-042"
[[agent.protect]]
path = "/srv/customers"
label = "顧客マスタ"
[agent.collector]
url = "https://collector:{self.collector.port}"
token = "{TOKEN}"
ca_file = "/etc/sekisho/ca.crt"
heartbeat = "5s"
""".encode(),
            "/etc/sekisho/config.toml",
            mode=0o600,
        )
        self.vm.run("sync && systemctl restart sekisho-agent", timeout=180)  # sync: for stories that lose power
        self.wait_for("agent.started")

    def events(self, code: str = "") -> list[Event]:
        """What the collector holds of it, in order."""
        return [event for event in self.collector.events() if not code or event["metadata"]["event_code"] == code]

    def spooled(self) -> list[Event]:
        """What its own spool holds, in order; after a kill this is what was durable."""
        lines = self.vm.run("sekisho-agent events -o json").out.splitlines()
        return [json.loads(line) for line in lines]

    def wait_for(
        self, code: str, count: int = 1, where: Callable[[Event], bool] | None = None, within_s: float = DEADLINE_S
    ) -> Any:
        """At least `count` events of `code` (for which `where` holds) at the collector; one, or the list of them."""
        deadline = time.monotonic() + within_s
        while True:
            found = [event for event in self.events(code) if where is None or where(event)]
            if len(found) >= count:
                return found[0] if count == 1 else found
            if time.monotonic() > deadline:
                pytest.fail(f"{len(found)} of {count} × {code} came within {within_s:.0f} s\n{self.story()}")
            time.sleep(0.3)

    def wait_until(self, command: str, within_s: float = DEADLINE_S) -> str:
        """Until a shell line in the guest succeeds; its output."""
        deadline = time.monotonic() + within_s
        while (done := self.vm.run(command, check=False)).rc:
            if time.monotonic() > deadline:
                pytest.fail(f"{command!r} did not succeed within {within_s:.0f} s: {done.out}{done.err}\n{self.story()}")
            time.sleep(0.3)
        return done.out.strip()

    def main_pid(self) -> int:
        """The agent's process, 0 while there is none."""
        return int(self.vm.run("systemctl show -P MainPID sekisho-agent").out)

    def status(self) -> dict[str, Any]:
        """What `sekisho-agent status --json` says."""
        found: dict[str, Any] = json.loads(self.vm.run("sekisho-agent status --json", check=False).out)
        return found

    def story(self) -> str:
        """Everything worth reading when a test fails."""
        try:
            log = self.vm.run("journalctl -u sekisho-agent --no-pager | tail -40; sekisho-agent status", check=False).out
        except LabError as error:
            log = str(error)
        events = "\n".join(json.dumps(event, ensure_ascii=False) for event in self.events()[-60:])
        return f"{log}\n{(self.collector.folder / 'log').read_text()[-2000:]}\n{events}"


def own(event: Event) -> Event:
    """What only Sekisho says of an event."""
    found: Event = event["unmapped"]["sekisho"]
    return found


def sources(events: list[Event]) -> set[str]:
    """The protected files that events name."""
    return {own(event)["source"]["path"] for event in events}


def environment() -> dict[str, str]:
    """For commands of this checkout."""
    return os.environ | {"PYTHONPATH": str(REPO)}


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    """A collector that serves."""
    running = Collector(tmp_path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def workstation(installed: str, collector: Collector, request: pytest.FixtureRequest) -> Iterator[Workstation]:
    """A guest whose agent runs, is enrolled and watches /srv/customers. The admin's screen is kept as evidence."""
    with VM(base=installed) as vm:
        ws = Workstation(vm, collector)
        ws.configure()
        yield ws
        EVIDENCE.mkdir(parents=True, exist_ok=True)
        (EVIDENCE / f"{request.node.name}.txt").write_text(collector.screen())
