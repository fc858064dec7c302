"""Mode "enforce" on real parts: a stick and a phone of QEMU's, udisks, the installed unit with its drop-in, a register.

What only hardware shows is here: that a device set read-only before anybody mounts it is mounted read-only, that vfat and
NTFS-3G are remounted under their users, and that USB authorization takes a phone off its bus and lets it on again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from conftest import REPO, needs_a_guest, own

if TYPE_CHECKING:
    from conftest import Workstation

pytestmark = needs_a_guest

DROP_IN = "sekisho-agent.service.d/enforce.conf"
ENTRY = ["--owner", "contractor", "--approver", "Suzuki", "--purpose", "delivery to the print shop"]


def enforce(ws: "Workstation", **policy: str) -> None:
    """Switch the mode on, with the drop-in that it needs."""
    ws.vm.run("mkdir -p /etc/systemd/system/sekisho-agent.service.d")
    ws.vm.push((REPO / "packaging" / "enforce.conf").read_bytes(), f"/etc/systemd/system/{DROP_IN}")
    keys = "".join(f'{key} = "{value}"\\n' for key, value in policy.items())
    ws.vm.run(
        "sed -i '0,/^\\[agent\\]/s//[agent]\\nmode = \"enforce\"/' /etc/sekisho/config.toml && "
        f"printf '[agent.enforce]\\n{keys}' >>/etc/sekisho/config.toml && systemctl daemon-reload && "
        "systemctl restart sekisho-agent",
        timeout=180,
    )
    ws.wait_until("test -s /var/lib/sekisho/register.json")
    assert ws.wait_until("sekisho-agent status --json")


def acted(ws: "Workstation", serial: str, act: str, code: str = "") -> dict[str, Any]:
    """What the hand told of a device."""
    found: dict[str, Any] = ws.wait_for(
        "medium.unapproved",
        where=lambda event: (
            own(event)["medium"].get("serial") == serial
            and own(event).get("detail", {}).get("act") == act
            and (not code or code in own(event)["detail"].get("did", ()))
        ),
    )
    return found


def register(ws: "Workstation", serial: str, *words: str) -> None:
    """Approve a medium by the event of its plugging in."""
    shown = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == serial)
    ws.collector.admin("media", "approve", "--from-event", shown["metadata"]["uid"], *ENTRY, *words)


def test_a_stick_is_read_only_until_it_is_approved_and_again_once_that_is_revoked(workstation: "Workstation") -> None:
    ws = workstation
    enforce(ws)
    stick = ws.vm.plug_stick("S0301", fs="vfat", files={"there.txt": b"old"})
    stopped = acted(ws, "S0301", "stopped", "read_only")
    assert (stopped["action_id"], stopped["disposition_id"]) == (2, 2)
    ws.vm.run(f"udisksctl mount -b {stick.part}", user="contractor", pam=True)
    place = ws.vm.run(["findmnt", "-no", "TARGET", stick.part]).out.strip()
    assert ws.vm.run(f"cat '{place}/there.txt'", user="contractor").out == "old"
    copy = f"cp /srv/customers/2014-06.csv '{place}/'"
    refused = ws.vm.run(copy, user="contractor", pam=True, check=False)
    assert refused.rc and "Read-only file system" in refused.err
    raw = ws.vm.run(f"dd if=/dev/zero of={stick.part} count=1", check=False)
    assert raw.rc and "not permitted" in raw.err

    register(ws, "S0301", "--until", "never")
    acted(ws, "S0301", "released")
    ws.wait_until(f"{copy} && sync")
    ws.wait_for("file.copied_out")

    key = own(stopped)["medium"]["key"]
    ws.collector.admin("media", "revoke", key, "--reason", "left the company")
    ws.wait_for(
        "medium.unapproved",
        2,
        where=lambda event: (
            (own(event).get("detail", {}).get("act") == "stopped" and own(event)["medium"]["decision"] == "revoked")
            or own(event).get("detail", {}).get("act") == "stopped"
        ),
    )
    ws.wait_until(f"! touch '{place}/more' 2>/dev/null")
    ws.vm.run(f"udisksctl unmount -b {stick.part} && udisksctl power-off -b {stick.dev}", user="contractor", pam=True)
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == "S0301")


def test_what_is_mounted_when_the_mode_begins_is_stopped_under_its_users(workstation: "Workstation") -> None:
    ws = workstation
    stick = ws.vm.plug_stick("S0302", fs="ntfs")
    ws.vm.run(f"mount -t ntfs-3g {stick.part} /mnt/stick && echo before >/mnt/stick/before.txt")
    enforce(ws)
    acted(ws, "S0302", "stopped", "read_only")
    refused = ws.vm.run("cp /srv/customers/2014-06.csv /mnt/stick/", check=False)
    assert refused.rc and "Read-only file system" in refused.err
    assert ws.vm.run("cat /mnt/stick/before.txt").out == "before\n"
    ws.vm.run("systemctl stop sekisho-agent", timeout=60)
    ws.vm.run("cp /srv/customers/2014-06.csv /mnt/stick/ && umount /mnt/stick")


def test_a_phone_is_taken_off_the_bus_and_let_on_when_it_is_approved(workstation: "Workstation", tmp_path: Path) -> None:
    ws = workstation
    enforce(ws)
    ws.vm.plug_phone("P0301", tmp_path / "phone")
    port = f"{ws.vm.usb_path('P0301')}/authorized"
    stopped = acted(ws, "P0301", "stopped", "deauthorized")
    assert own(stopped)["medium"]["kind"] == "phone"
    assert ws.vm.run(["cat", port]).out.strip() == "0"

    register(ws, "P0301", "--until", "never")
    acted(ws, "P0301", "released")
    assert ws.vm.run(["cat", port]).out.strip() == "1"


def test_a_refused_stick_never_gets_a_block_device(workstation: "Workstation") -> None:
    ws = workstation
    enforce(ws, unapproved="refuse")
    ws.vm.plug_stick("S0303", fs="vfat", wait=False)
    acted(ws, "S0303", "stopped", "deauthorized")
    ws.wait_until("! ls /dev/disk/by-id/usb-*S0303* 2>/dev/null")
    register(ws, "S0303", "--until", "never")
    ws.wait_until("ls /dev/disk/by-id/usb-*S0303*")
