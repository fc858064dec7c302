"""What `sekisho-agent` says to people, in English and Japanese side by side.

Owns: the sentences of `check`, `status` and `media`; each is found by a stable key, so that JSON output and tests do not
depend on the language. Must not know: who says them. Events are spoken by `contract/show.py`; what sensors do not see has
its words in `contract/words.py`, as both say it.
"""

from typing import Any

from agent.contract.unlock import SENTENCES
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
    "access_none": ("nobody but root", "root のみ"),
    "may.read": ("read", "閲覧"),
    "may.write": ("write", "変更"),
    "may.all": ("all, as root", "すべて (root)"),
    "col.protected": ("PROTECTED", "保護対象"),
    "col.may": ("MAY", "権限"),
    "col.who": ("WHO", "対象者"),
    "col.files": ("FILES", "件数"),
    "story.identity": ("identity", "識別"),
    "story.since": ("since", "接続時刻"),
    "story.port": ("port", "ポート"),
    "story.interfaces": ("interfaces", "インターフェース"),
    "story.block": ("block device", "ブロックデバイス"),
    "story.network": ("network", "ネットワーク"),
    "story.amounts": ("amounts", "転送量"),
    "story.disguised": ("disguised", "偽装の疑い"),
    "story.moved": ("{read} read from it, {written} written to it", "読み出し {read}、書き込み {written}"),
    "identity.serial": ("by its serial number", "シリアル番号で識別"),
    "identity.shared_serial": ("several pieces share this serial number", "複数の機器が同じシリアル番号を持つ"),
    "identity.no_serial": (
        "no serial number: all pieces of this model share the key",
        "シリアル番号なし: 同型の機器を区別できない",
    ),
    "by.ids": ("maker and model", "メーカー・型番"),
    "by.serial": ("serial", "シリアル"),
    "by.interfaces": ("interfaces", "インターフェース"),
    "by.capacity": ("capacity", "容量"),
    "by.file_system": ("file system", "ファイルシステム"),
    "since.boot": ("(there since the machine started)", "(起動時から)"),
    "since.agent_down": ("(came while no agent ran)", "(エージェント停止中に接続)"),
    "since.earlier_run": ("(told by an earlier agent)", "(以前のエージェントが記録済み)"),
    "since.unknown": ("(there before the agent)", "(エージェント開始前から)"),
    "col.medium": ("MEDIUM", "媒体"),
    "col.serial": ("SERIAL", "シリアル"),
    "col.kind": ("KIND", "種類"),
    "col.mount": ("MOUNT", "マウント先"),
    "col.decision": ("DECISION", "判定"),
    "col.reason": ("WHY", "理由"),
    "col.stopped": ("STOPPED", "停止"),
    "stopped.read_only": ("read-only", "読み取り専用"),
    "stopped.no_writes": ("not to be written to", "書き込み停止"),
    "stopped.no_opens": ("not to be opened", "使用停止"),
    "stopped.directories": ("not for all directories", "一部のディレクトリ不可"),
    "stopped.deauthorized": ("off the bus", "USB 停止"),
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
    "register": ("the register of media was confirmed within a day", "媒体台帳は 1 日以内に確認済み"),
    "register_old": (
        "the register of media was last confirmed {days} days ago; what was revoked since is not known here",
        "媒体台帳の最終確認は {days} 日前です。その後の取消しはこの端末では分かりません",
    ),
    "register_old.fix": ("let the agent reach the collector", "エージェントが収集サーバーに接続できるようにしてください"),
    "collector_away": (
        "{url} can't be reached ({why}); events wait in the spool",
        "{url} に接続できません ({why})。記録はスプールに保持されます",
    ),
    "collector_away.fix": (
        "start the collector, or mend the address or the firewall",
        "収集サーバーを起動するか、アドレスやファイアウォールの設定を直してください",
    ),
    "mode": ("{mode}", "{mode}"),
    "mode_enforce": (
        "enforce: without approval {unapproved}, never had a register {unknown}; on failure {on_failure}",
        "enforce: 承認なし {unapproved}、台帳未受信 {unknown}、障害時 {on_failure}",
    ),
    "enforce_usbguard": (
        "enforce: USBGuard runs, so which USB devices are let on the bus is left to it; file systems are still made read-only",
        "enforce: USBGuard が動作中のため、USB 機器の許可は任せます。ファイルシステムは引き続き読み取り専用にします",
    ),
    "enforce_no_approval": (
        "enforce: agent.media.require_approval is false, so nothing is ever stopped",
        "enforce: agent.media.require_approval が false のため、何も停止しません",
    ),
    "enforce_no_approval.fix": (
        "set agent.media.require_approval to true",
        "agent.media.require_approval を true にしてください",
    ),
    "enforce_directories": (
        "enforce: an approval's directories are not kept to, as who read a protected file is known in time with "
        "agent.staging.watch and hold alone",
        "enforce: agent.staging の watch と hold が無効のため、承認のディレクトリ指定を守らせることができません",
    ),
    "enforce_directories.fix": (
        "set agent.staging.watch and agent.staging.hold to true",
        "agent.staging.watch と agent.staging.hold を true にしてください",
    ),
    # enforce --dry-run
    "dry.nothing": (
        "enforce would have stopped nothing (since {since})",
        "enforce で停止される媒体はありませんでした ({since})",
    ),
    "dry.head": (
        "enforce would have stopped {count} media (since {since}):",
        "enforce で停止される媒体: {count} 件 ({since})",
    ),
    "col.would": ("WOULD BE", "動作"),
    "col.plugged": ("PLUGGED", "接続"),
    "col.copies": ("PROTECTED", "保護対象"),
    "col.others": ("OTHER", "その他"),
    "col.bytes": ("BYTES", "サイズ"),
    "col.people": ("PEOPLE", "利用者"),
    "col.last": ("LAST", "最終"),
    "would.read_only": ("read-only", "読み取り専用"),
    "would.refuse": ("refused", "使用停止"),
    "would.deauthorize": ("off the bus", "USB 停止"),
    "would.directories": ("refused by directory", "ディレクトリ別に拒否"),
    # unlock
    "unlock.done": ("{key} may be used until {until}", "{key} は {until} まで使えます"),
    "unlock.read_only": ("{key} may be read until {until}", "{key} は {until} まで読み取りできます"),
    "unlock.no_answer": (
        "the agent did not answer; see `sekisho-agent status`",
        "エージェントが応答しません。`sekisho-agent status` を確認してください",
    ),
    "unlock.no_collector": (
        "this machine was never enrolled, so no code is for it",
        "この端末は登録されていないため、解除コードは使えません",
    ),
    "unlock.too_often": (
        "too many tries; wait a minute",
        "試行回数が多すぎます。1 分お待ちください",
    ),
    "unlock.not_recorded": (
        "it could not be recorded that the code was used; free some disk space",
        "コードの使用を記録できませんでした。ディスクの空きを確保してください",
    ),
    "unlock.mistyped": (
        SENTENCES["mistyped"],
        "{group} 番目の組に誤りがあります。もう一度読み上げてもらってください",
    ),
    "unlock.not_for_this": (
        SENTENCES["not_for_this"],
        "この端末に接続中の媒体のコードではありません。新しいコードを発行してもらってください",
    ),
    "unlock.too_early": (SENTENCES["too_early"], "コードの発行時刻がこの端末の時計より先です。時計を合わせてください"),
    "unlock.over": (SENTENCES["over"], "コードの有効期間が過ぎています。新しいコードを発行してもらってください"),
    "unlock.used": (SENTENCES["used"], "このコードは使用済みです。新しいコードを発行してもらってください"),
    "unlock.clock_back": (SENTENCES["clock_back"], "この端末の時計が戻されています。時計を合わせてください"),
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
    "status.notices": ("notices", "通知"),
    "status.notices_say": (
        "{desktop} on desktops, {terminal} on terminals, {nobody} told nobody",
        "デスクトップ {desktop} 件、端末画面 {terminal} 件、未達 {nobody} 件",
    ),
    "status.no_collector": ("none configured: events stay on this machine", "設定なし。記録はこの端末に残ります"),
    "status.receipt": (
        "{url}: receipt for event {seq} at {at}, {backlog} to send",
        "{url}: {at} に記録 {seq} まで受領済み、未送信 {backlog} 件",
    ),
    "status.register": ("register", "媒体台帳"),
    "status.register_says": (
        "version {version} with {entries} approvals, confirmed at {at}",
        "版 {version}、承認 {entries} 件、{at} に確認",
    ),
    "status.no_receipt": ("{url}: no receipt yet, {backlog} to send", "{url}: 受領証なし、未送信 {backlog} 件"),
} | BLIND

SUBJECTS: dict[str, str] = {
    "kernel": "カーネル",
    "register": "媒体台帳",
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
