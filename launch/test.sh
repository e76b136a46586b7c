#!/usr/bin/env bash
# Lint, types and tests, from a fresh clone.
#
#   bash launch/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh dev

echo "Lint"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "Types"
"$python" -m pyright
echo "Tests"
cores=$(getconf _NPROCESSORS_ONLN)
exec "$python" -m pytest -n "$((cores < 8 ? cores : 8))" --dist loadfile "$@"
