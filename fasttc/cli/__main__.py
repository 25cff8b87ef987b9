"""The ``fasttc`` command: loads each verb's file only when that verb is called."""

import os
import sys
from importlib import import_module

import click

from fasttc import __version__

VERBS = {  # verb -> (module, one line for the overview)
    "demo": ("demo", "The whole road on a small built-in model."),
    "train": ("train", "Train transcoders for every MLP of a model, from scratch."),
    "finetune": ("finetune", "FTFA: fine-tune the feed-forward layers only."),
    "adapt": ("adapt", "PAT: adapt existing transcoders to a fine-tuned model."),
    "adapter": ("adapter", "Adapters: what fine-tuning changed, as features beside the base's MLPs."),
    "evaluate": ("evaluate", "FVU, L0, KL, top-1 error and cross-entropy of transcoders on held-out text."),
    "sample": ("sample", "Text from a model."),
    "attribute": ("attribute", "Attribution graph of a prompt."),
    "intervene": ("intervene", "Change features of the running model and see what it answers."),
    "graph": ("graph", "Prune, merge, compare, trace, view and export attribution graphs."),
    "features": ("features", "What features stand for: examples, logits, firing rates, as feature files."),
    "categories": ("categories", "Features by relevance and correctness, from labels or a judge."),
    "shift": ("shift", "How far fine-tuning moved what a model holds of documents, class by class."),
    "inspect": ("inspect", "What a transcoder set, a graph or a model folder holds."),
    "bench": ("bench", "Benchmarks."),
}


class Verbs(click.Group):
    """Resolves verbs from :data:`VERBS` without importing the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return import_module(f"fasttc.cli.{VERBS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fasttc")
def cli() -> None:
    """Transcoders for language models: train, adapt to fine-tuned models, and read as circuits."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Wrong input is one line on stderr and exit code 2; --debug shows the traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        cli(arguments, prog_name="fasttc", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo(f"fasttc: {str(error) or 'interrupted'}", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if "--debug" in arguments:
            raise
        click.echo(f"fasttc: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
