"""``fasttc finetune``: FTFA, fine-tuning with frozen attention, and what it is compared with."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, verb
from fasttc.cli._data import data_options
from fasttc.cli._training import costs, training_options


@click.command("finetune")
@click.argument("model")
@data_options()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the model."
)
@click.option(
    "--parameters",
    type=click.Choice(["ffn", "all", "lora"]),
    default="ffn",
    show_default=True,
    help="What trains: the feed-forward layers (FTFA), the whole model, or low-rank matrices beside every linear "
    "layer, merged at the end (needs peft: pip install 'fasttc[finetune]').",
)
@click.option("--lora-rank", default=8, show_default=True, help="Rank of the matrices of lora.")
@click.option(
    "--lora-alpha", type=float, help="Lora adds alpha/rank times their product. Default: twice the rank."
)
@click.option("--weight-decay", default=0.0, show_default=True, help="Of AdamW.")
@training_options
@verb
def command(run: Run, model: str, data: str, out: Path, training: dict[str, Any], **options: Any) -> None:
    """Fine-tune the feed-forward layers of MODEL on a text; everything else stays bit for bit as it is.

    The proof is printed: how many tensors were frozen, and one hash over them before and after.
    """
    from fasttc.training import finetune

    language_model, tokenizer = load_model(run, model)
    _, report = finetune(
        language_model, data, tokenizer, out=out, inplace=True, seed=run.seed, **options, **training
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    same = "equal" if report.sha256_before == report.sha256_after else "DIFFERENT"
    text = (
        f"cross-entropy on validation documents: {report.ce_before:.4f} -> {report.ce_after:.4f} nats per token\n"
        f"trained {len(report.trained)} tensors ({report.trained_parameters:,} parameters); {report.frozen} frozen\n"
        f"sha256 of the frozen ones before {report.sha256_before[:16]}, after {report.sha256_after[:16]}: {same}\n"
        f"{costs(report)}\nwrote {out}"
    )
    run.finish({"out": str(out), **report.to_dict()}, text)
