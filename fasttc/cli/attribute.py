"""``fasttc attribute``: the attribution graph of a prompt."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._adapters import load_adapters
from fasttc.cli._common import (
    Run,
    is_first,
    load_model,
    load_transcoders,
    one_prompt,
    table,
    verb,
)
from fasttc.cli._distributed import processes
from fasttc.cli._heads import head_table, strongest_by_head


@click.command("attribute")
@click.argument("model")
@click.option("--transcoders", help="Folder or hub reference of the transcoders.")
@click.option(
    "--adapters",
    help="Folder or hub reference of adapters: their features become nodes beside the transcoders'.",
)
@click.option(
    "--base",
    help="Run MODEL with this model's MLPs and the adapters; needed where there are no transcoders.",
)
@click.option("--prompt", help="The text whose next token is explained.")
@click.option("--prompt-ids", help="The same as token ids, used as given: 2,17,9.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of texts, one per line: a graph each, numbered, in the folder --out.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the graph goes.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Explain this next token (repeatable). Default: the likely ones.",
)
@click.option("--max-logits", default=10, show_default=True, help="Next tokens explained at most.")
@click.option("--logit-prob", default=0.95, show_default=True, help="Probability that they reach together.")
@click.option(
    "--max-feature-nodes", type=int, help="Feature nodes at most, chosen by influence. Default: all."
)
@click.option(
    "--edge-share", default=1.0, show_default=True, help="Share of each row's mass that stored edges reach."
)
@click.option(
    "--memory", "memory_gib", type=float, help="GiB for the sweep. Default: 1, or a quarter of a free GPU."
)
@click.option(
    "--split-by-head",
    "by_head",
    metavar="N",
    default=0,
    type=click.IntRange(min=0),
    help="Also say which attention heads carry the N edges with most influence.",
)
@verb
def command(
    run: Run,
    model: str,
    transcoders: str | None,
    adapters: str | None,
    base: str | None,
    prompt: str | None,
    prompt_ids: str | None,
    prompts: Path | None,
    out: Path,
    targets: tuple[str, ...],
    max_logits: int,
    logit_prob: float,
    max_feature_nodes: int | None,
    edge_share: float,
    memory_gib: float | None,
    by_head: int,
) -> None:
    """Trace which tokens and features of a prompt lead to MODEL's next token.

    Edges are direct effects with attention patterns and norm scales frozen; what the transcoders miss is an error
    node. With --adapters, each feature is the transcoders' or the adapters', and the page colours them apart. Next:
    `fasttc graph prune`, `fasttc graph view`, `fasttc graph export`.

    Several processes share the work: `torchrun --nproc-per-node 4 -m fasttc attribute ...`.
    """
    from fasttc.attribution import attribute_many

    if prompts is not None and (prompt is not None or prompt_ids is not None):
        raise ValueError("--prompts: expected it alone, got another prompt beside it")
    results = []
    with processes(run):
        tcs, owners = _owners(run, transcoders, adapters, base)
        language_model, tokenizer = load_model(run, model)
        graphs = attribute_many(
            language_model,
            tcs,
            [one_prompt(prompt, prompt_ids, tokenizer)] if prompts is None else _lines(prompts, tokenizer),
            tokenizer=tokenizer,
            targets=[int(t) if t.isdigit() and tokenizer is None else t for t in targets] or None,
            max_logits=max_logits,
            logit_prob=logit_prob,
            max_feature_nodes=max_feature_nodes,
            edge_share=edge_share,
            memory_budget=None if memory_gib is None else int(memory_gib * 2**30),
            progress=is_first(),
            **owners,
        )
        for number, graph in enumerate(graphs):
            if is_first():
                path = out if prompts is None else out / f"{number:04d}.graph"
                graph.save(path)
                results.append(_described(graph, path))
                if by_head:
                    split = strongest_by_head(language_model, tcs, graph, by_head, **owners)
                    results[-1]["heads"] = split
    if is_first():
        whole = results[0] if prompts is None else {"out": str(out), "graphs": results}
        run.finish(whole, "\n\n".join(map(_shown, results)))


def _owners(
    run: Run, transcoders: str | None, adapters: str | None, base: str | None
) -> tuple[Any, dict[str, Any]]:
    """Whose features the graph gets: the transcoders, and keyword arguments of ``attribute`` for adapters."""
    if transcoders is None and adapters is None:
        raise ValueError("expected --transcoders, --adapters or both, got neither")
    given = {
        "adapters": None if adapters is None else load_adapters(run, adapters),
        "base": None if base is None else load_model(run, base)[0],
    }
    return None if transcoders is None else load_transcoders(run, transcoders), given


def _lines(path: Path, tokenizer: Any) -> list[str]:
    """The texts of a file, one per line; empty lines are left out."""
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: give one prompt as --prompt-ids 2,17,9")
    texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path}: expected one prompt per line, got none")
    return texts


def _described(graph: Any, path: Path) -> dict[str, Any]:
    """What the JSON result says of a graph."""
    rows = [
        {"next token": repr(label), "probability": probability}
        for label, probability in zip(graph.logit_labels, graph.logit_probs.tolist(), strict=True)
    ]
    adapted = int(graph.from_adapter.sum())
    return {
        "out": str(path),
        "features": graph.n_features,
        **({"of_adapters": adapted} if graph.owners else {}),
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "targets": rows,
        "scores": graph.scores()._asdict(),
    }


def _shown(result: dict[str, Any]) -> str:
    """The same for people."""
    own = f" ({result['of_adapters']:,} of adapters)" if "of_adapters" in result else ""
    sizes = f"{result['features']:,} features{own}, {result['nodes']:,} nodes, {result['edges']:,} edges"
    named = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
    heads = f"\n{head_table(result['heads'])}\n" if "heads" in result else ""
    return f"{table(result['targets'])}\n{heads}\n{sizes}\n{named}\nwrote {result['out']}"
