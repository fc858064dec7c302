"""What is said to the person at the machine: a notice as a title and a few lines, English and Japanese side by side.

Owns: the sentences of `warn` and `enforce`, the link to ask for an approval, and how urgent a notice is. Every foreign text
goes through `harmless`; markup is a matter of who shows it (`agent/notifying.py`). Must not know desktops or terminals. Of
files it says how many, never which: a screen has other readers.
"""

from urllib.parse import quote

from agent.contract.codes import HIGH
from agent.contract.columns import harmless
from agent.contract.words import Language
from agent.core.notice import Notice

MOST_TEXT = 300
_TITLES: dict[str, tuple[str, str]] = {
    "copied": ("Protected files went onto an unapproved medium", "保護対象ファイルが未承認の媒体に書き込まれました"),
    "staged": ("Protected files left by way of a copy", "保護対象ファイルが複製を経て持ち出されました"),
    "limit": ("More protected files were carried out than is allowed", "持ち出し量が上限を超えました"),
    "unapproved": ("This medium is not approved", "この媒体は承認されていません"),
    "disguised": ("A device is not what it claims to be", "接続された機器が種類を偽っています"),
    "brought_in": ("A program came from a medium nobody approved", "承認されていない媒体からプログラムが持ち込まれました"),
    "refused_copy": ("A copy was refused", "書き込みを拒否しました"),
    "refused_mount": ("This medium may not be used, or may only be read", "この媒体は使用できないか、読み取り専用です"),
    "refused_device": ("This device was switched off", "この機器の使用を止めました"),
    "refused_expired": ("The approval of this medium has ended", "この媒体の承認が終了しました"),
}
_BODIES: dict[str, tuple[str, str]] = {
    "copied": (
        "{count} protected files were copied to {medium}{decision}. This was recorded.",
        "{medium}{decision}に保護対象ファイルが {count} 件書き込まれました。この操作は記録されています。",
    ),
    "staged": (
        "Copies of protected files that were made elsewhere reached {medium} ({count} times). This was recorded.",
        "別の場所に作られた保護対象ファイルの複製が {medium} に {count} 回書き込まれました。この操作は記録されています。",
    ),
    "limit": (
        "The limit “{limit}” for protected files was passed. This was recorded and will be asked about.",
        "保護対象ファイルの持ち出し上限「{limit}」を超えました。記録され、確認の対象になります。",
    ),
    "unapproved": (
        "{medium} has no valid approval{decision}. Do not copy protected files to it.",
        "{medium} には有効な承認がありません{decision}。保護対象ファイルを書き込まないでください。",
    ),
    "disguised": (
        "{medium} also acts as something else, a keyboard for example. Unplug it, and do not use it again.",
        "{medium} はキーボードなど別の機器としても動作しています。取り外し、二度と使わないでください。",
    ),
    "brought_in": (
        "{count} programs came or were run from {medium}{decision}. This was recorded.",
        "{medium}{decision}からプログラムが {count} 件持ち込まれたか実行されました。この操作は記録されています。",
    ),
    "refused_copy": (
        "{count} files were not written to {medium}{decision}.",
        "{medium}{decision}への {count} 件の書き込みを拒否しました。",
    ),
    "refused_mount": (
        "{medium} has no valid approval{decision}, so it was mounted read-only or not at all.",
        "{medium} には有効な承認がないため{decision}、読み取り専用にしたか、使用を止めました。",
    ),
    "refused_device": (
        "{medium} has no valid approval{decision}, so it was switched off.",
        "{medium} には有効な承認がないため{decision}、使用を止めました。",
    ),
    "refused_expired": (
        "The approval of {medium} has ended{decision}; it can be used no more, or only be read.",
        "{medium} の承認は終了しました{decision}。使用できないか、読み取り専用です。",
    ),
}
_WHY = (
    "Why: media that hold protected information need an approval by somebody else than their owner.",
    "理由: 保護対象の情報を扱う媒体には、所有者以外の人による事前の承認が必要です。",
)
_CONTACT = ("Ask: {contact}", "問い合わせ先: {contact}")
_LINK = ("Ask for an approval: {link}", "承認の申請: {link}")
_SOMETHING = ("a device", "機器")
_DECISIONS: dict[str, tuple[str, str]] = {
    "unapproved": (" (not approved)", "（未承認）"),
    "expired": (" (its approval has expired)", "（承認期限切れ）"),
    "revoked": (" (its approval was revoked)", "（承認取消済み）"),
}
_NO_APPROVAL = ("limit", "disguised")


def spoken(notice: Notice, lang: Language, contact: str, link: str) -> tuple[str, list[str]]:
    """Title and lines, plain text without controls. `link` is an address made by `approval_link`; empty texts are left out."""
    at = lang == "ja"
    words = {
        "count": str(notice.count),
        "medium": harmless(notice.medium, MOST_TEXT) or _SOMETHING[at],
        "limit": harmless(notice.limit, MOST_TEXT),
        "decision": _DECISIONS.get(notice.decision, ("", ""))[at],
    }
    lines = [_BODIES[notice.kind][at].format_map(words)]
    if notice.kind not in _NO_APPROVAL:
        lines.append(_WHY[at])
    if contact:
        lines.append(_CONTACT[at].format(contact=harmless(contact, MOST_TEXT)))
    if link and notice.kind not in _NO_APPROVAL:
        lines.append(_LINK[at].format(link=harmless(link, 2 * MOST_TEXT)))
    return _TITLES[notice.kind][at], lines


def approval_link(template: str, collector: str, notice: Notice, machine: str) -> str:
    """Where an approval is asked for: the site's own address, in which {medium} and {machine} stand for these; else the
    collector's console."""
    if not template:
        return collector
    return template.replace("{medium}", quote(notice.key, safe="", errors="replace")).replace(
        "{machine}", quote(machine, safe="", errors="replace")
    )


def urgency(severity: int) -> int:
    """Of the Desktop Notifications Specification: 0 low, 1 normal, 2 critical (stays until it is closed)."""
    return 2 if severity >= HIGH else 1
