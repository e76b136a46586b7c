#!/usr/bin/env bash
# Choosing how to answer each question: a small model learns pointer chasing, every question is asked in every configuration, and
# policies learn from the outcomes which to take (arXiv 2505.17312).
#
#   bash launch/adaptive.sh [seed=0]
#
# The same command again goes on with what was stopped; no question is asked, and no update made, twice.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/adaptive.sh [seed=0]"
seed=0 jobs=1
for argument in "$@"; do
    case $argument in
        seed=[0-9]*) declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done

echo "[1/3] Set-up"
source launch/setup.sh base
source launch/parallel_runs.sh
run=runs/adaptive_laptop-seed$seed
mkdir -p "$run"

echo "[2/3] The model; its log is $run/model.log"
training=
run_until_done coconut.train "$run/model" experiment=adaptive_laptop_model seed="$seed"
sed -n 's/^Done:/  Done:/p' "$run/model.log" | tail -n 1

echo "[3/3] The table of outcomes, policies, and what they are worth"
"$python" -m coconut.adaptive experiment=adaptive_laptop run="$run/model" seed="$seed" output="$run/choice"
