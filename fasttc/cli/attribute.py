"""``fasttc attribute``: the attribution graph of a prompt."""

from pathlib import Path

import click

from fasttc.cli._common import Run, is_first, load_model, load_transcoders, one_prompt, table, verb
from fasttc.cli._distributed import processes


@click.command("attribute")
@click.argument("model")
@click.option("--transcoders", required=True, help="Folder or hub reference of the transcoders.")
@click.option("--prompt", help="The text whose next token is explained.")
@click.option("--prompt-ids", help="The same as token ids, used as given: 2,17,9.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Where the graph goes."
)
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
@verb
def command(
    run: Run,
    model: str,
    transcoders: str,
    prompt: str | None,
    prompt_ids: str | None,
    out: Path,
    targets: tuple[str, ...],
    max_logits: int,
    logit_prob: float,
    max_feature_nodes: int | None,
    edge_share: float,
    memory_gib: float | None,
) -> None:
    """Trace which tokens and features of a prompt lead to MODEL's next token.

    Edges are direct effects with attention patterns and norm scales frozen; what the transcoders miss is an error
    node. Next: `fasttc graph prune`, `fasttc graph export`.

    Several processes share the work: `torchrun --nproc-per-node 4 -m fasttc attribute ...`.
    """
    from fasttc.attribution import attribute

    with processes(run):
        language_model, tokenizer = load_model(run, model)
        graph = attribute(
            language_model,
            load_transcoders(run, transcoders),
            one_prompt(prompt, prompt_ids, tokenizer),
            tokenizer=tokenizer,
            targets=[int(t) if t.isdigit() and tokenizer is None else t for t in targets] or None,
            max_logits=max_logits,
            logit_prob=logit_prob,
            max_feature_nodes=max_feature_nodes,
            edge_share=edge_share,
            memory_budget=None if memory_gib is None else int(memory_gib * 2**30),
            progress=is_first(),
        )
    if not is_first():
        return
    graph.save(out)
    scores = graph.scores()._asdict()
    rows = [
        {"next token": repr(label), "probability": probability}
        for label, probability in zip(graph.logit_labels, graph.logit_probs.tolist(), strict=True)
    ]
    result = {
        "out": str(out),
        "features": graph.n_features,
        "nodes": graph.n_nodes,
        "edges": graph.n_edges,
        "targets": rows,
        "scores": scores,
    }
    named = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    run.finish(result, f"{table(rows)}\n\n{graph!r}\n{named}\nwrote {out}")
