# shellcheck shell=bash
# Functions that the scripts of the repository's root share. Source it; it changes to the root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# What a clean Debian 12 lacks for building, and for machines of the rig.
# shellcheck disable=SC2034  # the scripts that source this use them
BUILD_PACKAGES=(gcc libc6-dev make pkg-config)
# shellcheck disable=SC2034
RIG_PACKAGES=(binutils busybox-static fio e2fsprogs xfsprogs sqlite3 iproute2 util-linux libnbd-bin qemu-utils python3)

# What a host with libvirt is made of, in namespaces; QEMU comes by need_libvirt.
LIBVIRT_PACKAGES=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients dnsmasq-base iptables iproute2 util-linux qemu-utils)

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

# Installs a real libvirtd for the tests of its client, and QEMU. Nothing of it is started.
need_libvirt() {
    need_packages "${LIBVIRT_PACKAGES[@]}"
    need_qemu
    # libvirtd doesn't start without this user, whoever runs the guests; the package that makes it wants systemd.
    id libvirt-qemu >/dev/null 2>&1 || as_root useradd -r -U -d /var/lib/libvirt -s /usr/sbin/nologin libvirt-qemu
}

# QEMU must be of the release that qemu-utils is of: where that came from backports, so does QEMU.
need_qemu() {
    if command -v qemu-system-x86_64 >/dev/null; then
        return
    fi
    say "installing Debian packages: qemu-system-x86"
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get)
    local options=(install -y -qq --no-install-recommends)
    if as_root "${install[@]}" "${options[@]}" qemu-system-x86 >/dev/null 2>&1; then
        return
    fi
    local folder origin codename
    folder=$(mktemp -d)
    mkdir -p "$folder/lists/partial"
    # shellcheck disable=SC2016  # the words are apt's
    apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Identifier: Packages' | sort -u |
        while read -r origin codename; do
            printf 'deb %s %s main\n' "$origin" "$codename"
            case $codename in
                *-*) ;;
                *) printf 'deb %s %s-backports main\n' "$origin" "$codename" ;;
            esac
        done | sed 's|^deb |deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] |' >"$folder/sources.list"
    codename=$(sed -n 's/^.* \(.*-backports\) main$/\1/p' "$folder/sources.list" | head -n 1)
    install+=(-o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null)
    install+=(-o "Dir::State::Lists=$folder/lists" -o APT::Sandbox::User=root)
    as_root "${install[@]}" update -qq
    as_root "${install[@]}" "${options[@]}" -t "$codename" qemu-system-x86 >/dev/null
    rm -rf "$folder"
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
