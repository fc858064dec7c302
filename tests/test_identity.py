"""The state directory's small files: made once, kept whole, refused when somebody else could have had a hand in them."""

import os

import pytest

from agent import identity
from agent.identity import Acknowledged, IdentityError, Pinned


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "deep" / "state"


@pytest.fixture
def machine_id(tmp_path):
    path = tmp_path / "machine-id"
    path.write_text("a" * 32 + "\n")
    return path


def test_a_key_is_made_once_for_its_owner_alone(state_dir, machine_id):
    first = identity.load_or_create(state_dir, machine_id)
    assert identity.load_or_create(str(state_dir), machine_id).agent == first.agent == identity.load(state_dir).agent
    assert identity.public_key(state_dir) == first.public_key
    assert oct(state_dir.stat().st_mode)[-3:] == "700"
    assert oct((state_dir / "agent.key").stat().st_mode)[-3:] == "600"
    assert len((state_dir / "agent.key").read_bytes()) == 32
    assert sorted(path.name for path in state_dir.iterdir()) == ["agent.json", "agent.key"]
    assert "a" * 32 not in (state_dir / "agent.json").read_text(), "machine-id(5) must not be published"


def test_a_key_that_others_could_read_is_refused_with_what_to_do(state_dir, machine_id):
    identity.load_or_create(state_dir, machine_id)
    (state_dir / "agent.key").chmod(0o644)
    with pytest.raises(IdentityError, match=r"agent\.key has mode 0644, open to others; run `chmod 600` on it"):
        identity.load_or_create(state_dir, machine_id)


def test_a_directory_open_to_others_is_refused(state_dir, machine_id):
    identity.load_or_create(state_dir, machine_id)
    state_dir.chmod(0o755)
    with pytest.raises(IdentityError, match=r"open to others; run `chmod 700`"):
        identity.load(state_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_another_users_key_is_refused(state_dir, machine_id):
    identity.load_or_create(state_dir, machine_id)
    os.chown(state_dir / "agent.key", 12345, 12345)
    with pytest.raises(IdentityError, match=r"belongs to uid 12345; run `chown 0`"):
        identity.load(state_dir)


@pytest.mark.parametrize("junk", [b"", b"short", b"x" * 33])
def test_a_damaged_key_is_never_replaced_silently(state_dir, machine_id, junk):
    identity.load_or_create(state_dir, machine_id)
    (state_dir / "agent.key").write_bytes(junk)
    with pytest.raises(IdentityError, match="is not a 32-byte key; restore it from a backup"):
        identity.load_or_create(state_dir, machine_id)


def test_a_link_or_a_pipe_in_place_of_the_key_is_refused(state_dir, machine_id, tmp_path):
    identity.load_or_create(state_dir, machine_id)
    key = state_dir / "agent.key"
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError, match="must be a plain file"):
        identity.load(state_dir)
    key.unlink()
    os.mkfifo(key, 0o600)
    with pytest.raises(IdentityError, match="is not a 32-byte key"):
        identity.load(state_dir)


def test_a_cloned_image_gets_a_new_key_and_keeps_the_old_aside(state_dir, machine_id):
    first = identity.load_or_create(state_dir, machine_id)
    first.pin(Pinned(url="https://c", key="A" * 43 + "=", agent=first.agent))
    machine_id.write_text("b" * 32 + "\n")
    second = identity.load_or_create(state_dir, machine_id)
    assert second.agent != first.agent
    assert second.tampered(5).detail == {"former": first.agent, "agent": second.agent}
    assert second.pinned() is None, "the clone has to enrol as itself"
    assert (state_dir / f"agent.key.of-{first.agent[:12]}").read_bytes() == bytes(first.key)
    assert identity.load_or_create(state_dir, machine_id).former == ""


def test_a_key_that_is_renewed_is_kept_aside_with_all_that_was_its_own(state_dir, machine_id):
    first = identity.load_or_create(state_dir, machine_id)
    first.pin(Pinned(url="https://c", key="A" * 43 + "=", agent=first.agent))
    (state_dir / "spool.db").write_bytes(b"its events")
    assert identity.renew(state_dir) == first.agent
    second = identity.load_or_create(state_dir, machine_id)
    assert second.agent != first.agent and second.former == "" and second.pinned() is None, (
        "meant, so no cloned_identity is told"
    )
    assert (state_dir / f"spool.db.of-{first.agent[:12]}").read_bytes() == b"its events"
    assert not (state_dir / "spool.db").exists()


def test_without_a_machine_id_nothing_is_concluded(state_dir, machine_id):
    first = identity.load_or_create(state_dir, machine_id)
    for nothing in ("", "uninitialized\n"):
        machine_id.write_text(nothing)
        assert identity.load_or_create(state_dir, machine_id).agent == first.agent
    machine_id.unlink()
    assert identity.load_or_create(state_dir, machine_id).agent == first.agent


def test_a_new_key_is_not_acknowledged_by_the_former_ones_head(state_dir, machine_id):
    mine = identity.load_or_create(state_dir, machine_id)
    mine.acknowledge(Acknowledged(agent=mine.agent, epoch=1, seq=2, hash="00"))
    assert mine.acknowledged().seq == 2
    mine.acknowledge(Acknowledged(agent="f" * 32, epoch=1, seq=9, hash="00"))
    assert mine.acknowledged() is None


def test_a_pin_for_another_key_or_a_damaged_one_is_refused(state_dir, machine_id):
    mine = identity.load_or_create(state_dir, machine_id)
    mine.pin(Pinned(url="https://c", key="A" * 43 + "=", agent="f" * 32))
    with pytest.raises(IdentityError, match="does not fit this agent's key; remove it and enroll again"):
        mine.pinned()
    (state_dir / "collector.json").write_bytes(b"{half")
    with pytest.raises(IdentityError, match="is damaged; move it away"):
        mine.pinned()


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(IdentityError, match="has the agent ever run on this machine"):
        identity.public_key(tmp_path / "nowhere")
    tmp_path.chmod(0o700)
    with pytest.raises(IdentityError, match="start the agent or enroll it"):
        identity.public_key(tmp_path)
