"""Copies that nobody types: by systemd's transient units, cron and at, under the guest's live systemd.

Who ordered it is known as far as the kernel knows it: cron and at go through PAM, which sets the login uid of the person they
run for; a transient unit is started by init for whoever asked, and has none. No person is named then, and none is guessed.
"""

from typing import TYPE_CHECKING

import pytest
from conftest import needs_a_guest, own

if TYPE_CHECKING:
    from conftest import Workstation

pytestmark = needs_a_guest

COPY = "cp /srv/customers/2014-06.csv /mnt/stick/"
ORDERS = {
    "cron": (f"echo '* * * * * {COPY}' | crontab -", True),
    "at": (f"echo '{COPY}' | at now", True),
    "user-unit": (f"systemd-run --user --wait {COPY}", True),
    "system-unit": (f"sudo systemd-run --wait {COPY}", False),
}
"""A contractor's order, and whether the kernel knows by a login uid for whom it is done."""


@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_that_a_service_makes_is_told_with_whom_the_kernel_knows(workstation: "Workstation", order: str) -> None:
    ws = workstation
    stick = ws.vm.plug_stick("S0021", fs="vfat")
    ws.vm.run(f"mount -o uid=contractor {stick.part} /mnt/stick")
    ws.wait_for("medium.mounted", where=lambda event: own(event)["medium"].get("serial") == "S0021")
    ws.vm.run("systemctl start cron atd")
    command, known = ORDERS[order]
    ws.vm.run(command, user="contractor", pam=True)

    told = own(ws.wait_for("file.copied_out"))
    assert told["source"]["path"] == "/srv/customers/2014-06.csv"
    assert told["process"]["exe"].endswith("/cp")
    assert told["link"] == "process"
    assert told.get("login", {}).get("user") == ("contractor" if known else None)
