"""``fasttc adapter evaluate``: how near the adapted hybrid is to the fine-tuned model, and what it wins back."""

from pathlib import Path
from typing import Any

import click

from fasttc.cli._adapters import load_adapters, load_pair, quality_text
from fasttc.cli._common import Run, plot_option, table, verb
from fasttc.cli._data import data_options
from fasttc.cli._task import ask, read_task, task_options


@click.command("evaluate")
@click.argument("target")
@click.option("--base", required=True, help="The model that TARGET came from.")
@click.option("--adapters", required=True, help="Folder or hub reference of the adapters.")
@data_options()
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@click.option("--tokens", default=32_768, show_default=True, help="About how many; 0: the whole split.")
@click.option("--per-layer/--all-layers-only", default=True, help="Also every layer alone.")
@plot_option("Error, KL and L0 by layer, without and with adapters,")
@task_options
@click.option(
    "--responses",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Also let every variant write so many responses, to the questions of --task in turn or from nothing: "
    "how long they are, and which share of the target's length is won back.",
)
@click.option(
    "--response-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="At most, of each."
)
@verb
def command(
    run: Run,
    target: str,
    base: str,
    adapters: str,
    tokens: int,
    data: str,
    prompt: str | None,
    answer: str | None,
    chat: bool,
    asked: dict[str, Any],
    responses: int,
    response_tokens: int,
    plot: Path | None,
    **options: Any,
) -> None:
    """Measure the hybrid of TARGET and BASE, without and with adapters, against TARGET.

    On held-out text: KL, top-1 error, L0, and the residual's error layer by layer. With --task or --responses: accuracy
    and length of responses of all three, and how much of the gap between hybrid and target the adapters win back.
    """
    from fasttc.evaluation import evaluate_adapters, question_ids, recovery, response_length
    from fasttc.models import anatomy

    questions = read_task(asked, prompt, answer)
    model, base_model, tokenizer = load_pair(run, target, base)
    loaded = load_adapters(run, adapters)
    room = anatomy(model).max_positions - response_tokens
    if responses and room < 1:
        raise ValueError(
            f"--response-tokens: expected fewer than the model's {room + response_tokens} positions, "
            f"got {response_tokens}"
        )
    found = evaluate_adapters(
        model, base_model, loaded, data, tokenizer=tokenizer, tokens=tokens or None, **options
    )
    result, text = found.to_dict(), quality_text(found)
    prompts: list[list[int]] | None = None
    if responses and questions is not None:
        prompts = [question_ids(question, tokenizer, room, chat=chat) for question in questions[:responses]]

    def scores(model: Any) -> dict[str, float]:
        got: dict[str, float] = {}
        if questions is not None:
            report = ask(model, questions, tokenizer, asked, chat)
            got["accuracy"] = report.accuracy
            got |= {} if report.f1 is None else {"word F1": report.f1}
        if responses:
            got["response tokens"] = response_length(
                model, tokenizer, prompts, n=responses, max_new_tokens=response_tokens, seed=run.seed
            )
        return got

    if questions is not None or responses:
        won = recovery(model, base_model, loaded, scores)
        result["recovery"] = {name: one.to_dict() for name, one in won.items()}
        text += f"\n\n{table([{'': name} | one.to_dict() for name, one in won.items()])}"
    if plot is not None:
        from fasttc.report.plots import adapters_by_layer

        adapters_by_layer(found.to_dict(), plot)
        run.say(f"wrote {plot}")
    run.finish(result, text)
