#!/usr/bin/env bash
# Makes or reuses .venv. Sourced by the other scripts, in the repository's root: `source launch/setup.sh base|EXTRA`.
# Sets $python to the environment's interpreter. Nothing is done twice: .venv remembers what it was made from.

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed and none was found. Install one, or name it: PYTHON=/path/to/python bash $0"
}

install() { # what is said, then pip's arguments
    local said=$1 log=.venv/install.log
    shift
    echo "  $said"
    if ! "$python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "the installation failed; the whole log is $log"
    fi
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_torch() {
    local wanted
    wanted=$(grep '^torch==' constraints.txt)
    if [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; then
        local index=https://download.pytorch.org/whl/cpu
        if "$python" -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
            install "torch, the CPU build" "$wanted" --index-url "$index"
            return
        fi
    fi
    install "torch" "$wanted"
}

check_name() {
    "$python" -P - "$PWD/coconut/__init__.py" <<'END' || exit 2
import pathlib, sys
import coconut

if pathlib.Path(coconut.__file__ or "").resolve() != pathlib.Path(sys.argv[1]).resolve():
    sys.exit(
        f"error: another package named coconut (the programming language, perhaps) shadows this one: {coconut.__file__}\n"
        "Take it out of this environment (.venv/bin/python -m pip uninstall coconut) or off PYTHONPATH."
    )
END
}

setup() {
    local what=$1 extras="" stamp made_from
    [ "$what" = base ] || extras="[$what]"
    python=$PWD/.venv/bin/python
    stamp=.venv/made-from-$what
    made_from=$(cat pyproject.toml constraints.txt launch/setup.sh)
    if [ -x "$python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then
        check_name
        return
    fi
    echo "Setting up .venv (once; one to three minutes, most of it downloading)"
    if [ ! -x "$python" ]; then
        local base
        base=$(find_python) || exit 2
        "$base" -m venv .venv || fail "$base cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
    fi
    : >.venv/install.log
    "$python" -c 'import torch' 2>/dev/null || install_torch
    install "coconut and what it needs" -c constraints.txt -e ".$extras"
    check_name
    printf '%s' "$made_from" >"$stamp"
}

setup "$@"
