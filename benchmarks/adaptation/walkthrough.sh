#!/usr/bin/env bash
# The whole road on a real model and real text, by the command line alone; docs/walkthrough.md shows its output.
#
#   bash benchmarks/adaptation/walkthrough.sh DATA OUT
#
# DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json; OUT is a new folder.
set -euo pipefail
source "$(dirname "$0")/../step.sh"
data=${1:?usage: walkthrough.sh DATA OUT} out=${2:?usage: walkthrough.sh DATA OUT}
model=$data/models/stories260K
text='{QUESTION} {CONTEXTS} {LONG_ANSWER}'
medical=(--data "$data/pubmedqa/ori_pqal.json" --text "$text")
shape=(--features 1024 --k 16 --batch-size 8 --context 128)
question='Do mitochondria play a role in remodelling lace plant leaves during programmed cell death?'
mkdir -p "$out"
start=$SECONDS

# 1. The base model's own samples are the text its transcoders are trained on.
step sample "$model" --samples 2500 --tokens 256 --batch-size 250 --out "$out/samples.jsonl"
step train "$model" --data "$out/samples.jsonl" "${shape[@]}" --tokens 650000 --out "$out/tcs_base"

# 2. FTFA: one pass over the medical text, feed-forward layers only.
step finetune "$model" "${medical[@]}" --tokens 1000000 --lr 1e-3 --out "$out/ft"

# 3. The base's transcoders on the fine-tuned model: unadapted, then PAT. Rates and updates here and in 4. are those that
#    the search of `fasttc bench adaptation` chose for this case (a severe fine-tuning on text the base never saw).
step evaluate "$out/ft" --transcoders "$out/tcs_base" "${medical[@]}"
for tokens in 20000 40000 160000; do
  step adapt "$out/ft" --transcoders "$out/tcs_base" "${medical[@]}" --lr 0.005 --update-tokens 32 \
    --tokens $tokens --out "$out/tcs_pat_$tokens"
done
step evaluate "$out/ft" --transcoders "$out/tcs_pat_160000" --base "$out/tcs_base" "${medical[@]}"

# 4. From scratch on the fine-tuned model, every budget its own run with its own schedule, and a closed-form decoder at
#    the end as PAT has.
for tokens in 20000 40000 80000 160000 320000 640000; do
  lr=$([ $tokens -ge 640000 ] && echo 0.005 || echo 0.01)
  step train "$out/ft" "${medical[@]}" "${shape[@]}" --lr $lr --update-tokens 64 --refit last \
    --tokens $tokens --out "$out/tcs_scratch_$tokens"
done

# 5. One question in both models.
step attribute "$model" --transcoders "$out/tcs_base" --prompt "$question" --out "$out/base.graph"
step attribute "$out/ft" --transcoders "$out/tcs_pat_160000" --prompt "$question" --out "$out/ft.graph"
for which in base ft; do
  step graph prune "$out/$which.graph" --out "$out/$which.pruned.graph"
  step graph export "$out/$which.pruned.graph" --slug "$which" --out "$out/json"
done

echo
python -m fasttc.benchmarks matched "$out"
echo "whole walkthrough: $((SECONDS - start)) s"
