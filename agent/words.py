"""What `sekisho-agent` says to people, in English and Japanese side by side.

Owns: the sentences of `check`, `status` and `media`; each is found by a stable key, so that JSON output and tests do not
depend on the language. Must not know: who says them. Events are spoken by `contract/show.py`; what sensors do not see has
its words in `contract/words.py`, as both say it.
"""

from typing import Any

from agent.contract.words import BLIND, Language

__all__ = ["WORDS", "Language", "say"]

WORDS: dict[str, tuple[str, str]] = {
    # verdicts and headings
    "ok": ("ok", "正常"),
    "blind": ("blind", "死角"),
    "error": ("ERROR", "エラー"),
    "healthy": ("healthy", "正常"),
    "degraded": ("degraded", "機能低下"),
    "no_media": ("no medium is plugged in", "接続されている媒体はありません"),
    "col.medium": ("MEDIUM", "媒体"),
    "col.serial": ("SERIAL", "シリアル"),
    "col.kind": ("KIND", "種類"),
    "col.mount": ("MOUNT", "マウント先"),
    "col.decision": ("DECISION", "判定"),
    "col.reason": ("WHY", "理由"),
    "approved": ("approved", "承認済み"),
    "unapproved": ("unapproved", "未承認"),
    "expired": ("expired", "承認期限切れ"),
    "revoked": ("revoked", "承認取消済み"),
    "unknown": ("unknown", "不明"),
    # check: what was found, and what to do
    "kernel": ("Linux {release}", "Linux {release}"),
    "kernel_old": ("Linux {release} is too old", "Linux {release} は古すぎます"),
    "kernel_old.fix": ("use Linux 5.17 or later", "Linux 5.17 以降を使ってください"),
    "state": ("{path}, {free} MiB free", "{path}、空き {free} MiB"),
    "state_unwritable": ("{path} can't be written", "{path} に書き込めません"),
    "state_unwritable.fix": (
        "run as root, or choose another agent.state_dir",
        "root で実行するか、agent.state_dir を変えてください",
    ),
    "state_small": (
        "{path} has {free} MiB left, the spool may take {wanted}",
        "{path} の空きは {free} MiB、スプールの上限は {wanted} MiB です",
    ),
    "state_small.fix": (
        "free some space, or lower agent.spool.max_bytes",
        "空きを増やすか、agent.spool.max_bytes を下げてください",
    ),
    "state_open": ("{path} is open to others (mode {mode})", "{path} が他の利用者に開かれています (モード {mode})"),
    "state_open.fix": ("chmod 700 {path}", "chmod 700 {path}"),
    "protect": ("{path} on {fs}", "{path} ({fs})"),
    "protect_none": (
        "no directory is protected, so no copy can be told",
        "保護対象のディレクトリがないため、持ち出しを検知できません",
    ),
    "protect_none.fix": (
        "add [[agent.protect]] with a path and a label",
        "[[agent.protect]] に path と label を書いてください",
    ),
    "protect_missing": (
        "{path} is not there; the agent waits for it (encrypted home, automount, network share)",
        "{path} がありません。現れるまで待ちます (暗号化ホーム、自動マウント、ネットワーク共有)",
    ),
    "protect_missing.fix": ("make it, mount it, or mend the path", "作成またはマウントするか、path を直してください"),
    "protect_unreadable": ("{path} may not be read", "{path} の読み取り権限がありません"),
    "protect_unreadable.fix": (
        "run as root; a user's FUSE mount needs -o allow_root",
        "root で実行してください。利用者の FUSE マウントには -o allow_root が要ります",
    ),
    "protect_autofs": (
        "{path} is an automount point; it is watched once it is mounted",
        "{path} は自動マウントポイントです。マウントされると監視します",
    ),
    "protect_network": (
        "{path} is on {fs}: what this machine does there is seen, what other clients or the server do is not",
        "{path} は {fs} 上です。この端末での操作は見えますが、他の端末やサーバーでの操作は見えません",
    ),
    "protect_network.fix": (
        "run an agent on the file server, too",
        "ファイルサーバーにもエージェントを入れてください",
    ),
    "protect_fuse": (
        "{path} is on {fs}: reads are seen by name at best, and the daemon behind it reads for others",
        "{path} は {fs} 上です。せいぜいファイル名しか分からず、実際に読むのは背後のデーモンです",
    ),
    "protect_fuse.fix": ("protect the directory below it", "その下の実ディレクトリを保護してください"),
    "simulated": ("{path}", "{path}"),
    "simulated_missing": ("{path} is not there", "{path} がありません"),
    "simulated_missing.fix": (
        "mkdir -p {path}, or clear agent.media.simulated_dir",
        "mkdir -p {path} とするか、agent.media.simulated_dir を空にしてください",
    ),
    "simulated_inside": ("{path} lies in the protected {tree}", "{path} が保護対象 {tree} の中にあります"),
    "simulated_inside.fix": ("put it elsewhere", "別の場所に置いてください"),
    "sensor": ("seen by {sensor}", "{sensor} で監視します"),
    "sensor_refused": ("can't be watched here ({why})", "ここでは監視できません ({why})"),
    "files.fix": (
        "run as root (packaging/sekisho-agent.service has just what is needed)",
        "root で実行してください (packaging/sekisho-agent.service に必要な権限があります)",
    ),
    "devices.fix": ("install and start systemd-udevd", "systemd-udevd を導入し、起動してください"),
    "sessions.fix": (
        "install systemd-logind (package libpam-systemd)",
        "systemd-logind (パッケージ libpam-systemd) を導入してください",
    ),
    "staging_hold": (
        "followed; watched while somebody reads protected files",
        "追跡します。保護対象ファイルが読まれている間だけ監視します",
    ),
    "staging_standing": ("followed; watched all the time", "追跡します。常に監視します"),
    "staging_off": (
        "copies made elsewhere first are not known when they leave",
        "別の場所にいったん複製されたものは、持ち出されても分かりません",
    ),
    "staging_off.fix": ("set agent.staging.watch to true", "agent.staging.watch を true にしてください"),
    "way_off": ("what leaves by {way} is not told", "{way} による持ち出しは記録しません"),
    "way_off.fix": ('set agent.ways.{way} to "watch"', 'agent.ways.{way} を "watch" にしてください'),
    "login": ("the kernel's login uid names the person", "カーネルのログイン UID で操作した人を特定できます"),
    "login_absent": (
        "this kernel keeps no login uid (CONFIG_AUDIT)",
        "このカーネルはログイン UID を持ちません (CONFIG_AUDIT)",
    ),
    "login_absent.fix": ("boot a kernel with audit compiled in", "audit を組み込んだカーネルで起動してください"),
    "login_unset": (
        "no login service here sets the login uid, so people can't be named through sudo",
        "ログイン UID を設定するサービスがないため、sudo を使った人を特定できません",
    ),
    "login_unset.fix": (
        "add `session required pam_loginuid.so` to the login services in /etc/pam.d",
        "/etc/pam.d のログインサービスに `session required pam_loginuid.so` を加えてください",
    ),
    "collector": ("{url}", "{url}"),
    "collector_none": (
        "none is configured: events stay on this machine only",
        "設定されていません。記録はこの端末だけに残ります",
    ),
    "collector_none.fix": ("set agent.collector.url", "agent.collector.url を設定してください"),
    "collector_ca": ("ca_file {path} is not there", "ca_file {path} がありません"),
    "collector_ca.fix": ("copy the collector's CA certificate to it", "収集サーバーの CA 証明書をそこに置いてください"),
    "collector_token": ("token_file {path} can't be read", "token_file {path} を読めません"),
    "collector_token.fix": ("it is needed once, to enrol", "登録のときに一度だけ必要です"),
    "collector_refused": ("{url}: its certificate is refused ({why})", "{url}: 証明書を信頼できません ({why})"),
    "collector_refused.fix": ("set agent.collector.ca_file", "agent.collector.ca_file を設定してください"),
    "collector_away": (
        "{url} can't be reached ({why}); events wait in the spool",
        "{url} に接続できません ({why})。記録はスプールに保持されます",
    ),
    "collector_away.fix": (
        "start the collector, or mend the address or the firewall",
        "収集サーバーを起動するか、アドレスやファイアウォールの設定を直してください",
    ),
    "mode": ("{mode} acts as observe in this version", "このバージョンでは {mode} は observe として動作します"),
    "mode.fix": ("set agent.mode to observe", "agent.mode を observe にしてください"),
    "limit_none": (
        "no limit is set: no burst or drip is found",
        "上限がないため、大量の持ち出しや少量ずつの持ち出しを検知しません",
    ),
    "limit_none.fix": ("remove `limit = []` for the defaults", "`limit = []` を消すと既定値になります"),
    # verify
    "verify.whole": (
        "whole: events {first} to {last} of epoch {epoch}{digests}{signed}",
        "改ざんなし: epoch {epoch} の記録 {first} から {last} まで{digests}{signed}",
    ),
    "verify.none": ("whole: no events yet in epoch {epoch}", "改ざんなし: epoch {epoch} の記録はまだありません"),
    "verify.digests": (", {count} of them as digests only", "、うち {count} 件はダイジェストのみ"),
    "verify.vouched": ("; signatures vouch up to {seq}", "。署名で {seq} まで確認済み"),
    "verify.unvouched": ("; no signature vouches for them yet", "。署名による確認はまだありません"),
    "verify.bad": ("not whole: {why}", "不正: {why}"),
    "verify.bad_event": ("not whole: event {seq}: {why}", "不正: 記録 {seq}: {why}"),
    # status
    "status.head": (
        "sekisho-agent {version} on {name}: {health} (pid {pid}, {memory} MiB)",
        "sekisho-agent {version} ({name}): {health} (pid {pid}、{memory} MiB)",
    ),
    "status.protected": ("protected", "保護対象"),
    "status.waiting": ("not there yet", "まだありません"),
    "status.sensor": ("sensor", "センサー"),
    "status.medium": ("medium", "媒体"),
    "status.spool": ("spool", "スプール"),
    "status.spool_says": (
        "{events} events, {kib} KiB, {waiting} not durable yet",
        "{events} 件、{kib} KiB、未書き込み {waiting} 件",
    ),
    "status.collector": ("collector", "収集サーバー"),
    "status.no_collector": ("none configured: events stay on this machine", "設定なし。記録はこの端末に残ります"),
    "status.receipt": (
        "{url}: receipt for event {seq} at {at}, {backlog} to send",
        "{url}: {at} に記録 {seq} まで受領済み、未送信 {backlog} 件",
    ),
    "status.no_receipt": ("{url}: no receipt yet, {backlog} to send", "{url}: 受領証なし、未送信 {backlog} 件"),
} | BLIND

SUBJECTS: dict[str, str] = {
    "kernel": "カーネル",
    "state_dir": "状態ディレクトリ",
    "protect": "保護対象",
    "simulated_dir": "模擬媒体",
    "files": "ファイル",
    "writers": "媒体への書き込み",
    "processes": "プロセス",
    "copies elsewhere": "別の場所の複製",
    "uploads": "送信",
    "phones": "スマートフォン",
    "devices": "機器",
    "sessions": "セッション",
    "login user": "ログイン利用者",
    "way": "経路",
    "collector": "収集サーバー",
    "mode": "モード",
    "limit": "上限",
}
"""What a line of `check` is about, in Japanese; the English name is also its name in JSON. "protect" and "way" have a name."""


def say(lang: Language, key: str, /, **values: Any) -> str:
    """The sentence of `key`; a key without one is itself (a code newer than this table)."""
    texts = WORDS.get(key)
    return texts[lang == "ja"].format(**values) if texts else key
