"""Stories of devices: one coherent story each, how sure it is which piece it is, cold starts, disguises, a first medium."""

import msgspec
import pytest
from workstation import PHONE, START, STICK, Workstation

from agent.core import facts
from agent.core.facts import Block, Device
from agent.core.media import medium_of

replace = msgspec.structs.replace
DISK = [
    Block(name="sdb", node="8:16", kind="disk", size=16_000_000_000),
    Block(name="sdb1", node="8:17", kind="partition", on="sdb", size=15_999_000_000, fs="vfat", fs_uuid="4A21-0001"),
]
ROOT_HUB = "/sys/devices/pci0000:00/0000:00:14.0/usb1"
FULL = replace(STICK, id=f"{ROOT_HUB}/1-1", blocks=DISK, port="1-1", hubs=["CalDigit TS3 Plus"])
KEYBOARD = Device(
    id=f"{ROOT_HUB}/1-2", bus="usb", vendor="Acme", vendor_id="1234", product_id="0001", interfaces=["03:01:01"], types=True
)
TETHER = replace(PHONE, product_id="4ee3", interfaces=["e0:01:03", "0a:00:00"], nodes=[], properties={}, networks=["usb0"])
READER = replace(
    FULL, id="r", serial="272", nodes=["8:64"], hubs=[], blocks=[Block(name="sde", node="8:64", kind="disk", size=0)]
)


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato")


def carried(ws: Workstation, device: Device, bytes_in: int, bytes_out: int) -> Workstation:
    return ws.tell(facts.Transferred(at_ms=ws.now, id=device.id, bytes_in=bytes_in, bytes_out=bytes_out))


# -- one story a device ------------------------------------------------------------------------------------------------


def test_the_end_of_a_stick_tells_its_whole_story(ws):
    carried(ws.plug(replace(FULL, blocks=[], nodes=[]), mount=None).plug(FULL, mount="/media/a").wait(60), FULL, 5_000, 7_000)
    ws.tell(facts.Plugged(at_ms=ws.now, device=replace(FULL, blocks=[], nodes=[]))).unplug(FULL)
    attached, mounted, detached = ws.only("medium.attached"), ws.only("medium.mounted"), ws.only("medium.detached")
    assert attached.medium["modes"] == ["mass_storage"] and attached.medium["hubs"] == ["CalDigit TS3 Plus"]
    assert "since" not in attached.medium
    told = detached.medium
    assert told["story"] == mounted.medium["story"] == attached.uid
    assert [(each["name"], each.get("on"), each.get("fs")) for each in told["blocks"]] == [
        ("sdb", None, None),
        ("sdb1", "sdb", "vfat"),
    ]
    assert (told["present_ms"], told["bytes_in"], told["bytes_out"]) == (60_000, 5_000, 7_000)
    assert told["mounts"] == ["/media/a"] and told["port"] == "1-1"
    assert told["identity"] == "serial" and told["identity_by"] == ["ids", "serial", "interfaces", "capacity", "file_system"]


def test_bytes_that_nobody_counted_are_not_told(ws):
    ws.plug().unplug()
    assert not {"bytes_in", "bytes_out", "usb_requests"} & set(ws.only("medium.detached").medium)


def test_of_a_phone_that_a_program_held_the_requests_are_told(ws):
    ws.plug(PHONE, mount=None)
    ws.tell(facts.WayHeld(at_ms=ws.now, pid=1, way="mtp", id="usb:001/002", device=PHONE.id, uses=310)).unplug(PHONE)
    assert ws.only("medium.detached").medium["usb_requests"] == 310


def test_a_phone_that_changes_its_mode_is_one_story(ws):
    ws.plug(PHONE, mount=None).wait(5).unplug(PHONE).wait(1).plug(TETHER, mount=None).wait(5).unplug(TETHER)
    first, second = ws.all("medium.attached")
    ended, end = ws.all("medium.detached")
    assert second.medium["story"] == ended.medium["story"] == end.medium["story"] == first.uid
    assert second.medium["switched_from"] == ["mtp"] and second.medium["modes"] == ["rndis"]
    assert second.medium["kind"] == "phone" and end.medium["present_ms"] == 11_000
    ws.none("device.disguised")


def test_a_known_phone_is_a_phone_in_every_mode_also_after_a_restart(ws):
    ws.plug(PHONE, mount=None).wait(5).unplug(PHONE).restart().plug(TETHER, mount=None)
    assert ws.all("medium.attached")[-1].medium["kind"] == "phone"


def test_a_card_has_a_story_of_its_own_within_that_of_its_reader(ws):
    inside = replace(READER, blocks=[Block(name="sde", node="8:64", kind="disk", size=8_000_000)])
    carried(ws.plug(READER, mount=None).wait(5), READER, 100, 200).plug(inside, mount=None).wait(30)
    carried(ws, READER, 1_100, 2_200).plug(READER, mount=None).unplug(READER)
    reader, card = ws.all("medium.attached")
    gone, end = ws.all("medium.detached")
    assert reader.medium["kind"] == "reader" and reader.medium["empty"] is True and "part" not in reader.medium
    assert card.medium["part"] == gone.medium["part"] == "card" and card.medium["story"] == reader.uid
    assert (gone.medium["present_ms"], gone.medium["bytes_in"], gone.medium["bytes_out"]) == (30_000, 1_000, 2_000)
    assert "part" not in end.medium and end.medium["bytes_out"] == 2_200


def test_the_next_card_in_a_reader_is_a_new_incident(ws):
    inside = replace(READER, blocks=[Block(name="sde", node="8:64", kind="disk", size=8_000_000)])
    ws.approve(STICK).plug(READER, mount=None).none("medium.unapproved")
    for _ in range(2):
        ws.plug(inside, mount="/media/card").plug(READER, mount=None)
        for mount_id, _ in ws._mounts.pop(READER.id):
            ws.tell(facts.Unmounted(at_ms=ws.now, mount_id=mount_id))
    assert len(ws.all("medium.unapproved")) == 2


def test_what_is_mounted_on_a_mapped_device_lies_on_the_stick(ws):
    opened = replace(
        FULL, nodes=["8:16", "8:17", "253:0"], blocks=[*DISK, Block(name="luks", node="253:0", kind="crypt", on="sdb1")]
    )
    ws.plug(opened, mount="/media/secret").copy("a.csv")
    assert ws.only("file.copied_out").medium["key"] == "usb:0951:1666:60A44C413F8CF320"
    ws.unplug(opened)
    assert ws.only("medium.detached").medium["blocks"][2] == {"name": "luks", "kind": "crypt", "on": "sdb1"}


def test_a_disk_that_comes_while_the_machine_runs_is_a_medium_and_one_of_its_start_is_not():
    disk = Device(id="d", bus="nvme", subsystem="block", removable=False, nodes=["259:0"])
    assert medium_of(disk) is None and medium_of(replace(disk, hotplugged=False)) is None
    came = medium_of(replace(disk, hotplugged=True))
    assert came is not None and came.kind == "storage"
    far = medium_of(replace(disk, bus="nvme-tcp", hotplugged=True))
    assert far is not None and far.kind == "network"


def test_media_now_shows_the_story_so_far(ws):
    carried(ws.plug(FULL, mount="/media/a"), FULL, 1, 2)
    (row,) = ws.core.media_now(ws.now)
    assert row["blocks"][1]["on"] == "sdb" and (row["bytes_in"], row["bytes_out"]) == (1, 2)
    assert row["identity"] == "serial" and row["interfaces"] == ["08:06:50"] and row["since_ms"] == START


# -- the agent was not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hotplugged", "since"), [(False, "boot"), (True, "agent_down"), (None, "unknown")])
def test_what_was_there_when_the_agent_came_is_told_so(ws, hotplugged, since):
    ws.plug(replace(FULL, hotplugged=hotplugged, since_ms=START - 90_000), mount=None, cold=True).wait(10).unplug(FULL)
    attached = ws.only("medium.attached").medium
    assert attached["since"] == since and attached["since_ms"] == START - 90_000
    assert ws.only("medium.detached").medium["present_ms"] == 100_000


def test_a_stick_that_stays_over_a_restart_keeps_its_story(ws):
    ws.tell(facts.Started(at_ms=ws.now, boot_id="b1")).plug(FULL, mount=None).wait(60).restart("b1")
    ws.plug(replace(FULL, hotplugged=True), mount=None, cold=True).wait(5).unplug(FULL)
    first, again = ws.all("medium.attached")
    assert again.medium["since"] == "earlier_run" and again.medium["story"] == first.uid
    assert ws.only("medium.detached").medium["present_ms"] == 65_000


def test_a_stick_that_went_while_no_agent_ran_is_detached_at_an_unknown_time(ws):
    ws.plug(FULL, mount=None).wait(60).restart().wait(2)
    gone = ws.only("medium.detached")
    assert gone.detail == {"time": "unknown"} and gone.medium["story"] == ws.only("medium.attached").uid
    assert "present_ms" not in gone.medium
    ws.restart().wait(2)
    ws.only("medium.detached")


def test_after_a_reboot_a_stick_came_with_the_machine(ws):
    ws.tell(facts.Started(at_ms=ws.now, boot_id="b1")).plug(FULL, mount=None).wait(60).restart("b2")
    ws.plug(replace(FULL, hotplugged=False), mount=None, cold=True).wait(2).none("medium.detached")
    assert ws.all("medium.attached")[-1].medium["since"] == "boot"


# -- disguises ---------------------------------------------------------------------------------------------------------


def test_a_stick_that_types_is_one_finding_on_its_attachment(ws):
    ducky = replace(FULL, interfaces=["08:06:50", "03:01:01"])
    ws.plug(ducky, mount=None).plug(replace(ducky, types=True), mount=None).wait(20)
    found = ws.only("device.disguised")
    assert found.severity == 4 and found.detail["reasons"] == ["types"]
    assert found["finding_info"]["related_events"][0]["uid"] == ws.only("medium.attached").uid
    assert found["message"] == "it stores data and types on a keyboard"
    ws.unplug(ducky).wait(60).plug(ducky, mount=None)
    assert len(ws.all("device.disguised")) == 2


def test_an_approved_keyboard_with_a_disk_is_told_low(ws):
    ws.approve(STICK).plug(replace(FULL, interfaces=["08:06:50", "03:01:01"]), mount=None)
    assert ws.only("device.disguised").severity == 2


def test_more_that_does_not_fit_raises_the_same_finding(ws):
    ws.plug(FULL, mount=None).wait(5).plug(replace(FULL, id=f"{ROOT_HUB}/1-4"), mount=None)
    ws.plug(replace(FULL, id=f"{ROOT_HUB}/1-4", interfaces=["08:06:50", "03:01:01"]), mount=None)
    first, raised = ws.all("device.disguised")
    assert first.detail["reasons"] == ["cloned_serial"] and raised.detail["reasons"] == [
        "cloned_serial",
        "types",
        "interfaces_changed",
    ]
    assert raised["finding_info"]["uid"] == first["finding_info"]["uid"] and raised["activity_name"] == "Update"
    assert raised.severity == 4


def test_two_pieces_with_one_serial_number_make_it_a_shared_one_for_good(ws):
    ws.plug(FULL, mount=None).wait(5).plug(replace(FULL, id=f"{ROOT_HUB}/1-4"), mount=None)
    ws.unplug(FULL).unplug(replace(FULL, id=f"{ROOT_HUB}/1-4")).restart().plug(FULL, mount=None)
    assert ws.all("medium.attached")[-1].medium["identity"] == "shared_serial"


def test_a_disguise_that_was_told_is_not_told_again_by_the_next_agent(ws):
    ducky = replace(FULL, interfaces=["08:06:50", "03:01:01"])
    ws.plug(ducky, mount=None).wait(5).restart().plug(ducky, mount=None, cold=True).wait(5)
    ws.only("device.disguised")
    assert ws.core.media_now(ws.now)[0]["disguised"] == ["types"]


def test_a_keyboard_long_after_a_stick_is_a_keyboard(ws):
    ws.plug(FULL, mount=None).wait(11).plug(KEYBOARD, mount=None).none("device.disguised")


def test_a_keyboard_with_a_stick_on_another_hub_is_a_keyboard(ws):
    far = replace(KEYBOARD, id=f"{ROOT_HUB}/1-7/1-7.2")
    ws.plug(FULL, mount=None).wait(2).plug(far, mount=None).none("device.disguised")


def test_a_new_keyboard_and_then_a_stick_on_one_hub_is_told_with_both(ws):
    ws.plug(KEYBOARD, mount=None).wait(2).plug(FULL, mount=None)
    found = ws.only("device.disguised")
    assert found.detail["reasons"] == ["keyboard_after_medium"] and found.severity == 3
    assert found.detail["doubts"][0]["other"] == "usb:1234:0001:noserial"


def test_what_is_there_at_the_start_came_with_nothing(ws):
    for device in (FULL, KEYBOARD):
        ws.plug(device, mount=None, cold=True)
    ws.none("device.disguised")


def test_what_is_built_in_is_never_disguised(ws):
    ws.plug(replace(FULL, interfaces=["08:06:50", "03:01:01"], built_in=True), mount=None).none("device.disguised")


def test_the_memory_of_devices_is_bounded(ws):
    for number in range(600):
        ws.plug(replace(FULL, serial=f"60A44C413F8C{number:04}"), mount=None).wait(4).unplug(FULL)
    assert ws.core.counts()["devices"] == 500
    assert len(ws.core.state()) < 100_000


# -- a person's first medium -------------------------------------------------------------------------------------------


def test_a_persons_first_medium_is_a_finding_once():
    ws = Workstation(first_use=True).login("sato").plug(KEYBOARD, mount=None).none("medium.first_use").plug()
    found = ws.only("medium.first_use")
    assert found.severity == 2 and found.login_user == "sato" and found.medium["model"] == "DataTraveler 3.0"
    ws.unplug().restart().login("sato").plug().plug(PHONE)
    ws.only("medium.first_use")
    ws.login("tanaka", 1001).plug(replace(FULL, serial="other-42")).wait(1)
    assert [each.login_user for each in ws.all("medium.first_use")] == ["sato", "tanaka"]


def test_with_nobody_at_the_machine_there_is_no_first_use():
    Workstation(first_use=True).plug().none("medium.first_use")


def test_an_empty_reader_is_no_use_but_its_card_is():
    ws = (
        Workstation(first_use=True).login("sato").plug(READER, mount=None).none("medium.first_use").mount(READER, "/media/card")
    )
    assert ws.only("medium.first_use").medium["kind"] == "reader"
