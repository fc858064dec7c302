"""What `sekisho-collector` says in its tables, in English and Japanese side by side.

Owns: column headings, and the words in cells that are not data; each is found by a key. JSON and CSV are for programs and
know no language. Must not know: who says them, locales. Events are spoken by `agent.contract.show`.
"""

from typing import Any

from agent.contract.words import Language

WORDS: dict[str, tuple[str, str]] = {
    "agent": ("AGENT", "エージェント"),
    "approver": ("APPROVER", "承認者"),
    "by": ("BY", "操作者"),
    "change": ("CHANGE", "変更内容"),
    "count": ("MACHINES", "台数"),
    "department": ("DEPARTMENT", "部署"),
    "from": ("FROM", "操作元"),
    "group": ("GROUP", "グループ"),
    "machines": ("MACHINES", "端末"),
    "operation": ("ACT", "操作"),
    "requester": ("REQUESTER", "申請者"),
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
    "machine": ("MACHINE", "端末"),
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
    "state_requested": ("requested", "申請中"),
    "state_approved": ("approved", "承認済み"),
    "state_expiring": ("ends soon", "まもなく期限"),
    "state_expired": ("expired", "期限切れ"),
    "state_used": ("used up", "使用済み"),
    "state_denied": ("denied: {reason}", "却下: {reason}"),
    "state_revoked": ("revoked: {reason}", "取消済み: {reason}"),
    "state_lost": ("lost: {reason}", "紛失: {reason}"),
    "with_read_only": ("read-only", "読み取り専用"),
    "with_once": ("once", "一回限り"),
    "all": ("all", "すべて"),
    "no_end": ("no end", "無期限"),
    "never": ("never", "なし"),
    "uses": ("{used} of {uses}", "{used} / {uses}"),
    # verify
    "whole": (
        "whole: {events} of {lines} events in full, {machines} machines, log {origin} at size {size}",
        "改ざんなし: {lines} 件中 {events} 件の内容あり、端末 {machines} 台、ログ {origin} (サイズ {size})",
    ),
    "part": ("chosen by: {filter}", "抽出条件: {filter}"),
    "key_given": ("key: the one you gave", "鍵: 指定されたもの"),
    "key_bundle": (
        "key: taken from the bundle itself ({key}): this shows that the bundle agrees with itself, not who made it; give the"
        " collector's key with --key",
        "鍵: このファイル自身に入っていたもの ({key})。内容に矛盾がないことは示しますが、誰が作ったかは示しません。"
        "収集サーバーの鍵を --key で指定してください",
    ),
    "compared": ("held against older checkpoints of size: {sizes}", "以前のチェックポイントと照合済み (サイズ: {sizes})"),
    "uncovered": ("not covered by the proof: {names}", "証明の対象外: {names}"),
    "bad": ("NOT WHOLE: {what}: {why}", "不正: {what}: {why}"),
    "bad_event": (
        "NOT WHOLE: {what}: event {seq} of {agent} (epoch {epoch}), line {line}: {why}",
        "不正: {what}: {agent} の {seq} 番目の記録 (epoch {epoch})、{line} 行目: {why}",
    ),
    "altered": ("altered", "改変"),
    "removed": ("removed", "削除"),
    "inserted": ("inserted", "挿入"),
    "reordered": ("reordered", "順序の入れ替え"),
    "back-dated": ("back-dated", "日時の遡り"),
    "forged": ("not signed as it should be", "署名の不一致"),
    "tree": ("not the log that was signed", "署名されたログとの不一致"),
    "unreadable": ("damaged", "破損"),
    "misplaced": ("misplaced", "位置の不一致"),
    "erased": (
        "erased the content of {count} events received before {before}",
        "{before} より前に受信した {count} 件の内容を消去しました",
    ),
    "carried": ("{witness}: has the checkpoint of size {size}", "{witness}: サイズ {size} のチェックポイントを渡しました"),
    "gap": ("-- gap: {count} events not shown ({reason}) --", "-- 欠落: {count} 件が表示されていません ({reason}) --"),
    "gap_some": ("-- gap: events not shown ({reason}) --", "-- 欠落: 表示されていない記録があります ({reason}) --"),
}


def say(lang: Language, key: str, /, **values: Any) -> str:
    """The words of `key`. Raises KeyError if there are none."""
    return WORDS[key][lang == "ja"].format(**values)


def heads(lang: Language, *keys: str) -> list[str]:
    """Column headings."""
    return [say(lang, key) for key in keys]
