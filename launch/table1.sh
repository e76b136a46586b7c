#!/usr/bin/env bash
# The eight methods of the paper's Table 1 on small graphs, from scratch, on a CPU: trained, evaluated, put in one table.
#
#   bash launch/table1.sh [seeds=0,1,2] [experiment=table1] [jobs=1|2]
#
# Every method takes equally many updates; those that begin with the same stage 0 share it. The same command again goes
# on with a run that was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/table1.sh [seeds=0,1,2] [experiment=table1] [jobs=1|2]"
seeds=0 experiment=table1 jobs=2
for argument in "$@"; do
    case $argument in
        seeds=* | experiment=* | jobs=1 | jobs=2) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

echo "[1/4] Set-up"
source launch/setup.sh base
runs=runs/$experiment
mkdir -p "$runs"
curriculum=$("$python" -m coconut.train experiment="$experiment" --cfg job --package curriculum)
setting() { awk -v key="$1:" '$1 == key { print $2 }' <<<"$curriculum"; }
unit=$(setting unit) first=$(setting first) total=$(setting total)

train() { # method, seed, further keys
    local run=$runs/$1-seed$2 began=$SECONDS
    if ! OMP_NUM_THREADS=$threads "$python" -m coconut.train experiment="$experiment" method="$1" seed="$2" run="$run" \
        "${@:3}" >>"$run.log" 2>&1; then
        { echo "error: $1, seed $2, stopped. The end of $run.log:"; tail -n 5 "$run.log"; } >&2
        return 1
    fi
    echo "  $1, seed $2: $(sed -n 's/^Best checkpoint: //p' "$run.log" | tail -n 1) ($(((SECONDS - began + 30) / 60)) min)"
}

after_first_stage() { # method, whose first stage, seed
    if [ "$unit" != updates ]; then # then which update ends stage 0 depends on the data
        train "$1" "$3"
        return
    fi
    train "$1" "$3" init="$runs/$2-seed$3/checkpoints/$(printf step-%07d "$first")" \
        curriculum.start_stage=1 curriculum.total=$((total - first))
}

in_words() {
    train cot "$1" ${keep[@]+"${keep[@]}"} && after_first_stage without_thought cot "$1" &&
        after_first_stage icot cot "$1" && train no_cot "$1"
}

between_markers() {
    train coconut "$1" ${keep[@]+"${keep[@]}"} && after_first_stage pause_as_thought coconut "$1" &&
        train without_curriculum "$1" && train pause "$1"
}

keep=()
[ "$unit" != updates ] || keep=(keep_every="$first")
echo "[2/4] Training: eight methods, $total $unit each, $jobs at a time"
threads=$(($(getconf _NPROCESSORS_ONLN) / jobs))
[ "$threads" -gt 0 ] || threads=1
trap 'trap - TERM; kill -TERM 0' INT TERM
for seed in ${seeds//,/ }; do
    if [ "$jobs" = 2 ]; then
        in_words "$seed" & one=$!
        between_markers "$seed" & other=$!
        failed=0
        wait $one || failed=1
        wait $other || failed=1
        [ $failed = 0 ] || exit 1
    else
        in_words "$seed"
        between_markers "$seed"
    fi
done

echo "[3/4] Evaluation, one run after the other"
for run in "$runs"/*-seed*/; do
    [ -f "${run}evaluation/test.json" ] || "$python" -m coconut.evaluate run="${run%/}" batch_size=250 >/dev/null
done

echo "[4/4] The table"
"$python" -m coconut.analyze table runs="$runs/*-seed*"
