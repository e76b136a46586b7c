#!/usr/bin/env bash
# Lint, types and tests, from a fresh clone. With arguments, the tests alone.
#
#   bash launch/test.sh                     everything
#   bash launch/test.sh -m "not slow"       without tests that start processes or train for long
#   bash launch/test.sh tests/models -k padding
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh dev

if [ $# -eq 0 ]; then
    echo "Lint"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    echo "Types"
    "$python" -m pyright
    echo "Tests"
fi
unset PYTHONDONTWRITEBYTECODE  # without bytecode, each process that a test starts would compile the package again
cores=$(getconf _NPROCESSORS_ONLN)
exec "$python" -m pytest -n "$((cores < 8 ? cores : 8))" --dist loadfile --no-loadscope-reorder "$@"
