#!/usr/bin/env bash
# Builds rublk, the published ublk server that ours is measured against, into .cache/peers. Prints the program's path.
set -euo pipefail
# shellcheck source=.ci/lib.sh
source "$(dirname "$0")/../../.ci/lib.sh"

version=0.2.15
peers="$PWD/.cache/peers"
program="$peers/bin/rublk"

if [ ! -x "$program" ] || [ "$("$program" --version 2>/dev/null | awk '{print $2}')" != "$version" ]; then
    {
        need_packages "${BUILD_PACKAGES[@]}" libclang-dev
        need_rust
        say "building rublk $version"
        # Its crate of bindings wants libclang; without its default features it links only the C library.
        cargo install rublk --version "$version" --locked --no-default-features --root "$peers" ||
            cargo install rublk --version "$version" --no-default-features --root "$peers"
    } >&2
fi
printf '%s\n' "$program"
