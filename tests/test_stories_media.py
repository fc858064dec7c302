"""Stories of media: plugged, mounted, approved or not, and the findings that come of it; who sits there; limits; the agent."""

import json

import msgspec
import pytest
from workstation import LIMITS, PHONE, ROOT, START, STICK, Workstation

from agent.core import facts
from agent.core.facts import Device
from agent.core.media import key_of, medium_of
from agent.core.pipeline import WindowLimit


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato")


def test_a_stick_comes_and_goes_in_the_name_of_who_sits_there(ws):
    ws.plug().unplug()
    codes = [event.code for event in ws.events]
    assert codes == ["medium.attached", "medium.mounted", "medium.detached", "medium.unmounted"]
    for event in ws.events:
        assert event["actor"]["user"] == {"uid": "1000", "name": "sato"} and event.attribution == "session"
        assert event.medium["decision"] == "unknown" and event.medium["decision_reason"] == "no_register"
    assert ws.all("medium.attached")[0]["peripheral_device"]["serial_number"] == "60A44C413F8CF320"
    assert ws.all("medium.mounted")[0].medium["fs"] == "vfat"


def test_with_nobody_at_the_machine_no_user_is_named():
    event = Workstation().plug().only("medium.attached")
    assert event["actor"] == {"app_name": "Sekisho"} and event.attribution == "unknown"


def test_a_mount_told_before_its_device_is_told_once_the_device_comes(ws):
    ws.mount(STICK, "/media/x").none("medium.mounted")
    ws.plug(mount=None)
    assert [event.code for event in ws.events] == ["medium.attached", "medium.mounted"]
    assert [watch.mount for watch in ws.core.watches()] == ["/media/x"]


def test_a_device_told_again_with_its_partitions_is_no_second_event(ws):
    bare = msgspec.structs.replace(STICK, nodes=[])
    ws.plug(bare, mount=None).plug(STICK)
    ws.only("medium.attached")
    ws.only("medium.mounted")


def test_an_approved_stick_is_low_and_raises_no_finding(ws):
    ws.approve(STICK).plug().copy("a.csv")
    event = ws.only("file.copied_out")
    assert event.severity == 2 and event.medium["decision"] == "approved" and event.medium["approval"] == "A-1"
    ws.none("medium.unapproved")


def test_an_unapproved_phone_is_a_finding_raised_once_when_files_reach_it(ws):
    ws.approve(STICK).plug(PHONE, mount="/run/user/1000/gvfs/phone")
    first = ws.only("medium.unapproved")
    assert first.severity == 3 and first.medium["kind"] == "phone"
    assert first["finding_info"]["related_events"][0]["uid"] == ws.only("medium.attached").uid
    for name in ("a.csv", "b.csv", "a.csv"):
        ws.copy(name)
    assert [event.severity for event in ws.all("file.copied_out")] == [4, 4, 4]
    _, raised = ws.all("medium.unapproved")
    assert raised.severity == 4 and raised["activity_name"] == "Update"
    assert raised["finding_info"]["uid"] == first["finding_info"]["uid"]
    assert raised["finding_info"]["related_events"][-1]["uid"] == ws.all("file.copied_out")[0].uid


def test_plugged_in_again_is_a_new_incident_but_an_agents_restart_is_not(ws):
    ws.approve(PHONE).plug()
    assert len(ws.all("medium.unapproved")) == 1
    ws.restart().plug(cold=True)
    assert len(ws.all("medium.unapproved")) == 1
    ws.unplug().plug()
    assert len(ws.all("medium.unapproved")) == 2


def test_an_empty_card_reader_is_no_finding_until_a_card_is_mounted(ws):
    reader = Device(
        id="r", bus="usb", vendor="Generic", interfaces=["08:06:50"], nodes=["8:32"], properties={"ID_DRIVE_FLASH_SD": "1"}
    )
    ws.approve(STICK).plug(reader, mount=None).none("medium.unapproved")
    ws.mount(reader, "/media/card")
    assert ws.only("medium.unapproved").medium["kind"] == "reader"


def test_a_keyboard_is_told_but_is_no_finding(ws):
    ws.approve(STICK).plug(Device(id="k", bus="usb", vendor="HHKB", interfaces=["03:01:01"]), mount=None)
    assert ws.only("medium.attached").medium["kind"] == "keyboard"
    ws.none("medium.unapproved")


def test_an_approval_taken_back_while_the_stick_is_in_is_a_finding(ws):
    ws.approve(STICK).plug().none("medium.unapproved")
    ws.approve(STICK, version=2, revoked=True)
    assert ws.only("medium.unapproved").medium["decision"] == "revoked"


def test_an_approval_that_ends_while_the_stick_is_in_is_a_finding(ws):
    ws.approve(STICK, until_ms=START + 60_000).plug().wait(50).none("medium.unapproved")
    ws.wait(30)
    assert ws.only("medium.unapproved").medium["decision"] == "expired"


def test_the_register_outlives_a_restart(ws):
    ws.approve(STICK).restart().plug(cold=True)
    assert ws.all("medium.attached")[0].medium["decision"] == "approved"


def test_where_no_approval_is_required_nothing_is_a_finding():
    ws = Workstation(require_approval=False).login("sato").approve(PHONE).plug()
    ws.copy("a.csv")
    assert ws.only("file.copied_out").severity == 2
    ws.none("medium.unapproved")


def test_media_now_says_each_decision_and_why(ws):
    ws.approve(STICK).plug().plug(PHONE, mount=None)
    rows = [(row["name"], row["mount"], row["decision"], row["reason"]) for row in ws.core.media_now(ws.now)]
    assert rows == [
        ("Kingston DataTraveler 3.0", "/media/Kingston", "approved", "approved"),
        ("Google Pixel 7", "", "unapproved", "not_registered"),
    ]


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (Device(id="1", bus="usb", interfaces=["08:06:50"]), "storage"),
        (Device(id="1", bus="usb", interfaces=["06:01:01", "08:06:50"]), "phone"),
        (Device(id="1", bus="usb", interfaces=["ff:ff:00"], properties={"ID_MTP_DEVICE": "1"}), "phone"),
        (Device(id="1", bus="usb", interfaces=["02:06:00", "0a:00:00"]), "network"),
        (Device(id="1", bus="usb", interfaces=["e0:01:03"]), "network"),
        (Device(id="1", bus="usb", interfaces=["03:01:01", "03:01:02"]), "keyboard"),
        (Device(id="1", bus="usb", interfaces=["03:01:01", "08:06:50"]), "storage"),
        (Device(id="1", bus="usb"), "other"),
        (Device(id="1", bus="usb", interfaces=["0e:01:00", "01:01:00"]), None),
        (Device(id="1", bus="usb", interfaces=["09:00:00"]), None),
        (Device(id="1", bus="ata", subsystem="block", removable=False, nodes=["8:0"]), None),
        (Device(id="1", bus="nvme", subsystem="block", removable=False, nodes=["259:0"]), None),
        (Device(id="1", bus="virtio", subsystem="block", removable=False, nodes=["254:0"]), None),
        (Device(id="1", bus="scsi", subsystem="block", removable=True, nodes=["8:0"]), "storage"),
        (Device(id="1", bus="ata", subsystem="block", removable=True, properties={"ID_CDROM": "1"}), "optical"),
        (Device(id="1", bus="mmc", subsystem="block", removable=False, properties={"ID_DRIVE_FLASH_SD": "1"}), "reader"),
        (Device(id="1", bus="mmc", subsystem="block", removable=False, nodes=["179:0"]), None),
        (Device(id="1", bus="bluetooth", subsystem="bluetooth", properties={"DEVTYPE": "host"}), None),
        (Device(id="1", bus="bluetooth", subsystem="bluetooth", properties={"DEVTYPE": "link"}), "other"),
        (Device(id="1", bus="thunderbolt", subsystem="thunderbolt"), "other"),
        (Device(id="1", simulated=True, declared_kind="phone", bus="usb"), "phone"),
    ],
)
def test_what_is_a_medium_and_of_which_kind(device, kind):
    medium = medium_of(device)
    assert (medium.kind if medium else None) == kind


def test_a_key_without_a_serial_of_its_own_says_so():
    assert key_of("usb", "", "", "60A44C", "0951", "1666") == "usb:0951:1666:60A44C"
    for serial in ("", "000000000000", "0123456789ABCDEF"):
        assert key_of("usb", "", "", serial, "0951", "1666") == "usb:0951:1666:noserial"
    assert key_of("mmc", "SanDisk", "SU08G", "0x1a2b", "", "") == "mmc:sandisk:su08g:0x1a2b"


def test_a_hostile_device_name_is_made_harmless(ws):
    evil = msgspec.structs.replace(STICK, model="\x1b[2JStick\u202egpj.exe\n" + "x" * 5_000, serial="a/b c:d\x00")
    ws.plug(evil)
    medium = ws.only("medium.attached").medium
    assert medium["key"] == "usb:0951:1666:a_b_c_d" and len(medium["model"]) <= 256
    assert medium["model"].startswith("[2JStick gpj.exe x") and medium["model"].isprintable()


# -- people ------------------------------------------------------------------------------------------------------------


def test_sudo_does_not_hide_the_person(ws):
    ws.sudo("root").plug(PHONE).copy("customers/a.csv", by="cp")
    event = ws.only("file.copied_out")
    assert event.login_user == "sato" and event["actor"]["user"]["name"] == "sato"
    assert [parent["exe"] for parent in event.process["parents"]] == ["/usr/bin/bash", "/usr/bin/sudo", "/usr/bin/bash"]


def test_a_service_has_no_login_user_and_none_is_invented(ws):
    service = ws.program("/usr/sbin/backupd", uid=0, user="root", loginuid=0xFFFFFFFF)
    ws.plug()
    service.read("a.csv").create(f"{ws.stick}/a.csv").close(f"{ws.stick}/a.csv", 300_000)
    event = ws.only("file.copied_out")
    assert "user" not in event["actor"] and event["actor"]["process"]["name"] == "backupd" and event.login is None


def test_a_look_at_a_dead_process_takes_nothing_away(ws):
    cp = ws.plug().run("cp", "a.csv", "/media").read("a.csv")
    cp.end()
    ws.tell(facts.ProcSeen(at_ms=ws.now, process=facts.Process(pid=cp.pid, start=cp.process.start, known="cached")))
    cp.create(f"{ws.stick}/a.csv").close(f"{ws.stick}/a.csv", 300_000)
    event = ws.only("file.copied_out")
    assert event.process["argv"] == ["cp", "a.csv", "/media"] and event.login_user == "sato" and event.attribution == "exact"


def test_a_pid_used_again_does_not_inherit_what_the_former_read(ws):
    old = ws.plug().run("less").read("a.csv").end()
    new = ws.program("/usr/bin/cp", pid=old.pid)
    new.seen(start=old.process.start + 5)
    new.create(f"{ws.stick}/x").close(f"{ws.stick}/x", 300_000)
    ws.wait(1).none("file.copied_out")


# -- limits ------------------------------------------------------------------------------------------------------------


def _copy_many(ws: Workstation, count: int, size: int = 1_000, seconds: float = 0.0) -> None:
    for number in range(count):
        ws.copy(ws.file(f"{ROOT}/{len(ws.sizes)}.csv", size))
        if seconds:
            ws.wait(seconds)


def test_a_burst_is_one_finding_on_its_evidence_before_it_ends(ws):
    ws.plug()
    _copy_many(ws, 150)
    finding = ws.only("copy.burst")
    assert finding.severity == 4 and finding.limit["files"] == 100 and finding.limit["of_files"] == 100
    assert [each["uid"] for each in finding["finding_info"]["related_events"]] == [
        event.uid for event in ws.all("file.copied_out")[:100]
    ]
    assert finding.login_user == "sato"


def test_a_greater_burst_is_told_again_at_each_doubling(ws):
    ws.plug()
    _copy_many(ws, 450)
    assert [finding.limit["files"] for finding in ws.all("copy.burst")] == [100, 200, 400]


def test_bytes_count_with_every_copy_files_once():
    ws = Workstation(limits=[WindowLimit(name="burst", window_s=600, bytes=1_000_000, files=3)]).login("sato").plug()
    for _ in range(4):
        ws.copy("a.csv")
    assert ws.only("copy.burst").limit | {"window": 0} == {
        "name": "burst", "window": 0, "bytes": 1_200_000, "files": 1, "of_bytes": 1_000_000, "of_files": 3,
    }  # fmt: skip


def test_a_few_files_a_day_pass_the_slow_limit_over_a_restart():
    ws = Workstation(limits=[LIMITS[0], WindowLimit(name="drip", window_s=30 * 86400, files=60)]).login("sato").plug()
    for day in range(12):
        _copy_many(ws, 5)
        ws.wait(86_400)
        if day == 6:
            ws.restart().plug(cold=True)
    assert ws.only("copy.drip").limit["files"] == 60
    ws.none("copy.burst")


def test_each_person_has_limits_of_their_own(ws):
    ws.plug()
    _copy_many(ws, 60)
    ws.login("tanaka", 1001)
    _copy_many(ws, 60)
    ws.none("copy.burst")


def test_su_and_sudo_do_not_split_a_persons_count(ws):
    ws.plug()
    _copy_many(ws, 60)
    ws.sudo("root")
    _copy_many(ws, 60)
    assert ws.only("copy.burst").login_user == "sato"


def test_a_window_that_emptied_fires_again(ws):
    ws.plug()
    _copy_many(ws, 110)
    ws.wait(700)
    _copy_many(ws, 110)
    assert len(ws.all("copy.burst")) == 2


# -- the agent itself, and history -------------------------------------------------------------------------------------


def test_history_is_one_summary_per_person_and_program(ws):
    for name in ("a.csv", "b.csv", "a.csv"):
        ws.run("libreoffice").read(name)
    ws.run("libreoffice").close(f"{ROOT}/a.csv", 1)
    ws.run("rm").delete(f"{ROOT}/b.csv")
    ws.wait(605)
    writer, remover = ws.all("file.history")
    assert writer["count"] == 4 and writer.detail == {
        "reads": 3,
        "writes": 1,
        "deletes": 0,
        "renames": 0,
        "files": ["a.csv", "b.csv"],
    }
    assert writer.login_user == "sato" and writer["file"] == {"name": "customers", "path": ROOT, "type_id": 2}
    assert remover.detail["deletes"] == 1


def test_history_of_a_service_counts_and_names_no_file(ws):
    service = ws.program("/usr/bin/restic", uid=0)
    for _ in range(1_000):
        service.read("a.csv")
    ws.tell(facts.Stopping(at_ms=ws.now))
    event = ws.only("file.history")
    assert event["count"] == 1_000 and "files" not in event.detail and "user" not in event["actor"]


def test_names_beyond_two_hundred_are_counted(ws):
    reader = ws.run("grep")
    for number in range(250):
        reader.read(ws.file(f"{ROOT}/{number}.txt", 10))
    ws.tell(facts.Stopping(at_ms=ws.now))
    assert len(ws.only("file.history").detail["files"]) == 200 and ws.only("file.history").detail["not_named"] == 50


def test_stopping_tells_what_is_known_and_ends_with_stopped(ws):
    ws.plug().run("zip").read("a.csv").create(f"{ws.stick}/x.zip").close(f"{ws.stick}/x.zip", 100_000)
    ws.tell(facts.Stopping(at_ms=ws.now))
    ws.only("file.copied_out")
    assert ws.events[-1].code == "agent.stopped"


def test_gap_clock_tampering_and_blindness_are_said(ws):
    ws.tell(facts.Lost(at_ms=ws.now, reason="fanotify_overflow", since_ms=START - 5, until_ms=START))
    ws.tell(facts.Lost(at_ms=ws.now, reason="spool_full", since_ms=START - 5, until_ms=START, count=3, first_seq=4, last_seq=6))
    ws.tell(facts.Clock(at_ms=ws.now, jump_ms=-86_400_000))
    ws.tell(facts.Tampered(at_ms=ws.now, what="spool_rows", detail={"missing": 2}))
    ws.tell(facts.Coverage(at_ms=ws.now, sensor="fanotify", ok=False, blind=["no_privilege"], why="needs root"))
    codes = {event.code: event for event in ws.events}
    assert [event.code for event in ws.events] == ["agent.gap", "agent.gap", "agent.clock", "agent.tampered", "agent.sensors"]
    assert codes["agent.gap"].lost["count"] == 3 and codes["agent.tampered"].severity == 5
    assert codes["agent.clock"].detail == {"jump_ms": -86_400_000}
    assert codes["agent.sensors"].detail["blind"] == ["no_privilege"] and "needs root" in codes["agent.sensors"]["message"]


def test_the_distance_to_the_collectors_clock_goes_into_every_event(ws):
    ws.tell(facts.Clock(at_ms=ws.now, offset_ms=1_500)).plug()
    assert ws.only("medium.attached").time_offset_ms == 1_500


def test_a_state_that_cannot_be_read_is_said(ws):
    ws.core.restore(b"\xc1 not msgpack")
    ws.tell(facts.Tick(at_ms=ws.now))
    assert ws.only("agent.gap").lost["reason"] == "state_unreadable"


def test_a_start_names_boot_mode_and_configuration(ws):
    ws.tell(
        facts.Started(at_ms=ws.now, boot_id="b", config_digest="d" * 64, mode="observe", previous={"epoch": 1, "head": "ab"})
    )
    started, config = ws.events
    assert started.code == "agent.started" and started.detail == {
        "boot_id": "b",
        "mode": "observe",
        "previous": {"epoch": 1, "head": "ab"},
    }
    assert config.detail["config_digest"] == "d" * 64 and started["app"]["name"] == "Sekisho"


def test_facts_replayed_from_their_record_give_the_same_events(ws):
    ws.plug().copy("a.csv")
    again = Workstation()
    again.events.clear()
    for fact in facts.read(line.encode() for line in ws.story):
        again.tell(fact)
    assert [json.dumps(each["unmapped"]["sekisho"].get("source")) for each in again.all("file.copied_out")] == [
        json.dumps(each["unmapped"]["sekisho"].get("source")) for each in ws.all("file.copied_out")
    ]
