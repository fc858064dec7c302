"""Lists that other programs keep: rules of usbguard and exports of udev, as approvals, and what can't be carried over."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_stub import udevdb, usbguard

STICK = "usb:0951:1666:60A44C413F8CF320"

GENERATED = r"""
allow id 1d6b:0002 serial "0000:00:14.0" name "xHCI Host Controller" hash "jEP/6WzviqdJ5VSeTUY8PatCNBKeaREvo2OqdplND/o=" parent-hash "rV9bfLq7c2eA4tYjVO4bptFMC2k8vkM1GjW7mR5wxjQ=" with-interface 09:00:00 with-connect-type ""
allow id 0951:1666 serial "60A44C413F8CF320" name "DataTraveler 3.0" hash "0sSbYs1xYhF8eQJ0Kx0Y0qO3Jm0F7p2R4QbA4j8m1a0=" parent-hash "jEP/6WzviqdJ5VSeTUY8PatCNBKeaREvo2OqdplND/o=" via-port "2-1" with-interface 08:06:50 with-connect-type "hotplug"
allow id 046d:c31c serial "" name "USB Keyboard" hash "xm2L0D4kq3q1n7sIhQ0Zc9e2v1bX8aY5tT6uU7vV8wA=" via-port "1-4" with-interface { 03:01:01 03:00:00 } with-connect-type "hotplug"
"""  # noqa: E501 - as `usbguard generate-policy` prints it


def carried(*lines: str) -> list[usbguard.Carried]:
    found = list(usbguard.read("\n".join(lines)))
    assert all(isinstance(each, usbguard.Carried) for each in found), found
    return found


def test_a_generated_policy():
    hub, stick, keyboard = carried(*GENERATED.splitlines())
    assert stick.keys == (STICK,)
    assert (stick.line, stick.allow, stick.name) == (3, True, "DataTraveler 3.0")
    assert "not carried over: the port it is in" in stick.notes
    assert "not carried over: the hash of its descriptors" in stick.notes
    assert hub.keys == ("usb:1d6b:0002:0000_00_14.0",)
    assert keyboard.keys == ("usb:046d:c31c:noserial",)
    assert "all pieces of this model share the key" in keyboard.notes[0]


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ('allow id 0951:1666 serial "60A44C413F8CF320"', [STICK]),
        ('allow 0951:1666 serial "60A44C413F8CF320"', [STICK]),
        ('allow id 0951:1666 serial { "60A44C413F8CF320" }', [STICK]),
        ('allow id 0951:1666 serial one-of { "60A44C413F8CF320" "60B" }', [STICK, "usb:0951:1666:60B"]),
        ('allow id one-of { 0951:1666 0951:1667 } serial "60B"', ["usb:0951:1666:60B", "usb:0951:1667:60B"]),
        ('reject id 0951:1666 serial "60B"', ["usb:0951:1666:60B"]),
        ('allow id 0951:1666 serial "60B" # the boss\'s', ["usb:0951:1666:60B"]),
    ],
)
def test_rules_of_single_media_are_carried_over(rule, keys):
    (found,) = carried(rule)
    assert list(found.keys) == keys
    assert found.allow == rule.startswith("allow")


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("allow", "names no device"),
        ('allow hash "jEP/6Wz="', "names no device"),
        ('allow id 0951:* serial "60B"', "all devices of a maker"),
        ("allow id *:*", "all devices of a maker"),
        ("allow id 0951:1666", "names no serial number"),
        ('allow id 0951:1666 serial none-of { "60B" "60C" }', "matches serial numbers by none-of"),
        ('allow id none-of { 0951:1666 0951:1667 } serial "60B"', "matches devices by none-of"),
        ('allow id 0951:1666 serial all-of { "60B" "60C" }', "matches serial numbers by all-of"),
        ('allow id 0951:1666 serial "60B" if !allowed-matches(id 0951:1666)', "only under conditions"),
        ("allow with-interface one-of { 08:*:* 08:06:50 }", "names no device"),
        ("block with-interface all-of { 08:*:* 03:00:* }", "names no device"),
        ("allow if { true localtime(00:00-12:00) }", "names no device"),
    ],
)
def test_rules_of_many_are_never_made_to_fit(rule, why):
    (found,) = carried(rule)
    assert found.keys == ()
    assert why in found.notes[0]


WRONG = [
    "Allow", 'allow name "a\\n"', "allow serial {}", 'allow id "0951:1666"', "allow with-interface 08:*:50", 'allow serial "a',
    "allow id 0951:1666 id 0951:1667", 'allow serial "a" foo', "allow id 951:1666", "allow id *:1666", "allow serial 60B",
    'allow serial some-of { "a" }', "allow id", 'allow serial one-of "a"', "permit",
]  # fmt: skip
RIGHT = [
    "allow", "block", "reject", "# a comment", "", 'allow name "a\\x41"', 'allow name "a\\\\"', "allow 0951:1666",
    "allow id *:*",
    "allow id 0951:*", "allow with-interface 08:*:*", "allow if localtime(00:00-12:00)", 'allow serial { "a" }',
    'allow serial ""',
    "allow if { !allowed-matches(id 0951:1666) true }", "allow with-interface one-of { 03:00:01 03:01:01 } # x",
    'allow serial "日本"', 'allow via-port one-of { "1-1" "1-2.4" }', 'block label "x" with-connect-type "hotplug"',
    'allow id 0951:1666 serial match-all { "a" "b" }', 'allow name equals-ordered { "a" "b" }', *GENERATED.splitlines()[1:],
]  # fmt: skip


@pytest.mark.parametrize("rule", WRONG)
def test_what_is_no_rule_is_said_with_its_place(rule):
    with pytest.raises(usbguard.BadRule) as bad:
        usbguard.parse(rule)
    assert 1 <= bad.value.column <= len(rule) + 1


@pytest.mark.parametrize("rule", RIGHT)
def test_rules(rule):
    usbguard.parse(rule)


@pytest.mark.skipif(not shutil.which("usbguard-rule-parser"), reason="usbguard-rule-parser (package usbguard) is not installed")
@pytest.mark.parametrize("rule", [each for each in (*RIGHT, *WRONG) if each])
def test_usbguard_itself_says_the_same_of_a_rule(rule):
    done = subprocess.run(["usbguard-rule-parser", rule], capture_output=True, text=True, timeout=20)
    assert ("ERROR" in done.stdout + done.stderr) == (rule in WRONG)


@given(text=st.text(max_size=200))
def test_whatever_a_file_holds_is_carried_or_refused(text):
    for each in usbguard.read(f"allow {text}"):
        assert isinstance(each, usbguard.Carried) or each[1].column >= 1


EXPORT = """P: /devices/pci0000:00/0000:00:14.0/usb2/2-1
N: bus/usb/002/003
E: DEVTYPE=usb_device
E: SUBSYSTEM=usb
E: ID_VENDOR=Kingston
E: ID_VENDOR_ID=0951
E: ID_MODEL=DataTraveler_3.0
E: ID_MODEL_ID=1666
E: ID_SERIAL_SHORT=60A44C413F8CF320
E: ID_USB_INTERFACES=:080650:

P: /devices/pci0000:00/0000:00:14.0/usb1/1-4
E: DEVTYPE=usb_device
E: SUBSYSTEM=usb
E: ID_VENDOR_ID=046d
E: ID_MODEL_ID=c31c
E: ID_USB_INTERFACES=:030101:030000:

P: /devices/pci0000:00/0000:00:14.0/usb1/1-5
E: DEVTYPE=usb_device
E: SUBSYSTEM=usb
E: ID_VENDOR_ID=18d1
E: ID_MODEL_ID=4ee1
E: ID_MODEL=Pixel_8
E: ID_SERIAL_SHORT=3A1B
E: ID_USB_INTERFACES=:060101:ff4201:

P: /devices/pci0000:00/0000:00:1d.0/mmc_host/mmc0/mmc0:0001/block/mmcblk0
E: SUBSYSTEM=block
E: DEVTYPE=disk
E: ID_NAME=SU08G
E: ID_SERIAL=0x1a2b3c4d
E: ID_DRIVE_FLASH_SD=1

P: /devices/pci0000:00/0000:00:17.0/ata1/block/sda
E: SUBSYSTEM=block
E: DEVTYPE=disk
E: ID_SERIAL_SHORT=S3Z
"""


def test_an_export_of_udev():
    found = [(each.line, each.key, each.name) for each in udevdb.read(EXPORT)]
    assert found == [
        (1, STICK, "Kingston DataTraveler 3.0"),
        (19, "usb:18d1:4ee1:3A1B", "Pixel 8"),
        (28, "", "SU08G"),
    ]


def test_an_export_that_lacks_ids():
    usb = "P: /devices/usb1/1-2\nE: SUBSYSTEM=usb\nE: DEVTYPE=usb_device\nE: ID_USB_INTERFACES=:080650:\n"
    assert [(each.key, each.name) for each in udevdb.read(usb)] == [("", "1-2")]
    assert [each.key for each in udevdb.read(f"{usb}E: PRODUCT=951/1666/110\nE: ID_SERIAL_SHORT=60B")] == ["usb:0951:1666:60B"]


@given(text=st.text(max_size=200))
def test_whatever_an_export_holds(text):
    list(udevdb.read(f"P: /x\nE: SUBSYSTEM=usb\nE: DEVTYPE=usb_device\nE: ID_USB_INTERFACES=:080650:\n{text}"))


@pytest.mark.parametrize(
    "recorded", sorted(Path(__file__).parent.joinpath("devices").glob("*.umockdev")), ids=lambda path: path.stem
)
def test_every_recorded_device_is_read(recorded):
    for each in udevdb.read(recorded.read_text()):
        assert each.line and each.name
