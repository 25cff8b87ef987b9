"""Does a graph predict what ablating a feature does? Influence against measured effects on a real model.

    python -m benchmarks interventions --data ../shared/data        about two minutes on two cores

Trains transcoders for every MLP of stories260K on the model's own samples, traces 20 prompts cut from other samples,
and ablates 20 features of each in the live model: nothing frozen, the rest of the model reacts. A feature's effect is
the KL of the next token it causes; its influence is that of the graph, which no ablation has gone into. Printed:
Spearman's rank correlation, beside the 0.72 that *Circuit Tracing* (Anthropic, 2025) reports for cross-layer
transcoders of a model of its own on 20 prompts.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fasttc
from fasttc import models
from fasttc.attribution import Intervention, intervene
from fasttc.benchmarks import record

PUBLISHED = 0.72
PROMPT_TOKENS = (12, 40)  # shortest and longest prompt
COMPARED = ("influence", "activation", "written")  # written: activation times length of the decoder row


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean, float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2).double()[inverse]


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation; nan where one of them does not vary."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def draw_features(graph: fasttc.Graph, n: int, how: str, generator: torch.Generator) -> Tensor:
    """``n`` feature nodes: "random", or "top" by influence."""
    if how == "top":
        return graph.influence()[: graph.n_features].sort(descending=True, stable=True).indices[:n]
    return torch.randperm(graph.n_features, generator=generator)[:n]


def measure_prompt(model: Any, tcs: Any, graph: fasttc.Graph, nodes: Tensor) -> list[dict[str, Any]]:
    """Influence and effect of each node, one ablation at a time."""
    influence, rows = graph.influence(), []
    for node in nodes.tolist():
        layer, position, index = graph.features[node].tolist()
        effect = intervene(model, tcs, graph.input_ids, Intervention(layer, index, position))
        activation = float(graph.activations[node])
        rows.append(
            {
                "layer": layer,
                "position": position,
                "feature": index,
                "activation": activation,
                "written": activation * float(tcs[layer].W_dec[index].detach().norm()),
                "influence": float(influence[node]),
                "kl": effect.kl(),
            }
        )
    return rows


def correlations(prompts: list[list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Spearman with the effect: over all features together, and the mean of the prompts' own."""

    def column(rows: list[dict[str, Any]], name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    together = [row for rows in prompts for row in rows]
    return {
        name: {
            "pooled": spearman(column(together, name), column(together, "kl")),
            "mean_of_prompts": sum(spearman(column(rows, name), column(rows, "kl")) for rows in prompts)
            / len(prompts),
        }
        for name in COMPARED
    }


def summary(measured: dict[str, list[list[dict[str, Any]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Correlations of both choices, and of random features that can matter at all.

    A feature of the last layer before the last position reaches no logit: influence and effect are exactly zero, which
    any graph predicts.
    """
    reaching = [[row for row in rows if row["influence"] > 0] for rows in measured["random"]]
    return {how: correlations(prompts) for how, prompts in (measured | {"reaching": reaching}).items()}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = record.parser("interventions", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds models/stories260K")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--features", type=int, default=20, help="ablated in each prompt")
    parser.add_argument("--width", type=int, default=1024, help="F of each transcoder")
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--samples", type=int, default=400, help="of the model, to train on")
    parser.add_argument("--tokens", type=int, default=400_000, help="of training, repeats counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu/interventions.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    folder = options.data / "models/stories260K"
    if not folder.is_dir():
        print(f"expected a model in {folder}, found none")
        return 2
    torch.manual_seed(options.seed)
    model, tokenizer = models.load(folder, dtype=torch.float32, device="cpu")
    start = [tokenizer.bos_token_id]
    texts = models.sample(
        model, start, n=options.samples + options.prompts, max_tokens=256, seed=options.seed, batch_size=128
    )
    kept, held_out = texts[: options.samples], texts[options.samples :]
    tcs, trained = fasttc.train(
        model, kept, n_features=options.width, k=options.k, tokens=options.tokens, seed=options.seed
    )
    generator = torch.Generator().manual_seed(options.seed)
    lengths = torch.randint(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, (options.prompts,), generator=generator)
    measured: dict[str, list[list[dict[str, Any]]]] = {"random": [], "top": []}
    scores = []
    for ids, length in zip(held_out, lengths.tolist(), strict=True):
        graph = fasttc.attribute(model, tcs, ids[:length])
        scores.append(graph.scores()._asdict())
        for how, prompts in measured.items():
            nodes = draw_features(graph, options.features, how, generator)
            prompts.append(measure_prompt(model, tcs, graph, nodes))
    found = summary(measured)
    mean_scores = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    _say(options, trained.fvu, mean_scores, found)
    environment = record.environment("cpu", options.seed)
    out = options.out or record.ROOT / "results/cpu/interventions.json"
    head = {
        "kind": "interventions",
        "environment": environment,
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "data")},
        "fvu": trained.fvu,
        "scores": mean_scores,
        "published": PUBLISHED,
        "spearman": found,
    }
    rows = [
        {"chosen": how, "prompt": number, **row}
        for how, prompts in measured.items()
        for number, prompt in enumerate(prompts)
        for row in prompt
    ]
    record.write(out, head, rows)
    print(f"wrote {out}")
    return 0


def _say(
    options: argparse.Namespace,
    fvu: float,
    scores: dict[str, float],
    found: dict[str, dict[str, dict[str, float]]],
) -> None:
    print(
        f"stories260K, F = {options.width}, k = {options.k}, {options.tokens:,} training tokens: FVU {fvu:.3f}; "
        f"mean replacement score {scores['replacement']:.3f}, completeness {scores['completeness']:.3f}"
    )
    print(f"{options.prompts} prompts x {options.features} features, ablated one at a time in the live model")
    print("Spearman with the KL that ablation causes:")
    print(f"{'features':<10}{'ranked by':<12}{'all together':>13}{'mean of prompts':>17}")
    for how, by_name in found.items():
        for name, values in by_name.items():
            print(f"{how:<10}{name:<12}{values['pooled']:>13.2f}{values['mean_of_prompts']:>17.2f}")
    print(f"published (Circuit Tracing, another model and other transcoders): {PUBLISHED}")
