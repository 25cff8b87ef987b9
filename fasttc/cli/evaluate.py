"""``fasttc evaluate``: how well transcoders stand in for a model's MLPs."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._carry_over import carried_over
from fasttc.cli._common import Run, load_model, load_transcoders, plot_option, verb
from fasttc.cli._data import data_options


@click.command("evaluate")
@click.argument("model")
@click.option("--transcoders", required=True, help="Folder or hub reference of the transcoders.")
@click.option("--base", help="Transcoders they came from: adds what of every feature is carried over.")
@click.option(
    "--features",
    "table_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --base: a CSV of every feature, what it kept and whether its label still holds.",
)
@data_options()
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option(
    "--tokens", default=32_768, show_default=True, help="About how many tokens; 0: the whole split."
)
@click.option("--per-layer/--all-layers-only", default=True, help="Also replace and remove each layer alone.")
@plot_option("FVU, L0 and the cost in cross-entropy by layer,")
@verb
def command(
    run: Run,
    model: str,
    transcoders: str,
    base: str | None,
    data: str,
    text: str | None,
    context: int,
    batch_size: int,
    split_seed: int,
    split: str,
    tokens: int,
    per_layer: bool,
    table_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure transcoders on held-out text of MODEL.

    FVU, MSE, L0, dead and dense features per layer; KL and top-1 error of the model with its MLPs replaced;
    cross-entropy as it is, replaced (each layer alone and all) and with MLPs removed. With --base, how many features
    are kept, changed, dead or newly used.
    """
    from fasttc.evaluation import evaluate
    from fasttc.training import open_data

    if table_file is not None and base is None:
        raise ValueError("--features: expected --base with it, got none")
    language_model, tokenizer = load_model(run, model)
    tcs = load_transcoders(run, transcoders)
    origin = None if base is None else load_transcoders(run, base)
    opened = open_data(language_model, data, tokenizer, text=text, context=context, split_seed=split_seed)
    options: dict[str, Any] = {"split": split, "tokens": tokens or None, "batch_size": batch_size}
    report = evaluate(language_model, tcs, opened, base=origin, per_layer=per_layer, progress=True, **options)
    result, lines = report.to_dict(), str(report)
    if origin is not None:
        carried, shown = carried_over(language_model, origin, tcs, opened, table_file, **options)
        result, lines = result | carried, f"{lines}\n\n{shown}"
    if plot is not None:
        from fasttc.report.plots import quality_by_layer

        quality_by_layer(report.to_dict(), plot)
        run.say(f"wrote {plot}")
    run.finish(result, lines)
