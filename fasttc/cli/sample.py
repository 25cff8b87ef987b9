"""``fasttc sample``: text from a model."""

import json
from pathlib import Path

import click

from fasttc.cli._common import Run, load_model, parse_ids, verb


@click.command("sample")
@click.argument("model")
@click.option("--prompt", help="What every sample begins with; BOS is put before it. Default: BOS alone.")
@click.option("--prompt-ids", help="The same as token ids: 2,17,9. For models without a tokenizer.")
@click.option(
    "-n", "--samples", "n", default=1, show_default=True, type=click.IntRange(min=1), help="How many."
)
@click.option(
    "--tokens", default=256, show_default=True, help="Tokens per sample at most, the prompt included."
)
@click.option(
    "--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0), help="0: greedy."
)
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a .jsonl file, one sample a line."
)
@verb
def command(
    run: Run,
    model: str,
    prompt: str | None,
    prompt_ids: str | None,
    n: int,
    tokens: int,
    temperature: float,
    batch_size: int,
    out: Path | None,
) -> None:
    """Draw text from MODEL (a folder or a hub id).

    With --out the samples are a data file for `fasttc train`: a model's own text needs no data set.
    """
    from fasttc._files import atomic_file
    from fasttc.models import sample

    if prompt is not None and prompt_ids is not None:
        raise ValueError("expected one of --prompt and --prompt-ids, got both")
    language_model, tokenizer = load_model(run, model)
    start = _start_ids(tokenizer, prompt) if prompt_ids is None else parse_ids(prompt_ids, "--prompt-ids")
    ids = sample(
        language_model,
        start,
        n=n,
        max_tokens=tokens,
        temperature=temperature,
        seed=run.seed,
        batch_size=batch_size,
        eos_id=getattr(tokenizer, "eos_token_id", None),
    )
    records: list[dict[str, object]]
    if tokenizer is None:
        records = [{"input_ids": row} for row in ids]
    else:
        records = [{"text": tokenizer.decode(row, skip_special_tokens=True)} for row in ids]
    total = sum(len(row) for row in ids)
    if out is None:
        run.finish(
            {"samples": records, "tokens": total}, "\n\n".join(str(next(iter(r.values()))) for r in records)
        )
        return
    with atomic_file(out) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    run.finish(
        {"out": str(out), "samples": n, "tokens": total}, f"wrote {n:,} samples, {total:,} tokens: {out}"
    )


def _start_ids(tokenizer: object, prompt: str | None) -> list[int]:
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: give the start of the text as --prompt-ids 1,17,9")
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []  # type: ignore[operator]
    start = ([bos] if bos is not None else []) + list(ids)
    if not start:
        raise ValueError("this tokenizer has no BOS token: give --prompt")
    return start
