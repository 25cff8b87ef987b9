"""``fasttc features``: evidence for what features stand for, as files that graph viewers read."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, load_transcoders, table, verb
from fasttc.cli._data import data_options


@click.command("features")
@click.argument("model")
@click.option("--transcoders", required=True, help="Folder or hub reference of the transcoders.")
@data_options(batch_size=32)
@click.option("--features", "chosen", help="Which, as LAYER:INDEX pairs: 0:12,3:7.")
@click.option(
    "--graph",
    type=click.Path(path_type=Path, dir_okay=False),
    help="All features of this graph file instead (pruned: those kept).",
)
@click.option("--all", "everything", is_flag=True, help="All features of all layers instead.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write."
)
@click.option("--scan", default="features", show_default=True, help="Name of the set in the files.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["plain", "packed"]),
    default="plain",
    show_default=True,
    help="plain: OUT/SCAN/ID.json for each feature; packed: OUT/index.json.gz and one file per layer.",
)
@click.option("--split", default="train", show_default=True, help="train, validation or test.")
@click.option("--tokens", default=1_000_000, show_default=True, help="About how many; 0: the whole split.")
@click.option("--examples", default=20, show_default=True, help="Strongest, and sampled, examples of each.")
@verb
def command(
    run: Run,
    model: str,
    transcoders: str,
    data: str,
    text: str | None,
    context: int,
    batch_size: int,
    split_seed: int,
    chosen: str | None,
    graph: Path | None,
    everything: bool,
    out: Path,
    scan: str,
    kind: str,
    split: str,
    tokens: int,
    examples: int,
) -> None:
    """Collect what features of MODEL's transcoders stand for, in one pass over text.

    Top and sampled examples in context, tokens promoted and suppressed, tokens that drive the feature, histogram,
    firing rate: as the feature files of circuit-tracer's and Neuronpedia's viewers. `fasttc graph view` shows them too.
    """
    from fasttc.analysis import feature_evidence
    from fasttc.report.feature_files import write_packed, write_plain

    if not scan or "/" in scan or scan.startswith("."):
        raise ValueError(f"--scan: expected a plain name, got {scan!r}")
    wanted = _wanted(chosen, graph, everything)
    language_model, tokenizer = load_model(run, model)
    tcs = load_transcoders(run, transcoders)
    found = feature_evidence(
        language_model,
        tcs,
        data,
        wanted,
        tokenizer=tokenizer,
        text=text,
        split=split,
        tokens=tokens or None,
        batch_size=batch_size,
        context=context,
        split_seed=split_seed,
        examples=examples,
        sampled=examples,
        seed=run.seed,
        progress=True,
    )
    names = _names(language_model, tokenizer)
    if kind == "packed":
        where = write_packed(out, scan, found, names, tcs[0].n_features)
    else:
        where = write_plain(out, scan, found, names)
    rows = [
        {
            "layer": e.layer,
            "feature": e.index,
            "rate": e.rate,
            "max": e.maximum,
            "promotes": " ".join(repr(names[token]) for token, _ in e.promoted[:4]),
        }
        for e in found
    ]
    n_tokens = found[0].n_tokens
    shown = table(rows[:20]) + (f"\n... and {len(rows) - 20:,} more" if len(rows) > 20 else "")
    run.finish(
        {"written": str(where), "tokens": n_tokens, "features": rows},
        f"{shown}\n{len(rows):,} features over {n_tokens:,} tokens: {where}",
    )


def _wanted(chosen: str | None, graph: Path | None, everything: bool) -> list[tuple[int, int]] | None:
    if (chosen is not None) + (graph is not None) + everything != 1:
        raise ValueError("expected exactly one of --features, --graph and --all")
    if graph is not None:
        from fasttc.graph import Graph

        return sorted({(layer, index) for layer, _, index in Graph.load(graph).features.tolist()})
    return None if chosen is None else [_pair(text) for text in chosen.split(",")]


def _pair(text: str) -> tuple[int, int]:
    try:
        layer, index = (int(part) for part in text.split(":"))
    except ValueError as error:
        raise ValueError(f"--features: expected LAYER:INDEX pairs (0:12,3:7), got {text!r}") from error
    return layer, index


def _names(model: Any, tokenizer: Any) -> list[str]:
    """The text of every token id of the model's vocabulary."""
    import torch

    from fasttc.attribution.prompt import token_names
    from fasttc.models import anatomy

    return token_names(torch.arange(anatomy(model).vocab_size), tokenizer)
