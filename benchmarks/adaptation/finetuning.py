"""What training the MLPs alone (FTFA) loses or gains against the whole model and LoRA.

    python -m benchmarks finetuning [--data DATA] [--quick]

DATA holds ``models/stories260K`` and ``pubmedqa/`` (1,000 questions with an answer in words and yes/no/maybe). Half of
the questions are for testing (those of ``test_ground_truth.json``); no method sees them. Two trainings, of the same
tokens for every method:

* text: question and long answer. Then: cross-entropy on the test half, and on the model's own samples, which says
  what was forgotten; matching: of the first sentences of four answers the one that belongs to a question, by
  log-likelihood; F1: words of what the model writes after a question and of that sentence.
* decision: yes, no or maybe after the question, which is left out of the loss. Then: accuracy by log-likelihood, and
  exact match of what the model writes.

Every method's learning rate is chosen by one rule: the lowest cross-entropy on validation documents of the training
half with the first seed, over a grid of half decades that grows until the best is not at its edge. Every seed is kept.
Beside an accuracy stands what the commonest answer, or guessing, would score.
"""

import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fasttc.benchmarks import record

METHODS = ("ffn", "all", "lora")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FORMS: dict[str, dict[str, Any]] = {
    "text": {"text": "{QUESTION} {LONG_ANSWER}"},
    "decision": {"prompt": "{QUESTION} Answer:", "answer": "{final_decision}"},
}
OPTIONS = ("yes", "no", "maybe")
MATCHED, WRITTEN = 200, 60
"""Questions of the test half for matching, and for writing."""


def main(arguments: list[str]) -> int:
    parser = record.parser("finetuning", __doc__)
    parser.add_argument("--data", type=Path, default=record.DATA)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, a fifth of the tokens")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu/finetuning.json")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        parser.error(f"--data: expected a folder, found none at {options.data}")
    if options.quick:
        options.tokens, options.seeds = options.tokens // 5, 1
    torch.set_num_threads(1)
    rates = RATES[1:2] if options.quick else RATES
    work = [(None, None), *((training, method) for training in FORMS for method in METHODS)]
    rows, seconds = [], 0.0
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        part = partial(_part, options.data, options.tokens, rates, options.seeds)
        for (training, method), (found, taken) in zip(
            work, pool.map(part, *zip(*work, strict=True)), strict=True
        ):
            print(f"{training}, {method}: {taken:.0f} s", flush=True)
            rows += found
            seconds += taken
    print(table(rows))
    if options.out is not None or not options.quick:
        head = {
            "kind": "finetuning",
            "environment": record.environment("cpu", 0),
            "tokens": options.tokens,
            "seeds": options.seeds,
            "cpu_minutes": round(seconds / 60, 1),
        }
        record.write(options.out or record.ROOT / "results/cpu/finetuning.json", head, rows)
    return 0


def _part(
    data: Path, tokens: int, rates: tuple[float, ...], seeds: int, training: str | None, method: str | None
) -> tuple[list[dict[str, Any]], float]:
    """Rows of one method, or of the model as it is, and the CPU seconds they took."""
    torch.set_num_threads(1)
    started = time.process_time()
    bench = Bench(data, tokens)
    if training is None or method is None:
        rows = [bench.untouched()]
    else:
        rows = bench.method(training, method, rates, seeds)
    return rows, time.process_time() - started


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
        asked = FORMS["decision"]
        self.decisions = read_questions(testing, **asked, options=OPTIONS)
        self.decisions_written = read_questions(testing[:WRITTEN], **asked)
        answered = {"prompt": "{QUESTION}", "answer": "{sentence}"}
        matching = _matching(testing)
        self.sentences = read_questions(matching[:MATCHED], **answered, options="{sentences}")
        self.sentences_written = read_questions(matching[:WRITTEN], **answered)
        whole = {"fractions": (0, 0, 1), "context": 128}
        self.test = open_data(self.model, testing, self.tokenizer, **FORMS["text"], **whole)
        bos = [self.tokenizer.bos_token_id]
        samples = fasttc.models.sample(self.model, bos, n=128, max_tokens=128, seed=0)
        self.own = open_data(self.model, samples, self.tokenizer, **whole)

    def untouched(self) -> dict[str, Any]:
        found = self._measure(self.model, "text") | self._measure(self.model, "decision")
        return {"training": "none", "method": "-", "lr": None, "seed": None, **found}

    def method(
        self, training: str, method: str, rates: tuple[float, ...], seeds: int
    ) -> list[dict[str, Any]]:
        """A row for every seed, at the rate that is best with the first."""
        searched = self._search(training, method, rates)
        best = min(searched, key=lambda lr: searched[lr][2])
        rows = []
        for seed in range(seeds):
            model, report, ce, seconds = self._train(training, method, best, seed) if seed else searched[best]
            rows.append(
                {
                    "training": training,
                    "method": method,
                    "lr": best,
                    "searched": {f"{lr:g}": ce for lr, (_, _, ce, _) in sorted(searched.items())},
                    "seed": seed,
                    "trained_parameters": report.trained_parameters,
                    "validation_ce": ce,
                    "cpu_seconds": round(seconds, 1),
                    **self._measure(model, training),
                }
            )
        return rows

    def _search(self, training: str, method: str, rates: tuple[float, ...]) -> dict[float, Any]:
        """Trainings with the first seed by rate; of several rates the best is not at the edge."""
        found = {lr: self._train(training, method, lr, 0) for lr in rates}
        while len(rates) > 1:
            best = min(found, key=lambda lr: found[lr][2])
            if min(found) < best < max(found):
                break
            lr = float(f"{best * 10 ** (0.5 if best == max(found) else -0.5):.0e}")
            found[lr] = self._train(training, method, lr, 0)
        return found

    def _train(self, training: str, method: str, lr: float, seed: int) -> tuple[Any, Any, float, float]:
        """(model, report, cross-entropy on validation documents, CPU seconds); infinite where it diverged."""
        from fasttc.training import Diverged, finetune

        started = time.process_time()
        try:
            model, report = finetune(
                self.model,
                self.training,
                self.tokenizer,
                parameters=method,
                lr=lr,
                seed=seed,
                context=128,
                tokens=self.tokens,
                fractions=(0.9, 0.1, 0.0),
                progress=False,
                **FORMS[training],
            )
        except Diverged:
            return None, None, math.inf, time.process_time() - started
        return model, report, report.ce_after, time.process_time() - started

    def _measure(self, model: Any, training: str) -> dict[str, Any]:
        """Cross-entropies in nats per token, and the tasks that belong to a training."""
        from fasttc.evaluation import evaluate_task
        from fasttc.training.causal import cross_entropy

        found: dict[str, Any] = {
            "test_ce": cross_entropy(model, self.test.batches("test", 16)),
            "own_ce": cross_entropy(model, self.own.batches("test", 16)),
        }
        if training == "text":
            chosen = evaluate_task(model, self.sentences, self.tokenizer)
            written = evaluate_task(model, self.sentences_written, self.tokenizer, max_new_tokens=48)
            return found | {"matching": chosen.accuracy, "matching_chance": chosen.chance, "f1": written.f1}
        chosen = evaluate_task(model, self.decisions, self.tokenizer)
        written = evaluate_task(model, self.decisions_written, self.tokenizer, max_new_tokens=4)
        return found | {
            "decision": chosen.accuracy,
            "balanced": chosen.balanced_accuracy,
            "majority": chosen.majority,
            "exact": written.accuracy,
            "chosen": {name: c.chosen for name, c in chosen.classes.items()},
        }


def _matching(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with the first sentence of their own answer among those of the next three, at a place that rotates."""
    firsts = [entry["LONG_ANSWER"].split(". ")[0].rstrip(".") + "." for entry in records]
    found = []
    for i, entry in enumerate(records):
        others = [firsts[(i + step) % len(firsts)] for step in (1, 2, 3)]
        place = i % 4
        sentences = [*others[:place], firsts[i], *others[place:]]
        found.append({"QUESTION": entry["QUESTION"], "sentence": firsts[i], "sentences": sentences})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for every training and method, the mean over seeds with the least and the greatest."""
    header = "| training | method | trained | rate | CE test | CE own | matching | F1 | decision | exact | balanced |"
    lines = [header, "|---|---|" + "---:|" * 9]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["training"], row["method"]), []).append(row)
    for (training, method), runs in groups.items():
        rate = "" if runs[0]["lr"] is None else f"{runs[0]['lr']:g}"
        size = f"{runs[0].get('trained_parameters', 0):,}"
        names = ("test_ce", "own_ce", "matching", "f1", "decision", "exact", "balanced")
        cells = [training, method, size, rate, *(_spread(runs, name) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    majority = next(row["majority"] for row in rows if "majority" in row)
    chance = next(row["matching_chance"] for row in rows if "matching_chance" in row)
    answers = "; ".join(
        f"{method} {', '.join(f'{name} {count}' for name, count in runs[0]['chosen'].items())}"
        for (training, method), runs in groups.items()
        if training == "decision"
    )
    lines += [
        "",
        f"Guessing scores {chance:.2f} in matching; always the commonest answer {majority:.3f} in decision, and "
        f"{1 / len(OPTIONS):.3f} balanced over classes. Decisions chosen (first seed): {answers}.",
    ]
    return "\n".join(lines)


def _spread(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f} … {max(values):.3f})" if len(values) > 1 else "")
