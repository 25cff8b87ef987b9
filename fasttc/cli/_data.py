"""The options of every verb that reads a data file."""

import functools
from collections.abc import Callable
from typing import Any

import click


def data_options(
    context: int = 128, batch_size: int = 8, required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds --data, --text, --context, --batch-size and --split-seed with these defaults."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @click.option(
            "--data", required=required, help="A .txt, .jsonl, .json or .parquet file, or a data set id."
        )
        @click.option("--text", help="How a record becomes text: '{QUESTION} {CONTEXTS} {LONG_ANSWER}'.")
        @click.option("--context", default=context, show_default=True, help="Tokens of a training row.")
        @click.option("--batch-size", default=batch_size, show_default=True, help="Rows at a time.")
        @click.option(
            "--split-seed",
            default=0,
            show_default=True,
            help="Which documents are train, validation and test. Keep it the same over all verbs.",
        )
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> None:
            function(*args, **options)

        return call

    return decorate
