"""Evidence for 1,000 features over a million tokens of a small real model: seconds and memory of the one pass.

    python -m benchmarks features [--data DATA]

DATA holds ``models/stories260K`` and ``pubmedqa/ori_pqal.json``. The transcoders (5 layers, F=1024, K=16) are trained
for a moment first, untimed: their cost per token does not depend on how good they are. Exits with 1 if the target
(5 minutes on 2 cores) is missed.
"""

import resource
import time
from pathlib import Path

import torch

from . import record

TARGET_SECONDS = 300.0
FEATURES_PER_LAYER = 200


def main(arguments: list[str]) -> int:
    parser = record.parser("features", __doc__)
    parser.add_argument("--data", type=Path, default=record.DATA)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/features.json")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        parser.error(f"--data: expected a folder, found none at {options.data}")

    import fasttc
    from fasttc.analysis import feature_evidence

    torch.set_num_threads(options.threads)
    model, tokenizer = fasttc.models.load(options.data / "models/stories260K")
    text = {"tokenizer": tokenizer, "text": "{QUESTION} {CONTEXTS} {LONG_ANSWER}"}
    corpus = options.data / "pubmedqa/ori_pqal.json"
    tcs, _ = fasttc.train(
        model, corpus, **text, n_features=1024, k=16, tokens=20_000, seed=options.seed, progress=False
    )
    wanted = [(layer, index) for layer in tcs.layers for index in range(FEATURES_PER_LAYER)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = feature_evidence(model, tcs, corpus, wanted, **text, tokens=options.tokens, seed=options.seed)
    seconds = time.perf_counter() - start
    row = {
        "features": len(found),
        "tokens": found[0].n_tokens,
        "seconds": round(seconds, 1),
        "extra_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
        "active": sum(evidence.n_active > 0 for evidence in found),
    }
    head = {"kind": "features", "environment": record.environment("cpu", options.seed)}
    met = seconds <= TARGET_SECONDS * row["tokens"] / 1_000_000
    record.write(options.out, {**head, "target_seconds": TARGET_SECONDS, "met": met}, [row])
    print(
        f"{row['features']:,} features ({row['active']:,} active), {row['tokens']:,} tokens: {row['seconds']} s "
        f"on {options.threads} threads, {row['extra_mb']} MB more than before ({'met' if met else 'missed'}: "
        f"at most {TARGET_SECONDS:.0f} s per million tokens)"
    )
    return 0 if met else 1
