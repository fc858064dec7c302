"""Stories of joins that amounts alone suggest: the bytes decide before anything is told."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workstation import ROOT, Workstation
from workstation import STICK as DEVICE

from agent.core import facts
from agent.core.doubts import Doubt
from agent.core.facts import OpenFile
from agent.sense import disproof

STICK = "/media/Kingston"
NOTE = f"{STICK}/own.odt"


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug()


def _office(ws: Workstation, alike: str, size: int = 180_000) -> Workstation:
    """A program that opened a protected file saves something of about its size on the stick."""
    ws.alike[NOTE] = alike
    ws.run("soffice").read("b.csv").create(NOTE).close(NOTE, size)
    return ws.wait(2)


def test_a_note_of_its_own_is_no_copy_if_its_bytes_say_so(ws):
    _office(ws, "other").none("file.copied_out")
    assert ws.only("file.written")
    assert [doubt.path for doubt in ws.doubts] == [NOTE]


def test_what_nobody_can_know_stays_as_it_was_graded(ws):
    unknown = _office(ws, "unknown").only("file.copied_out")
    packed = _office(Workstation().login("sato").plug(), "packed").only("file.copied_out")
    silent = _office(Workstation().login("sato").plug(), "").only("file.copied_out")
    assert unknown.confidence == packed.confidence == silent.confidence < 0.95
    assert unknown.link == "process"


def test_bytes_that_agree_make_it_sure(ws):
    event = _office(ws, "same", 110_000).only("file.copied_out")
    assert event.confidence >= 0.9 and event.link == "process"


def test_whoever_wrote_it_the_bytes_of_a_protected_file_are_joined_by_content(ws):
    ws.run("cat").read("a.csv")
    path = f"{STICK}/a.csv"
    ws.alike[path] = "same"
    ws.file(path, 300_000)
    ws.tell(facts.Found(at_ms=ws.now, pid=0, key=ws.keys[path], path=path, size=300_000)).wait(3)
    event = ws.only("file.copied_out")
    assert event.link == "content" and event.confidence >= 0.9 and event.source["path"] == f"{ROOT}/a.csv"


def test_what_several_had_read_leaves_once(ws):
    for reader in ("less", "grep"):
        ws.program(f"/usr/bin/{reader}").read("a.csv")
    path = f"{STICK}/x"
    ws.held[path] = {f"{ROOT}/a.csv": 300_000}
    ws.program("/usr/sbin/smbd").create(path).close(path, 300_000)
    ws.wait(2)
    assert ws.only("file.copied_out").link == "content"


@pytest.mark.parametrize("name", ["a.csv", "x.csv"])
@pytest.mark.parametrize("beneath_first", [False, True])
def test_what_its_server_writes_beneath_a_view_is_told_where_it_was_written(ws, name, beneath_first):
    ws.mount(DEVICE, "/home/sato/view", lies_on=f"{STICK}/")
    ws.program("/usr/bin/less").read("a.csv")
    person, server = ws.run("cp").read("a.csv"), ws.program("/usr/bin/bindfs")
    writes = [(person, f"/home/sato/view/{name}"), (server, f"{STICK}/{name}")]
    for _, path in writes:
        ws.held[path] = {f"{ROOT}/a.csv": 300_000}
    for program, path in reversed(writes) if beneath_first else writes:
        program.create(path).close(path, 300_000)
    ws.wait(3)
    event = ws.only("file.copied_out")
    assert event.dest["path"] == writes[0][1] and event.link == "process" and event.login_user == "sato"
    assert len(ws.all("file.written")) == 1


def test_a_plain_copy_is_told_at_once_and_not_compared(ws):
    ws.copy("a.csv")
    assert ws.only("file.copied_out").confidence == 0.95 and not ws.doubts


def test_a_file_manager_probes_protected_files_and_copies_a_photo_again_and_again(ws):
    photo = OpenFile("/home/sato/holiday.jpg", 250_000, ws.keys["/home/sato/holiday.jpg"])
    manager = ws.run("nautilus").read("a.csv").read("b.csv").seen(files=[photo])
    for number in range(5):
        path = f"{STICK}/{number}.jpg"
        ws.alike[path] = "decoy"
        manager.create(path).close(path, 250_000)
    ws.wait(2).none("file.copied_out")
    assert len(ws.all("file.written")) == 5
    assert all(photo.path in doubt.decoys for doubt in ws.doubts)


def test_a_decoy_made_of_protected_bytes_is_none(ws):
    decoy = ws.file("/home/sato/decoy.jpg", 200_000)
    ws.tell(facts.Moved(at_ms=ws.now, pid=0, key=ws.keys[decoy], path=decoy, old_path=f"{ROOT}/moved.csv", size=200_000))
    program = ws.run("python").read("b.csv").seen(files=[OpenFile(decoy, 200_000, ws.keys[decoy])])
    path = f"{STICK}/x.bin"
    ws.alike[path] = "decoy"
    program.create(path).close(path, 200_000)
    ws.wait(2)
    assert ws.all("file.copied_out") and not any(doubt.decoys for doubt in ws.doubts)


def test_what_settled_after_it_waits_for_the_answer(ws):
    """The archive takes what was read; the log beside it is not told to hold it, too."""
    archive, log = f"{STICK}/x.tar", f"{STICK}/x.log"
    ws.alike |= {archive: "same", log: "unknown"}
    program = ws.run("tar").read("a.csv").read("b.csv")
    program.create(archive).close(archive, 512_000).create(log).close(log, 490_000)
    ws.wait(2)
    assert {event.dest["path"] for event in ws.all("file.copied_out")} == {archive}
    assert ws.only("file.written") and [doubt.path for doubt in ws.doubts][:1] == [archive]


def test_a_stick_pulled_before_the_answer_loses_nothing(ws):
    ws.alike[NOTE] = ""
    ws.run("soffice").read("b.csv").create(NOTE).close(NOTE, 180_000)
    ws.now += 400
    ws.tell(facts.Tick(at_ms=ws.now)).none("file.copied_out")
    assert ws.doubts
    ws.unplug()
    assert ws.only("file.copied_out").dest["path"] == NOTE


def test_a_server_is_never_asked_for_its_bytes():
    ws = Workstation().login("sato")
    ws.plug(mount=None)
    ws.tell(facts.Mounted(at_ms=ws.now, mount_id=31, dev="8:17", mount=STICK, fs="fuseblk", label="STICK"))
    ws.stick = STICK
    _office(ws, "other")
    assert ws.only("file.copied_out") and not ws.doubts


# -- what nothing joins but the bytes --------------------------------------------------------------------------------------


def test_a_server_that_writes_what_somebody_else_read_is_known_by_the_bytes(ws):
    """A file system in user space over the stick: one program reads, another one writes."""
    ws.run("cp").read("a.csv")
    path = f"{STICK}/x"
    ws.held[path] = {f"{ROOT}/a.csv": 300_000}
    ws.run("bindfs").create(path).close(path, 300_000)
    event = ws.wait(2).only("file.copied_out")
    assert event.link == "content" and event.confidence >= 0.9 and event.bytes == 300_000


def test_a_file_of_the_same_size_is_no_copy_if_its_bytes_do_not_say_so(ws):
    ws.run("cp").read("a.csv")
    path = f"{STICK}/x"
    ws.run("bindfs").create(path).close(path, 300_000)
    ws.wait(2).none("file.copied_out")
    assert ws.only("file.written") and [doubt.only for doubt in ws.doubts] == [True]


def test_what_is_packed_far_below_what_was_read_is_known_by_what_is_in_it(ws):
    path = f"{STICK}/x.xz"
    ws.held[path] = {f"{ROOT}/a.csv": 300_000}
    ws.run("xz").read("a.csv").create(path).close(path, 400)
    event = ws.wait(2).only("file.copied_out")
    assert event.link == "process" and event.bytes == 300_000


def test_a_note_beside_a_protected_file_is_asked_for_its_bytes_and_stays_a_note(ws):
    ws.run("editor").read("a.csv").create(NOTE).close(NOTE, 400)
    ws.wait(2).none("file.copied_out")
    assert ws.only("file.written")


def test_of_a_disk_image_only_those_files_are_told_that_lie_in_it(ws):
    """Mounted, written to and unmounted before anybody looked: all that is told is that umount(8) closed the image."""
    ws.run("cp").read("a.csv")
    ws.run("grep").read("b.csv")
    image = f"{STICK}/disk.img"
    ws.held[image] = {f"{ROOT}/a.csv": 300_000}
    ws.run("umount").create(image).close(image, 24 << 20)
    event = ws.wait(2).only("file.copied_out")
    assert event.source["path"] == f"{ROOT}/a.csv" and event.link == "content"


# -- the look itself -------------------------------------------------------------------------------------------------------

NAMES = [
    f"{first}-{last}".encode() for first in ("sato", "suzuki", "tanaka") for last in ("akira", "yumiko", "haruto", "midori")
]
TEXT = b"".join(b"%06d,%s,%d Ginza street,Tokyo,%d yen\n" % (n, NAMES[n % 12], n * 7, n * 31) for n in range(4_000))
OTHER = b"".join(
    b"Chapter %d. Meadows whisper beneath %s mountains while rivers wander.\n" % (n, b"golden") for n in range(3_000)
)
NOISE = random.Random(7).randbytes(150_000)


def _look(tmp_path: Path, copy: bytes, *sources: bytes, decoys: tuple[bytes, ...] = (), piece: bool = False) -> str:
    def put(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    named = [put(f"source-{n}", data) for n, data in enumerate(sources)]
    others = [put(f"decoy-{n}", data) for n, data in enumerate(decoys)]
    doubt = Doubt(b"k", put("copy", copy), len(copy), named, [], True, piece, others)
    (told,) = disproof.look([doubt], 1)
    assert isinstance(told, facts.Compared) and told.key == b"k"
    return told.alike


def test_equal_bytes_are_the_same(tmp_path):
    assert _look(tmp_path, NOISE, NOISE) == "same"
    assert _look(tmp_path, b"head" * 200 + NOISE + TEXT, TEXT, NOISE) == "same"


def test_another_file_of_the_very_bytes_is_a_decoy_unless_the_source_has_them_too(tmp_path):
    other = random.Random(8).randbytes(len(NOISE))
    assert _look(tmp_path, other, TEXT, NOISE, decoys=(other,)) == "decoy"
    assert _look(tmp_path, NOISE, NOISE, decoys=(NOISE,)) == "same"


def test_another_text_is_other_and_an_excerpt_is_not(tmp_path):
    assert _look(tmp_path, OTHER, TEXT) == "other"
    assert _look(tmp_path, b"\n".join(TEXT.split(b"\n")[100:160]), TEXT) != "other"
    assert _look(tmp_path, b"hi 12\n", NOISE) == "other"


def test_what_may_be_packed_encrypted_or_encoded_is_never_other(tmp_path):
    import base64
    import bz2
    import lzma
    import zlib

    key = random.Random(9).randbytes(len(TEXT))
    sealed = bytes(a ^ b for a, b in zip(TEXT, key, strict=True))
    for copy in (zlib.compress(TEXT), lzma.compress(TEXT), bz2.compress(TEXT), sealed, TEXT.hex().encode()):
        assert _look(tmp_path, copy, TEXT) != "other"
        assert _look(tmp_path, base64.b64encode(copy), TEXT) != "other"
        assert _look(tmp_path, base64.encodebytes(sealed), TEXT) != "other"
    assert _look(tmp_path, TEXT.translate(bytes(range(1, 256)) + b"\0"), TEXT) != "other", "letter by letter"


def test_a_part_from_far_inside_a_large_source_is_never_other(tmp_path):
    large = TEXT * 80
    assert _look(tmp_path, OTHER, large) == "unknown"
    assert _look(tmp_path, NOISE[20_000:60_000], TEXT, NOISE) != "other"


def test_random_bytes_that_can_not_hold_the_smallest_source_are_other_but_for_a_piece(tmp_path):
    note = random.Random(10).randbytes(90_000)
    assert _look(tmp_path, note, NOISE) == "other"
    assert _look(tmp_path, note, NOISE, piece=True) == "unknown"
    assert _look(tmp_path, note, b"PK\x03\x04" + NOISE) == "unknown", "a document may be unpacked and packed anew"


def test_a_source_or_file_that_is_gone_or_no_file_disproves_nothing(tmp_path):
    note = tmp_path / "note"
    note.write_bytes(OTHER)
    doubt = Doubt(b"k", str(note), len(OTHER), [str(tmp_path / "gone")], [], True, False, [])
    assert [told.alike for told in disproof.look([doubt], 1)] == ["unknown"]
    os.mkfifo(tmp_path / "fifo")
    for path, size in (("fifo", 1), ("gone", 1)):
        asked = doubt._replace(path=str(tmp_path / path), size=size)
        assert [told.alike for told in disproof.look([asked], 1)] == ["gone"]
    (tmp_path / "link").symlink_to(note)
    assert [told.alike for told in disproof.look([doubt._replace(path=str(tmp_path / "link"))], 1)] == ["gone"]


def test_nothing_stays_open_and_no_time_of_access_is_written(tmp_path):
    before = os.listdir("/proc/self/fd")
    _look(tmp_path, OTHER, TEXT, decoys=(NOISE,))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    copy = tmp_path / "copy"
    os.utime(copy, (1_000_000_000, copy.stat().st_mtime))
    doubt = Doubt(b"k", str(copy), len(OTHER), [str(tmp_path / "source-0")], [], True, False, [])
    list(disproof.look([doubt], 1))
    assert copy.stat().st_atime == 1_000_000_000


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=20_000), st.integers(0, 5_000), st.integers(200, 20_000))
def test_a_part_of_a_source_is_never_other(tmp_path_factory, data, start, length):
    part = data[start : start + length] or data
    assert _look(tmp_path_factory.mktemp("look"), part, data) != "other"
