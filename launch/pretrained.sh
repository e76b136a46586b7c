#!/usr/bin/env bash
# From a fresh clone to a pretrained model that reasons in continuous thoughts on GSM8K, on a CPU: SmolLM2 (135M) learns to
# write its steps (CoT), then goes on with thoughts in their place; then it is evaluated, measured and asked.
#
#   bash launch/pretrained.sh [short=true] [methods=coconut] [model=PLACE] [data=FOLDER] [sets=FOLDER] [max_tokens=96] [seed=0]
#
#   short      a few updates and questions, to see that everything works: minutes in place of hours
#   methods    of coconut train, separated by commas; all: no_cot, coconut, pause_as_thought, without_thought, codi, pccot.
#              cot is always trained. Every method takes equally many updates; those that begin with CoT's stage 0 share it
#   model      a folder, a GGUF file, or OWNER/NAME of the hub; by default SmolLM2 is fetched
#   data       a folder with GSM8K's train.jsonl and test.jsonl; by default they are fetched from the hub
#   sets       a folder with gsm_hard.jsonl, svamp.jsonl and multiarith.jsonl, or hub: evaluate on these as well
#
# The same command again goes on with what was stopped, and leaves alone what is complete.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="Usage: bash launch/pretrained.sh [short=true] [methods=coconut] [model=PLACE] [data=FOLDER] [sets=FOLDER] [max_tokens=96] [seed=0]"
short=false methods=coconut model="" data="" sets="" max_tokens=96 seed=0
for argument in "$@"; do
    case $argument in
        short=true | short=false | methods=?* | model=?* | data=?* | sets=?* | max_tokens=[0-9]* | seed=[0-9]*)
            declare "${argument%%=*}=${argument#*=}" ;;
        *) echo "error: '$argument' is not known here. $usage" >&2; exit 2 ;;
    esac
done
[ "$methods" != all ] || methods=no_cot,coconut,pause_as_thought,without_thought,codi,pccot
for method in ${methods//,/ }; do
    case $method in
        cot | no_cot | coconut | pause_as_thought | without_thought | codi | pccot) ;;
        *) echo "error: methods=$method is not known here. $usage" >&2; exit 2 ;;
    esac
done
for file in ${data:+train.jsonl test.jsonl}; do
    [ -f "$data/$file" ] || {
        echo "error: data=$data has no $file. GSM8K is train.jsonl and test.jsonl (https://github.com/openai/grade-school-math)" >&2
        exit 2
    }
done

echo "[1/6] Set-up"
source launch/setup.sh gguf

own=$model
echo "[2/6] Weights${model:+: $model}"
if [ -z "$model" ]; then
    fetched=$("$python" launch/smollm2.py models/smollm2)
    sed '$d' <<<"$fetched"
    model=$(tail -n 1 <<<"$fetched")
fi

experiment=gsm8k_smollm2_laptop name=gsm8k_smollm2_laptop
[ -z "$own" ] || name=$name-$(basename "$own" .gguf)
rows=data/$name-$max_tokens
echo "[3/6] Data: GSM8K's questions with their equations as steps, in rows of at most $max_tokens tokens"
if [ ! -f "$rows/gsm8k_manifest.json" ]; then
    from=(preset=gsm8k)
    [ -z "$data" ] || from=(source="$data/train.jsonl" test="$data/test.jsonl")
    "$python" -m data_builders.gsm8k "${from[@]}" num_valid=100 out_dir="$rows" tokenizer="$model" max_tokens="$max_tokens" || {
        [ -n "$data" ] || echo "error: give a folder with GSM8K's train.jsonl and test.jsonl: data=FOLDER" >&2
        exit 2
    }
fi

runs=runs/$name-$max_tokens
precision=engine.precision=bfloat16 # as in training
limit=() suite=() compared=(suite=math_words precision=bfloat16)
questions=256
case $sets in
    "") compared=(split=test-bfloat16) ;;
    hub) suite=(suite=math_words) ;;
    *) suite=(suite=math_words suite.folder="$rows,$sets") ;;
esac
keys=(experiment=$experiment model.base="$model" data.prefix="$rows/gsm8k" seed="$seed")
if [ "$short" = true ]; then
    runs=$runs-short
    keys+=(curriculum.stage0_length=30 curriculum.stage_length=5 curriculum.total_length=50 valid_limit=8 validate_every=1000)
    limit=(limit=32) questions=16
fi
curriculum=$("$python" -m coconut.train "${keys[@]}" --cfg job --package curriculum)
setting() { awk -v key="$1:" '$1 == key { print $2 }' <<<"$curriculum"; }
first=$(setting stage0_length) total=$(setting total_length)

echo "[4/6] Training: CoT, then ${methods//,/, }; $total updates each"
"$python" -m coconut.train "${keys[@]}" method=cot run="$runs/cot-seed$seed" keep_every="$first"
made=("$runs/cot-seed$seed")
for method in ${methods//,/ }; do
    run=$runs/$method-seed$seed
    case $method in
        cot) continue ;;
        coconut | pause_as_thought | without_thought) # whose stage 0 is CoT
            more=(init="${made[0]}/checkpoints/$(printf step-%07d "$first")" curriculum.start_stage=1
                curriculum.total_length=$((total - first))) ;;
        *) more=() ;;
    esac
    "$python" -m coconut.train "${keys[@]}" method="$method" run="$run" ${more[@]+"${more[@]}"}
    made+=("$run")
done

echo "[5/6] Evaluation on GSM8K's test${sets:+, GSM-Hard, SVAMP and MultiArith}"
for run in "${made[@]}"; do
    "$python" -m coconut.evaluate run="$run" batch_size=128 "$precision" ${suite[@]+"${suite[@]}"} ${limit[@]+"${limit[@]}"}
done

echo "[6/6] The table, what the thoughts do, and a question"
[ "$short" = true ] || "$python" -m coconut.analyze table runs="${made[*]}" "${compared[@]}" output="$runs"
for run in "${made[@]:1}"; do
    parts=k_forcing,noise,geometry
    case $run in
        */no_cot-* | */without_thought-*) continue ;; # nothing stands between their questions and answers
        */pause_as_thought-*) ;;
        *) parts=$parts,audit_thoughts,decoded ;;
    esac
    "$python" -m coconut.analyze run="$run" parts="[$parts]" limit="$questions" batch_size=64 "$precision"
done
question="Tom has 6 apples. He buys 3 bags with 4 apples each and eats 2. How many apples does he have?"
echo "Question: $question"
for run in "${made[@]}"; do
    echo "$(basename "$run"):"
    "$python" -m coconut.generate run="$run" question="$question"
done
coconut=$(dirname "${python#"$PWD"/}")/coconut
echo "Ask another one:  $coconut generate run=${made[${#made[@]} - 1]} question=\"...\""
