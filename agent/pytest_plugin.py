"""pytest fixtures for anyone's test suite: `sekisho_media` and `sekisho_agent`.

Owns: a directory of simulated media per test, and a real agent process that watches it and a protected directory, with
its own state. Must not know any sensor. Events are read as any admin would: from the agent's spool.

    def test_copies_are_told(sekisho_agent, sekisho_media):
        (sekisho_agent.protected / "a.csv").write_text("…")
        stick = sekisho_media.plug("stick1", serial="60A44C")
        shutil.copy(sekisho_agent.protected / "a.csv", stick.path)
        event = sekisho_agent.wait_for("file.copied_out")
        assert event["unmapped"]["sekisho"]["medium"]["serial"] == "60A44C"
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import simulate

_DEADLINE_S = 20.0


class Media:
    """Plugs and pulls simulated media in one directory; pulls all at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ready: Callable[[str, bool], None] | None = None

    def plug(self, name: str, **claims: Any) -> simulate.Medium:
        """Plug a medium (see `agent.simulate.plug`) and, if an agent runs, wait until it watches it."""
        medium = simulate.plug(self.root, name, **claims)
        if self._ready:
            self._ready(str(medium.path), True)
        return medium

    def unplug(self, medium: simulate.Medium) -> None:
        """Pull a medium and, if an agent runs, wait until it noticed."""
        simulate.unplug(medium)
        if self._ready:
            self._ready(str(medium.path), False)

    def close(self) -> None:
        """Pull all that is plugged, also what a test left mounted without its descriptor."""
        self._ready = None
        for folder in self.root.iterdir():
            if os.path.ismount(folder):
                subprocess.run(["umount", "-l", str(folder)], check=True)
        for medium in simulate.present(self.root):
            simulate.unplug(medium)


class Agent:
    """A running agent: `protected` is its protected directory, `events()` what it recorded, `wait_for()` one to come."""

    def __init__(self, root: Path, media: Media, more_config: str = "", launcher: tuple[str, ...] = ()) -> None:
        self.root = root
        self._launcher = launcher
        self.protected = root / "protected"
        self.protected.mkdir(exist_ok=True)
        self.state_dir = root / "state"
        self.config_file = root / "config.toml"
        self.log = root / "agent.log"
        self._media = media
        self._process: subprocess.Popen[bytes] | None = None
        self.config_file.write_text(
            f'[agent]\nname = "test-machine"\nstate_dir = {json.dumps(str(self.state_dir))}\n'
            f'[[agent.protect]]\npath = {json.dumps(str(self.protected))}\nlabel = "customers"\n'
            f"[agent.media]\nsimulated_dir = {json.dumps(str(media.root))}\n{more_config}"
        )

    @property
    def pid(self) -> int:
        """The agent's process."""
        assert self._process is not None, "the agent is not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it watches."""
        with self.log.open("ab") as log:
            command = [*self._launcher, sys.executable, "-m", "agent.cli", "run", "-c", str(self.config_file)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        self._until(lambda: bool(self.status()), "the agent does not start")
        self._media._ready = self._media_ready

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """End it (SIGKILL: at once) and return its exit code."""
        self._media._ready = None
        if self._process is None:
            return 0
        self._process.send_signal(with_signal)
        code = self._process.wait(_DEADLINE_S)
        self._process = None
        return code

    def status(self) -> dict[str, Any]:
        """What `sekisho-agent status --json` says; empty while it does not answer."""
        from agent.checkup import NotRunning, ask

        if self._process is not None and self._process.poll() is not None:
            pytest.fail(f"the agent ended with {self._process.returncode}:\n{self.log.read_text()}")
        try:
            return ask(str(self.state_dir))
        except NotRunning:
            return {}

    def events(self, code: str = "") -> list[dict[str, Any]]:
        """All events recorded so far, oldest first, or those of one event code."""
        from agent.spoolfile import read_events

        found = [json.loads(data) for _, data in read_events(str(self.state_dir))]
        return [event for event in found if not code or event["metadata"]["event_code"] == code]

    def wait_for(self, code: str, count: int = 1, where: Callable[[dict[str, Any]], bool] | None = None) -> Any:
        """The event of `code` (for which `where` holds), or the list of them if `count` is more than one."""
        found: list[dict[str, Any]] = []

        def enough() -> bool:
            found[:] = [event for event in self.events(code) if where is None or where(event)]
            return len(found) >= count

        self._until(enough, f"{count} × {code} did not come")
        return found[0] if count == 1 else found

    def _media_ready(self, path: str, there: bool) -> None:
        self._until(lambda: (path in self.status().get("watched_media", [])) == there, f"the agent did not notice {path}")

    def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while not holds():
            if time.monotonic() > deadline:
                told = "\n".join(json.dumps(event, ensure_ascii=False) for event in self.events())
                pytest.fail(f"{otherwise}\n{self.log.read_text()}\n{told}")
            time.sleep(0.02)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}


@pytest.fixture
def sekisho_media(tmp_path: Path) -> Iterator[Media]:
    """A directory of simulated media."""
    root = tmp_path / "media"
    root.mkdir()
    media = Media(root)
    yield media
    media.close()


@pytest.fixture
def sekisho_agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    """A running agent that watches `sekisho_media` and a protected directory of its own."""
    agent = Agent(tmp_path, sekisho_media)
    agent.start()
    yield agent
    agent.stop()
