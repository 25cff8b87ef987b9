"""``fasttc finetune``: FTFA, fine-tuning with frozen attention, and what it is compared with."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._common import Run, load_model, verb
from fasttc.cli._data import data_options
from fasttc.cli._task import ask, read_task, task_options, task_text
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
@click.option(
    "--micro-batch", type=int, help="Rows that run at a time; gradients are added up. Default: all."
)
@click.option("--checkpointing", is_flag=True, help="Compute activations twice instead of keeping them.")
@click.option(
    "--optimiser",
    type=click.Choice(["adamw", "adamw8bit"]),
    default="adamw",
    show_default=True,
    help="adamw8bit keeps its averages in 8 bits (needs bitsandbytes).",
)
@click.option("--weight-decay", default=0.0, show_default=True, help="Of AdamW.")
@task_options
@training_options
@verb
def command(
    run: Run,
    model: str,
    data: str,
    out: Path,
    prompt: str | None,
    answer: str | None,
    chat: bool,
    asked: dict[str, Any],
    training: dict[str, Any],
    text: str | None,
    **options: Any,
) -> None:
    """Fine-tune the feed-forward layers of MODEL on a text; everything else stays bit for bit as it is.

    The proof is printed: how many tensors were frozen, and one hash over them before and after.

    Instead of --text, --prompt and --answer say what is read and what is learned after it. With --task the model
    answers those questions before and after (none of them should be in the data); beside --text, --prompt and --answer
    are of the task alone.
    """
    from fasttc.training import finetune

    questions = read_task(asked, prompt, answer)
    language_model, tokenizer = load_model(run, model)
    before = None if questions is None else ask(language_model, questions, tokenizer, asked, chat)
    learned = {"text": text} if text is not None else {"prompt": prompt, "answer": answer, "chat": chat}
    _, report = finetune(
        language_model,
        data,
        tokenizer,
        out=out,
        inplace=True,
        seed=run.seed,
        **learned,
        **options,
        **training,
    )
    same = "equal" if report.sha256_before == report.sha256_after else "DIFFERENT"
    shown = (
        f"cross-entropy on validation documents: {report.ce_before:.4f} -> {report.ce_after:.4f} nats per token\n"
        f"{_worse(report)}"
        f"trained {len(report.trained)} tensors ({report.trained_parameters:,} parameters); {report.frozen} frozen\n"
        f"sha256 of the frozen ones before {report.sha256_before[:16]}, after {report.sha256_after[:16]}: {same}\n"
    )
    result = {"out": str(out), **report.to_dict()}
    if before is not None:
        after = ask(language_model, questions, tokenizer, asked, chat)
        result |= {"task_before": before.to_dict(), "task_after": after.to_dict()}
        shown += f"task before: {task_text(before)}\ntask after: {task_text(after)}\n"
    run.finish(result, f"{shown}{costs(report)}\nwrote {out}")


def _worse(report: Any) -> str:
    worse = report.ce_after > report.ce_before
    return "it got worse: a lower --lr, more text of this kind, or fewer repeats may help\n" if worse else ""
