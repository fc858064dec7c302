"""What `sekisho-collector` says in its tables, in English and Japanese side by side.

Owns: column headings, and the words in cells that are not data; each is found by a key. JSON and CSV are for programs and
know no language. Must not know: who says them, locales. Events are spoken by `agent.contract.show`.
"""

from typing import Any

from agent.contract.words import Language

WORDS: dict[str, tuple[str, str]] = {
    "agent": ("AGENT", "エージェント"),
    "approver": ("APPROVER", "承認者"),
    "bytes": ("BYTES", "バイト数"),
    "day": ("DAY", "日"),
    "decision": ("DECISION", "判定"),
    "does_not_see": ("DOES NOT SEE", "見えないもの"),
    "ends": ("ENDS", "期限"),
    "event": ("EVENT", "イベント"),
    "events": ("EVENTS", "件数"),
    "file": ("FILE", "ファイル"),
    "id": ("ID", "ID"),
    "key": ("KEY", "キー"),
    "label": ("LABEL", "ラベル"),
    "last_heard": ("LAST HEARD", "最終受信"),
    "machine": ("MACHINE", "機械"),
    "made": ("MADE", "作成"),
    "medium": ("MEDIUM", "媒体"),
    "note": ("NOTE", "メモ"),
    "owner": ("OWNER", "所有者"),
    "program": ("PROGRAM", "プログラム"),
    "purpose": ("PURPOSE", "目的"),
    "role": ("ROLE", "役割"),
    "serial": ("SERIAL", "シリアル"),
    "severity": ("SEVERITY", "重大度"),
    "state": ("STATE", "状態"),
    "time": ("TIME", "時刻"),
    "uid": ("UID", "UID"),
    "until": ("UNTIL", "期限"),
    "used": ("USED", "使用"),
    "user": ("USER", "利用者"),
    "version": ("VERSION", "バージョン"),
    "way": ("WAY", "経路"),
    # cells
    "ok": ("ok", "正常"),
    "blind": ("blind", "死角あり"),
    "silent": ("silent", "途絶"),
    "approved": ("approved", "承認済み"),
    "read_only": ("read-only", "読み取り専用"),
    "revoked": ("revoked: {reason}", "取消済み: {reason}"),
    "no_end": ("no end", "無期限"),
    "never": ("never", "なし"),
    "uses": ("{used} of {uses}", "{used} / {uses}"),
    "gap": ("-- gap: {count} events not shown ({reason}) --", "-- 欠落: {count} 件が表示されていません ({reason}) --"),
    "gap_some": ("-- gap: events not shown ({reason}) --", "-- 欠落: 表示されていない記録があります ({reason}) --"),
}


def say(lang: Language, key: str, /, **values: Any) -> str:
    """The words of `key`. Raises KeyError if there are none."""
    return WORDS[key][lang == "ja"].format(**values)


def heads(lang: Language, *keys: str) -> list[str]:
    """Column headings."""
    return [say(lang, key) for key in keys]
