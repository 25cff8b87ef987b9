"""``fasttc evaluate``: how well transcoders stand in for a model's MLPs."""

import click

from fasttc.cli._common import Run, load_model, load_transcoders, verb
from fasttc.cli._data import data_options


@click.command("evaluate")
@click.argument("model")
@click.option("--transcoders", required=True, help="Folder or hub reference of the transcoders.")
@click.option("--base", help="Transcoders they came from: adds the cosine of every feature to its origin.")
@data_options()
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option(
    "--tokens", default=32_768, show_default=True, help="About how many tokens; 0: the whole split."
)
@click.option("--per-layer/--all-layers-only", default=True, help="Also replace and remove each layer alone.")
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
) -> None:
    """Measure transcoders on held-out text of MODEL.

    FVU, MSE, L0, dead and dense features per layer; KL and top-1 error of the model with its MLPs replaced;
    cross-entropy as it is, replaced (each layer alone and all) and with MLPs removed.
    """
    from fasttc.evaluation import evaluate

    language_model, tokenizer = load_model(run, model)
    report = evaluate(
        language_model,
        load_transcoders(run, transcoders),
        data,
        tokenizer=tokenizer,
        base=None if base is None else load_transcoders(run, base),
        text=text,
        split=split,
        tokens=tokens or None,
        batch_size=batch_size,
        context=context,
        split_seed=split_seed,
        per_layer=per_layer,
        progress=True,
    )
    run.finish(report.to_dict(), str(report))
