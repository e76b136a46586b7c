#!/usr/bin/env bash
# Trains on the GPUs (or processes) of this machine, with torchrun.
#
#   bash launch/torchrun.sh 4 experiment=NAME key=value ...
#   bash launch/torchrun.sh 4 evaluate run=DIR key=value ...
#
# Ctrl-C or SIGTERM: the workers finish their update and save, for which they have GRACE seconds (300 by default).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/parse_args.sh "$@"

exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$count" --max-restarts=0 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout="${GRACE:-300}" -m "${command[@]}"
