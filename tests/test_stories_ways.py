"""Stories of ways out that are no mounts: what is told of uploads, phones without a mount, printers; and what is not."""

import itertools
from typing import Any

import pytest
from workstation import PHONE, ROOT, START, Program, Workstation

from agent.core import facts
from agent.core.limits import WindowLimit

FAR = "203.0.113.5:443"
MB = 1_000_000


class Way:
    """A way that a program holds: `send(n)` bytes more, `close()`."""

    _ids = itertools.count(1)

    def __init__(self, by: Program, way: str = "network", *, old: bool = False, counted: bool = True, **more: Any) -> None:
        self.by, self.way, self.sent = by, way, (700_000 if old else 0) if counted else None
        self.id = more.pop("id", f"tcp:{next(self._ids):x}")
        self.more: dict[str, Any] = {"peer": FAR, **more}
        if not old:
            self.more = {"since_ms": by.ws.now, "began_ms": by.ws.now - 20, **self.more}
        self.tell()

    def tell(self) -> "Way":
        fact = facts.WayHeld(at_ms=self.by.ws.now, pid=self.by.pid, way=self.way, id=self.id, sent=self.sent, **self.more)
        self.by.ws.tell(fact)
        return self

    def send(self, count: int) -> "Way":
        assert self.sent is not None
        self.sent += count
        self.by.ws.now += 20
        return self.tell()

    def close(self) -> "Way":
        self.by.ws.tell(facts.WayClosed(at_ms=self.by.ws.now, id=self.id, sent=self.sent))
        return self


@pytest.fixture
def ws() -> Workstation:
    return Workstation().login("sato")


def test_an_upload_is_told_with_the_far_end_and_the_bytes(ws: Workstation) -> None:
    curl = ws.run("curl", "-T", f"{ROOT}/a.csv", "https://example.net/")
    way = Way(curl)
    curl.read("a.csv")
    way.send(300_900).close()
    out = ws.only("file.copied_out")
    assert (out.source["path"], out.way, out.link, out.dest) == (f"{ROOT}/a.csv", "network", "process", {"peer": FAR})
    assert out.bytes == 300_000 and out.confidence >= 0.9 and out.login_user == "sato"
    assert out.process["exe"] == "/usr/bin/curl" and out.medium is None


def test_what_died_before_anybody_looked_is_told_when_its_socket_is_gone(ws: Workstation) -> None:
    """The kernel tells a closed socket's final count; the read may be told after it."""
    curl = ws.run("curl")
    way = Way(curl)
    way.sent = 201_000
    way.close()
    curl.read("b.csv")
    ws.wait(1)
    assert ws.only("file.copied_out").bytes == 200_000


def test_scp_reads_and_its_ssh_sends(ws: Workstation) -> None:
    scp = ws.run("scp", f"{ROOT}/a.csv", "far:")
    way = Way(scp.child("/usr/bin/ssh", "far"), peer="203.0.113.5:22")
    way.send(3_000)
    ws.wait(1)
    scp.read("a.csv")
    way.send(301_000).close()
    out = ws.only("file.copied_out")
    assert out.link == "pipeline" and out.process["exe"] == "/usr/bin/scp"
    assert out.dest["peer"] == "203.0.113.5:22"


def test_a_pipeline_to_ssh_that_compresses(ws: Workstation) -> None:
    tar, ssh = ws.run("tar", "cz", ROOT, pipes=[7]), ws.run("ssh", "far", pipes=[7])
    way = Way(ssh)
    tar.read("a.csv").read("b.csv")
    way.send(90_000)
    ws.none("file.copied_out")
    way.close()
    assert ws.sources() == ["a.csv", "b.csv"]
    assert {each.link for each in ws.all("file.copied_out")} == {"pipeline"}
    assert all(each.confidence < 0.7 for each in ws.all("file.copied_out"))


def test_several_files_share_the_bytes_in_their_order(ws: Workstation) -> None:
    sync = ws.run("rclone", "copy", ROOT, "far:")
    way = Way(sync)
    sync.read("a.csv")
    way.send(300_400)
    ws.now += 100
    sync.read("b.csv")
    way.send(90_000)
    assert ws.sources() == ["a.csv"]
    way.send(111_000).close()
    assert ws.sources() == ["a.csv", "b.csv"]
    assert [each.bytes for each in ws.all("file.copied_out")] == [300_000, 200_000]


def test_many_connections_of_one_program(ws: Workstation) -> None:
    sync = ws.run("rclone", "copy", ROOT, "far:")
    ways = [Way(sync), Way(sync)]
    sync.read("a.csv").read("b.csv")
    ways[1].send(200_700)
    ways[0].send(300_700)
    ws.wait(3)
    assert sorted(ws.sources()) == ["a.csv", "b.csv"]


def test_a_mail_that_is_sent_minutes_after_the_file_was_attached(ws: Workstation) -> None:
    mail = ws.run("thunderbird")
    Way(mail, old=True)
    mail.read("a.csv")
    ws.wait(300)
    ws.none("file.copied_out")
    smtp = Way(mail, began_ms=START - 3_600_000, peer="203.0.113.9:587")
    smtp.send(411_000).close()
    out = ws.only("file.copied_out")
    assert out.link == "process" and out.confidence == 0.5


def test_an_upload_by_a_browser_that_was_connected_all_day(ws: Workstation) -> None:
    browser = ws.run("chromium")
    way = Way(browser, old=True)
    ws.wait(600)
    browser.read("a.csv")
    ws.wait(1)
    way.tell().send(301_500)
    ws.none("file.copied_out").wait(3)
    out = ws.only("file.copied_out")
    assert out.link == "process" and 0.5 < out.confidence <= 0.8


def test_an_ssh_forward_carries_what_another_program_sends(ws: Workstation) -> None:
    ssh = ws.program("/usr/bin/ssh", "-L", "8080:inner:80")
    curl = ws.run("curl", "http://127.0.0.1:8080/")
    way = Way(ssh, feeders=[curl.pid], began_ms=START - 3_600_000)
    curl.read("a.csv")
    way.send(304_000).close()
    out = ws.only("file.copied_out")
    assert out.link == "pipeline" and out.process["exe"] == "/usr/bin/curl" and out.login_user == "sato"


def test_a_phone_without_a_mount(ws: Workstation) -> None:
    """gvfsd-mtp holds the node for hours; what it reads, it reads to send it."""
    ws.plug(PHONE, mount=None)
    daemon = ws.run("gvfsd-mtp")
    Way(daemon, "mtp", counted=False, old=True, id="usb:001/002", device=PHONE.id, peer="Google Pixel 7")
    ws.wait(3600)
    daemon.read("a.csv")
    ws.wait(1)
    out = ws.only("file.copied_out")
    assert (out.way, out.link, out.bytes, out.confidence) == ("mtp", "process", 300_000, 0.85)
    assert out.medium["kind"] == "phone" and out.login_user == "sato"
    ws.wait(60)
    daemon.read("a.csv")
    ws.wait(1)
    assert len(ws.all("file.copied_out")) == 2


@pytest.mark.parametrize(("requests_ms_before", "told"), [(100, 1), (60_000, 0)])
def test_a_file_may_be_on_the_phone_before_its_read_is_told(ws: Workstation, requests_ms_before: int, told: int) -> None:
    """Requests are counted at once, reads told when the queue is read. Requests of long before were for something else."""
    ws.plug(PHONE, mount=None)
    daemon = ws.run("gvfsd-mtp")
    phone = Way(daemon, "mtp", counted=False, old=True, id="usb:001/002", device=PHONE.id, uses=318)
    ws.wait(3600)
    phone.more["uses"] = 329
    phone.tell()
    ws.now += requests_ms_before
    daemon.read("a.csv")
    ws.wait(3)
    assert len(ws.all("file.copied_out")) == told


def test_a_phone_that_was_pulled_has_got_what_was_counted_though_nobody_tells_its_requests_any_more(ws: Workstation) -> None:
    ws.plug(PHONE, mount=None)
    tool = ws.run("mtp-connect")
    phone = Way(tool, "mtp", id="usb:001/002", device=PHONE.id, uses=12, idle_uses=10, idle_sent=0)
    tool.read("a.csv")
    phone.send(120_000).close()
    ws.tell(facts.Unplugged(at_ms=ws.now, id=PHONE.id))
    out = ws.only("file.copied_out")
    assert (out.way, out.link, out.confidence) == ("mtp", "process", 0.7)
    assert 110_000 < out.bytes <= 120_000
    assert out.medium["kind"] == "phone"


def test_a_copy_onto_an_unapproved_phone_is_a_finding(ws: Workstation) -> None:
    ws.approve(facts.Device(id="x", vendor_id="1", product_id="2", serial="3")).plug(PHONE, mount=None)
    tool = ws.run("mtp-connect")
    Way(tool, "mtp", counted=False, id="usb:001/002", device=PHONE.id)
    tool.read("a.csv")
    ws.wait(1)
    assert ws.only("file.copied_out").severity == 4
    assert [each.severity for each in ws.all("medium.unapproved")] == [3, 4]


def test_where_nobody_can_count_it_is_time_alone(ws: Workstation) -> None:
    quic = ws.run("uploader")
    Way(quic, counted=False)
    quic.read("a.csv")
    ws.wait(1)
    out = ws.only("file.copied_out")
    assert out.link == "time" and out.confidence == 0.3


def test_nobody_saw_who_sent(ws: Workstation) -> None:
    ws.run("nc").read("a.csv")
    ws.run("md5sum").read("b.csv")
    used = facts.WayUsed(at_ms=ws.now + 30, way="network", id="tcp:9", sent=300_050, peer=FAR, uid=1000)
    ws.tell(used)
    ws.wait(1)
    assert [each.link for each in ws.all("file.copied_out")] == ["time"]


def test_limits_count_what_leaves_by_any_way_or_by_their_own(ws: Workstation) -> None:
    limits = [
        WindowLimit(name="all", window_s=600, bytes=250_000),
        WindowLimit(name="net", window_s=600, bytes=250_000, ways=("network",)),
        WindowLimit(name="usb", window_s=600, bytes=250_000, ways=("mount",)),
    ]
    ws = Workstation(limits=limits).login("sato")
    curl = ws.run("curl")
    way = Way(curl)
    curl.read("a.csv")
    way.send(300_500).close()
    ws.only("copy.all")
    ws.only("copy.net")
    ws.none("copy.usb")


def test_a_site_may_turn_a_way_off(ws: Workstation) -> None:
    ws = Workstation(ways_off=frozenset({"network"})).login("sato")
    curl = ws.run("curl")
    way = Way(curl)
    curl.read("a.csv")
    way.send(300_500).close()
    ws.wait(5).none("file.copied_out")


# -- innocents ---------------------------------------------------------------------------------------------------------


def test_a_browser_that_shows_a_file_and_chats_is_silent(ws: Workstation) -> None:
    browser = ws.run("chromium")
    ways = [Way(browser, old=True) for _ in range(4)]
    browser.read("a.csv")
    for _ in range(60):
        ws.wait(5)
        for way in ways:
            way.send(900)
    ws.wait(120).none("file.copied_out")


def test_a_call_that_streams_all_the_time_is_silent(ws: Workstation) -> None:
    call = ws.run("teams")
    way = Way(call, old=True)
    ws.wait(60)
    call.read("a.csv")
    for _ in range(100):
        ws.wait(1)
        way.send(250_000)
    ws.wait(120).none("file.copied_out")


def test_a_program_that_reads_and_only_asks_something_is_silent(ws: Workstation) -> None:
    """A licence check, a lookup of names, a download: what left is no twentieth of what was read."""
    tool = ws.run("python3")
    way = Way(tool)
    tool.read("a.csv")
    way.send(9_000).close()
    ws.wait(20).none("file.copied_out")


def test_grep_beside_a_busy_browser_is_silent(ws: Workstation) -> None:
    browser, grep = ws.run("chromium"), ws.run("grep", "-r", "x", ROOT)
    way = Way(browser)
    grep.read("a.csv").read("b.csv").end()
    way.send(900_000).close()
    ws.wait(20).none("file.copied_out")


def test_a_terminal_in_an_editor_is_not_the_editor(ws: Workstation) -> None:
    editor = ws.run("code")
    way = Way(editor, began_ms=START - 9_000_000)
    editor.child("/usr/bin/bash").child("/usr/bin/grep").read("a.csv")
    way.send(400_000).close()
    ws.wait(20).none("file.copied_out")


def test_a_database_server_that_answers_is_silent(ws: Workstation) -> None:
    server = ws.program("/usr/sbin/mysqld")
    server.read("a.csv").read("b.csv")
    ws.wait(3600)
    way = Way(server, began_ms=START - 9_000_000)
    for _ in range(50):
        way.send(20_000)
    way.close()
    ws.wait(20).none("file.copied_out")


def test_what_was_sent_before_the_read_does_not_count_though_nobody_had_looked(ws: Workstation) -> None:
    chat = ws.run("chat")
    way = Way(chat)
    ws.wait(2)
    chat.read("a.csv")
    for _ in range(30):
        way.send(400 if way.sent else 41_000)
    way.close()
    ws.wait(20).none("file.copied_out")


def test_what_a_program_said_within_the_second_before_it_read_is_not_the_file(ws: Workstation) -> None:
    """It greets at length, shows a file a second later, and goes on chatting: nobody had looked before the read."""
    chat = ws.run("chat")
    way = Way(chat)
    ws.wait(1)
    chat.read("a.csv")
    for _ in range(20):
        way.send(500 if way.sent else 40_500)
    way.close()
    ws.wait(20).none("file.copied_out")


def test_a_read_that_is_told_when_its_packed_bytes_have_left_through_another(ws: Workstation) -> None:
    """rsync -z by ssh on a machine under load: keys first, and the read told when all is over."""
    rsync = ws.run("rsync", "-z", f"{ROOT}/a.csv", "far:")
    way = Way(rsync.child("/usr/bin/ssh", "far"), peer="203.0.113.5:22")
    ws.wait(1)
    rsync.read("a.csv")
    way.send(90_000).close()
    ws.wait(20)
    assert ws.only("file.copied_out").link == "pipeline"


@pytest.mark.parametrize(("began_s_before", "told"), [(0, ["a.csv"]), (3_600, [])])
def test_a_sender_that_is_gone_before_its_sensor_looked_began_when_its_entry_says(
    ws: Workstation, began_s_before: int, told: list[str]
) -> None:
    """What leaves packed is a tool's; of a program that lives long it says nothing."""
    rsync = ws.run("rsync", "-z", f"{ROOT}/a.csv", "far:")
    ssh = rsync.child("/usr/bin/ssh", "far", began_ms=ws.now - began_s_before * 1_000)
    rsync.read("a.csv")
    way = Way(ssh, began_ms=None)
    way.sent = 90_000
    way.close()
    ws.wait(20)
    assert ws.sources() == told


def test_all_that_left_before_the_first_look_counts_if_it_is_just_what_was_read(ws: Workstation) -> None:
    """A slow handshake, and a small file that is gone before anybody looks."""
    scp = ws.run("scp", f"{ROOT}/a.csv", "far:")
    way = Way(scp.child("/usr/bin/ssh", "far"))
    ws.wait(2)
    scp.read("a.csv")
    way.send(304_000).close()
    assert ws.only("file.copied_out").link == "pipeline"


def test_who_happens_to_run_beside_a_sender_is_not_its_kin(ws: Workstation) -> None:
    """Both of one parent, each with a pipe whose other end nobody saw; the sender read a file of its own."""
    viewer = ws.run("less", pipes=[41])
    viewer.read("b.csv")
    sender = ws.run("lp", pipes=[42])
    way = Way(sender, "print", peer="ipp")
    sender.read("a.csv")
    way.send(310_000)
    ws.wait(1)
    way.send(900_000).close()
    ws.wait(10)
    assert ws.sources() == ["a.csv"]


def test_a_server_whose_child_reads_and_is_gone_before_a_look(ws: Workstation) -> None:
    """Somebody far away fetches a file: sshd's child reads, the connection was accepted by sshd."""
    sshd = ws.program("/usr/sbin/sshd")
    sshd.child("/usr/sbin/sshd").child("/usr/bin/cat").read("a.csv").end()
    ws.tell(facts.WayHeld(at_ms=ws.now, pid=sshd.pid, way="network", id="tcp:accepted", peer=FAR, sent=0))
    ws.tell(facts.WayClosed(at_ms=ws.now, id="tcp:accepted", sent=304_000))
    out = ws.only("file.copied_out")
    assert out.link == "pipeline" and out.process["exe"] == "/usr/bin/cat"
