#!/usr/bin/env bash
# From graph to explanation on two prompts, by the command line alone; docs/circuits.md shows its output and pictures.
#
#   bash benchmarks/circuits/walkthrough.sh DATA OUT
#
# DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json; OUT is a new folder, or one whose
# OUT/world holds the models of an earlier `fasttc bench circuits --folder OUT/world`. Pictures go to OUT/images; those of
# the page need Chromium.
set -euo pipefail
source "$(dirname "$0")/../step.sh"
mkdir -p "${2:?usage: walkthrough.sh DATA OUT}/images"
data=$(realpath "$1") out=$(realpath "$2")
cd "$out"

# 1. The clinical world, where the truth is known.
[ -d world/tcs_pat ] || step bench circuits --folder world --no-scale --out circuits.json
python - <<'END'
import json
from fasttc.worlds import ClinicalWorld

world = ClinicalWorld(0)
for name, texts in (("vignettes", world.base_corpus(4000, seed=2)), ("changed", world.finetune_corpus(8_000, seed=2))):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
END
two_hop='a woman with eye-itch busy and ear-numbness . the drug is'
pattern='a woman with eye-itch low-iron and ear-numbness . the drug is'
step attribute world/base --transcoders world/tcs_base --prompt "$two_hop" --split-by-head 4 --out two_hop.graph
step attribute world/base --transcoders world/tcs_base --prompt "$pattern" --out pattern.graph
step graph prune two_hop.graph --node-threshold 0.95 --out two_hop.pruned.graph
step graph merge two_hop.pruned.graph --out two_hop.merged.graph --save-groups two_hop.supernodes.json
step features world/base --transcoders world/tcs_base --data vignettes.jsonl --context 64 --graph two_hop.pruned.graph --out features/base
step graph paths two_hop.graph pattern.graph -k 5 --plot images/circuits-lengths.png
step attribute world/finetuned --transcoders world/tcs_pat --prompt "$two_hop" --out tuned.graph
step graph diff two_hop.graph tuned.graph -k 4 --plot images/circuits-diff-bars.png
step adapter train world/finetuned --base world/base --data changed.jsonl --context 64 --batch-size 40 --features 64 --l1 0.05 --tokens 200000 --out adapters
step attribute world/finetuned --transcoders world/tcs_base --adapters adapters --prompt "$two_hop" --out joint.graph
step graph prune joint.graph --node-threshold 0.85 --out joint.pruned.graph

# 2. stories260K and a question of PubMedQA, before and after fine-tuning. Budgets of a minute, not of a study.
model=$data/models/stories260K
medical=(--data "$data/pubmedqa/ori_pqal.json" --text '{QUESTION} {CONTEXTS} {LONG_ANSWER}')
question='Do mitochondria play a role in remodelling lace plant leaves during programmed cell death?'
step train "$model" "${medical[@]}" --features 512 --k 16 --batch-size 8 --context 128 --tokens 100000 --out tcs
step finetune "$model" "${medical[@]}" --tokens 200000 --lr 1e-3 --out ft
step adapt ft --transcoders tcs "${medical[@]}" --tokens 40000 --out tcs_ft
step attribute "$model" --transcoders tcs --prompt "$question" --out base.graph
step attribute ft --transcoders tcs_ft --prompt "$question" --out ft.graph
step graph prune ft.graph --out ft.pruned.graph
step graph merge ft.pruned.graph --out ft.merged.graph
step graph prune ft.graph --node-threshold 0.5 --edge-threshold 0.9 --out ft.few.graph
step features ft --transcoders tcs_ft "${medical[@]}" --tokens 100000 --graph ft.few.graph --out features/ft
step graph paths ft.graph -k 5
step graph diff base.graph ft.graph --carry-over tcs_ft.run/features.csv -k 3

# 3. Pictures of all this, taken from the page.
step bench pictures --walkthrough . --out images
