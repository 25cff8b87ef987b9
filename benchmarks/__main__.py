"""``python -m benchmarks SUITE ...``: each suite is a module here with ``main(arguments) -> exit status``."""

import argparse
import sys
from importlib import import_module

SUITES = {  # name -> what it does
    "ops": "ops against their competitors on this machine; --base REV: against another commit",
    "attribution": "graphs against circuit-tracer's algorithm, and how they scale",
    "circuits": "mechanism, merging and diff on the clinical world; graphs of 10,000 nodes",
    "cpu": "a whole training step on a CPU: time and memory, side by side",
    "gpu": "everything worth knowing on a new GPU, in under 8 minutes",
    "aot": "compile every kernel for every architecture; needs no GPU",
    "adaptation": "the ledger: what adapting transcoders costs beside training them from scratch",
    "finetuning": "training the MLPs alone against the whole model and LoRA: text, forgetting, a task",
    "adapters": "transcoder adapters: what a few features hold of a fine-tuning, and do to the words it writes",
    "shift": "how far classes of documents move in fine-tuning, on the clinical world",
    "page": "the page in a browser: opening, dragging",
    "pictures": "the pictures of docs/viewer.md and docs/circuits.md, from a walkthrough",
    "features": "evidence for 1,000 features over a million tokens: time and memory",
    "memory": "the memory that PAT says it will need, against what it needs",
    "wide": "a million features shared out over processes: tokens per second, memory",
    "prediction": "PAT of Gemma-2-2b on one H200, on paper",
    "throughput": "PAT without the model's forward, against a plain PyTorch loop",
    "sweeps": "around the ledger: width, distance of the fine-tuning, sparse autoencoders",
    "interventions": "influence in a graph against measured effects of ablation",
    "matched": "tokens from scratch that equal an adaptation, from a walkthrough",
    "report": "write tables and charts from the committed results",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:13s} {text}" for name, text in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see SUITE --help")
    options = parser.parse_args(arguments)
    return import_module(f".{options.suite}", __package__).main(options.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
