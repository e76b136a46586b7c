#!/usr/bin/env bash
# The eight methods of the paper's Table 1 on small graphs, from scratch, on a CPU: trained, evaluated, put in one table.
#
#   bash launch/table1.sh [seeds=0,1,2] [experiment=table1] [jobs=1|2]
#
# Every method takes equally many updates; where stages are counted in updates, those that begin with the same stage 0
# share it. The same command again goes on with a run that was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/table1.sh [seeds=0,1,2] [experiment=table1] [jobs=1|2]"
seeds=0 experiment=table1 jobs=2
for argument in "$@"; do
    case $argument in
        seeds=[0-9]* | experiment=?* | jobs=1 | jobs=2) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

echo "[1/4] Set-up"
source launch/setup.sh base
curriculum=$("$python" -m coconut.train experiment="$experiment" --cfg job --package curriculum)
setting() { awk -v key="$1:" '$1 == key { print $2 }' <<<"$curriculum"; }
unit=$(setting length_unit) first=$(setting stage0_length) total=$(setting total_length)
source launch/parallel_runs.sh
keep=()
[ "$unit" != updates ] || keep=(keep_every="$first")
runs=runs/$experiment
mkdir -p "$runs"

train() { # method, seed, further keys
    local run=$runs/$1-seed$2 began=$SECONDS
    run_until_done coconut.train "$run" experiment="$experiment" method="$1" seed="$2" "${@:3}" || return 1
    echo "  $1, seed $2: $(sed -n 's/^Best checkpoint: //p' "$run.log" | tail -n 1) ($(((SECONDS - began + 30) / 60)) min)"
}

after_first_stage() { # method, whose first stage, seed
    if [ "$unit" != updates ]; then # then which update ends stage 0 depends on the data
        train "$1" "$3"
        return
    fi
    train "$1" "$3" init="$runs/$2-seed$3/checkpoints/$(printf step-%07d "$first")" \
        curriculum.start_stage=1 curriculum.total_length=$((total - first))
}

in_one_pass() {
    train cot "$1" ${keep[@]+"${keep[@]}"} && after_first_stage without_thought cot "$1" &&
        after_first_stage icot cot "$1" && train no_cot "$1" && train pause "$1"
}

in_thoughts() { # and what begins with their stage 0
    train coconut "$1" ${keep[@]+"${keep[@]}"} && after_first_stage pause_as_thought coconut "$1" &&
        train without_curriculum "$1"
}

echo "[2/4] Training: eight methods, $total $unit each, $jobs at a time; each writes $runs/METHOD-seedN.log"
works=(in_one_pass in_thoughts)
in_parallel all_seeds

echo "[3/4] Evaluation, one run after the other"
evaluate_all coconut cot no_cot icot pause without_curriculum without_thought pause_as_thought

echo "[4/4] The table"
"$python" -m coconut.analyze table runs="${made[*]}" output="$runs"
