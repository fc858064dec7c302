"""The sender against a collector on a bad day: nothing is lost, nothing doubled, nothing believed that is not signed."""

import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import config, sender
from agent.collector import Collector, Refused, _retry_after_s
from agent.contract import chain, wire
from agent.core.facts import Clock, Lost, Register, Tampered
from agent.registerfeed import RegisterFeed
from agent.sender import Sender
from agent.spool import read_events, verify
from tests.crooked_peer import CrookedPeer
from tests.spooled import NOW_MS, Machine, event

DEADLINE_S = 10.0


class Desk(Machine):
    """A machine with a sender, its clock in our hands; `uniform` gives the upper bound, so waits are the longest possible."""

    def __init__(self, state_dir: Path, peer: CrookedPeer, max_bytes: int = 64 << 20, token: str = "let-me-in") -> None:
        super().__init__(state_dir, max_bytes)
        self.peer = peer
        self.now_ms = NOW_MS
        self.agent = config.Agent(name="ws-042")
        self.agent.collector.url, self.agent.collector.token = peer.url, token
        self.sender = self.new_sender()

    def new_sender(self) -> Sender:
        peer = Collector(self.peer.url, read_s=1.0, whole_s=1.0)
        return Sender(
            self.identity,
            self.agent,
            self.spool,
            self.told.append,
            now_ms=lambda: self.now_ms,
            uniform=lambda _, high: high,
            peer=peer,
        )

    def restart_all(self) -> None:
        self.sender.close()
        self.restart()
        self.sender = self.new_sender()

    def record(self, count: int = 1, **how: object) -> list[bytes]:
        return self.spool.append([event(**how) for _ in range(count)])

    def settle(self, steps: int = 40) -> None:
        """Step until nothing is due before the next heartbeat."""
        for _ in range(steps):
            due = self.sender.step()
            if due.wakeable and due.wait_s > 0:
                return
        pytest.fail(f"does not settle: {self.sender.status()}")

    def received(self) -> list[bytes]:
        """The digests the peer holds of our chain, in order."""
        lines = self.peer.held(self.identity.agent, self.spool.epoch).lines
        return [bytes.fromhex(folded.digest) if (folded := wire.folded(line)) else chain.digest(line) for line in lines]

    def recorded(self) -> list[bytes]:
        lines, after = [], 0
        while (batch := self.spool.next_batch(after)).lines:
            lines += batch.lines
            after = batch.last
        return [bytes.fromhex(folded.digest) if (folded := wire.folded(line)) else chain.digest(line) for line in lines]

    def close(self) -> None:
        self.sender.close()
        self.spool.close()


@pytest.fixture
def peer():
    with CrookedPeer() as made:
        yield made


@pytest.fixture
def desk(tmp_path, peer):
    made = Desk(tmp_path / "state", peer)
    yield made
    made.close()


def until(holds, what):
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


# -- the good day -----------------------------------------------------------------------------------------------------


def test_it_enrols_with_the_token_sends_and_releases_what_the_receipt_names(desk, peer):
    sealed = desk.record(5)
    desk.settle()
    assert peer.held(desk.identity.agent, desk.spool.epoch).lines == sealed
    assert desk.spool.acknowledged == 5
    assert (desk.identity.acknowledged().seq, desk.identity.acknowledged().hash) == desk.spool.head
    assert desk.identity.pinned().agent == desk.identity.agent
    status = desk.sender.status()
    assert (status["enrolled"], status["backlog"], status["last_error"]) == (True, 0, "")
    assert status["last_receipt"] == {"seq": 5, "at_ms": NOW_MS}
    assert verify(desk.state_dir, desk.identity.public_key).vouched == 5, "the receipt vouches for the chain, offline"


def test_the_token_is_used_once(desk, peer):
    desk.settle()
    desk.restart_all()
    desk.record()
    desk.settle()
    assert [asked.path for asked in peer.asked].count("/v1/enroll") == 1


def test_a_token_from_a_file_may_come_later(desk, peer, tmp_path):
    desk.agent.collector.token, desk.agent.collector.token_file = "", str(tmp_path / "token")
    due = desk.sender.step()
    assert "not enrolled yet; set agent.collector.token" in desk.sender.status()["last_error"]
    assert due == (60.0, False)
    assert peer.asked == []
    (tmp_path / "token").write_text("let-me-in\n")
    desk.settle()
    assert desk.sender.status()["enrolled"]


def test_silence_is_filled_with_heartbeats_that_are_no_events(desk, peer):
    desk.record(2)
    desk.settle()
    before = len(peer.batches())
    for _ in range(3):
        desk.now_ms += 60_000
        desk.settle()
    beats = peer.batches()[before:]
    assert [(beat.first, beat.last) for beat in beats] == [(3, 2)] * 3
    assert all(beat.prev == beat.hash == desk.spool.head[1] for beat in beats)
    assert desk.spool.head[0] == 2


def test_the_distance_of_the_clocks_is_told_once_it_changes(desk, peer):
    peer.date = "Thu, 09 Oct 2025 08:53:20 GMT"  # NOW_MS
    desk.settle()
    peer.date = "Thu, 09 Oct 2025 08:55:00 GMT"
    desk.record()
    desk.settle()
    desk.record()
    desk.settle()
    assert [fact.offset_ms for fact in desk.told_of(Clock)] == [500, 100_500]


def test_a_large_backlog_goes_in_several_batches_over_one_connection(desk, peer):
    desk.record(2500)
    desk.record(2500)
    desk.settle()
    assert [batch.last - batch.first + 1 for batch in peer.batches() if batch.last >= batch.first] == [2000, 2000, 1000]
    assert desk.received() == desk.recorded()


# -- the bad day ------------------------------------------------------------------------------------------------------

BAD = {
    "busy": "can't take events now (503)",
    "throttled": "asks to be sent less",
    "broken": "can't take events now (500)",
    "cut": "the answer broke off",
    "cut_before": "can't be reached",
    "wrong_signature": "signature does not fit the key that was pinned",
    "stranger": "the receipt is not for what was sent",
    "altered": "the receipt is not for what was sent",
    "garbage": "answers with no receipt",
    "not_http": "can't be reached",
    "endless": "the answer",
    "hanging": "no answer in time",
    "hole_lie": "asks again for event 3, which it was sent",
    "silly_409": "answers 409 without saying what it holds",
    "redirect": "redirects (302); set agent.collector.url",
}


@pytest.mark.parametrize("mood", BAD)
def test_after_each_bad_answer_nothing_is_released_and_the_same_is_sent_again(desk, peer, mood):
    desk.record(2)
    desk.settle()
    desk.record(3)
    peer.next(mood)
    due = desk.sender.step()
    status = desk.sender.status()
    assert BAD[mood] in status["last_error"]
    assert status["last_error"].isprintable()
    assert desk.spool.acknowledged == 2
    assert desk.identity.acknowledged().seq == 2
    assert due.wait_s > 0
    assert not due.wakeable, "a new event must not cut the waiting short"
    assert status["next_try"] == NOW_MS + int(due.wait_s * 1000)
    peer.gate.set()
    desk.settle()
    assert desk.received() == desk.recorded()
    assert desk.spool.acknowledged == 5
    assert desk.sender.status()["last_error"] == ""


def test_last_months_receipt_is_no_receipt(desk, peer):
    desk.record(2)
    desk.settle()
    desk.record(3)
    peer.next("last_month")
    desk.sender.step()
    assert desk.spool.acknowledged == 2
    assert desk.sender.status()["counts"]["stale_receipt"] == 1


def test_waits_double_up_to_five_minutes_and_retry_after_is_honoured(desk, peer):
    desk.settle()
    desk.record()
    peer.mood = "broken"
    assert [desk.sender.step().wait_s for _ in range(11)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    peer.next("busy")
    assert desk.sender.step().wait_s == 307
    peer.mood = "good"
    desk.settle()
    peer.mood = "broken"
    desk.record()
    assert desk.sender.step().wait_s == 1, "after a success it begins anew"


def test_the_jitter_is_full():
    assert sender.Backoff(lambda low, high: low).failed() == 0.0
    assert sender.Backoff(lambda low, high: high).failed(1e9) == 3601.0, "nobody may silence us for days"


@pytest.mark.parametrize(
    ("text", "seconds"), [("7", 7.0), ("Thu, 09 Oct 2025 08:54:20 GMT", 60.0), ("soon", None), ("", None), ("-5", None)]
)
def test_retry_after_may_be_seconds_or_a_date(text, seconds):
    class Response:
        headers = {"Retry-After": text, "Date": "Thu, 09 Oct 2025 08:53:20 GMT"}

    assert _retry_after_s(Response()) == seconds


def test_no_collector_at_all_is_said_with_what_to_do(tmp_path):
    with CrookedPeer() as gone:
        pass
    desk = Desk(tmp_path / "state", gone)
    desk.record()
    desk.sender.step()
    assert "can't be reached" in desk.sender.status()["last_error"]
    assert "start the collector or mend the way to it" in desk.sender.status()["last_error"]
    desk.close()


def certificate(place: Path) -> str:
    """A self-signed certificate for 127.0.0.1, key and all, in one file."""
    key, cert = place / "key.pem", place / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=collector", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    if not shutil.which("openssl"):
        pytest.skip("needs openssl(1) to make a certificate")
    subprocess.run(command, check=True, capture_output=True)
    (place / "both.pem").write_text(key.read_text() + cert.read_text())
    return str(place / "both.pem")


def test_over_tls_only_a_collector_the_ca_vouches_for_is_spoken_to(tmp_path, monkeypatch):
    own = certificate(tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with CrookedPeer(certificate=own) as peer:
        desk = Desk(tmp_path / "state", peer)
        desk.record(2)
        desk.sender.step()
        assert "its certificate is refused (self-signed certificate)" in desk.sender.status()["last_error"]
        assert "set agent.collector.ca_file to the CA that signed it" in desk.sender.status()["last_error"]
        assert peer.asked == [], "not a byte of ours was sent"
        desk.agent.collector.ca_file = str(tmp_path / "cert.pem")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
        desk.sender.close()
        desk.sender = Sender(desk.identity, desk.agent, desk.spool, desk.told.append, now_ms=lambda: desk.now_ms)
        desk.settle()
        assert desk.received() == desk.recorded()
        desk.agent.collector.ca_file = str(tmp_path / "gone.pem")
        desk.sender.close()
        desk.sender = Sender(desk.identity, desk.agent, desk.spool, desk.told.append, now_ms=lambda: desk.now_ms)
        desk.record()
        desk.sender.step()
        assert "gone.pem" in desk.sender.status()["last_error"]
        desk.close()


# -- who are you ------------------------------------------------------------------------------------------------------


def test_a_refused_token_is_not_tried_again_until_there_is_another(tmp_path, peer):
    desk = Desk(tmp_path / "state", peer, token="yesterdays")
    for _ in range(3):
        desk.sender.step()
    assert [asked.path for asked in peer.asked] == ["/v1/enroll"]
    assert "refuses to enroll this machine: not today" in desk.sender.status()["last_error"]
    desk.agent.collector.token = "let-me-in"
    desk.settle()
    assert desk.sender.status()["last_error"] == ""
    desk.close()


def test_an_unknown_agent_stops_sending_until_it_is_enrolled_anew(desk, peer):
    desk.record()
    desk.settle()
    desk.agent.collector.token = ""
    desk.record()
    peer.next("unknown")
    desk.sender.step()
    assert desk.sender.status()["stopped"] == "refused"
    asked = len(peer.asked)
    for _ in range(3):
        desk.now_ms += 60_000
        assert desk.sender.step() == (60.0, False)
    assert len(peer.asked) == asked
    desk.agent.state_dir = str(desk.state_dir)
    desk.now_ms += 1
    pinned = desk.identity.pinned()
    pinned.enrolled_at += 1  # what `sekisho-agent enroll` in another process leaves behind
    desk.identity.pin(pinned)
    desk.settle()
    assert desk.received() == desk.recorded()


def test_a_collector_that_forgot_us_is_joined_again_if_the_token_still_serves(desk, peer):
    desk.record(4)
    desk.settle()
    peer.agents.clear()
    peer.chains.clear()
    desk.record()
    desk.settle()
    assert desk.received() == desk.recorded()
    peer.agents.clear()
    peer.tokens.clear()
    desk.record()
    asked = len(peer.asked)
    for _ in range(5):
        desk.sender.step()
    assert [each.path for each in peer.asked[asked:]] == ["/v1/batches", "/v1/enroll"]
    assert desk.sender.status()["stopped"] == "refused"
    assert "refuses to enroll this machine" in desk.sender.status()["last_error"]


def test_enroll_pins_the_key_whatever_was_pinned(tmp_path, peer, monkeypatch):
    agent = config.Agent(name="ws", state_dir=str(tmp_path / "state"))
    pinned = sender.enroll(agent, peer.url, "let-me-in")
    assert (pinned.url, pinned.agent in peer.agents) == (peer.url, True)
    with pytest.raises(Refused, match="refuses to enroll this machine: not today"):
        sender.enroll(agent, peer.url, "wrong")
    with CrookedPeer("new") as other:
        assert sender.enroll(agent, other.url, "new").key != pinned.key
    with pytest.raises(Refused, match="can't be reached"):
        sender.enroll(agent, other.url, "new")
    with pytest.raises(Refused, match="must begin with https://"):
        sender.enroll(agent, "http://collector.example", "new")


def test_another_collector_behind_the_same_address_gets_no_receipt_believed(desk, peer):
    """The token is the one used before, the key another: whoever answers there is not the one we joined."""
    desk.record()
    desk.settle()
    peer.key, peer.other_key = peer.other_key, peer.key
    desk.record()
    desk.sender.step()
    assert "signature does not fit" in desk.sender.status()["last_error"]
    peer.next("unknown")
    desk.restart_all()
    desk.sender.step()
    desk.sender.step()
    assert "another key than the one pinned" in desk.sender.status()["last_error"]
    assert desk.spool.acknowledged == 1


# -- holes and forks --------------------------------------------------------------------------------------------------


def test_a_collector_restored_from_a_backup_is_filled_again(desk, peer):
    desk.record(10)
    desk.settle()
    peer.held(desk.identity.agent, desk.spool.epoch).cut(4)
    desk.record(2)
    desk.settle()
    assert desk.received() == desk.recorded()
    assert desk.spool.acknowledged == 12
    assert desk.told_of(Lost) == []


def test_a_collector_that_lost_everything_is_filled_again(desk, peer):
    desk.record(10)
    desk.settle()
    peer.chains.clear()
    desk.now_ms += 60_000
    desk.settle()
    assert desk.received() == desk.recorded()


def test_a_collector_that_has_more_than_we_know_of_is_not_sent_it_twice(desk, peer):
    desk.record(3)
    peer.next("cut", "cut")
    desk.sender.step()
    for _ in range(2):
        desk.sender.step()
    desk.record(2)
    desk.restart_all()
    desk.settle()
    assert desk.received() == desk.recorded()
    assert len(desk.received()) == 5


def test_what_was_cut_meanwhile_goes_as_digests_and_is_counted(tmp_path, peer):
    desk = Desk(tmp_path / "state", peer, max_bytes=1 << 20)
    for _ in range(4):
        desk.record(150, bulk=1600)
        desk.settle()
    assert desk.told_of(Lost) == []
    cut = desk.spool.stats()["cut"]
    assert cut
    peer.held(desk.identity.agent, desk.spool.epoch).cut(1)
    desk.now_ms += 60_000
    desk.settle()
    (lost,) = desk.told_of(Lost)
    assert (lost.reason, lost.count, lost.first_seq, lost.last_seq) == ("collector_lost", cut - 1, 2, cut)
    lines = peer.held(desk.identity.agent, desk.spool.epoch).lines
    assert sum(wire.folded(line) is not None for line in lines) == cut - 1
    assert len(lines) == 600
    desk.close()


def test_what_can_not_be_bridged_even_by_digests_begins_a_new_epoch(tmp_path, peer):
    desk = Desk(tmp_path / "state", peer, max_bytes=1 << 20)
    for _ in range(16):
        desk.record(100, bulk=3000)
        desk.settle()
    former = desk.spool.epoch
    assert desk.spool.stats()["first"] > 1
    peer.chains.clear()
    desk.now_ms += 60_000
    desk.settle()
    assert desk.spool.epoch > former
    (lost,) = desk.told_of(Lost)
    moved = desk.spool.acknowledged
    assert moved > 100, "what is still here is sent again, in the new chain"
    assert (lost.reason, lost.first_seq, lost.last_seq, lost.count) == ("collector_lost", 1, 1600, 1600 - moved)
    desk.record(3)
    desk.settle()
    assert desk.received() == desk.recorded()
    assert desk.spool.acknowledged == moved + 3
    desk.close()


def test_two_histories_under_one_name_stop_the_sending(desk, peer):
    desk.record(3)
    desk.settle()
    held = peer.held(desk.identity.agent, desk.spool.epoch)
    held.hashes[-1] = bytes(32)
    desk.record()
    desk.sender.step()
    status = desk.sender.status()
    assert status["stopped"] == "fork"
    assert "compare with sekisho-agent verify" in status["last_error"]
    (told,) = desk.told_of(Tampered)
    assert (told.what, told.detail["first"]) == ("fork", 4)
    asked = len(peer.asked)
    for _ in range(3):
        desk.now_ms += 60_000
        desk.sender.step()
    assert len(peer.asked) == asked
    assert len(desk.told_of(Tampered)) == 1


def test_a_collector_that_holds_more_than_this_machine_ever_wrote_is_a_fork(desk, peer):
    desk.record(3)
    desk.settle()
    held = peer.held(desk.identity.agent, desk.spool.epoch)
    for _ in range(2):
        held.lines.append(b"x")
        held.hashes.append(bytes(32))
    desk.record()
    desk.sender.step()
    assert desk.sender.status()["stopped"] == "fork"


# -- events nobody wants ----------------------------------------------------------------------------------------------


def test_one_event_the_collector_refuses_goes_as_its_digest_and_the_rest_is_not_held_up(desk, peer):
    desk.settle()
    events = [event() for _ in range(20)]
    peer.refused_uids.add(events[13].metadata.uid)
    sealed = desk.spool.append(events)
    desk.settle()
    assert desk.received() == desk.recorded()
    lines = peer.held(desk.identity.agent, desk.spool.epoch).lines
    assert [seq for seq, line in enumerate(lines, 1) if wire.folded(line)] == [14]
    (lost,) = desk.told_of(Lost)
    assert (lost.reason, lost.count, lost.first_seq) == ("refused", 1, 14)
    assert dict(read_events(desk.state_dir))[14] == sealed[13], "here it stays readable"
    verify(desk.state_dir)


def test_a_collector_that_refuses_everything_does_not_make_us_give_up_everything(desk, peer):
    desk.settle()
    events = [event() for _ in range(6)]
    peer.refused_uids |= {each.metadata.uid for each in events}
    peer.refuse_folded = True
    desk.spool.append(events)
    for _ in range(30):
        desk.sender.step()
    assert desk.spool.stats()["refused"] == 1
    assert "refuses event 1" in desk.sender.status()["last_error"]
    peer.refused_uids.clear()
    peer.refuse_folded = False
    desk.settle()
    assert desk.received() == desk.recorded()


def test_too_large_a_batch_is_split(desk, peer):
    desk.settle()
    desk.record(30)
    peer.mood = "too_large"
    desk.sender.step()
    for _ in range(60):
        desk.sender.step()
        if desk.spool.acknowledged == 30:
            break
    assert desk.received() == desk.recorded()
    assert desk.told_of(Lost) == []


# -- the register -----------------------------------------------------------------------------------------------------


def feed(desk: Desk) -> RegisterFeed:
    peer = Collector(desk.peer.url, read_s=1.0)
    return RegisterFeed(
        desk.identity, desk.agent, desk.told.append, now_ms=lambda: desk.now_ms, uniform=lambda _, high: high, peer=peer
    )


def test_the_register_comes_with_enrolment_and_is_there_without_a_network(desk, peer):
    peer.register = peer.sign_register(3, owner="sato", until=NOW_MS)
    desk.settle()
    (told,) = desk.told_of(Register)
    assert (told.version, told.approvals[0].key, told.approvals[0].until_ms) == (3, "usb:1", NOW_MS)
    desk.told.clear()
    later = feed(desk)
    later.tell_held()
    assert desk.told_of(Register) == [told]


def test_a_newer_register_is_asked_for_with_a_signature_and_told_once(desk, peer):
    desk.settle()
    ask = feed(desk)
    ask.tell_held()
    desk.told.clear()
    assert ask.step() == 0.0
    assert desk.told == [], "nothing new"
    peer.register = peer.sign_register(4)
    ask.step()
    assert [fact.version for fact in desk.told_of(Register)] == [4]
    assert peer.asked[-1].path == "/v1/register?after=0"
    assert ask.step() == 0.0
    assert ask.version == 4
    ask._peer.close()


@pytest.mark.parametrize("harm", ["signature", "garbage", "older"])
def test_a_register_that_is_not_to_be_believed_changes_nothing(desk, peer, harm):
    peer.register = peer.sign_register(5)
    desk.settle()
    ask = feed(desk)
    ask.tell_held()
    desk.told.clear()
    if harm == "signature":
        peer.key, peer.other_key = peer.other_key, peer.key
        peer.register = peer.sign_register(6)
    elif harm == "older":
        peer.register = peer.sign_register(2)
    else:
        peer.register = b'{"body":"{\\"version\\":9}","sig":"AAAA"}'
    assert ask.step() > 0
    assert ask.step() > 0
    assert (ask.version, desk.told_of(Register)) == (5, [])
    assert ask.status()["last_error"]
    assert [fact.detail for fact in desk.told_of(Tampered)] == ([{"held": 5, "sent": 2}] if harm == "older" else [])
    ask._peer.close()


def test_a_register_altered_on_disk_is_not_used_and_said(desk, peer):
    peer.register = peer.sign_register(5, owner="sato")
    desk.settle()
    path = desk.state_dir / "register.json"
    path.write_bytes(path.read_bytes().replace(b"sato", b"kato"))
    desk.told.clear()
    feed(desk).tell_held()
    assert [fact.what for fact in desk.told_of(Tampered)] == ["register_altered"]
    assert desk.told_of(Register) == []


# -- the threads ------------------------------------------------------------------------------------------------------


def test_the_thread_sends_what_is_appended_and_ends_with_the_last_word(tmp_path, peer):
    desk = Machine(tmp_path / "state")
    agent = config.Agent(name="ws")
    agent.collector.url, agent.collector.token = peer.url, "let-me-in"
    talker = Sender(desk.identity, agent, desk.spool, desk.told.append)
    stop = threading.Event()
    threads = talker.start(stop)
    for _ in range(3):
        desk.spool.append([event()])
        talker.wake()
        until(lambda: desk.spool.acknowledged == desk.spool.head[0], lambda: talker.status())
    desk.spool.append([event("agent.stopped")])
    stop.set()
    talker.wake()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert peer.held(desk.identity.agent, desk.spool.epoch).last == 4
    desk.spool.close()


def test_without_a_url_nothing_is_started(tmp_path):
    desk = Machine(tmp_path / "state")
    assert Sender(desk.identity, config.Agent(), desk.spool, desk.told.append).start(threading.Event()) == []
    desk.spool.close()


def test_a_surprise_is_counted_and_does_not_end_the_sending(desk, monkeypatch):
    desk.settle()
    desk.record()
    with monkeypatch.context() as patched:
        patched.setattr(desk.spool, "save_head", lambda _: 1 / 0)
        assert desk.sender.step().wait_s > 0
    assert desk.sender.status()["counts"]["unexpected"] == 1
    desk.settle()
    assert desk.received() == desk.recorded()


# -- any bad day ------------------------------------------------------------------------------------------------------

MOODS = [*(mood for mood in BAD if mood not in ("hanging", "endless")), "last_month", "too_large", "good"]
DAY = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("mood"), st.sampled_from(MOODS)),
        st.tuples(st.just("restored"), st.floats(0, 1)),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("unwanted"), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(DAY)
def test_whatever_the_peer_does_nothing_is_lost_or_doubled(day):
    place = Path(tempfile.mkdtemp())
    with CrookedPeer() as peer:
        desk = Desk(place / "state", peer)
        desk.settle()
        for what, how in day:
            if what == "append":
                desk.record(how)
            elif what == "step":
                for _ in range(how):
                    desk.sender.step()
            elif what == "mood":
                peer.next(how)
            elif what == "restored":
                held = peer.held(desk.identity.agent, desk.spool.epoch)
                held.cut(int(held.last * how))
            elif what == "restart":
                desk.restart_all()
            else:
                unwanted = event()
                peer.refused_uids.add(unwanted.metadata.uid)
                desk.spool.append([unwanted])
            assert desk.spool.acknowledged <= desk.spool.head[0]
        peer.coming.clear()
        desk.now_ms += 60_000  # a heartbeat is due: it finds out what a restored collector lacks
        desk.settle(200)
        assert desk.received() == desk.recorded(), day
        assert len(desk.received()) == desk.spool.head[0] == desk.spool.acknowledged
        counted = sum(lost.count for lost in {lost.first_seq: lost for lost in desk.told_of(Lost)}.values())
        assert counted == len(peer.refused_uids) == desk.spool.stats()["refused"]
        verify(desk.state_dir, desk.identity.public_key)
        desk.close()
    shutil.rmtree(place)
