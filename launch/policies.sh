#!/usr/bin/env bash
# Words, mixtures (HRPO), thoughts and noisy thoughts, trained by the same reward from 30,720 sampled answers each: pointer
# chasing, from scratch, on a CPU. One page compares them with one another and with what they started from.
#
#   bash launch/policies.sh [seeds=0,1,2] [jobs=1|2]
#
# The same command again goes on with a run that was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/policies.sh [seeds=0,1,2] [jobs=1|2]"
seeds=0 jobs=2
for argument in "$@"; do
    case $argument in
        seeds=[0-9]* | jobs=1 | jobs=2) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

echo "[1/4] Set-up"
source launch/setup.sh base
source launch/parallel_runs.sh
runs=runs/policies
mkdir -p "$runs"

run() { # module, name, seed, keys
    local run=$runs/$2-seed$3 began=$SECONDS
    run_until_done "$1" "$run" seed="$3" "${@:4}" || return 1
    echo "  $2, seed $3: $(sed -n 's/^Best checkpoint: //p' "$run.log" | tail -n 1) ($(((SECONDS - began + 30) / 60)) min)"
}

policy() { # name, whose model, seed, keys
    run coconut.rl "$1" "$3" experiment=hrpo_laptop init="$runs/$2-seed$3" "${@:4}"
}

in_words() {
    run coconut.train cot "$1" experiment=rewards_laptop_sampler curriculum.total_length=300 &&
        policy words cot "$1" gates.enabled=false && policy mixtures cot "$1"
}

in_thoughts() {
    run coconut.train coconut "$1" experiment=rewards_laptop_sampler method=coconut curriculum.max_stage=5 \
        curriculum.stage0_length=500 curriculum.stage_length=200 curriculum.total_length=2200 &&
        policy thoughts coconut "$1" gates.enabled=false &&
        policy noisy_thoughts coconut "$1" gates.enabled=false thought_noise=0.75
}

echo "[2/4] Training: two models that are stopped early, and two policies from each, $jobs at a time; each writes $runs/NAME-seedN.log"
works=(in_words in_thoughts)
in_parallel all_seeds

echo "[3/4] Evaluation, one run after the other"
evaluate_all cot words mixtures coconut thoughts noisy_thoughts

echo "[4/4] The page"
"$python" -m coconut.analyze table runs="${made[*]}" output="$runs"
