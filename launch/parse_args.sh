#!/usr/bin/env bash
# Sourced by the launchers with their arguments: NUMBER [COMMAND] key=value ...
# Sets $count, $command (the module of COMMAND, train if none is named, with its arguments) and $python (the interpreter:
# $PYTHON, or that of .venv, or the one on the PATH).

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python}") ||
    fail "There is no .venv here and no ${PYTHON:-python}. Make one (bash launch/test.sh does), or name it: PYTHON=/path/to/python"
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "The first argument is the number of processes on a machine; '${1:-}' came. See the head of $0."
count=$1
shift
command=(coconut.train)
[[ ! ${1:-} =~ ^[a-z]+$ ]] || { command=("coconut.$1"); shift; }
command+=("$@")
