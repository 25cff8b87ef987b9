"""``fasttc adapter``: what fine-tuning changed, as sparse features beside the base's MLPs."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli import adapter_evaluate, adapter_generate
from fasttc.cli._adapters import load_pair, quality_text
from fasttc.cli._common import Run, verb
from fasttc.cli._data import data_options
from fasttc.cli._distributed import check_alone
from fasttc.cli._training import costs, training_options


@click.group("adapter")
def command() -> None:
    """Transcoder adapters between a base model and its fine-tuned descendant."""


for verb_file in (adapter_evaluate, adapter_generate):
    command.add_command(verb_file.command)


@command.command("train")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@data_options()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the adapters."
)
@click.option("--features", "n_features", default=1024, show_default=True, help="Of every layer.")
@click.option("--l1", default=1e-3, show_default=True, help="Weight of the penalty: more is sparser.")
@click.option("--l1-ramp", default=0.1, show_default=True, help="Share of the steps in which it rises.")
@click.option("--bridge", default=2.0, show_default=True, help="Weight of the bridging losses; 0: none.")
@click.option(
    "--loss",
    type=click.Choice(["kl", "lm"]),
    default="kl",
    show_default=True,
    help="lm: next tokens instead.",
)
@click.option("--bias-only", is_flag=True, help="Biases and no features: what features have to beat.")
@training_options
@verb
def train(
    run: Run, target: str, base: str, data: str, out: Path, training: dict[str, Any], **options: Any
) -> None:
    """Train adapters so that BASE's MLPs with them act like those of TARGET, the fine-tuned model."""
    from fasttc.training import train_adapters

    check_alone()
    model, base_model, tokenizer = load_pair(run, target, base)
    adapters, report = train_adapters(
        model, base_model, data, tokenizer, out=out, seed=run.seed, **options, **training
    )
    text = f"{quality_text(report)}\n\n{costs(report)}\nwrote {adapters!r}: {out}"
    run.finish({"out": str(out), **report.to_dict()}, text)
