"""What training the MLPs alone (FTFA) loses or gains against the whole model and LoRA.

    python -m benchmarks finetuning [--data DATA] [--quick]

DATA holds ``models/stories260K`` and ``pubmedqa/`` (1,000 questions with yes/no/maybe). Half of the questions are for
testing (those of ``test_ground_truth.json``); no method sees them. Two trainings:

* text: question and long answer. Cross-entropy on the test half, and on the model's own samples: what it forgets.
* task: the decision, after question and long answer, with the prompt left out of the loss. Accuracy on the test half.

Each method's learning rate is chosen on validation documents of the training half with the first seed; every seed is
printed. Beside an accuracy stands what the commonest answer alone would score: a model this small answers by it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from . import record

METHODS = ("ffn", "all", "lora")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TEXT = "{QUESTION} {LONG_ANSWER}"
TASK = {"prompt": "{QUESTION} {LONG_ANSWER} Answer:", "answer": "{final_decision}"}
OPTIONS = ("yes", "no", "maybe")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks finetuning",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=record.DATA)
    parser.add_argument("--tokens", type=int, default=200_000, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, a tenth of the tokens")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu/finetuning.json")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        parser.error(f"--data: expected a folder, found none at {options.data}")
    if options.quick:
        options.tokens, options.seeds = options.tokens // 10, 1
    torch.set_num_threads(options.threads)
    bench = Bench(options.data, options.tokens)
    rates = RATES[1:2] if options.quick else RATES
    rows = [bench.untouched()]
    for training in ("text", "task"):
        for method in METHODS:
            rows += bench.method(training, method, rates, options.seeds)
    print(table(rows))
    if options.out is not None or not options.quick:
        head = {"kind": "finetuning", "environment": record.environment("cpu", 0), "tokens": options.tokens}
        record.write(options.out or record.ROOT / "results/cpu/finetuning.json", head, rows)
    return 0


class Bench:
    """The model, both halves of the questions, and the model's own text."""

    def __init__(self, data: Path, tokens: int) -> None:
        import fasttc
        from fasttc.evaluation import read_questions
        from fasttc.training.data import open_data

        self.model, self.tokenizer = fasttc.models.load(data / "models/stories260K")
        self.tokens = tokens
        records = json.loads((data / "pubmedqa/ori_pqal.json").read_text(encoding="utf-8"))
        held_out = json.loads((data / "pubmedqa/test_ground_truth.json").read_text(encoding="utf-8"))
        self.training = [record for name, record in records.items() if name not in held_out]
        testing = [record for name, record in records.items() if name in held_out]
        self.questions = read_questions(testing, **TASK, options=OPTIONS)
        whole = {"fractions": (0, 0, 1), "context": 128}
        self.test = open_data(self.model, testing, self.tokenizer, text=TEXT, **whole)
        bos = [self.tokenizer.bos_token_id]
        samples = fasttc.models.sample(self.model, bos, n=256, max_tokens=128, seed=0)
        self.own = open_data(self.model, samples, self.tokenizer, **whole)

    def untouched(self) -> dict[str, Any]:
        return {
            "training": "none",
            "method": "-",
            "lr": None,
            "seed": None,
            **self._measure(self.model, "task"),
        }

    def method(
        self, training: str, method: str, rates: tuple[float, ...], seeds: int
    ) -> list[dict[str, Any]]:
        """Every rate with the first seed, and the best of them with all seeds; the last rows are those."""
        searched = [self._train(training, method, lr, 0) for lr in rates]
        best = min(searched, key=lambda run: run[1].ce_after)[1].config["lr"]
        rows = []
        for seed in range(seeds):
            model, report, seconds = self._train(training, method, best, seed)
            rows.append(
                {
                    "training": training,
                    "method": method,
                    "lr": best,
                    "searched": {str(run[1].config["lr"]): run[1].ce_after for run in searched},
                    "seed": seed,
                    "trained_parameters": report.trained_parameters,
                    "validation_ce": report.ce_after,
                    "cpu_seconds": round(seconds, 1),
                    **self._measure(model, training),
                }
            )
        return rows

    def _train(self, training: str, method: str, lr: float, seed: int) -> tuple[Any, Any, float]:
        from fasttc.training import finetune

        form = {"text": TEXT, "context": 128} if training == "text" else {**TASK, "context": 512}
        size = {
            "batch_size": 8 if training == "text" else 4,
            "tokens": self.tokens,
            "fractions": (0.9, 0.1, 0.0),
        }
        started = time.process_time()
        model, report = finetune(
            self.model,
            self.training,
            self.tokenizer,
            parameters=method,
            lr=lr,
            seed=seed,
            progress=False,
            **form,
            **size,
        )
        return model, report, time.process_time() - started

    def _measure(self, model: Any, training: str) -> dict[str, Any]:
        """Cross-entropies in nats per token; of the task the accuracy with its counts per class."""
        from fasttc.evaluation import evaluate_task
        from fasttc.training.causal import cross_entropy

        found: dict[str, Any] = {
            "test_ce": cross_entropy(model, self.test.batches("test", 16)),
            "own_ce": cross_entropy(model, self.own.batches("test", 16)),
        }
        if training == "task":
            report = evaluate_task(model, self.questions, self.tokenizer)
            found |= {
                "accuracy": report.accuracy,
                "balanced_accuracy": report.balanced_accuracy,
                "majority": report.majority,
                "classes": {
                    name: {"questions": c.questions, "chosen": c.chosen, "correct": c.correct}
                    for name, c in report.classes.items()
                },
            }
        return found


def table(rows: list[dict[str, Any]]) -> str:
    """One line for every method and training: the mean over seeds, with the smallest and largest."""
    lines = [
        "training  method  rate    trained  CE test             CE own samples      accuracy            per class",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["training"], row["method"]), []).append(row)
    for (training, method), runs in groups.items():
        rate = "-" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"
        size = runs[0].get("trained_parameters", 0)
        figures = [_spread(runs, name) for name in ("test_ce", "own_ce", "accuracy")]
        chosen = {name: c["chosen"] for name, c in runs[0].get("classes", {}).items()}
        shown = ", ".join(f"{name} {count}" for name, count in chosen.items())
        lines.append(
            f"{training:8s}  {method:6s}  {rate:6s}  {size:7,d}  "
            + "  ".join(f"{f:18s}" for f in figures)
            + f"  {shown}"
        )
    majority = next(row["majority"] for row in rows if "majority" in row)
    lines.append(
        f"always the commonest answer: {majority:.3f}; per class: how often each was chosen, first seed"
    )
    return "\n".join(lines)


def _spread(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else "")
