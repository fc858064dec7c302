"""Media of every kind on real parts: file systems that sticks come with, encrypted ones, one that also types, other machines.

The file systems are those that the guest's own kernel and FUSE bring: what fanotify can say of each differs (README.md of this
folder's lab), what is told must not. Shares are a file system over 9p from the host, and NFS from a server in the guest.
"""

from typing import TYPE_CHECKING

import pytest
from conftest import needs_a_guest, own, sources

if TYPE_CHECKING:
    from conftest import Workstation

pytestmark = needs_a_guest

LISTS = "/srv/customers"
FILE_SYSTEMS = {
    "exfat": "mount -o uid=contractor",
    "ntfs": "mount -t ntfs-3g -o uid=contractor",
    "vfat": "mount -o uid=contractor",
}


@pytest.mark.parametrize("fs", FILE_SYSTEMS)
def test_a_stick_as_it_is_sold_tells_file_bytes_and_person(workstation: "Workstation", fs: str) -> None:
    ws = workstation
    stick = ws.vm.plug_stick("S0031", fs=fs)
    ws.vm.run(f"{FILE_SYSTEMS[fs]} {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "S0031")
    ws.vm.run(f"cp {LISTS}/2014-06.csv /mnt/stick/ && sync", user="contractor", pam=True)
    ws.vm.run(f"cp {LISTS}/2014-07.csv /mnt/stick/.tmp && mv /mnt/stick/.tmp /mnt/stick/b.jpg", user="contractor", pam=True)
    for copy in ws.wait_for("file.copied_out", 2):
        told = own(copy)
        assert told["bytes"] == int(ws.vm.run(["stat", "-c", "%s", told["source"]["path"]]).out)
        assert (told["medium"]["serial"], told["link"], told["login"]["user"]) == ("S0031", "process", "contractor")
    assert sources(ws.events("file.copied_out")) == {f"{LISTS}/2014-06.csv", f"{LISTS}/2014-07.csv"}
    ws.vm.run("umount /mnt/stick")


def test_an_encrypted_stick_is_the_stick_that_it_is_on(workstation: "Workstation") -> None:
    ws = workstation
    stick = ws.vm.plug_stick("S0032", fs="ext4", passphrase="geheim")
    ws.vm.run(f"cryptsetup open {stick.part} vault", stdin=b"geheim", timeout=180)
    ws.vm.run("mount /dev/mapper/vault /mnt/stick && chown contractor /mnt/stick")
    mounted = ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "S0032")
    assert own(mounted)["medium"]["fs"] == "ext4"
    ws.vm.run(f"cp {LISTS}/2014-06.csv /mnt/stick/", user="contractor", pam=True)
    told = own(ws.wait_for("file.copied_out"))
    assert (told["source"]["path"], told["medium"]["serial"]) == (f"{LISTS}/2014-06.csv", "S0032")
    ws.vm.run("umount /mnt/stick && cryptsetup close vault")
    ws.vm.unplug("S0032")
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == "S0032")


def test_a_keyboard_that_comes_with_a_stick_is_told_as_a_keyboard(workstation: "Workstation") -> None:
    ws = workstation
    ws.vm.plug_stick("S0033", fs="vfat")
    ws.vm.plug_other("KEYS1", "usb-kbd")
    stick = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == "S0033")
    assert own(stick)["medium"]["kind"] == "storage"
    keys = ws.wait_for("medium.attached", where=lambda event: own(event)["medium"].get("serial") == "KEYS1")
    assert own(keys)["medium"]["kind"] == "keyboard"
    ws.vm.unplug("KEYS1")
    ws.wait_for("medium.detached", where=lambda event: own(event)["medium"].get("serial") == "KEYS1")


MOUNT_9P = "mkdir -p /mnt/far && mount -t 9p -o trans=virtio,version=9p2000.L,access=any share /mnt/far"
MOUNT_NFS = (
    "systemctl start rpcbind nfs-server && mkdir -p /srv/export /mnt/far && chmod 777 /srv/export && "
    "exportfs -o rw,no_root_squash,fsid=7,no_subtree_check 127.0.0.1:/srv/export && "
    "mount -t nfs4 127.0.0.1:/srv/export /mnt/far"
)
SHARES = {"9p": MOUNT_9P, "nfs4": MOUNT_NFS}


@pytest.mark.parametrize("fs", SHARES)
def test_a_list_copied_to_another_machine_by_a_share_is_told(workstation: "Workstation", fs: str) -> None:
    ws = workstation
    (ws.vm.folder / "share").chmod(0o777)
    ws.vm.run(SHARES[fs], timeout=240)
    ws.vm.run("sleep 3")  # a mount is told at once; this is for a machine under load
    ws.vm.run(f"cp {LISTS}/2014-06.csv /mnt/far/", user="contractor", pam=True)
    told = own(ws.wait_for("file.copied_out", where=lambda event: own(event)["source"]["path"] == f"{LISTS}/2014-06.csv"))
    assert told["login"]["user"] == "contractor"
    assert told["way"] == "network"
    assert told["link"] == "process"


@pytest.mark.parametrize("fs", SHARES)
def test_a_protected_directory_on_another_machine_is_protected(workstation: "Workstation", fs: str) -> None:
    ws = workstation
    (ws.vm.folder / "share").chmod(0o777)
    ws.vm.run(SHARES[fs], timeout=240)
    ws.vm.run("head -c 50000 /dev/urandom >/mnt/far/far.csv && chmod a+r /mnt/far/far.csv")
    more = b'\n[[agent.protect]]\npath = "/mnt/far"\nlabel = "far"\n'
    ws.vm.run("cat >>/etc/sekisho/config.toml && systemctl reload sekisho-agent", stdin=more)
    ws.wait_for("agent.config", 2)
    stick = ws.vm.plug_stick("S0034", fs="vfat")
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "S0034")
    ws.vm.run("cp /mnt/far/far.csv /mnt/stick/", user="contractor", pam=True)
    told = own(ws.wait_for("file.copied_out"))
    assert (told["source"]["path"], told["bytes"]) == ("/mnt/far/far.csv", 50_000)
    assert (told["medium"]["serial"], told["login"]["user"]) == ("S0034", "contractor")
