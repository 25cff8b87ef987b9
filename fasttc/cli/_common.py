"""What every verb shares: its common options, the echo of its settings, and its two ways of printing a result."""

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Run:
    """One call of a verb.

    Attributes:
        verb: its name.
        settings: every option as resolved, echoed at the start and kept in the JSON result.
        as_json: whether stdout carries one JSON object and nothing else.
        seed, device, dtype: the common options; ``dtype`` is a torch dtype.
        device_map: of :func:`placement_options`; None: the model is on ``device``.

    Of several processes that torchrun started, only the first prints.
    """

    verb: str
    settings: dict[str, Any]
    as_json: bool
    seed: int
    device: str
    dtype: Any
    started: float = field(default_factory=time.perf_counter)
    device_map: str | None = None

    def say(self, text: str) -> None:
        """A line for people: stdout, or stderr when stdout carries JSON."""
        if is_first():
            click.echo(text, err=self.as_json)

    def finish(self, result: dict[str, Any], text: str) -> None:
        """Prints the result: JSON with the settings and the seconds, or the text."""
        if not is_first():
            return
        if self.as_json:
            seconds = round(time.perf_counter() - self.started, 3)
            whole = {"verb": self.verb, "settings": self.settings, "seconds": seconds, **result}
            click.echo(json.dumps(whole, indent=2, default=str))
        else:
            click.echo(text)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the common options and hands the function a :class:`Run` as its first argument."""

    @click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
    @click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.",
    )
    @click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Of weights and sums.",
    )
    @click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, everything else on stderr."
    )
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def call(seed: int, device: str, dtype: str, as_json: bool, debug: bool, **options: Any) -> None:
        import torch

        context = click.get_current_context()
        name = context.command_path.removeprefix("fasttc ")
        torch.manual_seed(seed)
        resolved = _device(device)
        settings = {**_flat(options), "seed": seed, "device": resolved, "dtype": dtype}
        run = Run(name, settings, as_json, seed, resolved, getattr(torch, dtype))
        shown = " ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
        if is_first():
            click.echo(f"fasttc {name}: {shown}", err=True)
        _quiet_transformers()
        function(run, **options)

    return call


def placement_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --device-map and --transcoder-device, below :func:`verb`; the function gets ``place``, for the trainings."""

    @click.option(
        "--device-map",
        help="Spread a large model over devices: auto, balanced or sequential (by accelerate). Not with --device.",
    )
    @click.option("--transcoder-device", help="Where transcoders are trained. Default: beside each layer.")
    @functools.wraps(function)
    def call(run: Run, device_map: str | None, transcoder_device: str | None, **options: Any) -> None:
        given = click.get_current_context().get_parameter_source("device")
        if device_map is not None and given is not click.core.ParameterSource.DEFAULT:
            raise ValueError(f"--device-map: expected none beside --device {run.device}, got {device_map!r}")
        run.device_map = device_map
        function(run, place=transcoder_device, **options)

    return call


def plot_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds ``--plot FILE``; whether it can be drawn is checked before the verb's work begins."""

    def checked(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
        if value is not None:
            from fasttc.report.plots import check_plot

            check_plot(value)
        return value

    return click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=checked,
        help=f"{what} as a .png, .svg or .pdf file (needs matplotlib: pip install 'fasttc[plots]').",
    )


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them, those of a group beside the others."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            _flat(value)
            if isinstance(value, dict)
            else {key: str(value) if isinstance(value, Path) else value}
        )
    return flat


def is_first() -> bool:
    """Whether this process speaks for all: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _device(name: str) -> str:
    import torch

    if name == "auto" and torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")  # of torchrun: a GPU for each process
        return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
    if name == "auto":
        return "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name} asked for, but no CUDA device was found")
    return name


def _quiet_transformers() -> None:
    """Advice of other libraries stays out of our output; their errors still raise."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)


def parse_ids(text: str, option: str) -> list[int]:
    """``"2,17,9"`` as a list of token ids.

    Raises:
        ValueError: something else than integers ≥ 0 separated by commas.
    """
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option}: expected token ids separated by commas (2,17,9), got {text!r}"
        ) from error
    if min(ids) < 0:
        raise ValueError(f"{option}: expected token ids >= 0, got {text!r}")
    return ids


def one_prompt(prompt: str | None, prompt_ids: str | None, tokenizer: Any) -> str | list[int]:
    """The prompt of a verb that takes it as text or as ids.

    Raises:
        ValueError: both or neither given, or text without a tokenizer.
    """
    if (prompt is None) == (prompt_ids is None):
        raise ValueError("expected exactly one of --prompt and --prompt-ids")
    if prompt_ids is not None:
        return parse_ids(prompt_ids, "--prompt-ids")
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: give the prompt as --prompt-ids 2,17,9")
    assert prompt is not None, "one of the two was given"
    return prompt


def load_model(run: Run, reference: str) -> tuple[Any, Any]:
    """The model in evaluation mode on the run's device, or spread by its map, in its dtype; its tokenizer or None."""
    from fasttc import models

    device = run.device if run.device_map is None else None
    return models.load(reference, dtype=run.dtype, device=device, device_map=run.device_map)


def load_transcoders(run: Run, reference: str) -> Any:
    """A transcoder set in any known format, on the run's device and dtype."""
    from fasttc.formats import TranscoderSet

    return TranscoderSet.from_pretrained(reference, device=run.device, dtype=run.dtype)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; numbers with four significant figures, right-aligned."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    numeric = [all(not isinstance(row.get(column), str) for row in rows) for column in columns]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
