#!/usr/bin/env bash
# From graph to explanation on two prompts, by the command line alone; docs/circuits.md shows its output.
#
#   bash benchmarks/circuits_walkthrough.sh DATA OUT
#
# DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json; OUT is a new folder, or one whose
# OUT/world holds the models of an earlier `fasttc bench circuits --folder OUT/world`.
set -euo pipefail
data=${1:?usage: circuits_walkthrough.sh DATA OUT} out=${2:?usage: circuits_walkthrough.sh DATA OUT}
mkdir -p "$out"
step() { echo; echo "\$ fasttc $*" | sed "s|$data/||g; s|$out/||g"; fasttc "$@" 2>>"$out/stderr.log" | sed "s|$data/||g; s|$out/||g"; }

# 1. The clinical world, where the truth is known.
world=$out/world
[ -d "$world/tcs_pat" ] || step bench circuits --folder "$world" --no-scale --out "$out/circuits.json"
two_hop='a woman with eye-itch busy and ear-numbness . the drug is'
pattern='a woman with eye-itch low-iron and ear-numbness . the drug is'
step attribute "$world/base" --transcoders "$world/tcs_base" --prompt "$two_hop" --out "$out/two_hop.graph"
step attribute "$world/base" --transcoders "$world/tcs_base" --prompt "$pattern" --out "$out/pattern.graph"
step graph prune "$out/two_hop.graph" --node-threshold 0.95 --out "$out/two_hop.pruned.graph"
step graph merge "$out/two_hop.pruned.graph" --out "$out/two_hop.merged.graph" --save-groups "$out/two_hop.supernodes.json"
step graph paths "$out/two_hop.graph" "$out/pattern.graph" -k 5
step attribute "$world/finetuned" --transcoders "$world/tcs_pat" --prompt "$two_hop" --out "$out/tuned.graph"
step graph diff "$out/two_hop.graph" "$out/tuned.graph" -k 4

# 2. stories260K and a question of PubMedQA, before and after fine-tuning. Budgets of a minute, not of a study.
model=$data/models/stories260K
medical=(--data "$data/pubmedqa/ori_pqal.json" --text '{QUESTION} {CONTEXTS} {LONG_ANSWER}')
question='Do mitochondria play a role in remodelling lace plant leaves during programmed cell death?'
step train "$model" "${medical[@]}" --features 512 --k 16 --batch-size 8 --context 128 --tokens 100000 --out "$out/tcs"
step finetune "$model" "${medical[@]}" --tokens 200000 --lr 1e-3 --out "$out/ft"
step adapt "$out/ft" --transcoders "$out/tcs" "${medical[@]}" --tokens 40000 --out "$out/tcs_ft"
step attribute "$model" --transcoders "$out/tcs" --prompt "$question" --out "$out/base.graph"
step attribute "$out/ft" --transcoders "$out/tcs_ft" --prompt "$question" --out "$out/ft.graph"
step graph prune "$out/ft.graph" --out "$out/ft.pruned.graph"
step graph merge "$out/ft.pruned.graph" --out "$out/ft.merged.graph"
step graph paths "$out/ft.graph" -k 5
step graph diff "$out/base.graph" "$out/ft.graph" --carry-over "$out/tcs_ft.run/features.csv" -k 3
