-- The collector's store. `raw` is the record, exactly as received; every other column of `events` is an index over it.
-- `pos` is the one order of all accepted events (1, 2, 3 ...): leaf pos - 1 of the tree, and the cursor of readers.
-- A folded event (only its digest came) has code NULL. Of what is here nothing changes but what `agents` and `tokens` count,
-- and content that retention erases: `raw` is then the line that stands for it, its leaf stays in `erased`.
-- Texts that come again and again (code ... program) are numbers of `names`; the view `readable` shows them as texts.

CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE names (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);

-- Where each chain ends: the hash after its last event, and the size of the tree that includes it.
CREATE TABLE chains (
    id INTEGER PRIMARY KEY, agent TEXT NOT NULL, epoch INTEGER NOT NULL,
    last INTEGER NOT NULL, hash BLOB NOT NULL, tree_size INTEGER NOT NULL,
    UNIQUE (agent, epoch)
);

-- `uid`: a UUID's 16 bytes, anything else as its text. `hash`: the chain's, after this event. The leaf's is that of `raw`.
CREATE TABLE events (
    pos INTEGER PRIMARY KEY,
    chain INTEGER NOT NULL, seq INTEGER NOT NULL, uid,
    time INTEGER NOT NULL, received_at INTEGER NOT NULL, severity INTEGER NOT NULL,
    code INTEGER, machine INTEGER, host INTEGER, user INTEGER, medium INTEGER, label INTEGER, way INTEGER, program INTEGER,
    bytes INTEGER, hash BLOB NOT NULL, raw BLOB NOT NULL
);
CREATE UNIQUE INDEX events_chain ON events (chain, seq);
CREATE INDEX events_uid ON events (uid) WHERE uid IS NOT NULL;
CREATE INDEX events_time ON events (time);
CREATE INDEX events_user ON events (user) WHERE user IS NOT NULL;
CREATE INDEX events_medium ON events (medium) WHERE medium IS NOT NULL;
CREATE INDEX events_grave ON events (pos, severity) WHERE severity >= 3;

-- Every accepted batch: its rows begin at `pos` with the seq `taken` (those before it were held) and end with `last`. What
-- was signed is `first` to `last`, the hashes before and after, and `sent_at`. The collector's own events are batches of one.
CREATE TABLE heads (
    pos INTEGER PRIMARY KEY, chain INTEGER NOT NULL, first INTEGER NOT NULL, taken INTEGER NOT NULL, last INTEGER NOT NULL,
    sent_at INTEGER NOT NULL, sig BLOB NOT NULL
);

-- Leaf hashes of events whose content retention erased: they can't be computed any more.
CREATE TABLE erased (pos INTEGER PRIMARY KEY, leaf BLOB NOT NULL);

-- The keys this log was signed with, oldest first; each names the one before it, signed by both (chain.Rotation, JSON).
CREATE TABLE signers (n INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, rotation TEXT NOT NULL);

-- Other logs whose checkpoints are cosigned here, as last seen; and cosignatures that others gave to checkpoints of this one.
CREATE TABLE witnessed (origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE cosigned (size INTEGER NOT NULL, line TEXT NOT NULL, note TEXT NOT NULL, PRIMARY KEY (size, line)) WITHOUT ROWID;

-- Looks at personal data within the last minutes: one row a person and filter, told as `record.viewed` and then counted.
CREATE TABLE looks (
    person TEXT NOT NULL, what TEXT NOT NULL, since INTEGER NOT NULL, count INTEGER NOT NULL, by TEXT NOT NULL,
    PRIMARY KEY (person, what)
) WITHOUT ROWID;

-- Serial numbers that media were seen with, so that one can be found by either.
CREATE TABLE serials (medium INTEGER NOT NULL, serial TEXT NOT NULL, PRIMARY KEY (medium, serial)) WITHOUT ROWID;

CREATE VIEW readable AS SELECT pos, agent, epoch, seq, time, severity,
    (SELECT text FROM names WHERE id = code) AS code, (SELECT text FROM names WHERE id = host) AS host,
    (SELECT text FROM names WHERE id = user) AS user, (SELECT text FROM names WHERE id = medium) AS medium,
    (SELECT text FROM names WHERE id = label) AS label, (SELECT text FROM names WHERE id = way) AS way,
    (SELECT text FROM names WHERE id = program) AS program, bytes, events.hash AS hash, CAST(raw AS TEXT) AS raw
    FROM events JOIN chains ON chains.id = chain;

-- Hashes of complete subtrees of 256, 65536, ... leaves (tree.TILE); those of leaves are computed from `events`.
CREATE TABLE nodes (level INTEGER NOT NULL, n INTEGER NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (level, n)) WITHOUT ROWID;

CREATE TABLE agents (
    agent TEXT PRIMARY KEY, key BLOB NOT NULL, name TEXT NOT NULL,
    enrolled_at INTEGER NOT NULL, enrolled_by TEXT NOT NULL,
    last_seen INTEGER NOT NULL, silent INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

-- Each agent's newest event of every `agent.*` code; `agent.sensors/NAME` for each sensor since it was started.
CREATE TABLE latest (agent TEXT NOT NULL, code TEXT NOT NULL, pos INTEGER NOT NULL, PRIMARY KEY (agent, code)) WITHOUT ROWID;

-- `hash` is SHA-256 of the token, which is never kept. `role` "enroll": an enrolment token. `uses` NULL: without end.
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, hash BLOB NOT NULL UNIQUE, role TEXT NOT NULL, note TEXT NOT NULL,
    created_at INTEGER NOT NULL, until INTEGER, uses INTEGER, used INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

-- The register of media: one entry a medium, as JSON of wire.ApprovalEntry.
CREATE TABLE approvals (key TEXT PRIMARY KEY, entry TEXT NOT NULL) WITHOUT ROWID;
