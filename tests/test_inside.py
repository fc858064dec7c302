"""What lies in a file that nothing joins to what was read: an extract, something packed, a disk image. By bytes alone."""

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from agent.core import facts
from agent.core.doubts import Doubt
from agent.sense import disproof, inside, rawread

CHANCE = random.Random(20261124)
NOISE = CHANCE.randbytes(90_000)
LINES = "".join(f"{n};customer {CHANCE.getrandbits(64):x};tokyo\n" for n in range(4_000)).encode()
REGULAR = b"customer,0000,tokyo\n" * 45_000


def _held(tmp_path: Path, copy: bytes, **sources: bytes) -> dict[str, int]:
    for name, data in sources.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "copy"
    path.write_bytes(copy)
    paths = {str(tmp_path / name): name for name in sources}
    doubt = Doubt(b"k", str(path), len(copy), list(paths), [], False, False, [], True)
    (told,) = disproof.look([doubt], 1)
    assert isinstance(told, facts.Compared) and told.alike == ("same" if told.held else "unknown")
    return {paths[each]: size for each, size in told.held.items()}


def _zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("photo.jpg", NOISE[:200])
        made.writestr("x", data)
    return out.getvalue()


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress, _zip], ids=["xz", "gzip", "bzip2", "zip"])
def test_what_is_packed_is_found_whatever_it_is_called(tmp_path, pack):
    packed = pack(REGULAR)
    assert len(packed) < len(REGULAR) / 20
    assert _held(tmp_path, packed, source=REGULAR, other=LINES) == {"source": len(REGULAR)}


def test_another_text_that_is_packed_is_not(tmp_path):
    assert not _held(tmp_path, lzma.compress(b"things to do, call back\n" * 9_000), source=REGULAR)


def test_packed_bytes_that_are_damaged_or_never_end_harm_nobody(tmp_path):
    began = time.monotonic()
    packed = lzma.compress(REGULAR)
    inside.unpacked(packed[:-40] + bytes(40))
    bomb = gzip.compress(bytes(300 << 20), 9)
    plain, count = inside.unpacked(bomb) or (b"", 0)
    assert len(plain) <= inside.HEAD and count <= 80 << 20
    for junk in (b"\x1f\x8b", b"PK\x03\x04", b"BZh9" + NOISE, b"\xfd7zXZ\0" + NOISE):
        inside.unpacked(junk)
    assert inside.unpacked(NOISE) is None
    assert time.monotonic() - began < 10


def test_a_few_lines_of_a_file_are_an_extract_of_it(tmp_path):
    assert _held(tmp_path, LINES[2_000:2_900], source=LINES, other=NOISE) == {"source": 900}
    note = b"a note of my own, about nothing that was read: call back, buy bread, write home\n" * 3
    assert not _held(tmp_path, note, source=LINES)


def test_a_short_count_is_no_extract(tmp_path):
    assert not _held(tmp_path, LINES[2_000:2_060], source=LINES)


def test_files_are_found_in_an_image_at_any_sector(tmp_path):
    image = bytearray(1 << 20)
    image[77 * 512 : 77 * 512 + len(NOISE)] = NOISE
    image[900 * 512 : 900 * 512 + 700] = LINES[:700]
    assert _held(tmp_path, bytes(image), source=NOISE, small=LINES[:700], other=LINES[700:]) == {"source": 90_000, "small": 700}


@pytest.mark.skipif(not os.path.exists("/usr/sbin/mkfs.ext4"), reason="needs mkfs.ext4")
def test_a_file_is_found_in_a_real_file_system(tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(NOISE)
    image = tmp_path / "i"
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-d", str(tmp_path / "tree"), str(image), "24M"], check=True)
    assert _held(tmp_path, image.read_bytes(), source=NOISE, other=LINES) == {"source": 90_000}


def test_a_file_that_changes_or_goes_meanwhile_is_not_known(tmp_path):
    doubt = Doubt(b"k", str(tmp_path / "gone"), 5, [str(tmp_path / "also")], [], False, False, [], True)
    (told,) = disproof.look([doubt], 1)
    assert isinstance(told, facts.Compared) and told.alike == "unknown"


# -- what was read by way of the device -------------------------------------------------------------------------------------


def test_what_was_read_past_the_file_system_is_known_by_its_bytes(tmp_path):
    tree = tmp_path / "protected" / "below"
    tree.mkdir(parents=True)
    (tree / "a.csv").write_bytes(NOISE)
    (tree / "b.csv").write_bytes(NOISE[::-1])
    copy = tmp_path / "x"
    copy.write_bytes(NOISE)
    written = facts.Closed(at_ms=5, pid=7, key=b"k", path=str(copy), size=len(NOISE))
    (read,) = rawread.read_for(written, [str(tmp_path / "protected")])
    assert (read.pid, read.path, read.size) == (7, str(tree / "a.csv"), len(NOISE))
    copy.write_bytes(LINES[: len(NOISE)])
    assert not list(rawread.read_for(written, [str(tmp_path / "protected"), str(tmp_path / "gone")]))


def test_an_export_is_known_by_its_values_and_a_note_in_the_same_language_is_not(tmp_path):
    """A database keeps the values of a row as they are, with numbers and lengths between them."""
    rows = [f"{CHANCE.getrandbits(60):x} Chiyoda {n}" for n in range(3_000)]
    pages = b"".join(bytes([n % 7, 0, 3]) + row.encode() + bytes([n % 251, 1]) for n, row in enumerate(rows))
    export = "".join(f"{n},{row}\n" for n, row in enumerate(rows)).encode()
    prose = b" ".join(b"please remember to call the customer about the delivery on Thursday, before noon,".split()) * 400
    assert set(_held(tmp_path, export, source=pages, other=prose)) == {"source"}
    note = b"call the customer before Thursday, about the delivery,\nand remember: please be there at noon,\n" * 8
    assert not _held(tmp_path, note, source=prose, other=pages)
