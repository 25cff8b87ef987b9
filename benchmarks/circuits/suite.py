"""Reading circuits where the truth is known: mechanism, merging and diff on the clinical world, and large graphs.

    python -m benchmarks circuits                       table and targets, JSON under benchmarks/results/cpu/

The causal check comes first: without it there is no truth to compare with. Models are those of ``fasttc demo``, made
here where --folder does not hold them. Exits with 1 if a target is missed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttc.benchmarks import record
from fasttc.evaluation.causal import disease_swap
from fasttc.graph import Graph, MergedGraph, PrunedGraph, concept_nodes, feature_changes, mechanism, merge
from fasttc.graph.mechanism import bootstrap_draws
from fasttc.graph.quotient import edges_of, merge_loss

from .scale import LIMITS, elsewhere
from .world import CircuitWorld, Feature, Side, matched_sets

EXPLAINED = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
"""Share of a concept's variance, by the disease: at least."""
CHOOSING = 40  # prompts of each kind on which one of these is chosen
NODE_THRESHOLDS = (0.8, 0.95)
JUDGED = 0.95  # graphs of 0.8 have 26 nodes here, half of them tokens: little is left to merge
OF_DEFAULTS = 20  # prompts of each kind whose graphs have the default targets
RANDOM_MERGES, RANDOM_SETS = 5, 20
NAMED = 10  # features that the diff names
LOSS = ("completeness_kept", "replacement_kept", "influence_kept", "sign_agreement", "edges_kept", "internal")


def auc(high: Any, low: Any, high_weights: Any = None, low_weights: Any = None) -> float:
    """Probability that a draw from ``high`` is above one from ``low``, ties counting half; weighted."""
    one = np.ones(len(high)) if high_weights is None else high_weights
    two = np.ones(len(low)) if low_weights is None else low_weights
    above = (np.asarray(high)[:, None] > np.asarray(low)) + 0.5 * (
        np.asarray(high)[:, None] == np.asarray(low)
    )
    return float(one @ above @ two / (one.sum() * two.sum()))


def clustered_bound(
    high: Any, low: Any, drugs: Sequence[Sequence[str]], seed: int, draws: int = 2000
) -> float:
    """Lower end of the 95 % percentile bootstrap interval of the AUC; drugs are drawn, with all their prompts."""
    counts = [bootstrap_draws(labels, draws, seed + at) for at, labels in enumerate(drugs)]
    return float(np.quantile([auc(high, low, a, b) for a, b in zip(*counts, strict=True)], 0.025))


def shares(
    home: CircuitWorld, n: int, held_out: bool, seed: int
) -> tuple[list[list[str]], list[list[Graph]]]:
    """Drugs and graphs of ``n`` prompts of each kind, two-hop first."""
    asked = [home.world.prompts(kind, n, held_out=held_out, seed=seed) for kind in ("two_hop", "pattern")]
    drugs = [[prompt.answer for prompt in prompts] for prompts in asked]
    return drugs, [list(home.base.graphs(prompts)) for prompts in asked]


def mechanisms(home: CircuitWorld, n: int) -> tuple[dict[str, Any], list[Graph]]:
    """Multi-hop shares of held-out prompts of both kinds, and their graphs.

    The concepts are chosen on other prompts, which show other findings: features by how much of their variance the
    disease explains, and the least share by how well it separates the kinds there.
    """
    scores = home.decoding(150)
    sets = {
        least: {(layer, int(f)) for layer, score in enumerate(scores) for f in np.flatnonzero(score >= least)}
        for least in EXPLAINED
    }

    def multi_hop(graphs: list[list[Graph]], concepts: set[Feature]) -> list[Any]:
        return [
            np.array([mechanism(g, concept_nodes(g, concepts)).multi_hop for g in part]) for part in graphs
        ]

    _, other = shares(home, CHOOSING, False, 5000 + home.seed)
    separated = {least: auc(*multi_hop(other, concepts)) for least, concepts in sets.items()}
    chosen = max(separated, key=lambda least: separated[least])
    drugs, graphs = shares(home, n, True, 2000 + home.seed)
    found = {least: multi_hop(graphs, concepts) for least, concepts in sets.items()}
    high, low = found[chosen]
    direct = [float(np.mean([mechanism(graph, []).direct for graph in part])) for part in graphs]
    row = {
        "prompts": 2 * n,
        "drugs": [len(set(labels)) for labels in drugs],
        "explained": chosen,
        "concepts": sorted(sets[chosen]),
        "auc": auc(high, low),
        "auc_low": clustered_bound(high, low, drugs, home.seed),
        "multi_hop": [float(high.mean()), float(low.mean())],
        "direct": direct,
        "auc_where_chosen": separated,
        "auc_at_every_share": {least: auc(*pair) for least, pair in found.items()},
    }
    return row, [graph for part in graphs for graph in part]


def random_loss(merged: MergedGraph, seed: int) -> list[Any]:
    """Losses of random merges of the same sizes, within kinds."""
    generator = np.random.default_rng(seed)
    edges, group = edges_of(merged.pruned), merged.supernode.numpy()
    losses = []
    for _ in range(RANDOM_MERGES):
        shuffled = group.copy()
        for kind in np.unique(edges.kind):
            members = np.flatnonzero((edges.kind == kind) & (group >= 0))
            shuffled[members] = generator.permutation(group[members])
        losses.append(merge_loss(edges, shuffled, merged.loss.pruned))
    return losses


def merging(graphs: Sequence[Graph], node_threshold: float, seed: int) -> dict[str, Any]:
    """Default merges of pruned graphs against random ones: means over prompts, and how often ours is better."""
    ours, others = [], []
    for at, graph in enumerate(graphs):
        pruned: PrunedGraph = graph.prune(node_threshold, 0.98)
        merged = merge(pruned)
        ours.append(merged.loss)
        others.append(random_loss(merged, seed + at))
    row: dict[str, Any] = {
        "node_threshold": node_threshold,
        "nodes": float(np.mean([loss.nodes_before for loss in ours])),
        "supernodes": float(np.mean([loss.nodes_after for loss in ours])),
        "times_fewer": float(np.mean([loss.nodes_before / loss.nodes_after for loss in ours])),
    }
    for name in LOSS:
        mine = np.array([getattr(loss, name) for loss in ours])
        random = np.array([np.mean([getattr(loss, name) for loss in losses]) for losses in others])
        row[name], row[f"{name}_least"] = float(mine.mean()), float(mine.min())
        row[f"{name}_random"], row[f"{name}_above_random"] = (
            float(random.mean()),
            float((mine > random).mean()),
        )
    return row


def brought_in(home: CircuitWorld, n: int) -> dict[str, Any]:
    """Features that the diff names for the changed drugs, and what ablating them does on other prompts."""
    world = home.world
    prompts = world.prompts(
        "two_hop", 2 * n, phase="finetuned", diseases=world.changed, seed=3000 + home.seed
    )
    naming, asked = prompts[:n], prompts[n:]
    asked = [prompt for prompt in asked if prompt.text not in {other.text for other in naming}]
    pairs = zip(home.base.graphs(naming), home.tuned.graphs(naming), strict=True)
    tested = feature_changes(pairs, seed=home.seed)
    named = [one for one in tested if one.change > 0 and one.q <= 0.05][:NAMED]
    chosen: list[Feature] = [one.feature for one in named]
    kept = [disease for disease in world.common if disease not in world.changed]
    unchanged = world.prompts("two_hop", n, phase="finetuned", diseases=kept, seed=4000 + home.seed)
    ids = home.ids([prompt.text for prompt in asked])
    answers = home.answers(asked)
    effect = drop(home.tuned, ids, answers, chosen)
    sets = matched_sets(home.tuned, ids, chosen, RANDOM_SETS, home.seed)
    random = [drop(home.tuned, ids, answers, features) for features in sets]
    elsewhere_ids = home.ids([prompt.text for prompt in unchanged])
    return {
        "prompts_named_on": n,
        "prompts_ablated_on": len(asked),
        "significant": sum(one.q <= 0.05 and one.change > 0 for one in tested),
        "features": [one.to_dict() for one in named],
        "drop": effect,
        "drop_random": sorted(random),
        "drop_random_95": float(np.quantile(random, 0.95)),
        "drop_unchanged_drugs": drop(home.tuned, elsewhere_ids, home.answers(unchanged), chosen),
    }


def drop(side: Side, ids: torch.Tensor, answers: torch.Tensor, features: Sequence[Feature]) -> float:
    """By how much the log-probability of the right drug falls, mean over prompts, in nats."""
    return float((side.log_probs(ids, answers) - side.log_probs(ids, answers, features)).mean())


def judge(result: dict[str, Any]) -> list[str]:
    """One sentence per target, each beginning with "met" or "missed"."""
    share, (judged,) = result["mechanism"], [r for r in result["merging"] if r["node_threshold"] == JUDGED]
    found = result["diff"]
    checks = [
        (
            min(share["drugs"]) >= 12 and share["prompts"] >= 200,
            f"{share['drugs']} drugs, {share['prompts']} prompts",
        ),
        (share["auc"] >= 0.9, f"AUC {share['auc']:.3f} of two-hop against pattern drugs (>= 0.9)"),
        (
            share["auc_low"] >= 0.8,
            f"its lower 95 % bound, clustered by drug: {share['auc_low']:.3f} (>= 0.8)",
        ),
        (judged["times_fewer"] >= 5, f"{judged['times_fewer']:.2f} times fewer nodes (>= 5)"),
    ]
    names = (("completeness_kept", 0.85), ("sign_agreement", 0.9), ("edges_kept", 0.8))
    for name, least in names:
        value, random = judged[name], judged[f"{name}_random"]
        better = judged[f"{name}_above_random"]
        text = f"{name} {value:.3f} (>= {least}), random {random:.3f}, better on {better:.0%} of prompts"
        checks.append((value >= least and value > random and better >= 0.9, text))
    text = f"ablating the {len(found['features'])} named features costs {found['drop']:.3f} nats, "
    checks.append(
        (
            bool(found["features"]) and found["drop"] > found["drop_random_95"],
            text + f"the 95th percentile of matched random sets {found['drop_random_95']:.3f}",
        )
    )
    for row in result.get("scale", []):
        fits = row["seconds"] < LIMITS["seconds"] and row["bytes"] < LIMITS["bytes"]
        size = f"{row['nodes']:,} nodes, {row['edges']:,} edges"
        checks.append(
            (fits, f"{row['operation']} of {size}: {row['seconds']} s, {row['bytes'] / 2**20:.0f} MiB")
        )
    return [("met: " if passed else "missed: ") + text for passed, text in checks]


def notes(result: dict[str, Any]) -> list[str]:
    """What was measured and is not judged: merges of graphs pruned as usual, and of those with the default targets."""
    usual = [row for row in result.get("merging", []) if row["node_threshold"] != JUDGED]
    more = result.get("merging_default_targets", [])
    return [
        f"note: {targets}, pruned at {row['node_threshold']} ({row['nodes']:.0f} nodes), "
        f"{row['times_fewer']:.2f} times fewer, completeness_kept {row['completeness_kept']:.3f}"
        for targets, rows in (("one target", usual), ("default targets", more))
        for row in rows
    ]


def run(home: CircuitWorld, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, the causal check first; ``stopped`` where that fails."""
    checks = {
        "base": disease_swap(home.base.model, home.world, n=200).to_dict(),
        "finetuned": disease_swap(home.tuned.model, home.world, phase="finetuned", n=200).to_dict(),
    }
    result: dict[str, Any] = {"causal_check": checks, "models_reused": home.reused}
    if not all(check["passed"] for check in checks.values()):
        return {**result, "stopped": "the causal check failed: the truth is not in the models"}
    result["mechanism"], graphs = mechanisms(home, options.prompts)
    result["merging"] = [merging(graphs, threshold, home.seed) for threshold in NODE_THRESHOLDS]
    kinds = (
        home.world.prompts(kind, OF_DEFAULTS, held_out=True, seed=home.seed)
        for kind in ("two_hop", "pattern")
    )
    graphs = [graph for prompts in kinds for graph in home.base.graphs(prompts, answers=False)]
    result["merging_default_targets"] = [
        merging(graphs, threshold, home.seed) for threshold in NODE_THRESHOLDS
    ]
    result["diff"] = brought_in(home, options.prompts // 2)
    if not options.no_scale:
        result["scale"] = [
            elsewhere(what, options.nodes, 100 * options.nodes, home.seed)
            for what in ("merge", "paths", "diff")
        ]
    return result


def main(arguments: list[str]) -> int:
    parser = record.parser("circuits", __doc__)
    parser.add_argument("--folder", type=Path, help="of the models; default: a new one, removed at the end")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts of each kind")
    parser.add_argument("--nodes", type=int, default=10_000, help="of the large graph")
    parser.add_argument("--no-scale", action="store_true", help="leave the large graph out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the JSON object instead of the table")
    parser.add_argument("--out", type=Path, default=record.ROOT / "results/cpu/circuits.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        home = CircuitWorld(options.folder or Path(temporary), options.seed)
        result = run(home, options)
    targets = [f"missed: {result['stopped']}"] if "stopped" in result else judge(result)
    head = {"kind": "circuits", "environment": record.environment("cpu", options.seed)}
    whole = {**head, "targets": targets, "cpu_seconds": round(time.process_time() - start, 1), **result}
    record.write(options.out, whole, [])
    shown = [*targets, *notes(result), f"written to {options.out}"]
    print(json.dumps(whole, indent=1) if options.json else "\n".join(shown))
    return 0 if all(text.startswith("met") for text in targets) else 1
