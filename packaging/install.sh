#!/usr/bin/env bash
# Installs Sekisho on a plain machine, from this checkout, into an environment of its own: /opt/sekisho. (`agent` is too
# plain a name for a package to share an environment with others.) Run again to upgrade: what is there is kept.
#
#   install.sh --agent | --collector | both      what to install (and start)
#   install.sh --uninstall [--purge]             remove it; keys, spool, store and configuration stay unless --purge
#     --root DIR     into DIR instead of /, starting nothing: for images and packages
#     --wheels DIR   take Python packages from DIR only, for machines without a package index
#     --no-start     install and enable, but start nothing: for golden images
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source=$(dirname "$here")
root="" agent=no collector=no uninstall=no purge=no start=yes wheels=""
# The system's own Python: one below somebody's home would be out of the services' sight.
python=${PYTHON:-/usr/bin/python3}
command -v "$python" >/dev/null || python=python3

die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
usage() { printf 'install.sh: %s\n' "$*" >&2; sed -n 's/^#   //p' "$here/install.sh" >&2; exit 2; }
say() { printf '%s\n' "$*"; }

while [ $# -gt 0 ]; do
    case $1 in
        --agent) agent=yes ;;
        --collector) collector=yes ;;
        --uninstall) uninstall=yes ;;
        --purge) purge=yes ;;
        --no-start) start=no ;;
        --root) root=${2:-}; [ -n "$root" ] || usage "--root needs a directory"; shift ;;
        --wheels) wheels=${2:-}; [ -d "$wheels" ] || usage "--wheels needs a directory of wheels"; shift ;;
        *) usage "unknown option \"$1\"" ;;
    esac
    shift
done
if [ "$uninstall" = yes ] && [ "$agent$collector" != nono ]; then usage "--uninstall removes both; leave out --agent and --collector"; fi
if [ "$uninstall$agent$collector" = nonono ]; then usage "say what to install: --agent, --collector or both"; fi
if [ "$purge" = yes ] && [ "$uninstall" = no ]; then usage "--purge goes with --uninstall"; fi

live=no
if [ -z "$root" ]; then
    [ "$(id -u)" = 0 ] || die "must be run as root: sudo $0 …"
    if [ -d /run/systemd/system ]; then live=yes; fi
else
    mkdir -p "$root" || die "can't make the directory $root; choose another for --root"
    root=$(cd "$root" && pwd)
fi
[ "$live" = yes ] || start=no

opt=$root/opt/sekisho
units=(sekisho-agent.service sekisho-collector.service)

if [ "$uninstall" = yes ]; then
    if [ "$live" = yes ]; then systemctl disable --now "${units[@]}" 2>/dev/null || true; fi
    for unit in "${units[@]}"; do
        rm -f "$root/etc/systemd/system/$unit" "$root/etc/systemd/system/multi-user.target.wants/$unit"
    done
    for command in sekisho-agent sekisho-collector; do
        link=$root/usr/local/bin/$command
        if [ "$(readlink "$link" || true)" = "/opt/sekisho/bin/$command" ]; then rm -f "$link"; fi
        rm -f "$root/usr/local/share/man/man8/$command.8"
    done
    rm -f "$root/etc/sysusers.d/sekisho.conf" "$root/etc/tmpfiles.d/sekisho.conf"
    rm -rf "$opt"
    if [ "$live" = yes ]; then systemctl daemon-reload; fi
    if [ "$purge" = yes ]; then
        rm -rf "$root/etc/sekisho" "$root/var/lib/sekisho" "$root/var/lib/sekisho-collector"
        say "Removed, with keys, spool, store and configuration."
    else
        say "Removed. Kept: $root/etc/sekisho, $root/var/lib/sekisho, $root/var/lib/sekisho-collector (--purge removes them)."
    fi
    exit 0
fi

command -v "$python" >/dev/null || die "$python is missing; apt-get install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old; Sekisho needs 3.11 or later: PYTHON=python3.11 $0 …"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python can't make virtual environments; apt-get install python3-venv"

# A copy to build from, so that neither old build leftovers come along nor root's files stay in the checkout.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/pip.log
(cd "$source" && tar -cf - --exclude=__pycache__ agent server_stub pyproject.toml README.md LICENSE) | tar -xf - -C "$scratch"
what=$scratch
if [ "$collector" = yes ]; then what="$scratch[collector]"; fi
pip_options=(-q --disable-pip-version-check --root-user-action=ignore)
if [ -n "$wheels" ]; then pip_options+=(--no-index --find-links "$wheels"); fi
# An environment made by another Python is made anew; everything worth keeping lies elsewhere.
if [ -x "$opt/bin/python" ] && ! "$opt/bin/python" -c 'import pip' 2>/dev/null; then rm -rf "$opt"; fi
if [ ! -x "$opt/bin/python" ]; then "$python" -m venv "$opt" || die "can't make an environment in $opt"; fi
# --force-reinstall without dependencies: this very checkout, also when its version number did not change.
{ "$opt/bin/python" -m pip install "${pip_options[@]}" "$what" &&
    "$opt/bin/python" -m pip install "${pip_options[@]}" --no-deps --force-reinstall "$scratch"; } >"$log" 2>&1 ||
    { cat "$log" >&2; die "pip could not install Sekisho's dependencies (its words are above); without a package index use --wheels DIR"; }
if [ -n "$root" ]; then
    # The commands must name the interpreter where it will be, not where it is being put together.
    grep -rlI --include='sekisho-*' "^#!$opt/bin" "$opt/bin" | xargs -r sed -i "1s|^#!$opt/bin|#!/opt/sekisho/bin|"
fi

install -d -m 0755 "$root/etc/sekisho" "$root/etc/systemd/system" "$root/etc/sysusers.d" "$root/etc/tmpfiles.d" \
    "$root/usr/local/bin" "$root/usr/local/share/man/man8"
install -m 0644 "$here/sysusers.d/sekisho.conf" "$root/etc/sysusers.d/sekisho.conf"
install -m 0644 "$here/tmpfiles.d/sekisho.conf" "$root/etc/tmpfiles.d/sekisho.conf"
for command in sekisho-agent sekisho-collector; do
    ln -sfn "/opt/sekisho/bin/$command" "$root/usr/local/bin/$command"
    install -m 0644 "$here/man/$command.8" "$root/usr/local/share/man/man8/$command.8"
done

# A configuration that is there is the site's own and never touched. umask: it will hold a token.
write_config() {
    [ -e "$1" ] && return
    (umask 077 && cat >"$1")
    say "wrote $1: edit it"
}
chosen=()
if [ "$agent" = yes ]; then
    install -m 0644 "$here/sekisho-agent.service" "$root/etc/systemd/system/"
    write_config "$root/etc/sekisho/config.toml" <<'TOML'
# Every key, with its default and what it does: config.example.toml. `sekisho-agent check` reads this file over.
[agent]

# [[agent.protect]]
# path = "/srv/customers"
# label = "顧客マスタ"

[agent.collector]
# url = "https://collector.example:8443"
# token = ""
TOML
    chosen+=(sekisho-agent.service)
fi
if [ "$collector" = yes ]; then
    install -m 0644 "$here/sekisho-collector.service" "$root/etc/systemd/system/"
    write_config "$root/etc/sekisho/collector.toml" <<'TOML'
# Every key, with its default and what it does: config.example.toml.
[collector]
listen = "127.0.0.1:8443"
# To be reached from other machines, listen on an address of theirs; TLS is then required:
# listen = "0.0.0.0:8443"
# tls_cert = "/etc/sekisho/tls.crt"
# tls_key = "/etc/sekisho/tls.key"
TOML
    chosen+=(sekisho-collector.service)
fi

if [ -z "$root" ]; then
    if command -v systemd-sysusers >/dev/null; then systemd-sysusers sekisho.conf; fi
    if command -v systemd-tmpfiles >/dev/null; then systemd-tmpfiles --create sekisho.conf; fi
    if [ "$collector" = yes ] && getent group sekisho-collector >/dev/null; then
        chgrp sekisho-collector /etc/sekisho/collector.toml && chmod 0640 /etc/sekisho/collector.toml
    fi
fi
if [ "$live" = yes ]; then
    systemctl daemon-reload
    systemctl enable -q "${chosen[@]}"
else
    install -d "$root/etc/systemd/system/multi-user.target.wants"
    for unit in "${chosen[@]}"; do
        ln -sfn "/etc/systemd/system/$unit" "$root/etc/systemd/system/multi-user.target.wants/$unit"
    done
fi
if [ "$start" = yes ]; then
    systemctl restart "${chosen[@]}" || die "installed, but not started; see: journalctl -u sekisho-agent -u sekisho-collector"
    say "Running: ${chosen[*]}"
else
    say "Installed and enabled, not started: ${chosen[*]}"
fi
if [ "$agent" = yes ]; then say "Next: name the protected directories in /etc/sekisho/config.toml, then: sekisho-agent check"; fi
