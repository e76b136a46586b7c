#!/usr/bin/env bash
# From a fresh clone to a model that reasons in continuous thoughts, and a report about it, on a CPU.
#
#   bash launch/quickstart.sh [seed=N]
set -euo pipefail
cd "$(dirname "$0")/.."

seed=0
for argument in "$@"; do
    case $argument in
        seed=*) seed=${argument#seed=} ;;
        *) echo "error: '$argument' is not known here. Usage: bash launch/quickstart.sh [seed=N]" >&2; exit 2 ;;
    esac
done
name=quickstart
[ "$seed" = 0 ] || name=quickstart-seed$seed

echo "[1/5] Set-up"
source launch/setup.sh base

echo "[2/5] Data: random graphs of 10 nodes, and a question about each (seconds)"
[ -f "data/$name/graphs_manifest.json" ] || \
    "$python" -m data_builders.prosqa preset=graphs name=graphs out_dir="data/$name" seed="$seed"

echo "[3/5] Training: first with written steps, then with thoughts in their place (seven to ten minutes)"
"$python" -m coconut.train experiment=quickstart run="runs/$name" seed="$seed" data.prefix="data/$name/graphs"

echo "[4/5] Evaluation: 500 graphs that the model has never seen (seconds)"
"$python" -m coconut.evaluate run="runs/$name" batch_size=250

echo "[5/5] What its thoughts do, and the report (a minute)"
question=$("$python" -c "import json; print(json.load(open('data/$name/graphs_test.json'))[0]['question'])")
"$python" -m coconut.analyze run="runs/$name" batch_size=250
coconut=$(dirname "${python#"$PWD"/}")/coconut
echo "Ask it a question:"
echo "  $coconut generate run=runs/$name question=\"$question\""
echo "See each of its thoughts, on a page in the browser:"
echo "  $coconut demo run=runs/$name"
