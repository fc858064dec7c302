"""`python -m bench [PROGRAM …] [-- ARGUMENT …]`: run the programs one after another, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ORDER = ["memory", "latency", "hold", "storm", "overhead", "ingest"]


def main(arguments: list[str]) -> int:
    """Run what was named, or all; the worst exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, handed_on = arguments[:cut], arguments[cut + 1 :]
    there = [name for name in ORDER if Path(__file__).with_name(f"{name}.py").exists()]
    if unknown := [name for name in names if name not in there]:
        print(f"no such program: {', '.join(unknown)}; there are: {', '.join(there)}", file=sys.stderr)
        return 2
    worst = 0
    for name in names or there:
        print(f"\n## {name}", flush=True)
        command = [sys.executable, "-m", f"bench.{name}", *handed_on]
        if name == "ingest":  # prints one JSON object, and keeps none
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            print(done.stdout, end="", flush=True)
            if (folder := os.environ.get("SEKISHO_BENCH_OUT")) and done.returncode == 0:
                Path(folder, "ingest.json").write_text(done.stdout.splitlines()[-1] + "\n")
            worst = max(worst, done.returncode)
            continue
        worst = max(worst, subprocess.run(command, check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
