"""Phones on real parts: what leaves by MTP and PTP, where no mount is there to be watched, and what only looks like it.

Each way is one that people use: libmtp's tools, jmtpfs (a FUSE mount of the user's own), a file manager's gvfs, gphoto2. What
counts is who holds the device's node in /dev/bus/usb, what that process read, and how much it then said to the device. Just
as much: that charging, browsing and fetching photographs from the phone are not told as carrying out.
"""

import json
import time
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
phone now and then fails to describe a file that it has just taken, which jmtpfs tells as an error after nothing was sent, and a
person tries again; each story looks whether the phone has it."""
LOOK_ROUND = "sleep 8"
"""Between a user's FUSE mount and what is finished on it a small process of the agent's starts, which takes emulation long.
While anything looks at the mount, unmounting may say "busy", and a person tries again."""
WAYS = {
    "mtp-connect": SEND.format(f"{LISTS}/2014-06.csv"),
    "jmtpfs": f"mkdir -p ~/phone && jmtpfs ~/phone && {LOOK_ROUND} && "
    f"for try in 1 2 3; do cp {LISTS}/2014-06.csv ~/phone/phone/ && break; rm -f ~/phone/phone/2014-06.csv; done && "
    "sync && for try in 1 2 3 4 5; do fusermount3 -u ~/phone && break; sleep 1; done",
    "gvfs": f"gio mount {GVFS} && gio copy {LISTS}/2014-06.csv {GVFS}phone/",
}
SYNCED = "sleep 6"
"""What came late would have come by now: a holder is told at once, a read by it within a second."""


def plug(ws: "Workstation", folder: Path, readonly: bool = False) -> dict[str, Any]:
    """A phone with a photograph on it; its attached event."""
    folder.mkdir(exist_ok=True)
    (folder / "IMG_0001.jpg").write_bytes(bytes(range(256)) * 400)
    ws.vm.plug_phone(PHONE, folder, readonly=readonly)
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


REFUSED = {
    "store is read-only": (f"mtp-connect --sendfile {LISTS}/all.bin / || true", True),
    "no such folder": (f"mtp-connect --sendfile {LISTS}/all.bin 2014-06.csv || true", False),
    "by gvfs, store is read-only": (f"gio mount {GVFS} && gio copy {LISTS}/all.bin {GVFS}phone/ || true", True),
}
"""A transfer that the phone turns down after the file was opened, and whether nothing can be written to it at all."""


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_phone_refuses_has_not_left(workstation: "Workstation", tmp_path: Path, why: str) -> None:
    ws = workstation
    command, readonly = REFUSED[why]
    plug(ws, tmp_path / "phone", readonly=readonly)
    ws.vm.run(command, user="contractor", pam=True, timeout=180)
    assert not any(path.stat().st_size > 110_000 for path in (tmp_path / "phone").iterdir()), "the phone took it"
    assert left(ws) == []
    assert not [event for event in ws.events() if event["metadata"]["event_code"].startswith("copy.")]


def test_a_phone_that_is_pulled_in_mid_copy_has_got_a_part(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    plug(ws, tmp_path / "phone")
    copying = ws.vm.spawn(SEND.format(f"{LISTS}/all.bin"), user="contractor", pam=True, timeout=180)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 4_000_000 for path in (tmp_path / "phone").iterdir()):
        assert time.monotonic() < deadline, "nothing came to the phone"
        time.sleep(0.02)
    ws.vm.unplug(PHONE)
    copying()
    told = own(ws.wait_for("file.copied_out"))
    assert (told["way"], told["medium"]["serial"], told["login"]["user"]) == ("mtp", PHONE, "contractor")
    assert told["source"]["path"] == f"{LISTS}/all.bin"
    assert 4_000_000 < told["bytes"] < 60_000_000, "what went, not what was read"


def test_a_camera_is_told_and_fetching_from_it_is_not_carrying_out(workstation: "Workstation", tmp_path: Path) -> None:
    """By PTP, as photographs are fetched: the same device, spoken to by another program."""
    ws = workstation
    plug(ws, tmp_path / "phone")
    fetch = "mkdir -p ~/pictures && cd ~/pictures && gphoto2 --list-files && gphoto2 --get-all-files"
    ws.vm.run(fetch, user="contractor", pam=True)
    assert (ws.vm.run("stat -c %s ~contractor/pictures/IMG_0001.jpg").out.strip()) == str(256 * 400)
    assert left(ws) == []


def test_a_list_uploaded_by_ptp_is_told(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    plug(ws, tmp_path / "phone")
    ws.vm.run(f"gphoto2 --folder /store_00010001 --upload-file {LISTS}/2014-06.csv", user="contractor", pam=True, timeout=180)
    size = int(ws.vm.run(["stat", "-c", "%s", f"{LISTS}/2014-06.csv"]).out)
    assert (tmp_path / "phone" / "2014-06.csv").stat().st_size == size, "the phone has not got it"
    told = own(ws.wait_for("file.copied_out"))
    assert (told["source"]["path"], told["bytes"]) == (f"{LISTS}/2014-06.csv", size)
    assert (told["way"], told["medium"]["serial"], told["login"]["user"]) == ("mtp", PHONE, "contractor")
