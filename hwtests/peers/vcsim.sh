#!/usr/bin/env bash
# Builds the simulated vCenter of hwtests/peers/vcsim and installs pyvmomi, into .cache/vcenter; both only once. Prints the simulator's path and
# that of a Python which has pyvmomi, one a line.
set -euo pipefail
# shellcheck source=.ci/lib.sh
source "$(dirname "$0")/../../.ci/lib.sh"

pyvmomi=9.1.1.0
cache="$PWD/.cache/vcenter"
source="$PWD/hwtests/peers/vcsim/main.go"
program="$cache/vcsim-$(sha256sum "$source" | cut -c 1-16)"
python="$cache/pyvmomi-$pyvmomi/bin/python3"

mkdir -p "$cache"
# Two tests at once build it once.
exec 9>"$cache/lock"
flock 9

if [ ! -x "$program" ]; then
    {
        need_packages golang-go golang-github-vmware-govmomi-dev
        say "building the simulated vCenter"
        GO111MODULE=off GOFLAGS='' GOPATH=/usr/share/gocode GOCACHE="$cache/go" go build -o "$program.new" "$source"
        rm -f "$cache"/vcsim-????????????????
        mv "$program.new" "$program"
    } >&2
fi
if ! "$python" -c 'import pyVmomi' 2>/dev/null; then
    {
        need_packages python3-venv
        say "installing pyvmomi $pyvmomi"
        rm -rf "$cache/pyvmomi-$pyvmomi"
        python3 -m venv "$cache/pyvmomi-$pyvmomi"
        "$cache/pyvmomi-$pyvmomi/bin/pip" install --quiet --disable-pip-version-check "pyvmomi==$pyvmomi"
    } >&2
fi
printf '%s\n' "$program" "$python"
