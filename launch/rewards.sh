#!/usr/bin/env bash
# Process rewards without labels of steps: a small model's answers are sampled and judged, reward models are trained on them by four
# losses, and then compared with votes, rollouts and the oracle (arXiv 2412.01981).
#
#   bash launch/rewards.sh [seed=0] [jobs=1|2]
#
# The same command again goes on with what was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/rewards.sh [seed=0] [jobs=1|2]"
seed=0 jobs=2
for argument in "$@"; do
    case $argument in
        seed=[0-9]* | jobs=1 | jobs=2) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

echo "[1/4] Set-up"
source launch/setup.sh base
source launch/parallel_runs.sh
runs=runs/rewards_laptop-seed$seed sampler=runs/rewards_laptop-seed$seed/sampler
mkdir -p "$runs"

echo "[2/4] The sampler, and its answers: 8 to each of 2,000 questions, 64 to each of 200 others"
training=
run_until_done coconut.train "$sampler" experiment=rewards_laptop_sampler seed="$seed"
answers=$sampler/rollouts
for split in "train limit=2000 samples=8" "valid limit=200 samples=8" "test limit=200 samples=64"; do
    # shellcheck disable=SC2086  # a name and keys
    [ -f "$answers/${split%% *}.jsonl" ] || \
        "$python" -m coconut.rollout run="$sampler" split=$split seed="$seed" batch_size=256
done

echo "[3/4] Reward models, $jobs at a time"
losses=(ce dpo nca kto value)
every_second() { # 0 or 1, where to begin
    local i
    for ((i = $1; i < ${#losses[@]}; i += 2)); do
        run_until_done coconut.reward "$runs/models/${losses[i]}" experiment=rewards_laptop loss="${losses[i]}" seed="$seed" \
            init="$sampler" data.train="$answers/train.jsonl" data.valid="$answers/valid.jsonl" || return 1
        echo "  ${losses[i]}: $(sed -n 's/^Best checkpoint: //p' "$runs/models/${losses[i]}.log" | tail -n 1)"
    done
}
mkdir -p "$runs/models"
in_parallel every_second

echo "[4/4] The comparison"
"$python" -m coconut.reward compare runs="$runs/models/*" answers="$answers/test.jsonl" rollouts=8 output="$runs"
