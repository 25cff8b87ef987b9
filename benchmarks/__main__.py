"""``python -m benchmarks SUITE ...``: suites are modules with ``main(arguments) -> exit status``."""

import argparse
import sys
from importlib import import_module

SUITES = {  # name -> module, what it does
    "ops": ("ops.suite", "ops against their competitors on this machine; --base REV: against another commit"),
    "cpu": ("ops.cpu", "a whole training step on a CPU: time and memory, side by side"),
    "gpu": ("ops.gpu", "everything worth knowing on a new GPU, in under 8 minutes"),
    "aot": ("ops.aot", "compile every kernel for every architecture; needs no GPU"),
    "attribution": ("attribution.suite", "graphs against circuit-tracer's algorithm, and how they scale"),
    "interventions": ("attribution.interventions", "influence in a graph against measured effects of ablation"),
    "adaptation": ("adaptation.ledger", "the ledger: what adapting costs beside training from scratch"),
    "sweeps": ("adaptation.sweeps", "around the ledger: width, distance of the fine-tuning, autoencoders"),
    "finetuning": ("adaptation.finetuning", "MLPs alone against the whole model and LoRA: text, forgetting, a task"),
    "throughput": ("adaptation.throughput", "PAT without the model's forward, against a plain PyTorch loop"),
    "memory": ("adaptation.memory", "the memory that PAT says it will need, against what it needs"),
    "wide": ("adaptation.wide", "a million features shared out over processes: tokens per second, memory"),
    "prediction": ("adaptation.prediction", "PAT of Gemma-2-2b on one H200, on paper"),
    "matched": ("adaptation.matched", "tokens from scratch that equal an adaptation, from a walkthrough"),
    "adapters": ("adapters.suite", "what a few features hold of a fine-tuning, and do to the words it writes"),
    "circuits": ("circuits.suite", "mechanism, merging and diff on the clinical world; graphs of 10,000 nodes"),
    "shift": ("circuits.shift", "how far classes of documents move in fine-tuning, on the clinical world"),
    "features": ("features", "evidence for 1,000 features over a million tokens: time and memory"),
    "page": ("page.speed", "the page in a browser: opening, dragging"),
    "pictures": ("page.pictures", "the pictures of docs/viewer.md and docs/circuits.md, from a walkthrough"),
    "report": ("report", "write tables and charts from the committed results"),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:13s} {text}" for name, (_, text) in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see SUITE --help")
    options = parser.parse_args(arguments)
    return import_module(f"fasttc.benchmarks.{SUITES[options.suite][0]}").main(options.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
