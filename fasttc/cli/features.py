"""``fasttc features``: evidence for what features stand for, as files that viewers, people and judges read."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from fasttc.cli._adapters import load_adapters, load_pair, parse_features
from fasttc.cli._common import Run, load_model, load_transcoders, table, verb
from fasttc.cli._data import data_options


@click.command("features")
@click.argument("model")
@click.option("--transcoders", help="Folder or hub reference of the transcoders.")
@click.option("--adapters", help="Adapters instead, looked at in the hybrid of MODEL with --base.")
@click.option("--base", help="With --adapters: the model that MODEL was fine-tuned from.")
@data_options(batch_size=32)
@click.option("--features", "chosen", help="Which, as LAYER:INDEX pairs: 0:12,3:7.")
@click.option(
    "--graph",
    type=click.Path(path_type=Path, dir_okay=False),
    help="All features of this graph file instead (pruned: those kept).",
)
@click.option("--all", "everything", is_flag=True, help="All features of all layers instead.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; of lines: the file."
)
@click.option("--scan", default="features", show_default=True, help="Name of the set in the files.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["plain", "packed", "lines"]),
    default="plain",
    show_default=True,
    help="plain: OUT/SCAN/ID.json for each feature; packed: OUT/index.json.gz and one file per layer, in the place "
    "of an earlier packed set; lines: one JSON object per line, for a person or a judge.",
)
@click.option("--split", default="train", show_default=True, help="train, validation or test.")
@click.option("--tokens", default=1_000_000, show_default=True, help="About how many; 0: the whole split.")
@click.option("--examples", default=20, show_default=True, help="Strongest, and sampled, examples of each.")
@verb
def command(
    run: Run,
    model: str,
    transcoders: str | None,
    adapters: str | None,
    base: str | None,
    data: str,
    chosen: str | None,
    graph: Path | None,
    everything: bool,
    out: Path,
    scan: str,
    kind: str,
    tokens: int,
    examples: int,
    **options: Any,
) -> None:
    """Collect what features of MODEL's transcoders or adapters stand for, in one pass over text.

    Top and sampled examples in context, tokens promoted and suppressed, tokens that drive the feature, histogram,
    firing rate: as the feature files of circuit-tracer's and Neuronpedia's viewers. `fasttc graph view` shows them too.
    As lines: figures, tokens and the strongest examples as marked text. Next: `fasttc categories`.
    """
    from fasttc.analysis import feature_evidence
    from fasttc.report.feature_files import check_packed_folder

    if not scan or "/" in scan or scan.startswith("."):
        raise ValueError(f"--scan: expected a plain name, got {scan!r}")
    if out.exists() and (kind == "lines") != out.is_file():
        expected, got = ("file", "folder") if kind == "lines" else ("folder", "file")
        raise ValueError(f"--out: expected a {expected} for --format {kind}, {out} is a {got}")
    if kind == "packed":
        check_packed_folder(out)
    wanted = _wanted(chosen, graph, everything, adapters is not None)
    language_model, tokenizer, tcs, place = _opened(run, model, transcoders, adapters, base)
    with place:
        found = feature_evidence(
            language_model,
            tcs,
            data,
            wanted,
            tokenizer=tokenizer,
            tokens=tokens or None,
            examples=examples,
            sampled=examples,
            seed=run.seed,
            progress=True,
            **options,
        )
    names = _names(language_model, tokenizer)
    where = _write(out, kind, scan, found, names, tokenizer, tcs[0].n_features, adapters is not None)
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


def _opened(
    run: Run, model: str, transcoders: str | None, adapters: str | None, base: str | None
) -> tuple[Any, Any, Any, AbstractContextManager[Any]]:
    """(model, tokenizer, transcoders or adapters, where they run)."""
    from fasttc.models import hybrid

    if (transcoders is None) == (adapters is None):
        raise ValueError("expected exactly one of --transcoders and --adapters")
    if (adapters is None) != (base is None):
        raise ValueError("expected --adapters and --base together, got one of them")
    if adapters is None or base is None:
        loaded = load_transcoders(run, transcoders or "")
        return *load_model(run, model), loaded, nullcontext()
    language_model, base_model, tokenizer = load_pair(run, model, base)
    loaded = load_adapters(run, adapters)
    return language_model, tokenizer, loaded, hybrid(language_model, base_model, loaded)


def _write(
    out: Path,
    kind: str,
    scan: str,
    found: Any,
    names: list[str],
    tokenizer: Any,
    n_features: int,
    of_adapters: bool,
) -> Path:
    from fasttc.report.feature_files import write_lines, write_packed, write_plain

    owner = "adapter" if of_adapters else "transcoder"
    if kind == "packed":
        return write_packed(out, scan, found, names, n_features, owner)
    if kind == "plain":
        return write_plain(out, scan, found, names, owner)

    def decode(ids: list[int]) -> str:
        return " ".join(names[i] for i in ids) if tokenizer is None else tokenizer.decode(ids)

    return write_lines(out, found, names, decode)


def _wanted(
    chosen: str | None, graph: Path | None, everything: bool, of_adapters: bool
) -> list[tuple[int, int]] | None:
    if (chosen is not None) + (graph is not None) + everything != 1:
        raise ValueError("expected exactly one of --features, --graph and --all")
    if graph is not None:
        return _of_graph(graph, of_adapters)
    return None if chosen is None else parse_features(chosen, "--features")


def _of_graph(path: Path, of_adapters: bool) -> list[tuple[int, int]]:
    """Features of a graph by the number in their own set: the adapters', or the transcoders'."""
    from fasttc.graph import Graph

    graph = Graph.load(path)
    first = graph.metadata["adapters_from"] if of_adapters and graph.owners else [0] * graph.n_layers
    own = graph.features[graph.from_adapter == of_adapters]
    if not len(own):
        raise ValueError(
            f"--graph: expected features of {'adapters' if of_adapters else 'transcoders'}, got none"
        )
    return sorted({(layer, index - first[layer]) for layer, _, index in own.tolist()})


def _names(model: Any, tokenizer: Any) -> list[str]:
    """The text of every token id of the model's vocabulary."""
    import torch

    from fasttc.attribution.prompt import token_names
    from fasttc.models import anatomy

    return token_names(torch.arange(anatomy(model).vocab_size), tokenizer)
