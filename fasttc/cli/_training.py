"""The options of every verb that trains."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import plot_option, table

NAMES = ("tokens", "lr", "warmup", "decay", "clip", "checkpoint_every", "resume")
DECAYS = click.Choice(["cosine", "linear", "constant"])


def training_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options :data:`NAMES`, which the function gets together as ``training``, and ``--plot``."""

    @click.option(
        "--tokens", default=1_000_000, show_default=True, help="Tokens to process, repeats counted."
    )
    @click.option("--lr", type=float, help="Learning rate at its height. Default: the method's.")
    @click.option(
        "--warmup", default=0.05, show_default=True, help="Share of the steps in which the rate rises."
    )
    @click.option("--decay", type=DECAYS, default="cosine", show_default=True, help="Of the rate after that.")
    @click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm; 0: no clipping.")
    @click.option("--checkpoint-every", type=int, help="Steps between checkpoints. Default: ten in all.")
    @click.option("--resume", is_flag=True, help="Continue the checkpoint in OUT.run, bit for bit.")
    @plot_option("Training curves")
    @functools.wraps(function)
    def call(plot: Path | None, out: Path, **options: Any) -> None:
        training = {name: options.pop(name) for name in NAMES}
        function(out=out, training=training, **options)
        if plot is not None:
            from fasttc.report.plots import training_curves

            training_curves(out.with_name(f"{out.name}.run") / "metrics.jsonl", plot)
            click.echo(f"wrote {plot}", err=True)

    return call


def transcoder_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that only trainings of transcoders have; the function gets them as keyword arguments."""

    @click.option(
        "--refit",
        type=click.Choice(["first", "last", "both", "only", "none"]),
        help="Closed-form decoders before training, after it, both, or instead of it. Default: the method's.",
    )
    @click.option("--update-tokens", type=int, help="Tokens in one update. Default: the method's.")
    @click.option(
        "--whiten/--no-whiten",
        default=True,
        show_default=True,
        help="Encoders learn on centred, half-whitened inputs; the result is an ordinary transcoder either way.",
    )
    @click.option("--buffer", default=1, show_default=True, help="Batches held in memory and mixed.")
    @click.option(
        "--patience", type=int, help="Stop after so many looks (of twenty) without a better held-out FVU."
    )
    @click.option(
        "--shard-features",
        is_flag=True,
        help="Under torchrun each process trains some features of every layer, not some layers: for layers too wide "
        "for one. Without closed forms.",
    )
    @functools.wraps(function)
    def call(
        *args: Any,
        refit: str | None,
        update_tokens: int | None,
        whiten: bool,
        buffer: int,
        patience: int | None,
        shard_features: bool,
        **options: Any,
    ) -> None:
        chosen: dict[str, Any] = {
            "whiten": whiten,
            "buffer": buffer,
            "patience": patience,
            "shard_features": shard_features,
        }
        if refit is not None:
            chosen["refit"] = None if refit == "none" else refit
        if update_tokens is not None:
            chosen["update_tokens"] = update_tokens
        function(*args, fitting=chosen, **options)

    return call


def layer_table(report: Any) -> str:
    """Quality on validation documents, per layer, as a table."""
    before = {quality.layer: quality.fvu for quality in report.before}
    rows = []
    for quality in report.layers:
        row = {"layer": quality.layer, "FVU": quality.fvu, "L0": quality.l0, "dead": quality.dead}
        rows.append({**row, "FVU before": before[quality.layer]} if quality.layer in before else row)
    return table(rows)


def costs(report: Any) -> str:
    """What a training took, in one line."""
    stopped = f"\n{report.stopped}" if report.stopped else ""
    return f"{report.steps:,} steps, {report.tokens:,} tokens, {report.seconds:.1f} s{stopped}"
