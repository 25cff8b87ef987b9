"""Transcoder adapters on a small model and real text: how much of a fine-tuning a few sparse features hold.

    python -m benchmarks adapters [--data DATA]            all pairs and seeds; about ten minutes a seed on one core
    python -m benchmarks adapters --quick                  much smaller, one seed: does it run at all

DATA holds models/stories260K (a Hugging Face folder) and pubmedqa/ori_pqal.json. The base is fine-tuned on medical
text: feed-forward layers only (FTFA) and whole, on abstracts; and FTFA on questions with their answers, which end.
Between the base and each of the three, adapters are trained, and biases alone beside them. Test documents are in no
training.

* How near the hybrid comes to the target: KL, top-1 error, L0.
* What it wins back: accuracy of telling the next ten words of a test document from three other orders of them, and the
  length of what it writes where texts end.
* Whether features are what they seem: those that favour a class of words, chosen on training documents, are ablated
  while the model writes, beside 20 random sets matched in size, firing rate and strength.

`python -m benchmarks report` writes the tables of docs/adapters.md.
"""

import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fasttc import models
from fasttc.benchmarks import record
from fasttc.evaluation import Question, evaluate_adapters, evaluate_task, recovery, response_length
from fasttc.evaluation.words import WordClass, ablation_effect, feature_table, matched_controls
from fasttc.training import TokenData, finetune, train_adapters
from fasttc.training.documents import read_documents

from . import report as adapters_report

WORDS = ("patient", "patients", "study", "studies", "group", "groups", "treatment", "results")


@dataclass(frozen=True)
class Pair:
    """What a target is: parameters that are fine-tuned, the text of a document, tokens of a row.

    ``ends``: documents that fit a row, each with the token in the end that ends a text.
    """

    parameters: str
    text: str
    context: int
    ends: bool = False


PAIRS = {
    "FTFA": Pair("ffn", "{QUESTION} {CONTEXTS} {LONG_ANSWER}", 128),
    "full": Pair("all", "{QUESTION} {CONTEXTS} {LONG_ANSWER}", 128),
    "FTFA, answers": Pair("ffn", "{QUESTION} {LONG_ANSWER}", 256, ends=True),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything, fixed in advance.

    Attributes:
        finetune: tokens of a fine-tuning; adapt: of a training of adapters.
        features: F; l1: weight of the penalty.
        held_out: test tokens; chosen_on: training tokens on which features are chosen.
        chosen: how many; draws: random sets.
        texts, length: what is written for a rate, in samples and tokens.
        questions: orders of words to tell apart; responses: texts written for their length.
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
    questions: int = 150
    responses: int = 128


QUICK = Plan(4096, 4096, 32, 0.4, 1024, 2048, 3, 4, 16, 24, 4, 4)


class Bench:
    """One model pair: the base, the documents and, once trained, the target and its adapters."""

    def __init__(self, name: str, data: Path, plan: Plan, seed: int) -> None:
        self.name, self.pair, self.plan, self.seed = name, PAIRS[name], plan, seed
        self.base, self.tokenizer = models.load(data / "models" / "stories260K")
        self.tokenizer.eos_token = self.tokenizer.bos_token  # it was trained with BOS between stories
        texts = [
            str(text) for text in read_documents(data / "pubmedqa" / "ori_pqal.json", text=self.pair.text)
        ]
        documents: list[Any] = texts
        if self.pair.ends:
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            kept = [i for i, ids in enumerate(encoded) if len(ids) + 2 <= self.pair.context]
            texts = [texts[i] for i in kept]
            documents = [[*encoded[i], self.tokenizer.eos_token_id] for i in kept]
        self.tokens = TokenData(
            documents, self.tokenizer, context=self.pair.context, bos_id=self.tokenizer.bos_token_id
        )
        self.questions = word_orders([texts[i] for i in self.tokens.indices("test")], plan.questions)

    def row(self) -> dict[str, Any]:
        """Everything that is measured, as a row of the results."""
        plan, shared = self.plan, {"seed": self.seed, "progress": False}
        target, tuned = finetune(
            self.base, self.tokens, parameters=self.pair.parameters, tokens=plan.finetune, lr=1e-3, **shared
        )
        row: dict[str, Any] = {
            "pair": self.name,
            "seed": self.seed,
            "ce_before": tuned.ce_before,
            "ce_after": tuned.ce_after,
            "plan": asdict(plan),
        }
        settings = {"tokens": plan.adapt, "batch_size": 512 // self.pair.context, "lr": 5e-3, **shared}
        biases, _ = train_adapters(target, self.base, self.tokens, bias_only=True, **settings)
        adapters, trained = train_adapters(
            target, self.base, self.tokens, n_features=plan.features, l1=plan.l1, **settings
        )
        row["steps"] = trained.steps
        for name, found in (("bias_only", biases), ("adapters", adapters)):
            quality = evaluate_adapters(target, self.base, found, self.tokens, tokens=plan.held_out)
            row[name] = quality.to_dict()
        won = recovery(target, self.base, adapters, self._scores)
        row["recovery"] = {name: one.to_dict() for name, one in won.items()}
        if not self.pair.ends:
            row["words"] = self._words(target, adapters)
        return row

    def _scores(self, model: Any) -> dict[str, float]:
        task = evaluate_task(model, self.questions, self.tokenizer, normalise="none")
        found = {"accuracy": task.accuracy}
        if self.pair.ends:
            found["response tokens"] = response_length(
                model, self.tokenizer, n=self.plan.responses, max_new_tokens=255, seed=self.seed
            )
        return found

    def _words(self, target: Any, adapters: Any) -> dict[str, Any]:
        """Rates of the class of words with the features ablated that favour it, and with random ones."""
        words, plan = WordClass(WORDS), self.plan
        batches = self.tokens.batches("train", 8, max_tokens=plan.chosen_on)
        table = feature_table(target, self.base, adapters, batches, words, self.tokenizer)
        chosen = table.strongest(plan.chosen)
        controls = matched_controls(table, chosen, plan.draws, seed=self.seed)

        def write(model: Any) -> list[str]:
            options = {
                "n": plan.texts,
                "max_tokens": plan.length,
                "seed": self.seed,
                "batch_size": plan.texts,
            }
            rows = models.sample(model, [self.tokenizer.bos_token_id], **options)
            return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

        effect = ablation_effect(target, self.base, adapters, words, chosen, controls, write)
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


def measure(name: str, data: Path, plan: Plan, seed: int, threads: int) -> dict[str, Any]:
    """A row of the results, in a process of its own."""
    torch.set_num_threads(threads)
    return Bench(name, data, plan, seed).row()


def word_orders(documents: list[str], n: int, *, words: int = 10, before: int = 40) -> list[Question]:
    """Questions whose options are the next words of a document and three other orders of them; always the same."""
    rng = random.Random(0)
    questions = []
    for text in documents:
        split = text.split()
        for start in range(words, len(split) - words + 1, words):
            right = split[start : start + words]
            options = {" ".join(right): None}
            while len(options) < 4 and len(set(right)) > 3:
                options[" ".join(rng.sample(right, words))] = None
            if len(options) == 4:
                shuffled = rng.sample(list(options), 4)
                prompt = " ".join(split[max(0, start - before) : start])
                questions.append(Question(prompt, " ".join(right), tuple(shuffled)))
    return rng.sample(questions, min(n, len(questions)))


def main(arguments: list[str] | None = None) -> int:
    parser = record.parser("adapters", __doc__)
    parser.add_argument("--data", type=Path, default=record.DATA, help="models/stories260K and pubmedqa")
    parser.add_argument("--pair", choices=PAIRS, action="append", help="only this pair (repeatable)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each measures a pair with a seed")
    parser.add_argument("--quick", action="store_true", help="small sizes, one seed; nothing is learned")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has of these sizes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu/adapters.json")
    options = parser.parse_args(arguments)
    if not (options.data / "models" / "stories260K").is_dir():
        parser.error(f"--data: expected a folder with models/stories260K and pubmedqa, got {options.data}")
    for name in ("seeds", "threads", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    plan, seeds = (QUICK, 1) if options.quick else (Plan(), options.seeds)
    out = options.out or (None if options.quick else record.ROOT / "results/cpu/adapters.json")
    rows = []
    if options.resume and out is not None and out.is_file():
        rows = [row for row in record.read(out)["rows"] if row["plan"] == asdict(plan)]
    done = {(row["seed"], row["pair"]) for row in rows}
    order = list(PAIRS)
    wanted = [(seed, name) for seed in range(seeds) for name in options.pair or PAIRS]
    head = {"kind": "adapters", "environment": record.environment("cpu", 0) | {"threads": options.threads}}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(measure, name, options.data, plan, seed, options.threads)
            for seed, name in wanted
            if (seed, name) not in done
        ]
        for finished in as_completed(running):
            row = finished.result()
            rows = sorted([*rows, row], key=lambda r: (r["seed"], order.index(r["pair"])))
            print(
                f"seed {row['seed']}, {row['pair']}: {row['adapters']['kl_recovered']:.1%} of the KL",
                flush=True,
            )
            if out is not None:
                record.write(out, head, rows)
    print(adapters_report.tables(rows))
    return 0
