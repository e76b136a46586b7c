#!/usr/bin/env bash
# Build the site of README.md and docs/, from a fresh clone. A link or an anchor that leads nowhere is an error.
#
#   bash launch/docs.sh            build it; it opens without a server
#   bash launch/docs.sh serve      serve it, and build again what changes
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh docs
export NO_MKDOCS_2_WARNING=1  # an advertisement of mkdocs-material

if [ $# -gt 0 ]; then
    exec "$python" -m mkdocs "$@"
fi
"$python" -m mkdocs build  # with --quiet warnings would not count
echo "Site: build/site/index.html"
