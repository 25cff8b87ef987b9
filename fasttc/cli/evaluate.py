"""``fasttc evaluate``: how well transcoders stand in for a model's MLPs, and how well a model answers questions."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from fasttc.cli._carry_over import carried_over
from fasttc.cli._common import Run, load_model, load_transcoders, plot_option, verb
from fasttc.cli._data import data_options
from fasttc.cli._task import ask, read_task, task_options, task_text


@click.command("evaluate")
@click.argument("model")
@click.option("--transcoders", help="Folder or hub reference of the transcoders.")
@click.option("--base", help="Transcoders they came from: adds what of every feature is carried over.")
@click.option(
    "--features",
    "table_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --base: a CSV of every feature, what it kept and whether its label still holds.",
)
@data_options(required=False)
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option(
    "--tokens", default=32_768, show_default=True, help="About how many tokens; 0: the whole split."
)
@click.option("--per-layer/--all-layers-only", default=True, help="Also replace and remove each layer alone.")
@plot_option("FVU, L0 and the cost in cross-entropy by layer,")
@task_options
@verb
def command(
    run: Run,
    model: str,
    data: str | None,
    prompt: str | None,
    answer: str | None,
    chat: bool,
    asked: dict[str, Any],
    **options: Any,
) -> None:
    """Measure transcoders on held-out text of MODEL, or MODEL's answers to the questions of a task.

    With --transcoders and --data: FVU, MSE, L0, dead and dense features per layer; KL and top-1 error of the model with
    its MLPs replaced; cross-entropy as it is, replaced (each layer alone and all) and with MLPs removed. With --base,
    how many features are kept, changed, dead or newly used.

    With --task: accuracy, per class where the questions have the same options; with --transcoders too, of the model
    with its MLPs replaced.
    """
    questions = read_task(asked, prompt, answer)
    if (questions is None) == (data is None):
        raise ValueError(f"expected one of --data and --task, got {'none' if data is None else 'both'}")
    if questions is not None:
        _task(run, model, questions, asked, chat, options["transcoders"])
    else:
        _transcoders(run, model, data, **options)


def _task(run: Run, model: str, questions: Any, asked: dict[str, Any], chat: bool, tcs: str | None) -> None:
    from fasttc.models import replaced

    language_model, tokenizer = load_model(run, model)
    with nullcontext() if tcs is None else replaced(language_model, load_transcoders(run, tcs)):
        report = ask(language_model, questions, tokenizer, asked, chat)
    run.finish(report.to_dict(), task_text(report))


def _transcoders(
    run: Run,
    model: str,
    data: Any,
    transcoders: str | None,
    base: str | None,
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
    from fasttc.evaluation import evaluate
    from fasttc.training import open_data

    if transcoders is None:
        raise ValueError("--transcoders: expected a folder or a hub reference beside --data, got none")
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
