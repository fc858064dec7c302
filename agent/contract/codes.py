"""The one table of event codes, and the words that events use.

Owns: which event codes exist, the OCSF class and activity each is written as, and what each means in one sentence.
Must not know: how an event is built (`core/ocsf.py`) or shown (`contract/show.py`).
`docs/reference.md` is held to this table by a test.
"""

from typing import Literal, NamedTuple

OCSF_VERSION = "1.8.0"
PRODUCT = "Sekisho"

Decision = Literal["approved", "unapproved", "expired", "revoked", "unknown"]
Link = Literal["process", "pipeline", "lineage", "content", "time"]
Attribution = Literal["exact", "cached", "session", "unknown"]
Way = Literal["mount", "mtp", "usb", "network", "print", "bluetooth"]
MediumKind = Literal["storage", "phone", "optical", "keyboard", "network", "reader", "other"]

SEVERITIES = {1: "info", 2: "low", 3: "medium", 4: "high", 5: "critical"}
INFO, LOW, MEDIUM, HIGH, CRITICAL = SEVERITIES

PERIPHERAL, FILE, FINDING, LIFECYCLE, ERROR, API = 1010, 1001, 2006, 6002, 6008, 6003
CLASS_NAMES = {
    PERIPHERAL: "Peripheral Activity",
    FILE: "File System Activity",
    FINDING: "Data Security Finding",
    LIFECYCLE: "Application Lifecycle",
    ERROR: "Application Error",
    API: "API Activity",
}


class Code(NamedTuple):
    """One event code: its OCSF class, activity id and caption, usual severity, and what it tells."""

    class_uid: int
    activity_id: int
    activity_name: str
    severity: int
    tells: str

    @property
    def type_uid(self) -> int:
        """OCSF rule: `class_uid` * 100 + `activity_id`."""
        return self.class_uid * 100 + self.activity_id


CODES: dict[str, Code] = {
    "medium.attached": Code(PERIPHERAL, 1, "Connect", INFO, "a removable medium or device that could carry data appeared"),
    "medium.detached": Code(PERIPHERAL, 2, "Disconnect", INFO, "it went away"),
    "medium.mounted": Code(FILE, 12, "Mount", INFO, "a file system of a medium was mounted"),
    "medium.unmounted": Code(FILE, 13, "Unmount", INFO, "it was unmounted"),
    "file.copied_out": Code(FILE, 1, "Create", LOW, "protected bytes reached a medium or another way out"),
    "file.written": Code(FILE, 1, "Create", INFO, "another file was written to a medium"),
    "file.brought_in": Code(FILE, 1, "Create", INFO, "a file came from a medium onto the machine"),
    "file.staged": Code(FILE, 1, "Create", INFO, "a copy of protected bytes was made outside the protected directory"),
    "file.history": Code(FILE, 2, "Read", INFO, "operations on protected files by one person and program in one window"),
    "access.changed": Code(FILE, 7, "Set Security", LOW, "owner, mode or ACL of something protected changed"),
    "medium.unapproved": Code(FINDING, 1, "Create", MEDIUM, "a medium without a valid approval was connected"),
    "copy.staged": Code(FINDING, 1, "Create", HIGH, "protected bytes left by way of a copy made elsewhere"),
    "device.disguised": Code(FINDING, 1, "Create", HIGH, "a device is not what it claims to be"),
    "medium.first_use": Code(FINDING, 1, "Create", LOW, "this person used a medium on this machine for the first time"),
    "agent.started": Code(LIFECYCLE, 3, "Start", INFO, "the agent began to watch"),
    "agent.stopped": Code(LIFECYCLE, 4, "Stop", INFO, "the agent was stopped in order"),
    "agent.heartbeat": Code(LIFECYCLE, 99, "Heartbeat", INFO, "an hourly summary: sensors, queue, counts"),
    "agent.config": Code(LIFECYCLE, 99, "Configuration", INFO, "the digest of the configuration in force"),
    "agent.sensors": Code(ERROR, 1, "General Error", LOW, "what is not seen on this machine"),
    "agent.gap": Code(ERROR, 1, "General Error", MEDIUM, "what was lost: how many, from when to when, why"),
    "agent.tampered": Code(ERROR, 1, "General Error", CRITICAL, "the agent's own records or files were altered"),
    "agent.clock": Code(ERROR, 1, "General Error", MEDIUM, "the clock jumped"),
    "agent.silent": Code(ERROR, 1, "General Error", HIGH, "made by the collector: a machine stopped reporting"),
    "agent.back": Code(ERROR, 1, "General Error", INFO, "made by the collector: it reports again"),
    "review.decided": Code(API, 1, "Create", INFO, "made by the collector: a person decided on a finding"),
    "register.changed": Code(API, 3, "Update", INFO, "made by the collector: the register of media changed"),
    "record.viewed": Code(API, 2, "Read", INFO, "made by the collector: a person looked at records"),
    "record.erased": Code(API, 4, "Delete", INFO, "made by the collector: retention erased the content of old events"),
}

COPY_LIMIT = Code(FINDING, 1, "Create", HIGH, "a person carried out more than a limit allows in its window")


def code_of(event_code: str) -> Code:
    """The table row of an event code. `copy.<limit>` names a configured limit. Raises KeyError for an unknown code."""
    row = CODES.get(event_code)
    if row is None and event_code.startswith("copy."):
        return COPY_LIMIT
    if row is None:
        raise KeyError(event_code)
    return row
