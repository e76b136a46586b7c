#!/usr/bin/env bash
# Trains on several machines, with torchrun. Call it once on each, with the same words; whoever comes first waits.
#
#   NODES=2 MEET=node1:29400 bash launch/torchrun_nodes.sh 8 experiment=NAME key=value ...
#
# NODES: how many machines. MEET: one of them, and a free port. The number is that of processes on this machine.
# All machines need the same folder of this repository and the same files under data/ and runs/.
# Ctrl-C or SIGTERM on one of them: all workers finish their update, the run is saved and ends on all machines (GRACE as in
# torchrun.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/parse_args.sh "$@"
[ -n "${NODES:-}" ] && [ -n "${MEET:-}" ] || fail "NODES (how many machines) and MEET (HOST:PORT of one of them) are needed."

exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$count" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$MEET" --rdzv-id="${RENDEZVOUS_ID:-coconut}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout="${GRACE:-300}" -m "${command[@]}"
