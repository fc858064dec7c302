"""The theft of 2014 again, on real parts: what the admin's screen shows while somebody with a right to read carries a
customer list away bit by bit, and while somebody else does it in one go.

Four stories of one machine, each from a fresh guest: the everyday week (an approved stick, a phone "to charge", a few files a
day, sudo and su between), the detour (dumped from a database, zipped, encrypted, renamed, an hour's wait), the bulk copy, and
the cut cable with a reboot and a power loss. Days pass by setting the guest's clock; nothing is waited for. What the admin
saw of each is kept as evidence, see README.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conftest import needs_a_guest, own, sources

if TYPE_CHECKING:
    from conftest import Workstation
    from vm import Stick

pytestmark = needs_a_guest

LISTS = "/srv/customers"
PHONE = "PH0NE2014"
LIMITS = """
[[agent.limit]]
name = "burst"
bytes = "100MiB"
window = "10m"
[[agent.limit]]
name = "drip"
files = 10
window = "30d"
"""
"""A month's few files: five on the approved stick, then two a day by MTP, which pass it on the third day"""

DOWN = ("stopped", "not_running")
"""What is said of the time in which nothing could be seen: by a reboot in order, and by a power loss"""


def limits(ws: "Workstation") -> None:
    """The site's own limits, into the running agent's configuration."""
    ws.vm.run("cat >>/etc/sekisho/config.toml && systemctl reload sekisho-agent", stdin=LIMITS.encode())
    ws.wait_for("agent.config", 2)


def plug_approved(ws: "Workstation", serial: str) -> "Stick":
    """The administrator plugs a stick once, enters it in the register by that event, and hands it out; it is plugged again."""
    image = ws.vm.plug_stick(serial, fs="vfat").image
    shown = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == serial)
    ws.vm.unplug(serial)
    words = ["--owner", "contractor", "--approver", "Suzuki", "--purpose", "delivery to the print shop", "--until", "never"]
    ws.collector.admin("media", "approve", "--from-event", shown["metadata"]["uid"], *words)
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == serial)
    ws.wait_until(f"grep -q {serial} /var/lib/sekisho/register.json")
    return ws.vm.plug_stick(serial, image=image)


def mount(ws: "Workstation", stick: "Stick", serial: str) -> None:
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == serial)


def pass_time(ws: "Workstation", how_long: str) -> None:
    """Set the guest's clock on."""
    ws.vm.run(f"date -s '+{how_long}'")


def copy_of(name: str) -> Any:
    return lambda event: own(event)["source"]["path"] == f"{LISTS}/{name}"


def test_an_approved_stick_then_a_phone_a_few_files_a_day(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    limits(ws)
    stick = plug_approved(ws, "APPR0VED1")
    again = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("decision") == "approved")
    assert again["severity_id"] <= 2
    mount(ws, stick, "APPR0VED1")
    ws.vm.run(f"cp {LISTS}/2014-0*.csv /mnt/stick/", user="contractor", pam=True)
    for copy in ws.wait_for("file.copied_out", 3):
        told = own(copy)
        assert told["bytes"] == int(ws.vm.run(["stat", "-c", "%s", told["source"]["path"]]).out)
        assert (told["medium"]["serial"], told["medium"]["decision"]) == ("APPR0VED1", "approved")
        assert (told["login"]["user"], told["process"]["exe"].rsplit("/", 1)[-1]) == ("contractor", "cp")

    ws.vm.run(f"sudo -i cp {LISTS}/2014/part1.csv /mnt/stick/", user="contractor", pam=True)
    ws.vm.run(f"sudo su -c 'cp {LISTS}/2014/part2.csv /mnt/stick/'", user="contractor", pam=True)
    for name in ("2014/part1.csv", "2014/part2.csv"):
        assert own(ws.wait_for("file.copied_out", where=copy_of(name)))["login"]["user"] == "contractor"
    assert not ws.events("copy.drip")
    ws.vm.run("umount /mnt/stick")
    ws.vm.unplug("APPR0VED1")

    ws.vm.plug_phone(PHONE, tmp_path / "phone")
    phone = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == PHONE)
    assert (own(phone)["medium"]["kind"], own(phone)["medium"]["decision"]) == ("phone", "unapproved")
    ws.wait_for("medium.unapproved", where=lambda event: own(event)["medium"].get("serial") == PHONE)
    part = 10
    for _ in range(3):
        assert not ws.events("copy.drip")
        pass_time(ws, "1 day")
        for _ in range(2):
            part += 1
            send = f"mtp-connect --sendfile {LISTS}/2014/part{part}.csv part{part}.csv"
            if part == 12:  # in another account's name, which he knows the password of
                send = f"echo staff | su staff -c '{send}'"
            for _ in range(3):  # a host under load: libmtp may give up on the emulated phone before it answers
                ws.vm.run(send, user="contractor", pam=True, timeout=180, check=False)
                if (tmp_path / "phone" / f"part{part}.csv").exists():
                    break
            told = own(ws.wait_for("file.copied_out", where=copy_of(f"2014/part{part}.csv")))
            assert (told["way"], told["medium"]["serial"], told["login"]["user"]) == ("mtp", PHONE, "contractor")
    drip = own(ws.wait_for("copy.drip"))
    assert (drip["limit"]["name"], drip["login"]["user"]) == ("drip", "contractor")
    assert drip["limit"]["files"] >= 10
    assert not ws.events("copy.burst")
    findings = [event for event in ws.events("medium.unapproved") if own(event)["medium"].get("serial") == PHONE]
    assert len({event["finding_info"]["uid"] for event in findings}) == 1, "one finding, which the first copy raises"


def test_what_was_dumped_zipped_encrypted_and_renamed_is_still_the_list(workstation: "Workstation") -> None:
    ws = workstation
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) SELECT i, hex(randomblob(20)) FROM n"
    ws.vm.run(f"sqlite3 {LISTS}/members.db 'CREATE TABLE member AS {rows}' && chmod a+r {LISTS}/members.db")
    steps = [
        f"sqlite3 {LISTS}/members.db .dump >~/work.sql",
        "zip -q ~/work.zip ~/work.sql && rm ~/work.sql",
        "openssl enc -aes-256-cbc -pbkdf2 -pass pass:a -in ~/work.zip -out ~/work.bin && rm ~/work.zip",
        "mv ~/work.bin ~/holiday.jpg",
    ]
    for number, step in enumerate(steps, 1):
        ws.vm.run(step, user="contractor", pam=True)
        if number < len(steps):
            ws.wait_for("file.staged", number)
    pass_time(ws, "1 hour")
    stick = ws.vm.plug_stick("UNKN0WN1", fs="vfat")
    mount(ws, stick, "UNKN0WN1")
    ws.vm.run("cp ~/holiday.jpg /mnt/stick/", user="contractor", pam=True)

    told = own(ws.wait_for("file.copied_out"))
    assert told["source"]["path"] == f"{LISTS}/members.db"
    assert told["link"] == "lineage"
    assert told["login"]["user"] == "contractor"
    assert (told["medium"]["serial"], told["medium"]["decision"]) == ("UNKN0WN1", "unapproved")
    assert told["bytes"] == int(ws.vm.run(f"stat -c %s {LISTS}/members.db").out), "of the source, as it is told"
    assert told["dest"]["size"] == int(ws.vm.run("stat -c %s /mnt/stick/holiday.jpg").out)
    finding = ws.wait_for("copy.staged")
    assert own(finding)["source"]["path"] == f"{LISTS}/members.db"
    assert finding["severity_id"] >= 4


def test_the_whole_directory_in_one_go_is_found_before_it_is_through(workstation: "Workstation") -> None:
    ws = workstation
    limits(ws)
    ws.vm.run(
        f"mkdir {LISTS}/scans && cd {LISTS}/scans && head -c 10M /dev/urandom >1.bin && "
        "for n in $(seq 2 20); do cp 1.bin $n.bin; done && sync"
    )
    stick = ws.vm.plug_stick("UNKN0WN2", 300, "vfat")
    mount(ws, stick, "UNKN0WN2")
    copying = ws.vm.spawn(
        f"cp -r {LISTS}/scans /mnt/stick/ && sync -f /mnt/stick && date +%s%3N", user="contractor", pam=True, timeout=300
    )
    burst = ws.wait_for("copy.burst")
    still = len(ws.events("file.copied_out"))
    through_ms = int(copying().out)
    print(f"copy.burst {(through_ms - burst['time']) / 1000:.1f} s before the copy was through, with {still} of 20 files told")
    assert burst["time"] < through_ms
    assert own(burst)["login"]["user"] == "contractor"
    assert own(burst)["limit"]["bytes"] >= 100 << 20
    assert sources(ws.wait_for("file.copied_out", 20)) == {f"{LISTS}/scans/{n}.bin" for n in range(1, 21)}


def test_a_cut_cable_a_reboot_and_a_power_loss_hide_nothing(workstation: "Workstation") -> None:
    ws = workstation
    stick = ws.vm.plug_stick("UNKN0WN3", 128, "vfat")
    mount(ws, stick, "UNKN0WN3")
    ws.vm.network(False)
    ws.vm.run(f"cp {LISTS}/2014-06.csv /mnt/stick/ && sync", user="contractor", pam=True)
    ws.wait_until("test $(sekisho-agent events -o json | grep -c file.copied_out) -ge 1")
    ws.vm.reboot()
    ws.wait_until("systemctl is-active sekisho-agent", within_s=240)
    ws.wait_until(f"mountpoint -q /mnt/stick || mount -o uid=contractor {stick.part} /mnt/stick")
    ws.vm.run(f"cp {LISTS}/2014-07.csv /mnt/stick/ && sync", user="contractor", pam=True)
    ws.wait_until("test $(sekisho-agent events -o json | grep -c file.copied_out) -ge 2")
    assert not ws.events("file.copied_out"), "the cable was not cut"
    durable = [event["metadata"]["uid"] for event in ws.spooled()]
    ws.vm.spawn(f"cp {LISTS}/all.bin /mnt/stick/", user="contractor", check=False)
    ws.wait_until("test -s /mnt/stick/all.bin")
    ws.vm.power_loss()
    ws.vm.power_on()  # a new guest's cable is plugged

    gaps = ws.wait_for("agent.gap", 2, where=lambda event: own(event)["lost"]["reason"] in DOWN, within_s=300)
    assert [own(gap)["lost"]["reason"] for gap in gaps] == list(DOWN)
    assert sources(ws.wait_for("file.copied_out", 2)) >= {f"{LISTS}/2014-06.csv", f"{LISTS}/2014-07.csv"}
    held = [event for event in ws.events() if own(event).get("seq")]
    uids = [event["metadata"]["uid"] for event in held]
    assert len(uids) == len(set(uids)), "each once"
    assert [uid for uid in uids if uid in set(durable)] == durable, "all that was durable, in its order"
    mine = [own(event)["seq"] for event in held if event["device"]["uid"] == gaps[0]["device"]["uid"]]
    assert mine == list(range(1, len(mine) + 1))
    for gap in gaps:
        assert own(gap)["lost"]["since"] < own(gap)["lost"]["until"]
    assert "whole" in ws.vm.run("sekisho-agent verify").out
