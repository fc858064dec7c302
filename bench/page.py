"""docs/benchmarks.md from what the programs left in a folder: `python -m bench.page FOLDER`.

Owns: the page's order, what each measurement is for, how it was taken and what it does not show. The figures are the
programs' own (PROGRAM.json and PROGRAM.md); raw ones are copied to docs/benchmarks/.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "benchmarks.md"
RAW = REPO / "docs" / "benchmarks"

HEAD = """# Measured

What Sekisho costs, against tools that watch files too, on one machine. `make bench` (as root) takes all of it again: it
needs 25 GB below `$SEKISHO_BENCH_DIR` for a while, and fatrace, inotify-tools and gcc to compare; what is missing is left
out, and said. With `SEKISHO_BENCH_OUT=FOLDER` the figures are kept, and `python -m bench.page FOLDER` makes this page.

**How.** Everything runs on two loop-mounted ext4 file systems, a disk and a medium, with warm caches. Every round runs every
tool once, in turning order; ratios are taken within a round, and the median is given with (least–most). Beside the wall clock
stands the CPU of the work's own processes (user and system; what the kernel does for a mark is in it), which other load
disturbs less. A tool's CPU is counted from when it is ready to its end, so that what it does last counts too. *Files told*
are distinct source files that its record names, or for reads summed up in `file.history` counts. `marks` is no tool: the
agent's own marks with a reader that throws away what it reads, so the kernel's part of the cost. The agent runs as it is
installed, with its modules compiled; its memory is one of the things that this changes (1 to 3 MiB).

**Where the agent's CPU goes.** Of each file that is copied onto a medium, about a third is the kernel's two records taken apart
and two files looked up, a third is finding out what it is (who, from where, onto what, how much by now), and a third is the
event in its exact bytes: hash, chain, packing, SQLite. Two thirds of all of it is the Python interpreter, a sixth the kernel, a
tenth zlib and SHA-256. So fatrace, which prints a line and forgets it, stays cheaper than this can be made in Python.
"""

PARTS: dict[str, tuple[str, str]] = {
    "overhead_inside": (
        "Slow-down of work, and CPU per file told",
        "30,000 files of 200 to 3,200 bytes in 600 directories. fatrace names programs and files, keeps "
        "nothing, and watches every mount; watchdog and inotifywait name no program. The agent's figure "
        "includes finding source and destination of each copy, the person, limits, the signed and hashed "
        "event, and its fsync to the spool; and the look at who may read these files, which a process of idle priority takes "
        "at the start and once a day (about 0.2 s of CPU here, 6 µs a file of each row).\n\n"
        "*Not shown*: a slow stick, on which copying takes longer and the ratios shrink; cold caches; network "
        "file systems; sending the events (the collector is off here, and on under Memory and Latency).",
    ),
    "elsewhere_outside": (
        "Work elsewhere on the same file system",
        "What everybody else on the machine feels. The build starts about 600 processes. A tool is started once a round, the "
        "works are run several times under it; a pair is the n-th run under a tool and the n-th without one in that round. "
        "Ratios are the median of all pairs (first–third quartile). `stopped` is the agent with all its marks, held by "
        "SIGSTOP: it shows what the marks cost when nobody reads.\n\n"
        "*Not shown*: a machine with one core, where the agent's own CPU would come on top.",
    ),
    "elsewhere_large": (
        "Large copies",
        "One file on tmpfs, in pairs as above: on a disk, what the kernel writes back when it likes made single runs differ "
        "fourfold.\n\n*Not shown*: a real stick, whose speed hides all of it.",
    ),
    "memory": (
        "Memory and idle CPU",
        "PSS shares what several processes map; USS is what would come free. Both processes (the agent, and "
        "the small one that holds opens) are in it. The first figure of idle CPU has the look at the access rights of "
        "50,000 directories in it, which is taken at the start and once a day.\n\n"
        "*Not shown*: the kernel's own memory for marks (about 1 KB for each protected directory) and for "
        "unread events (100 bytes each).",
    ),
    "latency": (
        "From close(2) to the administrator's tail",
        "Agent, collector and tail on one machine, over loopback HTTP.\n\n"
        "*Not shown*: a network between them, TLS, and other agents.",
    ),
    "hold": (
        "How long an opener on a medium is held",
        "The probe with real-time priority waits for nothing but the hold; the ordinary one also for its own "
        'turn. "Busy" is two endless loops a core at the same priority as the probe\'s user.\n\n'
        "The agent looks at an opener once a second (2 ms at most): that is in p99.9 and worst here.\n\n"
        "*Not shown*: many programs that open their first file at once; they are looked at one after another.",
    ),
    "storm": (
        "Storms",
        "A C program that does nothing else, alone and several at once. CPU is of the tool, for each file that its record "
        "tells: a tool that passes over half of them does half of the work. fatrace and watchdog do not say what they lost; of "
        "reads the agent's summaries count opens, without those that the kernel merged with one before. *Gaps told* counts "
        "`agent.gap` events: what the agent knows it lost.\n\n"
        "*Not shown*: a machine that is out of memory; the queue of unread events is not bounded by number.",
    ),
    "ingest": (
        "The collector: events made durable a second",
        "16 connections, batches of 250 with real chains and signatures; each waits for its signed receipt, "
        "which comes after fsync. The sender runs on the same machine and takes its share of it.",
    ),
    "verify": (
        "Bundles and proofs",
        "A log made by the real writer from real batches, exported, and checked as `sekisho-collector verify` does it: every "
        "signature, every chain, the tree.\n\n*Not shown*: reading the bundle from a slow disk.",
    ),
}


def main(folder: Path) -> None:
    """Write the page and the raw figures."""
    RAW.mkdir(exist_ok=True)
    pieces = [HEAD]
    for program, (title, about) in PARTS.items():
        source = folder / f"{program}.json"
        if not source.exists():
            continue
        document: dict[str, Any] = json.loads(source.read_text())
        shutil.copy(source, RAW / source.name)
        pieces.append(f"## {title}\n\n{about}\n\n{where(document.get('machine'))}")
        tables = folder / f"{program}.md"
        pieces.append(tables.read_text().strip() if tables.exists() else plain(document))
        pieces.append(
            f"Raw figures: [{program}.json](benchmarks/{program}.json), by `python -m bench.{program.partition('_')[0]}`"
        )
    PAGE.write_text("\n\n".join(piece.strip() for piece in pieces) + "\n")


def where(machine: dict[str, Any] | None) -> str:
    """The machine, in a line."""
    if machine is None:
        return ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}, Python"
        f" {machine['python']}; {machine['at']}, load average at the end {machine['load'][0]}."
    )


def plain(document: dict[str, Any]) -> str:
    """A flat JSON object as a table."""
    rows = [f"| {key} | {value} |" for key, value in document.items() if not isinstance(value, dict | list)]
    return "\n".join(["| what | figure |", "| --- | --- |", *rows])


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python -m bench.page FOLDER   (a folder that SEKISHO_BENCH_OUT named)")
    main(Path(sys.argv[1]))
