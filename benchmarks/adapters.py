"""Transcoder adapters on a small model and real text: how much of a fine-tuning a few sparse features hold.

    python -m benchmarks adapters --data DATA              two model pairs; a few minutes on one core
    python -m benchmarks adapters --data DATA --quick      much smaller: does it run at all
    python -m benchmarks adapters --report                 the tables of docs/adapters.md again, from the results

DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json. The base is fine-tuned on the medical
text twice, feed-forward layers only (FTFA) and whole; between the base and each of the two, adapters are trained, and
biases alone beside them. Test documents are in no training. Then the features that favour a class of words, chosen on
training documents, are ablated while the model writes, beside 20 random sets matched in size, firing rate and strength.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fasttc import models
from fasttc.evaluation import evaluate_adapters
from fasttc.evaluation.words import WordClass, ablation_effect, feature_table, matched_controls
from fasttc.training import TokenData, finetune, train_adapters
from fasttc.training.documents import read_documents

from . import record

TEXT = "{QUESTION} {CONTEXTS} {LONG_ANSWER}"
WORDS = ("patient", "patients", "study", "studies", "group", "groups", "treatment", "results")
PAIRS = {"FTFA": "ffn", "full": "all"}  # name -> what is fine-tuned
DOCUMENT = record.ROOT.parent / "docs" / "adapters.md"
RESULT = "adapters.json"


@dataclass(frozen=True)
class Plan:
    """Sizes of everything, fixed in advance.

    Attributes:
        finetune: tokens of a fine-tuning; adapt: of a training of adapters.
        features: F; l1: weight of the penalty.
        held_out: test tokens; chosen_on: training tokens on which features are chosen.
        chosen: how many; draws: random sets.
        texts, length: what is written for a rate, in samples and tokens.
    """

    finetune: int = 100_000
    adapt: int = 80_000
    features: int = 256
    l1: float = 0.4
    held_out: int = 8192
    chosen_on: int = 16_384
    chosen: int = 10
    draws: int = 20
    texts: int = 192
    length: int = 96


QUICK = Plan(4096, 4096, 32, 0.4, 1024, 2048, 3, 4, 16, 24)


def measure(pair: str, data: Path, plan: Plan, seed: int) -> dict[str, Any]:
    """One model pair, as a row of the results."""
    base, tokenizer = models.load(data / "models" / "stories260K")
    documents = read_documents(data / "pubmedqa" / "ori_pqal.json", text=TEXT)
    tokens = TokenData(documents, tokenizer, context=128, bos_id=tokenizer.bos_token_id)
    target, tuned = finetune(
        base, tokens, parameters=PAIRS[pair], tokens=plan.finetune, lr=1e-3, seed=seed, progress=False
    )
    settings = {"tokens": plan.adapt, "batch_size": 4, "lr": 5e-3, "seed": seed, "progress": False}
    row: dict[str, Any] = {
        "pair": pair,
        "ce_before": tuned.ce_before,
        "ce_after": tuned.ce_after,
        "plan": asdict(plan),
    }
    biases, _ = train_adapters(target, base, tokens, bias_only=True, **settings)
    row["bias_only"] = evaluate_adapters(target, base, biases, tokens, tokens=plan.held_out).to_dict()
    adapters, trained = train_adapters(target, base, tokens, n_features=plan.features, l1=plan.l1, **settings)
    row["steps"] = trained.steps
    row["adapters"] = evaluate_adapters(target, base, adapters, tokens, tokens=plan.held_out).to_dict()
    row["words"] = _word_effect(target, base, adapters, tokens, tokenizer, plan, seed)
    return row


def _word_effect(
    target: Any, base: Any, adapters: Any, tokens: TokenData, tokenizer: Any, plan: Plan, seed: int
) -> dict[str, Any]:
    words = WordClass(WORDS)
    batches = tokens.batches("train", 8, max_tokens=plan.chosen_on)
    table = feature_table(target, base, adapters, batches, words, tokenizer)
    chosen = table.strongest(plan.chosen)
    controls = matched_controls(table, chosen, plan.draws, seed=seed)

    def write(model: Any) -> list[str]:
        options = {"n": plan.texts, "max_tokens": plan.length, "seed": seed, "batch_size": plan.texts}
        rows = models.sample(model, [tokenizer.bos_token_id], **options)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    effect = ablation_effect(target, base, adapters, words, chosen, controls, write)
    place = {feature: i for i, feature in enumerate(table.features)}

    def means(features: Any) -> dict[str, float]:
        rows = [place[feature] for feature in features]
        return {"rate": float(table.rate[rows].mean()), "strength": float(table.strength[rows].mean())}

    return {
        **asdict(effect),
        "words": list(WORDS),
        "change": effect.change,
        "control_changes": effect.control_changes,
        "percentile_95": effect.percentile_95,
        "counts": effect.counts,
        "chosen": chosen,
        "active_features": len(table.features),
        "chosen_means": means(chosen),
        "control_means": [means(control) for control in controls],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as two Markdown tables."""
    lines = [
        "| pair | adapter | KL to the target | share taken away | top-1 error | L0 per layer (mean) |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        hybrid = row["adapters"]["hybrid"]
        lines.append(
            f"| {row['pair']} | none (hybrid) | {hybrid['kl']:.4f} | - | {hybrid['top1_error']:.1%} | - |"
        )
        for name, shown in (("bias_only", "biases only"), ("adapters", f"F = {row['plan']['features']}")):
            quality = row[name]["adapted"]
            l0 = ", ".join(f"{value:.1f}" for value in quality["l0"])
            lines.append(
                f"| {row['pair']} | {shown} | {quality['kl']:.4f} | {row[name]['kl_recovered']:.1%} "
                f"| {quality['top1_error']:.1%} | {l0} ({quality['mean_l0']:.2f}) |"
            )
    lines += [
        "",
        "| pair | target | hybrid | adapted | ablated | change | controls: 95th percentile | all of them |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        words = row["words"]
        changes = ", ".join(f"{change:.1f}" for change in sorted(words["control_changes"]))
        figures = " | ".join(
            f"{words[name]:.1f}" for name in ("target", "hybrid", "adapted", "ablated", "change")
        )
        lines.append(f"| {row['pair']} | {figures} | {words['percentile_95']:.1f} | {changes} |")
    return "\n".join(lines)


def report(path: Path) -> None:
    """Writes the tables into the document, between its two marks."""
    found = record.read(path)
    start, end = "<!-- adapters -->\n", "<!-- /adapters -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(start)
    environment = found["environment"]
    source = f"{environment['device']}, torch {environment['torch']}, seed {environment['seed']}."
    body = f"{start}{table(found['rows'])}\n\n{source}\n{end}"
    DOCUMENT.write_text(head + body + rest.split(end)[1], encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with models/stories260K and pubmedqa")
    parser.add_argument("--pair", choices=PAIRS, action="append", help="only this pair (repeatable)")
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="JSON file; default: benchmarks/results/DEVICE/adapters.json"
    )
    parser.add_argument("--report", action="store_true", help="only rewrite the tables of docs/adapters.md")
    options = parser.parse_args(arguments)
    environment = record.environment("cpu", options.seed)
    out = options.out or record.ROOT / "results" / record.device_folder(environment["device"]) / RESULT
    if options.report:
        report(out)
        return 0
    if options.data is None or not (options.data / "models" / "stories260K").is_dir():
        parser.error("--data: expected a folder with models/stories260K and pubmedqa")
    rows = record.read(out)["rows"] if out.is_file() else []
    plan = QUICK if options.quick else Plan()
    for pair in options.pair or PAIRS:
        row = measure(pair, options.data, plan, options.seed)
        rows = sorted(
            [*(r for r in rows if r["pair"] != pair), row], key=lambda r: list(PAIRS).index(r["pair"])
        )
        record.write(out, {"kind": "adapters", "environment": environment}, rows)
    print(table(rows))
    return 0
