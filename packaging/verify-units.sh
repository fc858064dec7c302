#!/usr/bin/env bash
# systemd-analyze verify for our units, with the programs and the directory of this checkout in place of /opt/sekisho
# (verify refuses a unit whose program is not there). Prints the exposure scores; fails if verify has anything to say.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for unit in sekisho-agent sekisho-collector; do
    sed "s|/opt/sekisho/bin/[a-z-]*|/bin/true|" "$here/$unit.service" >"$scratch/$unit.service"
    said=$(SYSTEMD_LOG_LEVEL=notice systemd-analyze verify --man=no "$scratch/$unit.service" 2>&1) || said="verify failed: $said"
    # What other units of the machine say of themselves is not ours to mend.
    said=$(grep -F -e "$unit" -e "verify failed" <<<"$said" || true)
    if [ -n "$said" ]; then printf '%s\n' "$said" >&2; exit 1; fi
    systemd-analyze security --no-pager --offline=true "$scratch/$unit.service" | tail -n 1
done
