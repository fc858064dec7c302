#!/usr/bin/env bash
# Makes (or brings up to date) a virtual environment that runs this checkout: venv.sh DIRECTORY EXTRA
# PYTHON names the interpreter. On Debian and Ubuntu the venv module is a package of its own: as root it is installed
# here, otherwise the line to type is printed. A stamp in the directory tells make when nothing is left to do.
set -euo pipefail

venv=$1 extra=$2 python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

die() { printf 'venv.sh: %s\n' "$*" >&2; exit 1; }

can_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

# packages… : installed as root, else told what to type.
apt() {
    command -v apt-get >/dev/null || die "$python can't make virtual environments; install its venv module and try again"
    [ "$(id -u)" = 0 ] || die "please type: sudo apt-get install -y $*   (then run make again)"
    echo "installing $* …"
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install "$@"; } >"$log" 2>&1 ||
        { cat "$log" >&2; die "apt-get install $* failed; what it said stands above"; }
}

command -v "$python" >/dev/null || apt python3 python3-venv
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old; Sekisho needs 3.11 or later: PYTHON=python3.11 make …"

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    can_venv || apt python3-venv "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "installing this checkout into $venv …"
PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    "$venv/bin/python" -m pip install -q -e "$here[$extra]" >"$log" 2>&1 ||
    { cat "$log" >&2; die "pip could not install Sekisho's dependencies; what it said stands above"; }
touch "$venv/.installed-$extra"
if [ "$extra" = dev ]; then touch "$venv/.installed-collector"; fi
