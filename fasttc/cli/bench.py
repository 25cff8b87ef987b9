"""``fasttc bench``: the benchmarks, as ``python -m benchmarks`` runs them in a checkout."""

import sys

import click


@click.command("bench", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Run a benchmark suite; `fasttc bench --help` lists them."""
    from fasttc.benchmarks.__main__ import main

    sys.exit(main(list(arguments)))
