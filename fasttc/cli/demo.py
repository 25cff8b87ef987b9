"""``fasttc demo``: the whole road on a small built-in model whose causal structure is known."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, table, verb

SHAPE: dict[str, Any] = {"n_features": 512, "k": 8}
UPDATES: dict[str, Any] = {"update_tokens": 512}
BUDGET: dict[str, int] = {"base": 400_000, "finetune": 260_000, "adapt": 80_000, "scratch": 320_000}
"""Tokens, repeats counted."""


@dataclass
class Road:
    """What the demo's stretches share: where they write, how long each took."""

    run: Run
    out: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stretch(self, name: str, what: str) -> Iterator[None]:
        """Announces a stretch and times it."""
        self.run.say(f"{what} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    @property
    def options(self) -> dict[str, Any]:
        """Of every training."""
        return {"context": 64, "batch_size": 40, "seed": self.run.seed, "progress": not self.run.as_json}


@click.command("demo")
@click.option(
    "--out",
    default="fasttc-demo",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for everything that is made.",
)
@verb
def command(run: Run, out: Path) -> None:
    """Train a small model on a world with known causes, then walk the whole road with it.

    Findings lead to a disease and the disease to a drug; some drugs follow from one finding alone. The demo trains a
    Gemma-2 on such cases, checks that swapping the disease inside it swaps the drug, trains transcoders, fine-tunes
    with FTFA, adapts with PAT, compares with training from scratch, and traces one prompt in both models.
    At most three minutes on two CPU cores.
    """
    from fasttc._files import write_json
    from fasttc.evaluation.causal import disease_swap
    from fasttc.worlds import ClinicalWorld

    start = time.perf_counter()
    road, world = Road(run, out), ClinicalWorld(run.seed)
    model, tokenizer = base_model(road, world)
    base_swap = disease_swap(model, world)
    tcs = base_transcoders(road, world, model, tokenizer)
    tuned, finetuned = fine_tuned(road, world, model, tokenizer)
    tuned_swap = disease_swap(tuned, world, phase="finetuned")
    modes = compare(road, world, tuned, tokenizer, tcs)
    graphs = trace(
        road, world, {"base": (model, tcs), "finetuned": (tuned, modes.pop("_adapted"))}, tokenizer
    )
    summary = {
        "model": {"accuracy": drug_accuracy(world, model, tuned), "finetune": finetuned},
        "causal_check": {"base": base_swap.to_dict(), "finetuned": tuned_swap.to_dict()},
        "transcoders": modes,
        "graphs": graphs,
        "stretch_seconds": road.seconds,
        "total_seconds": round(time.perf_counter() - start, 1),
    }
    write_json(out / "summary.json", summary)
    run.finish(summary, described(summary, out))


def base_model(road: Road, world: Any) -> tuple[Any, Any]:
    """A small Gemma-2, trained on the world's base corpus."""
    from fasttc.models.build import build_causal_lm
    from fasttc.training import finetune
    from fasttc.worlds import CLINICAL_MODEL as RECIPE

    model, tokenizer = build_causal_lm(RECIPE, world.vocabulary, seed=road.run.seed)
    model.to(road.run.device)
    with road.stretch("base_model", "training a small Gemma-2 on the clinical world"):
        documents = world.base_corpus(RECIPE["documents"])
        given = {**road.options, "context": RECIPE["context"], **RECIPE["training"]}
        finetune(model, documents, tokenizer, parameters="all", inplace=True, **given)
    save_model(model, tokenizer, road.out / "base")
    return model, tokenizer


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    from fasttc._files import atomic_folder

    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def base_transcoders(road: Road, world: Any, model: Any, tokenizer: Any) -> Any:
    """Transcoders of the base model, over the text it was trained on."""
    from fasttc.training import train

    with road.stretch("base_transcoders", "training transcoders for its MLPs"):
        documents = world.base_corpus(20_000, seed=1)
        given = {**road.options, **SHAPE, **UPDATES, "tokens": BUDGET["base"], "out": road.out / "tcs_base"}
        return train(model, documents, tokenizer, **given)[0]


def fine_tuned(road: Road, world: Any, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """FTFA on rarer diseases and changed drugs, and what it proves about the frozen tensors."""
    from fasttc.training import finetune

    with road.stretch(
        "finetune", "fine-tuning its feed-forward layers on rare diseases and changed drugs (FTFA)"
    ):
        documents = world.finetune_corpus(12_000)
        given = {**road.options, "tokens": BUDGET["finetune"], "lr": 3e-3, "beta2": 0.98}
        tuned, report = finetune(model, documents, tokenizer, **given)
    save_model(tuned, tokenizer, road.out / "finetuned")
    proof = (
        "ce_before",
        "ce_after",
        "frozen",
        "sha256_before",
        "sha256_after",
        "trained_parameters",
        "tokens",
    )
    return tuned, {name: getattr(report, name) for name in proof}


def drug_accuracy(world: Any, model: Any, tuned: Any) -> list[dict[str, Any]]:
    """Share of right drugs on held-out prompts, in both models, by what fine-tuning did to the disease."""
    from fasttc.evaluation.causal import accuracy

    kept = [disease for disease in world.common if disease not in world.changed]
    groups = {"unchanged": kept, "changed drug": world.changed, "rare disease": world.rare}
    asked = {f"two hops, {name}": ("two_hop", diseases) for name, diseases in groups.items()}
    rows = []
    for name, (kind, diseases) in {**asked, "pattern": ("pattern", None)}.items():
        prompts = world.prompts(kind, 200, phase="finetuned", diseases=diseases)
        rows.append(
            {
                "drug": name,
                "base": accuracy(model, world, prompts),
                "finetuned": accuracy(tuned, world, prompts),
            }
        )
    return rows


def compare(road: Road, world: Any, tuned: Any, tokenizer: Any, tcs: Any) -> dict[str, Any]:
    """A ledger in small: transcoders of the fine-tuned model by every mode of adapting, and from scratch, at one L0.

    Seconds are of the whole call: closed forms and the measurements before and after are in it.
    """
    from fasttc.training import adapt, open_data, train

    data = open_data(tuned, world.finetune_corpus(20_000, seed=1), tokenizer, context=64)
    made: dict[str, tuple[Any, int, float]] = {"unadapted": (tcs, 0, 0.0)}
    adapted, refits = tcs, {"closed form": "only", "PAT": None, "closed form + PAT": "last"}
    with road.stretch("adapt", "adapting the transcoders to the fine-tuned model (PAT)"):
        for name, refit in refits.items():
            given = {**road.options, **UPDATES, "tokens": BUDGET["adapt"], "refit": refit}
            started = time.perf_counter()
            adapted, report = adapt(tuned, tcs, data, **given)
            made[name] = (adapted, report.tokens, time.perf_counter() - started)
        adapted.save_pretrained(road.out / "tcs_pat")
    with road.stretch("scratch", "training transcoders from scratch, to compare"):
        for name, tokens in (("scratch, PAT's budget", BUDGET["adapt"]), ("scratch", BUDGET["scratch"])):
            folder = road.out / f"tcs_scratch_{tokens}"
            given = {**road.options, **SHAPE, **UPDATES, "tokens": tokens, "refit": "last"}
            started = time.perf_counter()
            new, report = train(tuned, data, **given, out=folder)
            made[name] = (new, report.tokens, time.perf_counter() - started)
    with road.stretch("evaluate", "measuring all of them on held-out documents"):
        modes: dict[str, Any] = {name: measured(road, tuned, data, *one) for name, one in made.items()}
    return {**modes, "_adapted": adapted}


def measured(road: Road, model: Any, data: Any, tcs: Any, tokens: int, seconds: float) -> dict[str, Any]:
    """The columns of the demo's table."""
    from fasttc.evaluation import evaluate

    report = evaluate(model, tcs, data, batch_size=40, tokens=16_384, per_layer=False)
    names = ("fvu", "l0", "kl", "top1_error", "ce_original", "ce_replaced", "ce_ablated")
    return {"tokens": tokens, "seconds": round(seconds, 2), **{name: getattr(report, name) for name in names}}


def trace(road: Road, world: Any, models: dict[str, tuple[Any, Any]], tokenizer: Any) -> dict[str, Any]:
    """One two-hop prompt about a changed drug, traced and pruned in both models."""
    from fasttc.attribution import attribute
    from fasttc.graph import write_graph_json

    prompt = world.prompts("two_hop", 1, phase="finetuned", diseases=world.changed)[0]
    found: dict[str, Any] = {
        "prompt": prompt.text,
        "disease": world.values["disease"][prompt.disease],
        "drug": {phase: drugs[prompt.disease] for phase, drugs in world.drugs.items()},
    }
    with road.stretch("attribute", f"tracing {prompt.text!r} in both models"):
        for name, (model, tcs) in models.items():
            graph = attribute(model, tcs, prompt.text, tokenizer=tokenizer)
            graph.save(road.out / f"{name}.graph")
            pruned = graph.prune()
            pruned.save(road.out / f"{name}.pruned.graph")
            write_graph_json(pruned, road.out / "json", slug=name)
            found[name] = {
                "says": graph.logit_labels[0],
                "probability": float(graph.logit_probs[0]),
                "nodes": graph.n_nodes,
                "edges": graph.n_edges,
                "pruned_nodes": pruned.n_nodes,
                "pruned_edges": pruned.n_edges,
                **graph.scores()._asdict(),
            }
    return found


def described(summary: dict[str, Any], out: Path) -> str:
    """The summary for people."""
    swaps = [
        {
            "model": name,
            "two hops follow (>= 0.8)": swap["two_hop_follows"],
            "pattern changes (<= 0.2)": swap["pattern_changes"],
            "passed": "yes" if swap["passed"] else "NO",
            "strict: two hops": swap["strict_two_hop_follows"],
            "strict: pattern": swap["strict_pattern_changes"],
        }
        for name, swap in summary["causal_check"].items()
    ]
    modes = [{"transcoders": name, **values} for name, values in summary["transcoders"].items()]
    graphs = summary["graphs"]
    traced = [{"graph": name, **graphs[name]} for name in ("base", "finetuned")]
    frozen = summary["model"]["finetune"]
    same = "equal" if frozen["sha256_before"] == frozen["sha256_after"] else "DIFFERENT"
    return "\n".join(
        [
            "\nRight drugs on held-out prompts",
            table(summary["model"]["accuracy"]),
            f"FTFA left {frozen['frozen']} tensors frozen; sha256 before and after: {same}",
            "\nCausal check: the drug after swapping the disease inside the model",
            table(swaps),
            "(strict: the disease's representation is taken where other things than the drug are asked for)",
            "\nThe adaptation ledger of this world: on the fine-tuned model, held-out documents, all layers replaced",
            table(modes),
            "(one seed, fixed budgets, no option searched, a base that saw related text: what it is worth on a real "
            "model, searched on both sides, is in docs/adaptation.md)",
            f"\nAttribution of {graphs['prompt']!r} ({graphs['disease']}: {' -> '.join(graphs['drug'].values())})",
            table(traced),
            f"\nwrote {out}/: summary.json; models base, finetuned; transcoders tcs_*; *.graph; json/",
            f"{summary['total_seconds']:.0f} s in all",
        ]
    )
