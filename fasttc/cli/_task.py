"""The options of every verb that asks a model questions, and how the answers are shown."""

import functools
from collections.abc import Callable
from typing import Any

import click

NAMES = ("task", "options", "normalise", "max_new_tokens")


def task_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options :data:`NAMES`, which the function gets together as ``asked``, and --prompt, --answer, --chat."""

    @click.option(
        "--task", help="Questions to answer, in a file like those of --data. Needs --prompt and --answer."
    )
    @click.option("--prompt", help="A template such as '{QUESTION}': what comes before the answer.")
    @click.option("--answer", help="A template such as '{final_decision}': the right answer.")
    @click.option(
        "--options",
        help="Multiple choice: 'yes,no,maybe', or '{FIELD}' that holds a record's own list. Default: free text.",
    )
    @click.option(
        "--normalise",
        type=click.Choice(["bytes", "tokens", "none"]),
        default="bytes",
        show_default=True,
        help="What the log-likelihood of an option is divided by.",
    )
    @click.option("--max-new-tokens", default=32, show_default=True, help="Of a free text.")
    @click.option("--chat", is_flag=True, help="Put prompt and answer into the tokenizer's chat template.")
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> None:
        asked = {name: options.pop(name) for name in NAMES}
        function(*args, asked=asked, **options)

    return call


def read_task(asked: dict[str, Any], prompt: str | None, answer: str | None) -> Any:
    """The questions, or None where no task was given.

    Raises:
        ValueError: a task without --prompt and --answer; what :func:`fasttc.evaluation.read_questions` refuses.
    """
    from fasttc.evaluation import read_questions

    if asked["task"] is None:
        return None
    if prompt is None or answer is None:
        raise ValueError("--task: expected --prompt and --answer, which say what a record asks, got none")
    options = asked["options"]
    if options is not None and not options.startswith("{"):
        options = [option.strip() for option in options.split(",")]
    return read_questions(asked["task"], prompt=prompt, answer=answer, options=options)


def ask(model: Any, questions: Any, tokenizer: Any, asked: dict[str, Any], chat: bool) -> Any:
    """The report of :func:`fasttc.evaluation.evaluate_task`."""
    from fasttc.evaluation import evaluate_task

    options = {name: asked[name] for name in ("normalise", "max_new_tokens")}
    return evaluate_task(model, questions, tokenizer, chat=chat, progress=True, **options)


def task_text(report: Any) -> str:
    """A task's report as text: the scores, what they are to be compared with, and a line for every class."""
    from fasttc.cli._common import table

    if report.kind == "text":
        return f"{report.questions} questions: exact match {report.accuracy:.1%}, word F1 {report.f1:.3f}"
    lines = [
        f"{report.questions} questions: accuracy {report.accuracy:.1%} (always the commonest answer "
        f"{report.majority:.1%}, drawn {report.chance:.1%}); log-likelihoods by {report.normalise}"
    ]
    if report.balanced_accuracy is not None:
        lines[0] += f"; mean over classes {report.balanced_accuracy:.1%}"
        rows = [
            {"class": name, "questions": c.questions, "chosen": c.chosen, "correct": c.correct}
            for name, c in report.classes.items()
        ]
        lines.append(table(rows))
    return "\n".join(lines)
