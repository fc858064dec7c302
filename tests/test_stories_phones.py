"""Stories of phones whose bytes the kernel counts: what really went to one is told, and as much of it as went."""

import pytest
from test_stories_ways import Way
from workstation import PHONE, Program, Workstation

NODE = "usb:001/002"


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato").plug(PHONE, mount=None)


def held(by: Program) -> Way:
    return Way(by, "mtp", id=NODE, device=PHONE.id, uses=20, idle_uses=10)


def test_what_was_sent_is_told_once_it_is_sent(ws: Workstation) -> None:
    tool = ws.run("mtp-connect")
    phone = held(tool)
    phone.send(300)
    tool.read("a.csv")
    phone.more["uses"] = 40
    ws.none("file.copied_out").wait(1)
    phone.send(300_200)
    out = ws.only("file.copied_out")
    assert (out.way, out.link, out.bytes) == ("mtp", "process", 300_000)
    assert out.confidence >= 0.9, "it was measured"


def test_what_the_phone_refused_has_not_left(ws: Workstation) -> None:
    tool = ws.run("mtp-connect")
    phone = held(tool)
    tool.read("a.csv")
    phone.more["uses"] = 60
    phone.send(420).close()
    ws.wait(30).none("file.copied_out")


def test_what_was_cut_short_left_as_far_as_it_came(ws: Workstation) -> None:
    tool = ws.run("mtp-connect")
    phone = held(tool)
    tool.read("a.csv")
    phone.more["uses"] = 60
    phone.send(120_000).close()
    out = ws.only("file.copied_out")
    assert 110_000 < out.bytes < 120_000
    assert out.confidence < 0.85


def test_a_slow_phone_is_waited_for(ws: Workstation) -> None:
    daemon = ws.run("gvfsd-mtp")
    phone = held(daemon)
    daemon.read("a.csv")
    phone.more["uses"] = 60
    for _ in range(6):
        phone.send(50_100)
        ws.wait(5)
    assert ws.only("file.copied_out").bytes == 300_000


def test_several_files_are_each_told_though_counted_together(ws: Workstation) -> None:
    daemon = ws.run("gvfsd-mtp")
    phone = held(daemon)
    daemon.read("a.csv")
    phone.more["uses"] = 60
    phone.send(600_500)
    daemon.read("b.csv")
    phone.more["uses"] = 80
    phone.send(100)
    ws.wait(1)
    assert len(ws.all("file.copied_out")) == 2


def test_a_refused_list_does_not_leave_with_a_photograph_later(ws: Workstation) -> None:
    daemon = ws.run("gvfsd-mtp")
    phone = held(daemon)
    daemon.read("a.csv")
    phone.more["uses"] = 60
    phone.send(300)
    ws.wait(120)
    phone.more["uses"] = 90
    phone.send(4_000_000)
    ws.wait(30).none("file.copied_out")
