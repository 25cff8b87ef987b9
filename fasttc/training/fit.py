"""What training from scratch and adapting have in common: transcoders, a source, an objective, a report."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

import fasttc
from fasttc._files import write_json
from fasttc.nn import Transcoder, TranscoderSet
from fasttc.training.activations import Source
from fasttc.training.checkpoint import model_fingerprint
from fasttc.training.data import TokenData, TokenStream
from fasttc.training.distributed import Processes
from fasttc.training.loop import Loop, Outcome, Run
from fasttc.training.memory import estimate
from fasttc.training.options import TrainingOptions, TranscoderOptions
from fasttc.training.quality import LayerQuality, measure
from fasttc.training.report import TranscoderReport, common
from fasttc.training.transcoding import TranscoderTask
from fasttc.training.watch import Watch


def validation_quality(
    source: Source, transcoders: Sequence[Transcoder], data: TokenData, options: TrainingOptions
) -> list[LayerQuality]:
    """Quality on validation documents, of the transcoders of all processes."""
    batches = data.batches("validation", options.batch_size, max_tokens=options.validation_tokens)
    own = measure(source, transcoders, batches)
    return [quality for part in source.processes.gather(own) for quality in part]


def announce(
    run: Run,
    model: nn.Module,
    transcoders: Sequence[Transcoder],
    options: TranscoderOptions,
    context: int,
    trained: Sequence[str] | None = None,
) -> None:
    """Says how much memory a training will need, where progress is shown, before it takes any."""
    if run.progress and run.processes.first:
        needed = estimate(model, transcoders, options, context, trained)
        tqdm.write(f"{run.label}: memory {needed}", file=sys.stderr)


def run_loop(
    task: Any,
    data: TokenData,
    model: nn.Module,
    options: TrainingOptions,
    lr: float,
    run: Run,
    extra: dict[str, Any] | None = None,
    stream: TokenStream | None = None,
    taken: int = 0,
    watch: Watch | None = None,
) -> Outcome:
    """Trains for the whole budget. A checkpoint is good for the same options, data and model only.

    Args:
        stream: of training blocks; None: from its start.
        taken: tokens of the budget that are gone already; they count in the outcome.
        watch: see :class:`fasttc.training.loop.Loop`.
    """
    steps = options.steps(data.context, taken)
    identity = {
        **options.to_dict(),
        "lr": lr,
        "data": data.fingerprint,
        "context": data.context,
        "fractions": [len(part) for part in data.splits.values()],
        "model": model_fingerprint(model),
        **(extra or {}),
    }
    outcome = Loop(
        task=task,
        stream=stream or data.stream("train", options.block_rows, seed=options.seed),
        steps=steps,
        lr=lr,
        warmup=options.warmup,
        decay=options.decay,
        run=run,
        config=identity,
        watch=watch,
    ).run_all()
    return replace(outcome, tokens=outcome.tokens + taken)


def finish_transcoders(
    kind: str,
    task: TranscoderTask,
    source: Source,
    outcome: Outcome,
    data: TokenData,
    config: dict[str, Any],
    layers: list[LayerQuality],
    before: list[LayerQuality],
    provenance: dict[str, Any],
    refits: dict[str, Any],
) -> tuple[TranscoderSet, TranscoderReport]:
    """The trained set in evaluation mode, with its report in the metadata."""
    report = TranscoderReport(
        **common(kind, outcome, data, config["seed"], config), layers=layers, before=before, refits=refits
    )
    transcoders = _of_all_processes(task.transcoders, source.processes)
    for transcoder in transcoders:
        transcoder.eval().requires_grad_(True)
    training = {key: value for key, value in report.to_dict().items() if key != "last"}
    metadata = {"fasttc_version": fasttc.__version__, **provenance, "training": training}
    return TranscoderSet(transcoders, source.sites, metadata), report


def _of_all_processes(own: list[Transcoder], processes: Processes) -> list[Transcoder]:
    """The transcoders of all layers, on every process: the own ones as they are, the others' as copies on the CPU."""
    if processes.size == 1:
        return own
    found: list[Transcoder] = []
    kinds = processes.gather([(transcoder.config.to_dict(), transcoder.W_enc.dtype) for transcoder in own])
    for rank, theirs in enumerate(kinds):
        for i, (config, dtype) in enumerate(theirs):
            mine = rank == processes.rank
            copy = own[i] if mine else Transcoder(**config, dtype=dtype, device="meta").to_empty(device="cpu")
            state = {name: t.detach().cpu().contiguous() for name, t in copy.state_dict().items()}
            processes.spread(list(state.values()), rank)
            if not mine:
                copy.load_state_dict(state)
            found.append(copy)
    return found


def save_result(run: Run, out: str | Path | None, save: Any, report: Any) -> None:
    """Writes the result, then its report beside the log, and only then drops the checkpoint."""
    if out is None or run.folder is None:
        return
    if run.processes.first:
        save(out)
        write_json(run.folder / "report.json", report.to_dict())
        if run.checkpoint is not None:
            shutil.rmtree(run.checkpoint, ignore_errors=True)
    run.processes.gather(None)  # the result is there when any of them returns


def model_name(model: nn.Module) -> str:
    config: Any = model.config
    return getattr(config, "name_or_path", "") or getattr(config, "model_type", type(model).__name__)
