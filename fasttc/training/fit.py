"""What training from scratch and adapting have in common: transcoders, a source, an objective, a report."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

import fasttc
from fasttc._files import write_json
from fasttc.nn import Transcoder, TranscoderSet, io, rows
from fasttc.training.activations import Source
from fasttc.training.checkpoint import common_folder, model_fingerprint
from fasttc.training.closed_form import Activations, Refits, held_out_watch, refit_first, refit_last
from fasttc.training.data import TokenData, TokenStream
from fasttc.training.distributed import Processes
from fasttc.training.loop import Loop, Outcome, Run
from fasttc.training.memory import estimate
from fasttc.training.options import TrainingOptions, TranscoderOptions
from fasttc.training.quality import LayerQuality, measure
from fasttc.training.report import TranscoderReport, common
from fasttc.training.sharded import SHARED_OUT, ShardedTranscoder
from fasttc.training.transcoding import TranscoderTask
from fasttc.training.watch import Watch
from fasttc.training.whitening import Whitening


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


def identify(
    run: Run,
    model: nn.Module,
    data: TokenData,
    options: TrainingOptions,
    lr: float,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a checkpoint has to agree on: it is good for the same options, data and model only.

    Raises:
        ValueError: the one that ``run`` is to resume is not there, or another's; so before any work is done.
    """
    identity = {
        **options.to_dict(),
        **data.settings(),
        **data.identity(),
        "lr": lr,
        "model": model_fingerprint(model),
        **(extra or {}),
    }
    run.resumes(identity)
    return identity


def run_loop(
    task: Any,
    data: TokenData,
    options: TrainingOptions,
    lr: float,
    run: Run,
    identity: dict[str, Any],
    stream: TokenStream | None = None,
    taken: int = 0,
    watch: Watch | None = None,
) -> Outcome:
    """Trains for the whole budget.

    Args:
        identity: see :func:`identify`.
        stream: of training blocks; None: from its start.
        taken: tokens of the budget that are gone already; they count in the outcome.
        watch: see :class:`fasttc.training.loop.Loop`.
    """
    outcome = Loop(
        task=task,
        stream=stream or data.stream("train", options.block_rows, seed=options.seed),
        steps=options.steps(data.context, taken),
        lr=lr,
        warmup=options.warmup,
        decay=options.decay,
        run=run,
        config=identity,
        watch=watch,
    ).run_all()
    return replace(outcome, tokens=outcome.tokens + taken)


@dataclass
class Fitting:
    """One training of transcoders, from its first closed form to the set on disk.

    Attributes:
        kind: "scratch" or "adapt".
        model, data, options: of the training.
        lr: learning rate at its height.
        run: see :class:`fasttc.training.loop.Run`.
        identity: see :func:`identify`.
        source: of activations, open.
        held_out: activations of validation tokens, which choose ridges and the best weights.
        inside: the source in the coordinates of the training; from :meth:`start` on ``held_out`` is in them too.
        whitening: of these coordinates.
        stream: of training blocks.
        refits: what closed forms have done so far.
    """

    kind: str
    model: nn.Module
    data: TokenData
    options: TranscoderOptions
    lr: float
    run: Run
    identity: dict[str, Any]
    source: Source
    held_out: Activations
    inside: Source = field(init=False)
    whitening: Whitening = field(init=False)
    stream: TokenStream = field(init=False)
    refits: Refits = field(default_factory=Refits)

    def __post_init__(self) -> None:
        self.stream = self.data.stream("train", self.options.block_rows, seed=self.options.seed)

    def start(self, transcoders: Sequence[Transcoder], trained: Sequence[str] | None = None) -> None:
        """Writes transcoders in the coordinates of the training and gives them the first closed form, if any.

        Args:
            transcoders: of the own layers; changed in place.
            trained: names of what will be trained; None: all there is.
        """
        own = any(transcoder.skip for transcoder in transcoders)
        skip = any(self.source.processes.gather(own))  # of all layers, so that every process decides alike
        self.whitening = Whitening(self.held_out[0], active=self.options.whitens(trained, skip))
        self.inside, xs = self.whitening.enter(self.source, transcoders, self.held_out[0])
        self.held_out = xs, self.held_out[1]
        self.refits = refit_first(self.inside, transcoders, self.stream, self.options, self.held_out)

    @property
    def updates(self) -> int:
        """Gradient steps in what the first closed form has left of the budget."""
        blocks = self.options.steps(self.data.context, self.refits.tokens)
        return blocks * self.options.parts(self.data.context)

    def finish(
        self,
        task: TranscoderTask,
        *,
        settings: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        before: Sequence[LayerQuality] = (),
    ) -> tuple[TranscoderSet, TranscoderReport]:
        """Trains, refits, measures: the set in evaluation mode with its report in the metadata, and the report.

        Args:
            task: of all layers.
            settings: for the report, besides the options.
            provenance: for the metadata of the set.
            before: quality before the training.
        """
        options, source = self.options, self.source
        steps = options.steps(self.data.context, self.refits.tokens)
        watch = held_out_watch(task, self.held_out, options, steps)
        taken = self.refits.tokens
        outcome = run_loop(
            task, self.data, options, self.lr, self.run, self.identity, self.stream, taken, watch
        )
        refit_last(task, self.held_out, self.refits)
        self.whitening.leave(task.transcoders)
        layers = validation_quality(source, task.transcoders, self.data, options)
        config = {**options.to_dict(), "lr": self.lr, **(settings or {})}
        report = TranscoderReport(
            **common(self.kind, outcome, self.data, options.seed, config),
            layers=layers,
            before=list(before),
            refits=self.refits.of_all(source.processes),
        )
        transcoders = _of_all_processes(task.transcoders, source.processes)
        for transcoder in transcoders:
            transcoder.eval().requires_grad_(True)
        training = {key: value for key, value in report.to_dict().items() if key != "last"}
        origin = {"fasttc_version": fasttc.__version__, "model": model_name(self.model), **(provenance or {})}
        return TranscoderSet(transcoders, source.sites, {**origin, "training": training}), report


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


def save_result(run: Run, out: str | Path | None, save: Any, report: Any, *, together: bool = False) -> None:
    """Writes the result, then its report beside the log, and only then drops the checkpoint.

    ``save(out)`` is called by the first process; ``together``: by all of them.
    """
    if out is None or run.folder is None:
        return
    if together or run.processes.first:
        save(out)
    if run.processes.first:
        write_json(run.folder / "report.json", report.to_dict())
        if run.checkpoint is not None:
            shutil.rmtree(run.checkpoint, ignore_errors=True)
    run.processes.gather(None)  # the result is there when any of them returns


def save_transcoders(
    run: Run, out: str | Path | None, tcs: TranscoderSet, report: TranscoderReport
) -> TranscoderSet:
    """Writes a set with :func:`save_result` and gives it back.

    Of features that processes share out each writes its own rows, and what is given back is read from the folder when
    it is used; without a folder it is put together on every process.
    """
    shares = [transcoder for transcoder in tcs if isinstance(transcoder, ShardedTranscoder)]
    if not shares:
        save_result(run, out, tcs.save_pretrained, report)
        return tcs
    if out is None:
        return TranscoderSet([share.whole() for share in shares], tcs.sites, tcs.metadata)
    save_result(run, out, partial(_write_shares, shares, tcs, run.processes), report, together=True)
    return TranscoderSet.from_pretrained(out)


def _write_shares(
    shares: Sequence[ShardedTranscoder], tcs: TranscoderSet, processes: Processes, out: str | Path
) -> None:
    """A set in the native format, every process its own rows: none ever holds all of a layer."""
    with common_folder(Path(out), processes) as folder:
        files = [folder / io.layer_file(site.layer) for site in tcs.sites]
        if processes.first:
            io.write_header(folder, [share.config for share in shares], tcs.sites, tcs.metadata)
            for share, file in zip(shares, files, strict=True):
                whole = Transcoder(**share.config.to_dict(), dtype=share.W_enc.dtype, device="meta")
                rows.reserve(file, whole.state_dict())
        processes.gather(None)
        for share, file in zip(shares, files, strict=True):
            for name, tensor in share.state_dict().items():
                if name in SHARED_OUT:
                    rows.write_rows(file, name, tensor, share.first)
                elif processes.first:
                    rows.write_rows(file, name, tensor)


def model_name(model: nn.Module) -> str:
    config: Any = model.config
    return getattr(config, "name_or_path", "") or getattr(config, "model_type", type(model).__name__)
