# shellcheck shell=bash
# Sourced by the other tools. bash 3.2 suffices, so that macOS's own will do.

say() { printf '%s\n' "$*" >&2; }

fail() { say "$*"; exit 1; }

# Networks hiccup: three tries, a few seconds apart.
retry() {
    local pause
    for pause in 3 10; do
        "$@" && return
        say "failed, trying again in $pause seconds: $1"
        sleep "$pause"
    done
    "$@"
}

may_install_debian_packages() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# The packages are wanted for their programs. Installing them must neither start
# a service nor ask a question; on a machine that has a policy for services, it stays.
install_debian_packages() (
    export DEBIAN_FRONTEND=noninteractive
    policy=/usr/sbin/policy-rc.d
    log=$(mktemp)
    ours=
    trap 'rm -f "$log" $ours' EXIT
    trap 'exit 1' HUP INT TERM
    if [ ! -e "$policy" ] && [ ! -L "$policy" ]; then
        ours=$policy
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    say "installing Debian packages: $*"
    {
        retry apt-get update -qq &&
            retry apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "$@"
    } </dev/null >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
)

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# PYTHON names the interpreter; else it is the first that is new enough.
choose_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or newer"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer on the PATH: install one, or name one with PYTHON=/path/to/python3"
}

# Debian keeps what venv needs in packages of their own.
need_venv_module() {
    local package
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    may_install_debian_packages || fail "$1 cannot make virtual environments: sudo apt-get install $package"
    install_debian_packages "$package" || fail "could not install $package"
    "$1" -c 'import ensurepip, venv' || fail "$1 cannot make virtual environments, even with $package"
}

# An empty virtual environment at $1, whatever was there.
make_venv() {
    local python
    python=$(choose_python) || exit
    need_venv_module "$python"
    "$python" -m venv --clear "$1"
}
