"""``fasttc bench``: the benchmarks, with the arguments of ``python -m benchmarks``."""

import sys
from importlib import import_module

import click


@click.command("bench", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run a suite of benchmarks (ops, attribution, cpu, gpu, ...); each explains itself with --help."""
    status = import_module("fasttc.benchmarks.__main__").main(list(arguments) or ["--help"])
    if status:
        sys.exit(status)
