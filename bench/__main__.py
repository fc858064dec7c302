"""`python -m bench [PROGRAM …] [-- ARGUMENT …]`: run the programs one after another, each in a process of its own.

All of them take about 20 minutes of a machine that does nothing else. With $SEKISHO_BENCH_OUT their figures are kept there,
and when all of them were begun, docs/benchmarks.md is written from what is there; a program that fails is said, and ends the
others not.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench import page

ORDER = ["memory", "latency", "hold", "storm", "overhead", "elsewhere", "ingest", "verify"]


def main(arguments: list[str]) -> int:
    """Run what was named, or all; 2 if one of them failed."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, handed_on = arguments[:cut], arguments[cut + 1 :]
    there = [name for name in ORDER if Path(__file__).with_name(f"{name}.py").exists()]
    if unknown := [name for name in names if name not in there]:
        print(f"no such program: {', '.join(unknown)}; there are: {', '.join(there)}", file=sys.stderr)
        return 2
    failed: list[str] = []
    for name in names or there:
        began = time.monotonic()
        print(f"\n## {name}", flush=True)
        command = [sys.executable, "-m", f"bench.{name}", *handed_on]
        if name == "ingest":  # prints one JSON object, and keeps none
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            print(done.stdout, end="", flush=True)
            if (folder := os.environ.get("SEKISHO_BENCH_OUT")) and done.returncode == 0:
                Path(folder, "ingest.json").write_text(done.stdout.splitlines()[-1] + "\n")
        else:
            done = subprocess.run(command, text=True, check=False)
        if done.returncode:
            failed.append(name)
        print(f"\n{name}: {time.monotonic() - began:.0f} s", flush=True)
    if (folder := os.environ.get("SEKISHO_BENCH_OUT")) and not names:
        page.main(Path(folder))
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
