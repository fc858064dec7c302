"""After the theft of 2014: who knows his way around hides it, an auditor checks what was kept, a colleague is left alone.

The agent is killed and kept from coming back, its spool is cut, the clock is turned back: each of it is told by somebody. The
export is verified without the collector; of a database in which one row was altered, that row is named. And of the documents
that are the staff member's own, nothing is anywhere: not at the collector, not in the agent's spool, not in the export.
"""

import json
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from conftest import environment, needs_a_guest, own, sources

if TYPE_CHECKING:
    from conftest import Collector, Workstation

pytestmark = needs_a_guest

LISTS = "/srv/customers"
SPOOL = "/var/lib/sekisho/spool.db"


def test_a_killed_agent_a_cut_spool_and_a_clock_turned_back_are_told(workstation: "Workstation") -> None:
    ws = workstation
    ws.collector.stop()
    with ws.collector.config.open("a") as config:
        config.write('silent_after = "20s"\n')
    ws.collector.start()
    stick = ws.vm.plug_stick("UNKN0WN4", fs="vfat")
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "UNKN0WN4")
    ws.vm.run("date -s '+1 hour'")
    ws.wait_for("agent.clock", where=lambda event: own(event)["detail"]["jump_ms"] > 0)

    ws.vm.network(False)
    ws.vm.run(f"cp {LISTS}/2014-06.csv {LISTS}/2014-07.csv /mnt/stick/", user="contractor", pam=True)
    ws.wait_until("test $(sekisho-agent events -o json | grep -c file.copied_out) -ge 2")
    ws.vm.run("systemctl kill -s KILL sekisho-agent && systemctl stop sekisho-agent", timeout=180)  # nor does it come back
    ws.wait_until("systemctl is-active sekisho-agent | grep -qE '^(inactive|failed)$'")
    silent = ws.wait_for("agent.silent")
    assert silent["severity_id"] >= 4
    which = "(SELECT seq FROM link WHERE code = 'file.copied_out')"
    cut = f"DELETE FROM content WHERE seq IN {which}; DELETE FROM link WHERE code = 'file.copied_out'; SELECT changes();"
    assert int(ws.vm.run(["sqlite3", SPOOL, cut]).out) == 2

    ws.vm.network(True)
    ws.vm.run("systemctl start sekisho-agent", timeout=180)
    tampered = ws.wait_for("agent.tampered")
    assert tampered["severity_id"] == 5
    assert own(tampered)["detail"]["what"].startswith("spool_")
    ws.vm.run("date -s '-50 min'")
    back = ws.wait_for("agent.clock", where=lambda event: own(event)["detail"]["jump_ms"] < 0)
    assert -3_060_000 < own(back)["detail"]["jump_ms"] < -2_940_000
    ws.vm.run(f"cp {LISTS}/2014-08.csv /mnt/stick/", user="contractor", pam=True)
    assert sources(ws.events("file.copied_out") or [ws.wait_for("file.copied_out")]) == {f"{LISTS}/2014-08.csv"}


def verified(bundle: Path) -> tuple[int, str]:
    """What an auditor's `verify` says, somewhere else: its exit code and its lines."""
    command = [sys.executable, "-m", "server_stub.cli", "verify", str(bundle), "--lang", "en"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    return done.returncode, done.stdout + done.stderr


def altered(collector: "Collector", before: bytes, after: bytes) -> str:
    """Alter one row past the collector, which does not run; as `verify` names it."""
    collector.stop()
    with sqlite3.connect(collector.folder / "state" / "collector.db") as store:
        for pos, raw in store.execute("SELECT pos, raw FROM events ORDER BY pos").fetchall():
            if b"file.copied_out" in raw and before in raw:
                store.execute("UPDATE events SET raw = ? WHERE pos = ?", (raw.replace(before, after), pos))
                break
        else:
            raise AssertionError("no such row")
    collector.start()
    event = json.loads(raw)
    return f"altered: event {own(event)['seq']} of {event['device']['uid']}"


def test_an_auditor_names_the_altered_row_and_finds_nobodys_own_documents(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    stick = ws.vm.plug_stick("UNKN0WN5", fs="vfat")
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "UNKN0WN5")
    ws.vm.run(
        "mkdir ~/tagebuch && echo 'liebes tagebuch' >~/tagebuch/sommerfest.odt && cp ~/tagebuch/sommerfest.odt ~/again.odt && "
        "zip -q ~/sommerfest.zip ~/tagebuch/sommerfest.odt && cp -r ~/tagebuch ~/sommerfest.zip /mnt/stick/ && "
        "mv /mnt/stick/tagebuch/sommerfest.odt /mnt/stick/tagebuch/winterfest.odt && cat /mnt/stick/tagebuch/winterfest.odt",
        user="contractor",
        pam=True,
    )
    ws.vm.run(f"cp {LISTS}/2014-06.csv {LISTS}/2014-07.csv /mnt/stick/", user="contractor", pam=True)
    ws.wait_for("file.copied_out", 2)
    ws.vm.run("umount /mnt/stick")
    ws.vm.unplug("UNKN0WN5")
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == "UNKN0WN5")
    whole = tmp_path / "whole.zip"
    ws.collector.admin("export", "-o", str(whole))
    with zipfile.ZipFile(whole) as bundle:
        exported = b"".join(bundle.read(name) for name in bundle.namelist()).decode(errors="replace")
    told = json.dumps(ws.events()) + ws.collector.screen() + json.dumps(ws.spooled()) + exported
    log = ws.vm.run("journalctl -u sekisho-agent --no-pager; cat /var/lib/sekisho/*", check=False).out
    for private in ("sommerfest", "winterfest", "tagebuch", "again.odt"):
        assert private not in told.lower()
        assert private not in log.lower()
    assert "2014-06.csv" in told
    assert sources(ws.events("file.copied_out")) == {f"{LISTS}/2014-06.csv", f"{LISTS}/2014-07.csv"}

    assert verified(whole)[0] == 0
    named = altered(ws.collector, b"2014-06.csv", b"2014-66.csv")
    doubtful = tmp_path / "doubtful.zip"
    ws.collector.admin("export", "-o", str(doubtful))
    code, said = verified(doubtful)
    print(said)
    assert code == 1
    assert named in said
