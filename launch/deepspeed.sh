#!/usr/bin/env bash
# Trains with DeepSpeed's own launcher, on this machine or on those of a hostfile.
#
#   bash launch/deepspeed.sh 4 engine=deepspeed experiment=NAME key=value ...
#   HOSTFILE=hosts bash launch/deepspeed.sh 4 engine=deepspeed experiment=NAME key=value ...
#
# The number is that of processes on a machine. HOSTFILE has a line "NAME slots=NUMBER" for each machine; pdsh and ssh
# without a password are needed here, and this folder under the same path on all of them.
# PORT: where the workers meet (a free one by default).
# Ctrl-C or SIGTERM: the workers finish their update and save; DeepSpeed kills what is still there after 30 seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/parse_args.sh "$@"
"$python" -c 'import deepspeed' 2>/dev/null >&2 || fail "DeepSpeed is not installed: $python -m pip install deepspeed"

port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
"$python" -m deepspeed.launcher.runner --hostfile="${HOSTFILE:-/nowhere}" --num_gpus="$count" --master_port="$port" \
    --no_local_rank --module "${command[@]}" &
runner=$!

stop() { # on one machine the runner passes no signal on: what it started is asked instead
    if [ -n "${HOSTFILE:-}" ]; then kill -TERM "$runner"; else pkill -TERM -P "$runner"; fi 2>/dev/null || true
}
trap stop TERM INT
status=0
wait "$runner" || status=$?
while kill -0 "$runner" 2>/dev/null; do
    status=0
    wait "$runner" || status=$?
done
exit "$status"
