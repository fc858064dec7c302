"""Two texts the collector serves besides its API: the metrics for Prometheus, and the page at `/`.

Owns: metric names and their help (names stay for ever), the page and its headers. Must not know routes.
"""

from server_stub.collector import Collector
from server_stub.commit import BUCKETS_S
from server_stub.config import VERSION

HOME_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

HOME = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Sekisho collector</title>
<style>body{{font:16px/1.6 system-ui,sans-serif;max-width:42em;margin:4em auto;padding:0 1em}}
code{{background:#eee;padding:.1em .3em}}</style>
<h1>Sekisho collector</h1>
<p>This machine receives and keeps what Sekisho's agents record: which protected files left a workstation, onto which
medium, by whose hand. There is nothing to see here without a token,
and this version ({VERSION}) has no console to sign in to.</p>
<p>On this machine: <code>sekisho-collector tail -f</code>. From elsewhere:
<code>sekisho-collector tail -f --url https://… --token …</code>; an administrator makes tokens with
<code>sekisho-collector token create --role viewer</code>.</p>
<p lang="ja">ここは Sekisho の収集サーバーです。
記録を見るには、このサーバーで <code>sekisho-collector tail -f</code> を実行してください。</p>
</html>
"""


def _metric(name: str, kind: str, told: str, values: list[tuple[str, float]]) -> str:
    lines = [f"# HELP sekisho_{name} {told}", f"# TYPE sekisho_{name} {kind}"]
    return "\n".join(lines + [f"sekisho_{name}{labels} {value!r}" for labels, value in values])


def metrics(c: Collector) -> str:
    """Prometheus text format, version 0.0.4."""
    latency = c.writer.latency
    buckets = [(f'_bucket{{le="{bound:g}"}}', float(n)) for bound, n in zip(BUCKETS_S, latency.counts, strict=True)]
    buckets += [('_bucket{le="+Inf"}', latency.count), ("_sum", latency.total), ("_count", latency.count)]
    silent = sum(agent.silent for agent in c.agents.values())
    results = [(f'{{result="{name}"}}', float(n)) for name, n in sorted(c.batches.items())]
    carried = [(f'{{result="{name}"}}', float(n)) for name, n in sorted(c.carried.items())]
    return "\n".join(
        (
            _metric("events_accepted_total", "counter", "Events made durable.", [("", c.writer.accepted)]),
            _metric("batches_total", "counter", "Batches, by what became of them.", results),
            _metric("commit_seconds", "histogram", "Duration of a group commit.", buckets),
            _metric("log_size", "gauge", "Events in the log, which is the size of its tree.", [("", c.writer.size)]),
            _metric("agents", "gauge", "Agents enrolled.", [("", len(c.agents))]),
            _metric("agents_silent", "gauge", "Agents that stopped reporting.", [("", silent)]),
            _metric("tail_readers", "gauge", "Live readers.", [("", c.tails)]),
            _metric("witness_total", "counter", "Checkpoints given to witnesses, by what became of them.", carried),
            _metric("store_bytes", "gauge", "The store on disk.", [("", c.store.size_bytes())]),
            _metric("store_writable", "gauge", "1 if the last commit went well.", [("", int(c.writer.alive()))]),
            "",
        )
    )
