#!/usr/bin/env bash
# Learn when to think: a model that can answer at once and step by step learns by reward which to do, with GRPO and with decoupled
# GRPO (arXiv 2505.13379); then one page shows the curves of all runs.
#
#   bash launch/thinkless.sh [seeds=0,1,2] [experiment=thinkless_laptop] [jobs=1|2]
#
# The first two arms are run with every seed, the others with the first one alone. The same command again goes on with a run
# that was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/thinkless.sh [seeds=0,1,2] [experiment=thinkless_laptop] [jobs=1|2]"
seeds=0,1,2 experiment=thinkless_laptop jobs=2
for argument in "$@"; do
    case $argument in
        seeds=[0-9]* | experiment=?* | jobs=1 | jobs=2) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

vanilla="objective.name=grpo objective.normalize_advantages=false" # in arXiv 2505.13379 advantages are not divided by a deviation
main_arms=("degrpo objective.control_token_weight=0.02" "grpo $vanilla") # a short answer's control token has 1/4 in GRPO
other_arms=(
    "degrpo_faster objective.control_token_weight=0.1"
    "degrpo_published objective.control_token_weight=0.001"
    "grpo_tokens objective.name=dapo objective.normalize_advantages=false objective.clip_high=0.2"
    "grpo_slowed $vanilla objective.control_token_scale=0.1"
    "grpo_unlimited $vanilla ~reward.max_mode_tokens.short"
)

echo "[1/4] Set-up"
source launch/setup.sh base
source launch/parallel_runs.sh
runs=runs/$experiment
mkdir -p "$runs"
seeds=(${seeds//,/ })

work=() # command, name, keys
arm() { # seed, name, keys
    work+=("rl $2-seed$1 experiment=$experiment init=$runs/warmup-seed$1 seed=$1 ${*:3}")
}
every_second() { # 0 or 1, where to begin
    local i command name keys began
    for ((i = $1; i < ${#work[@]}; i += 2)); do
        read -r command name keys <<<"${work[i]}"
        began=$SECONDS
        # shellcheck disable=SC2086  # several keys
        run_until_done "coconut.$command" "$runs/$name" $keys || return 1
        echo "  $name: $(sed -n 's/^Best checkpoint: //p' "$runs/$name.log" | tail -n 1) ($(((SECONDS - began + 30) / 60)) min)"
    done
}

echo "[2/4] Warm-up: short answers and long ones; each run writes $runs/NAME.log"
for seed in "${seeds[@]}"; do work+=("train warmup-seed$seed experiment=${experiment}_warmup seed=$seed"); done
in_parallel every_second

echo "[3/4] Reinforcement learning, $jobs runs at a time"
work=()
for seed in "${seeds[@]}"; do
    # shellcheck disable=SC2086  # a name and keys
    for keys in "${main_arms[@]}"; do arm "$seed" $keys; done
done
# shellcheck disable=SC2086
for keys in "${other_arms[@]}"; do arm "${seeds[0]}" $keys; done
in_parallel every_second

echo "[4/4] What came of it: who chooses best, on unseen questions, and the page of all runs"
made=()
for run in "${work[@]}"; do
    read -r _ name _ <<<"$run"
    made+=("$runs/$name")
    "$python" -m coconut.analyze run="$runs/$name" checkpoint=last batch_size=250 >/dev/null
done
"$python" -m coconut.analyze table runs="${made[*]}" output="$runs"
