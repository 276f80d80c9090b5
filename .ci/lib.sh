# shellcheck shell=bash
# Functions that the scripts of the repository's root share. Source it; it changes to the root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# What a clean Debian 12 lacks for building, and for machines of the rig.
# shellcheck disable=SC2034  # the scripts that source this use them
BUILD_PACKAGES=(gcc libc6-dev make pkg-config)
# shellcheck disable=SC2034
RIG_PACKAGES=(binutils busybox-static fio e2fsprogs xfsprogs sqlite3 iproute2 util-linux libnbd-bin qemu-utils python3)

say() {
    printf '\n== %s\n' "$*"
}

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "must be root, or have sudo, to run: $*"
    fi
}

# Installs those Debian packages that are missing.
need_packages() {
    local package missing=()
    for package in "$@"; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    if [ "${#missing[@]}" -eq 0 ]; then
        return
    fi
    say "installing Debian packages: ${missing[*]}"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends)
    if ! as_root "${install[@]}" "${missing[@]}" >/dev/null 2>&1; then
        as_root apt-get update -qq
        as_root "${install[@]}" "${missing[@]}" >/dev/null
    fi
}

need_rust() {
    if ! command -v cargo >/dev/null && [ -x "${HOME:-/root}/.cargo/bin/cargo" ]; then
        PATH="$HOME/.cargo/bin:$PATH"
    fi
    command -v cargo >/dev/null || fail "cargo is missing; install Rust with rustup"
}

# The folder that cargo builds into, with the profile's folder.
built() {
    printf '%s/debug' "${CARGO_TARGET_DIR:-target}"
}
