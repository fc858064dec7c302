"""`make demo`: a real collector and a real agent on this machine, a stick, and somebody who copies customer files to it.

Nothing is faked: the commands shown are run, the lines below them are what `sekisho-collector tail -f` prints, and at the end
the collector's API is asked whether every expected event arrived (exit 1 and what is missing otherwise). All of it happens in
one scratch directory, which is removed, and mounts are undone, also after Ctrl-C.

With root the stick is an ext4 image on a loop device and fanotify watches; without, a plain folder and inotify, which
names no process and no person. The demo says which. The upload goes to a server in a network namespace, from another one: the
machine's own network is not touched, and nothing leaves it.
"""

import argparse
import json
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
NOBODY_LOGGED_IN = 2**32 - 1
BURST_FILES = 120
CAP_SYS_ADMIN = 21
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else text


def say(text: str = "") -> None:
    print(text, flush=True)


class Missing(Exception):
    """Something that should have happened did not; str() says what."""


# -- who runs it -------------------------------------------------------------------------------------------------------


def privileged() -> bool:
    """Whether we are root with what root can do: in a plain container root has no CAP_SYS_ADMIN (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    effective = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return os.geteuid() == 0 and bool(effective >> CAP_SYS_ADMIN & 1)


def become_root(args: argparse.Namespace) -> None:
    """Start again by sudo, if there is one and the person agrees; otherwise go on without."""
    if os.geteuid() == 0 or args.no_root or not shutil.which("sudo"):
        return
    silent = subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0
    if not silent:
        if not sys.stdin.isatty():
            return
        say("fanotify and loop mounts need root: sudo will ask for your password (Ctrl-C there: go on without root).")
        if subprocess.run(["sudo", "-v"]).returncode != 0:
            return
    os.execvp("sudo", ["sudo", sys.executable, __file__, *sys.argv[1:]])


class Person:
    """The somebody at the keyboard: a login uid for the processes that play them, as far as this kernel keeps one."""

    def __init__(self) -> None:
        people = [each for each in pwd.getpwall() if 1000 <= each.pw_uid < 60000]
        invoker = os.environ.get("SUDO_USER", "")
        wanted = next((each for each in people if each.pw_name == invoker), people[0] if people else None)
        self.uid = wanted.pw_uid if wanted else 1000
        self.name = wanted.pw_name if wanted else "uid 1000"
        self.account = wanted
        self.why_not = self._why_no_login_uid()

    def _why_no_login_uid(self) -> str:
        try:
            current = int(Path("/proc/self/loginuid").read_text())
        except OSError:
            return "this kernel keeps no login uid (audit is not compiled in)"
        if not privileged():
            return "" if current != NOBODY_LOGGED_IN else "nobody logged in here (no login uid), and only root may set one"
        probe = subprocess.run(["sh", "-c", f"echo {self.uid} > /proc/self/loginuid"], capture_output=True)
        if probe.returncode == 0:
            return ""
        if current != NOBODY_LOGGED_IN:
            self.uid = current
            with suppress(KeyError):
                self.account = pwd.getpwuid(current)
                self.name = self.account.pw_name
            return ""
        return "this machine does not let the login uid be set (a container, perhaps)"

    def log_in(self) -> None:
        """In the child, before exec: what pam_loginuid does at a login."""
        with suppress(OSError):
            Path("/proc/self/loginuid").write_text(str(self.uid))

    def instead_of_root(self) -> list[str]:
        """A command's first words that run it as this person."""
        if not self.account:
            return []
        return ["setpriv", f"--reuid={self.account.pw_uid}", f"--regid={self.account.pw_gid}", "--init-groups"]

    def log_in_and_drop_root(self) -> None:
        """As `log_in`, then become that user."""
        self.log_in()
        if privileged() and self.account:
            os.initgroups(self.account.pw_name, self.account.pw_gid)
            os.setgid(self.account.pw_gid)
            os.setuid(self.account.pw_uid)


# -- what is copied ----------------------------------------------------------------------------------------------------


def make_customers(root: Path) -> None:
    """Synthetic customer files: names drawn from lists, nobody's data. Three large ones, and many small ones for a burst."""
    chance = random.Random(2014)
    family = "佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤 吉田 山田 佐々木 山口 松本 井上".split()
    given = "陽翔 蓮 湊 葵 結菜 陽葵 凛 律 碧 芽依 咲良 大和 悠真 莉子 紬 樹".split()
    towns = "札幌市 仙台市 さいたま市 千葉市 横浜市 新潟市 静岡市 名古屋市 京都市 大阪市 神戸市 岡山市 広島市 福岡市".split()

    def row(number: int) -> str:
        born = f"{chance.randint(2000, 2012)}-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}"
        return f"{number:08},{chance.choice(family)} {chance.choice(given)},{born},{chance.choice(towns)}\n"

    block = "".join(row(number) for number in range(5000))
    header = "会員番号,氏名,生年月日,住所\n"
    root.mkdir(parents=True)
    for month, times in (("2014-04", 3), ("2014-05", 5), ("2014-06", 8)):
        (root / f"{month}.csv").write_text(header + block * times)
    (root / "orders").mkdir()
    for number in range(BURST_FILES):
        at = number * 40
        (root / "orders" / f"{number:04}.csv").write_text(header + block[at * 30 : at * 30 + 20_000])


# -- the two programs and the tail -------------------------------------------------------------------------------------


class House:
    """One scratch directory with a running collector, a running agent, and the admin's tail."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.customers = scratch / "srv" / "customers"
        self.home = scratch / "home" / "somebody"
        self.media = scratch / "media"
        self.state = scratch / "state"
        self.collector_toml, self.agent_toml = scratch / "collector.toml", scratch / "agent.toml"
        self.children: list[subprocess.Popen[Any]] = []
        self.shown = 0
        self.collapse = ""
        self.collapsed = 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.token = ""

    def command(self, name: str, *args: str) -> list[str]:
        config = self.collector_toml if name == "sekisho-collector" else self.agent_toml
        return [str(BIN / name), *args, "-c", str(config)]

    def run(self, name: str, *args: str, show: bool = False) -> str:
        """Run one of our commands; its output. Raises Missing if it fails."""
        line = " ".join((name, *args))
        if show:
            say(f"{paint('$', '2')} {paint(line, '1')}")
        done = subprocess.run(self.command(name, *args), capture_output=True, text=True, timeout=60)
        if show and done.stdout:
            say(done.stdout.rstrip())
        if done.returncode:
            raise Missing(f"{line} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def start(self, name: str, *args: str) -> None:
        with (self.scratch / f"{name}.log").open("ab") as log:
            self.children.append(subprocess.Popen(self.command(name, *args), stdout=log, stderr=log))

    def open(self) -> None:
        """Start collector, agent and tail; returns once the agent watches."""
        make_customers(self.customers)
        self.media.mkdir()
        self.home.mkdir(parents=True)
        self.home.chmod(0o777)
        listen = self.url.removeprefix("http://")
        self.collector_toml.write_text(
            f'[collector]\nlisten = "{listen}"\nstate_dir = {json.dumps(str(self.scratch / "collector"))}\n'
        )
        self.start("sekisho-collector", "serve")
        self.until(lambda: self.get("/readyz") is not None, "the collector did not start")
        enrolment = self.run("sekisho-collector", "token", "create", "--enroll").strip()
        self.token = self.run("sekisho-collector", "token", "create", "--role", "viewer").strip()
        self.agent_toml.write_text(
            f'[agent]\nname = "ws-042"\nstate_dir = {json.dumps(str(self.state))}\n'
            f'[[agent.protect]]\npath = {json.dumps(str(self.customers))}\nlabel = "顧客マスタ"\n'
            f'[agent.collector]\nurl = "{self.url}"\ntoken = "{enrolment}"\nheartbeat = "5s"\n'
            f"[agent.media]\nsimulated_dir = {json.dumps(str(self.media))}\n"
        )
        self.start("sekisho-agent", "run")
        self.until(self._watches, "the agent does not watch the protected directory")
        self.until(lambda: self.count()["agent.started"], "the agent's first event did not reach the collector")
        follow = self.command("sekisho-collector", "tail", "-f", "-n", "0")
        tail = subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.children.append(tail)
        threading.Thread(target=self._show, args=(tail,), daemon=True).start()
        self.until(lambda: b"sekisho_tail_readers 1" in (self.get("/metrics") or b""), "the tail did not connect")

    def _show(self, tail: subprocess.Popen[str]) -> None:
        """Print the tail as it comes; of a burst only the first lines, and how many more there were."""
        assert tail.stdout is not None
        for line in tail.stdout:
            if self.collapse and self.collapse in line:
                self.collapsed += 1
            if self.collapsed <= 3 or self.collapse not in line:
                say("  " + line.rstrip())
            self.shown += 1

    def close(self) -> None:
        """Pull what is plugged and end what was started, the newest first."""
        for descriptor in self.media.glob("*.medium.toml"):
            name = descriptor.name.removesuffix(".medium.toml")
            subprocess.run(self.command("sekisho-agent", "sim", "unplug", name), capture_output=True)
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for folder in self.media.glob("*"):
            if os.path.ismount(folder):
                subprocess.run(["umount", "-l", str(folder)], capture_output=True)

    # -- asking --

    def status(self) -> Any:
        done = subprocess.run(self.command("sekisho-agent", "status", "--json"), capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode in (0, 3) else None

    def _watches(self) -> bool:
        status = self.status()
        return bool(status) and all(tree["watched"] for tree in status["protected"])

    def get(self, path: str) -> Any:
        """An answer of the collector's API, or None while it does not answer."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                body = answer.read()
        except (urllib.error.URLError, OSError):
            return None
        return json.loads(body) if body[:1] in (b"{", b"[") else body

    def events(self) -> Iterator[dict[str, Any]]:
        after = ""
        while True:
            page = self.get(f"/v1/events?order=asc&limit=500{'&after=' + str(after) if after else ''}")
            if page is None:
                return
            yield from page["events"]
            after = page["next"]
            if not after:
                return

    def count(self) -> Counter[str]:
        """How many events of each code the collector holds."""
        return Counter(event["metadata"]["event_code"] for event in self.events())

    def until(self, holds: Callable[[], Any], otherwise: str, within_s: float = 15.0) -> None:
        deadline = time.monotonic() + within_s
        while not holds():
            for child in self.children:
                if child.poll() not in (None, 0):
                    logs = "\n".join(log.read_text() for log in self.scratch.glob("*.log"))
                    raise Missing(f"{otherwise}: {child.args[0]} ended with {child.returncode}\n{logs}")
            if time.monotonic() > deadline:
                raise Missing(otherwise)
            time.sleep(0.05)


class Elsewhere:
    """Two network namespaces joined by a cable: in one sits whoever uploads, in the other a web server that takes all.

    They live as long as the two processes that hold them, and these end with us, whatever happens: their input ends then.
    """

    ADDRESS = "203.0.113.80"  # reserved for examples (RFC 5737)
    NEAR = "import sys; print(flush=True); sys.stdin.read()"
    FAR = """
import http.server, sys, threading
class Take(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.end_headers()
threading.Thread(target=http.server.HTTPServer(("", 80), Take).serve_forever, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""

    def __init__(self) -> None:
        self.held: list[subprocess.Popen[str]] = []
        self.prefix: list[str] = []

    def open(self) -> None:
        """Raises Missing, saying what this machine lacks."""
        for program in ("ip", "curl", "unshare", "nsenter", "setpriv"):
            if not shutil.which(program):
                raise Missing(f"{program} is not installed")
        near, far = self._hold(self.NEAR), self._hold(self.FAR)
        for where, command in (
            (near, f"link add cable type veth peer name cable netns {far.pid}"),
            (near, "addr add 203.0.113.7/24 dev cable"),
            (near, "link set cable up"),
            (far, f"addr add {self.ADDRESS}/24 dev cable"),
            (far, "link set cable up"),
        ):
            done = subprocess.run([*self._inside(where), "ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                raise Missing(done.stderr.strip())
        self.prefix = self._inside(near)

    def close(self) -> None:
        for process in self.held:
            process.kill()
            process.communicate()

    @staticmethod
    def _inside(process: "subprocess.Popen[str]") -> list[str]:
        return ["nsenter", f"--net=/proc/{process.pid}/ns/net"]

    def _hold(self, program: str) -> "subprocess.Popen[str]":
        """A Python program in a network namespace of its own, until its input ends; returns once it has printed a line."""
        words = ["unshare", "-n", sys.executable, "-c", program]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.held.append(process)
        assert process.stdout is not None and process.stderr is not None
        if not process.stdout.readline():
            raise Missing(process.stderr.read().strip())
        return process


# -- the story ---------------------------------------------------------------------------------------------------------


class Shell:
    """A shell that the person logged in to, before anything else happened; its commands are run one after the other."""

    END = "the command ended with"

    def __init__(self, environment: dict[str, str], log_in: Callable[[], None]) -> None:
        ours, theirs = os.openpty()  # a terminal, as people have one: what two commands both write to a pipe could be data
        self.said = os.fdopen(ours, encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            ["bash", "-s"],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            text=True,
            env=environment,
            cwd="/",
            preexec_fn=log_in,  # noqa: PLW1509 (no thread is there yet)
        )
        os.close(theirs)

    def run(self, command: str) -> tuple[int, str]:
        """A command's exit status and what it said. Raises Missing if the shell itself is gone."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{{ {command}\n}} </dev/null; echo {self.END} $?\n")
        self.process.stdin.flush()
        said: list[str] = []
        with suppress(OSError):  # EIO: nobody has the other end any more
            for line in self.said:
                if line.startswith(self.END):
                    return int(line.rsplit(" ", 1)[1]), "".join(said).strip()
                said.append(line)
        raise Missing(f"the shell ended: {''.join(said).strip()}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


class Story:
    """The steps, each shown, run, and checked at the collector."""

    def __init__(self, house: House, person: Person, root: bool) -> None:
        self.house, self.person, self.root = house, person, root
        self.missing: list[str] = []
        stick, home = str(house.media / "stick"), str(house.home)
        path = os.environ.get("PATH", "/usr/bin:/bin")
        environment = {"PATH": path, "LC_ALL": "C.UTF-8", "C": str(house.customers), "STICK": stick, "HOME": home}
        self.login = Shell(environment, person.log_in_and_drop_root)
        self.as_root = Shell(environment, person.log_in)

    def close(self) -> None:
        """The person logs out."""
        self.login.close()
        self.as_root.close()

    @contextmanager
    def expecting(self, title: str, **codes: int) -> Iterator[None]:
        """Run a step; afterwards wait until the collector holds so many events more of each code."""
        say(f"\n{paint(title, '36')}")
        before, shown = self.house.count(), self.house.shown
        yield
        done = time.monotonic()
        wanted = {code.replace("__", "."): number for code, number in codes.items()}

        def arrived() -> bool:
            now = self.house.count()
            return all(now[code] - before[code] >= number for code, number in wanted.items())

        try:
            self.house.until(arrived, "not in time")
            every = self.house.count().total() - before.total()
            self.house.until(lambda: self.house.shown - shown >= every, "the tail did not print them all", 5)
        except Missing as error:
            now = self.house.count()
            short = [f"{now[code] - before[code]} of {number} {code}" for code, number in wanted.items()]
            self.missing.append(f"{title} {error}; at the collector: {', '.join(short)}")
            return
        say(paint(f"  ({time.monotonic() - done:.1f} s after the command ended)", "2"))

    def shell(self, command: str, as_root: bool = False, inside: Elsewhere | None = None) -> None:
        """Show a shell command and let the person at the keyboard run it, `inside` a network namespace or here."""
        say(f"{paint('#' if as_root else '$', '2')} {paint(command, '1')}")
        if inside:  # entering a network namespace takes root; then the person takes over
            words = [*inside.prefix, *self.person.instead_of_root(), "bash", "-c", command]
            status, said = self.as_root.run(shlex.join(words))
        else:
            status, said = (self.as_root if as_root else self.login).run(command)
        if status:
            self.missing.append(f"{command} ended with {status}: {said}")

    def plug(self) -> None:
        """Plug the stick in: a real file system of its own where root can mount one, else a folder."""
        kinds = ["ext4", "tmpfs", "folder"] if self.root else ["folder"]
        for fs in kinds:
            args = ["sim", "plug", "stick", "--model", "DataTraveler 3.0", "--serial", "60A44C413F8CF320", "--fs", fs]
            try:
                self.house.run("sekisho-agent", *args)
            except Missing as error:
                if fs == kinds[-1]:
                    raise
                say(paint(f"  (no {fs} here: {error})", "2"))
                continue
            say(f"{paint('$', '2')} {paint(f'sekisho-agent sim plug stick --serial 60A44C413F8CF320 --fs {fs}', '1')}")
            break
        stick = self.house.media / "stick"
        stick.chmod(0o777)
        self.house.until(lambda: str(stick) in self.house.status()["watched_media"], "the agent does not watch the stick")

    def tell(self) -> None:
        """The whole story."""
        out = {"file__copied_out": 3}
        left = {"file__copied_out": 1, "copy__staged": 1}
        plugged = {"medium__attached": 1, "medium__mounted": 1, "medium__unapproved": 1}
        with self.expecting("A stick is plugged in that nobody approved.", **plugged):
            self.plug()
        with self.expecting("Three files are copied to it.", **out):
            self.shell("cp $C/2014-04.csv $C/2014-05.csv $C/2014-06.csv $STICK/")
        if self.root:
            with self.expecting("The same, packed, through a pipe: two processes.", **out):
                self.shell("tar -C $C -cf - 2014-04.csv 2014-05.csv 2014-06.csv | gzip -1 > $STICK/holiday.tgz")
            with self.expecting("As root by `sudo -i`: still the same person.", file__copied_out=1):
                self.shell("cat $C/2014-06.csv > $STICK/notes.txt", as_root=True)
            self.house.collapse = "orders/"
            with self.expecting(
                f"{BURST_FILES} files at once: more than the limit.", file__copied_out=BURST_FILES, copy__burst=1
            ):
                self.shell("cp -r $C/orders $STICK/")
            if self.house.collapsed > 3:
                say(paint(f"  (… and {self.house.collapsed - 3} more lines like these three)", "2"))
            with self.expecting("A copy is made elsewhere on the machine, under another name.", file__staged=1):
                self.shell("cp $C/2014-05.csv ~/notes.txt")
            with self.expecting("Later another program carries it out, packed: it is still the protected file.", **left):
                self.shell("gzip -c ~/notes.txt > $STICK/holiday.jpg")
            self.upload()
        with self.expecting("The stick is pulled.", medium__detached=1):
            self.house.run("sekisho-agent", "sim", "unplug", "stick", show=True)

    def upload(self) -> None:
        """A file goes to a server by the network, if this machine can hold one without being touched."""
        elsewhere = Elsewhere()
        try:
            elsewhere.open()
        except Missing as error:
            say(paint(f"\n(No upload is shown: {error}.)", "2"))
        else:
            with self.expecting("One is uploaded: no medium at all.", file__copied_out=1):
                self.shell(f"curl -sT $C/2014-04.csv http://{elsewhere.ADDRESS}/", inside=elsewhere)
        finally:
            elsewhere.close()

    def summary(self) -> None:
        """What an admin would ask next."""
        say(f"\n{paint('Who took how much, which machines are watched, and is the record whole?', '36')}")
        field = "user" if self.root and not self.person.why_not else "medium"
        self.house.run("sekisho-collector", "query", "--event", "file.copied_out", "--group-by", field, show=True)
        self.house.run("sekisho-collector", "agents", show=True)
        self.house.run("sekisho-agent", "verify", show=True)
        if self.root and not self.person.why_not:
            strangers = {
                (event["unmapped"]["sekisho"].get("login") or {}).get("uid")
                for event in self.house.events()
                if event["metadata"]["event_code"] == "file.copied_out"
            } - {self.person.uid}
            if strangers:
                self.missing.append(f"copies not told as those of {self.person.name}: login uid {strangers}")


def introduce(person: Person, root: bool) -> None:
    say(paint("Sekisho: which protected files leave this machine, onto what, by whose hand.", "1"))
    if root:
        say("Running as root: fanotify watches, the stick is a file system of its own.")
    else:
        say("Running without root: inotify watches. Not seen like this: which process and person copied, which file a copy")
        say("came from, pipes, short-lived programs. `sudo make demo` shows the whole.")
    if person.why_not:
        say(f"No person can be named: {person.why_not}. On a machine where people log in, lines carry their name.")
    else:
        say(f"The commands are run as the login user {person.name}.")
    say(paint("Indented lines are what `sekisho-collector tail -f` prints.", "2"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Sekisho's main job on this machine, in under a minute.")
    parser.add_argument("--no-root", action="store_true", help="do not ask for root; show the smaller part")
    parser.add_argument("--keep", action="store_true", help="leave the scratch directory for a look around")
    args = parser.parse_args()
    become_root(args)
    root = privileged() and not args.no_root
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = Path(tempfile.mkdtemp(prefix="sekisho-demo-"))
    scratch.chmod(0o755)
    person = Person()
    house = House(scratch)
    story = Story(house, person, root)
    try:
        introduce(person, root)
        house.open()
        story.tell()
        story.summary()
    except Missing as error:
        story.missing.append(str(error))
    except KeyboardInterrupt:
        say("\nstopped")
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # nothing may stop the cleaning up
        story.close()
        house.close()
        if args.keep:
            say(f"\nEverything is left in {scratch}: configuration, spool, store, logs.")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    if story.missing:
        say(f"\n{paint('The demo did not come out as it should:', '31')}")
        for each in story.missing:
            say(f"  - {each}")
        return 1
    say(f'\n{paint("Every expected event arrived.", "32")} Next: README.md, "Watch your own machine in five minutes".')
    return 0


if __name__ == "__main__":
    sys.exit(main())
