"""Phones on real parts: what leaves by MTP and PTP, where no mount is there to be watched, and what only looks like it.

Each way is one that people use: libmtp's tools, jmtpfs (a FUSE mount of the user's own), a file manager's gvfs, gphoto2. What
counts is who holds the device's node in /dev/bus/usb, what that process read, and how much it then said to the device. Just
as much: that charging, browsing and fetching photographs from the phone are not told as carrying out.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import needs_a_guest, own, sources

if TYPE_CHECKING:
    from conftest import Workstation

pytestmark = needs_a_guest

LISTS = "/srv/customers"
PHONE = "PH0NE2014"
GVFS = f"mtp://QEMU_QEMU_filesharing_{PHONE}/"
SEND = "mtp-connect --sendfile {0} / || true"
"""The second word is a folder: libmtp takes a name that begins with digits for a folder's number, and the phone refuses. QEMU's
phone now and then fails to describe a file that it has just taken; each story looks whether the phone has it."""
WAYS = {
    "mtp-connect": SEND.format(f"{LISTS}/2014-06.csv"),
    "jmtpfs": f"mkdir -p ~/phone && jmtpfs ~/phone && cp {LISTS}/2014-06.csv ~/phone/phone/ && sync && fusermount3 -u ~/phone",
    "gvfs": f"gio mount {GVFS} && gio copy {LISTS}/2014-06.csv {GVFS}phone/",
}
SYNCED = "sleep 6"
"""What came late would have come by now: a holder is told at once, a read by it within a second."""


def plug(ws: "Workstation", folder: Path) -> dict[str, Any]:
    """A phone with a photograph on it; its attached event."""
    folder.mkdir(exist_ok=True)
    (folder / "IMG_0001.jpg").write_bytes(bytes(range(256)) * 400)
    ws.vm.plug_phone(PHONE, folder)
    attached: dict[str, Any] = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == PHONE)
    return attached


def left(ws: "Workstation") -> list[dict[str, Any]]:
    """What is told to have left, once all is told."""
    ws.vm.run(SYNCED)
    found: list[dict[str, Any]] = ws.events("file.copied_out")
    return found


def test_quick_one_stick_one_phone(workstation: "Workstation", tmp_path: Path) -> None:
    """The main job on real parts, in a minute once the guest is there: `make test-vm ARGS='-k quick'`."""
    ws = workstation
    stick = ws.vm.plug_stick("S0001", fs="vfat")
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "S0001")
    ws.vm.run(f"cp {LISTS}/2014-06.csv /mnt/stick/", user="contractor", pam=True)
    assert own(plug(ws, tmp_path / "phone"))["medium"]["kind"] == "phone"
    ws.vm.run(SEND.format(f"{LISTS}/2014-07.csv"), user="contractor", pam=True, timeout=180)

    copies = sorted(map(own, ws.wait_for("file.copied_out", 2)), key=lambda told: told["source"]["path"])
    assert len(copies) == 2
    on_stick, on_phone = copies
    assert (on_stick["way"], on_stick["medium"]["serial"], on_stick["bytes"]) == ("mount", "S0001", on_stick["dest"]["size"])
    assert (on_phone["way"], on_phone["medium"]["serial"]) == ("mtp", PHONE)
    assert on_phone["bytes"] == (tmp_path / "phone" / "2014-07.csv").stat().st_size
    assert {on_stick["login"]["user"], on_phone["login"]["user"]} == {"contractor"}
    ws.vm.run("umount /mnt/stick")
    ws.vm.unplug("S0001")
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == "S0001")


@pytest.mark.parametrize("way", WAYS)
def test_a_list_copied_to_a_phone_is_told_with_the_phone_and_the_person(
    workstation: "Workstation", tmp_path: Path, way: str
) -> None:
    ws = workstation
    assert own(plug(ws, tmp_path / "phone"))["medium"]["kind"] == "phone"
    ws.vm.run(WAYS[way], user="contractor", pam=True, timeout=180)

    copy = ws.wait_for("file.copied_out")
    told = own(copy)
    size = int(ws.vm.run(["stat", "-c", "%s", f"{LISTS}/2014-06.csv"]).out)
    assert (tmp_path / "phone" / "2014-06.csv").stat().st_size == size, "the phone has not got it"
    assert told["source"]["path"] == f"{LISTS}/2014-06.csv"
    assert (told["way"], told["medium"]["serial"], told["medium"]["kind"]) == ("mtp", PHONE, "phone")
    assert told["bytes"] == size
    assert told["link"] in ("process", "pipeline")
    assert told["login"]["user"] == "contractor"
    assert len(left(ws)) == 1, "one file, one event"
    assert max(event["severity_id"] for event in ws.events("medium.unapproved")) == 4, "a finding of high severity"


def test_to_charge_to_look_and_to_fetch_is_not_to_carry_out(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    plug(ws, tmp_path / "phone")
    ws.vm.run("mkdir -p ~/phone ~/pictures && jmtpfs ~/phone && ls -lR ~/phone", user="contractor", pam=True)
    ws.vm.run("cp ~/phone/phone/IMG_0001.jpg ~/pictures/ && fusermount3 -u ~/phone", user="contractor", pam=True)
    ws.vm.run(f"gio mount {GVFS} && gio list {GVFS}phone/", user="contractor", pam=True, timeout=180)
    ws.vm.run(f"gio copy {GVFS}phone/IMG_0001.jpg ~/pictures/again.jpg", user="contractor", pam=True)
    ws.vm.run(
        f"cat {LISTS}/2014-06.csv {LISTS}/2014-07.csv | wc -l; grep -c x {LISTS}/2014-08.csv", user="contractor", pam=True
    )
    assert left(ws) == []
    assert not [event for event in ws.events() if event["metadata"]["event_code"].startswith("copy.")]


def test_ones_own_pictures_on_ones_own_phone_are_nobodys_business(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    plug(ws, tmp_path / "phone")
    ws.vm.run("head -c 300000 /dev/urandom >~/holiday.jpg", user="contractor")
    ws.vm.run(f"cat {LISTS}/2014-0*.csv | md5sum", user="contractor", pam=True)
    ws.vm.run(SEND.format("~/holiday.jpg"), user="contractor", pam=True, timeout=180)
    ws.vm.run(f"gio mount {GVFS} && gio copy ~/holiday.jpg {GVFS}phone/again.jpg", user="contractor", pam=True, timeout=180)
    assert (tmp_path / "phone" / "holiday.jpg").stat().st_size == 300_000
    assert (tmp_path / "phone" / "again.jpg").stat().st_size == 300_000
    assert left(ws) == []
    assert "holiday" not in json.dumps(ws.events())


def test_several_lists_in_one_go_are_each_told_once(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    plug(ws, tmp_path / "phone")
    names = [f"2014-0{month}.csv" for month in (6, 7, 8)]
    ws.vm.run(
        f"gio mount {GVFS} && gio copy {' '.join(f'{LISTS}/{name}' for name in names)} {GVFS}phone/",
        user="contractor",
        pam=True,
        timeout=180,
    )
    copies = ws.wait_for("file.copied_out", 3)
    assert sources(copies) == {f"{LISTS}/{name}" for name in names}
    assert {own(copy)["login"]["user"] for copy in copies} == {"contractor"}
    assert len(left(ws)) == 3
