"""The loop of every training: blocks in, updates out, a log, checkpoints, and a safe way to stop."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttc._files import atomic_file, recover_folder
from fasttc.training.checkpoint import (
    StoredTensors,
    check_same,
    load_checkpoint,
    read_values,
    save_checkpoint,
)
from fasttc.training.data import TokenStream
from fasttc.training.distributed import Processes, ProcessLost, processes
from fasttc.training.optimiser import Optimiser, schedule
from fasttc.training.packing import TokenBatch
from fasttc.training.stopping import Diverged, Interrupted, stop_flag
from fasttc.training.watch import Watch


class Task(Protocol):
    """What is trained: turns a block into gradients and says what has to be saved."""

    optimiser: Optimiser
    divergence: tuple[float, float]
    """(factor, offset): a loss above ``factor * lowest + offset`` has diverged."""

    parts: int
    """Updates for each block."""

    def split(self, batch: TokenBatch, step: int) -> Sequence[Any]:
        """A block as ``parts`` pieces of work; ``step`` is the number of the block."""
        ...

    def backward(self, part: Any) -> dict[str, Tensor]:
        """Leaves gradients; returns metrics, scalars or [L], on the device. "loss" is the one that is watched."""
        ...

    def after_update(self, metrics: dict[str, Tensor]) -> None:
        """Whatever follows an update: constraints, controllers."""
        ...

    def combine(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of all processes: one row per update, the same on all of them."""
        ...

    def divided(self, name: str) -> bool:
        """Whether of several processes each has to save what it has under a name; else all have the same."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values besides the optimiser's."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What callbacks are given, after every step: everything is consistent then. Transcoders of a task take x in the
    coordinates of the training (:mod:`fasttc.training.whitening`), not the model's."""

    step: int
    steps: int
    tokens: int
    task: Any


@dataclass
class Run:
    """How a training is run, none of which changes its result.

    Attributes:
        folder: where the checkpoint and the log go; None writes nothing.
        resume: True continues the checkpoint in ``folder``, "auto" does so if there is one.
        progress: shows a bar.
        callbacks: called with a :class:`Progress` after every step.
        checkpoint_every: steps between checkpoints; None: ten in all.
        log_every: steps averaged in a line of ``metrics.jsonl``; also how soon a bad loss is seen.
        label: of the bar.
        processes: that train together. Files and the bar are the first one's.
    """

    folder: Path | None = None
    resume: bool | str = False
    progress: bool = True
    callbacks: Sequence[Callable[[Progress], None]] = ()
    checkpoint_every: int | None = None
    log_every: int = 10
    label: str = "train"
    processes: Processes = field(default_factory=processes)

    def __post_init__(self) -> None:
        if self.resume not in (True, False, "auto"):
            raise ValueError(f"resume: expected True, False or 'auto', got {self.resume!r}")
        if self.resume is True and self.folder is None:
            raise ValueError(
                "resume: expected out=, the place whose checkpoint is to be continued; got out=None"
            )
        for name in ("checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")

    @property
    def checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder / "checkpoint"

    def resumes(self, config: dict[str, Any]) -> bool:
        """Whether there is a checkpoint to continue. Asked by all processes together, before any work is done.

        Raises:
            ValueError: there is none and ``resume`` is True, or it belongs to another ``config``.
        """
        path = self.checkpoint
        if path is None:
            return False
        if self.processes.first:
            recover_folder(path)
        self.processes.gather(None)
        if not self.resume or (self.resume == "auto" and not path.is_dir()):
            return False
        check_same(read_values(path)["config"], config, path)
        return True


@dataclass
class Outcome:
    """What a loop has done: totals over all sittings, the last averaged metrics, and why it stopped early if it did."""

    steps: int
    tokens: int
    epochs: int
    seconds: float
    metrics: dict[str, Any]
    stopped: str = ""


@dataclass
class Loop:
    """Runs a task for a fixed number of steps: one block each, and one update for every part of a block.

    With several processes Ctrl-C waits for the next line of the log, where all of them stop at the same step.

    Args:
        task: see :class:`Task`.
        stream: of blocks.
        steps: blocks.
        lr, warmup, decay: the schedule; ``warmup`` is a share of all updates.
        run: see :class:`Run`.
        config: what a checkpoint has to agree on to be resumed (JSON types).
        watch: stops early, and ends with its best weights, also when the loss diverges; None: neither. Without a look
            a loss that diverges ends with the weights of the last checkpoint.
    """

    task: Task
    stream: TokenStream
    steps: int
    lr: float
    warmup: float
    decay: str
    run: Run
    config: dict[str, Any]
    watch: Watch | None = None
    _step: int = 0
    _tokens: int = 0
    _seconds: float = 0.0
    _lowest: float = math.inf
    _window: list[dict[str, Tensor]] = field(default_factory=list)
    _last: dict[str, Any] = field(default_factory=dict)
    _in_step: bool = False
    _saved_at: int | None = None
    _stopped: str = ""
    _agreed: bool = False

    def run_all(self) -> Outcome:
        """Trains to the end, or to where it stops early; raises :class:`Interrupted`, :class:`ProcessLost`, or
        :class:`Diverged` if there are no earlier weights to end with."""
        self._start()
        every = self.run.checkpoint_every or max(1, math.ceil(self.steps / 10))
        try:
            with stop_flag() as stopped, self._bar() as bar:
                started = time.perf_counter() - self._seconds
                while self._step < self.steps and not self._stopped:
                    self._one_step()
                    self._seconds = time.perf_counter() - started
                    bar.update()
                    due = self._step % every == 0 and self._step < self.steps
                    logs = due or self._step % self.run.log_every == 0 or self._step == self.steps
                    stop = self._stop(stopped(), logs)
                    if logs or stop:
                        self._flush(bar)
                    self._look()
                    self._in_step = False
                    if due:
                        self._save()
                    if stop:
                        raise KeyboardInterrupt
                    for callback in self.run.callbacks:
                        callback(Progress(self._step, self.steps, self._tokens, self.task))
        except KeyboardInterrupt:
            raise self._interrupted() from None
        except ProcessLost as error:
            raise self._lost(error) from error
        except Diverged as error:
            kept = self._go_back()
            if kept is None:
                raise
            self._stopped = f"{error.reason}; kept the weights of step {kept}"
        else:
            if self.watch is not None:
                self.watch.put_back()
        return Outcome(self._step, self._tokens, self.stream.epoch, self._seconds, self._last, self._stopped)

    def _go_back(self) -> int | None:
        """After a divergence the weights of the best look, or else of the last checkpoint, if they are good; the step
        that they are of."""
        if self.watch is not None and self.watch.put_back():
            return self.watch.best_step
        path = self._last_checkpoint()
        if path is None:
            return None
        self._load(path)
        return self._saved_at if all(self.run.processes.gather(self.task.optimiser.finite)) else None

    def _lost(self, error: ProcessLost) -> ProcessLost:
        kept = self._last_checkpoint()
        how = f"start all again with --resume: {kept} continues" if kept else "there is no checkpoint yet"
        return ProcessLost(f"step {self._step + 1}: {error}; {how}")

    def _look(self) -> None:
        watch, step = self.watch, self._step
        due = watch is not None and (step % watch.every == 0 or step == self.steps)
        if watch is not None and due and watch.look(step):
            self._stopped = (
                f"no better on held-out tokens after step {watch.best_step}: stopped at step {step}"
            )

    def _one_step(self) -> None:
        self._in_step = True  # until held-out quality has been looked at too
        batch = self.stream.next()
        for i, part in enumerate(self.task.split(batch, self._step)):
            metrics = self.task.backward(part)
            self.task.optimiser.step(self._rate(self._step * self.task.parts + i))
            self.task.after_update(metrics)
            self._window.append(metrics)
        self._step += 1
        self._tokens += batch.n_tokens

    def _stop(self, stopped: bool, together: bool) -> bool:
        """Whether to stop now: of several processes all at once, where they look at it together."""
        if self.run.processes.size == 1:
            return stopped
        self._agreed = together and any(self.run.processes.gather(stopped))
        return self._agreed

    def _rate(self, update: int) -> float:
        parts = self.task.parts
        return self.lr * schedule(
            update, self.steps * parts, int(self.warmup * self.steps * parts), self.decay
        )

    def _flush(self, bar: Any) -> None:
        """Brings the metrics of the last steps to the host: the one moment the loop waits for the device."""
        if not self._window:
            return
        columns = {
            name: torch.stack([m[name] for m in self._window]).double().cpu() for name in self._window[0]
        }
        first = self._step - len(self._window) // self.task.parts + 1
        self._window.clear()
        columns = self.task.combine(columns)
        for i, loss in enumerate(columns["loss"].tolist()):
            if not math.isfinite(loss):
                raise Diverged(first + i // self.task.parts, loss, self._lowest)
        averages: dict[str, Any] = {name: column.mean(0).tolist() for name, column in columns.items()}
        factor, offset = self.task.divergence
        if averages["loss"] > factor * self._lowest + offset:
            raise Diverged(self._step, averages["loss"], self._lowest)
        self._lowest = min(self._lowest, averages["loss"])
        self._last = averages
        bar.set_postfix_str(f"loss {averages['loss']:.4f}", refresh=False)
        if self.run.folder is not None and self.run.processes.first:
            rate = self._rate(self._step * self.task.parts - 1)
            line = {
                "step": self._step,
                "tokens": self._tokens,
                "lr": rate,
                "seconds": self._seconds,
                **averages,
            }
            with (self.run.folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _start(self) -> None:
        if self.run.folder is None or self.run.checkpoint is None:
            return
        if self.run.resumes(self.config):
            self._resume(self.run.checkpoint)
        elif self.run.processes.first:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            (self.run.folder / "metrics.jsonl").write_text("", encoding="utf-8")

    def _load(self, path: Path) -> tuple[StoredTensors, dict[str, Any]]:
        """Puts the weights and averages of a checkpoint in place; all there is in it."""
        tensors, values = load_checkpoint(path, self.run.processes)
        self.task.optimiser.restore(tensors.under("optimiser."))
        self.task.restore(tensors.under("task."), values["task"])
        return tensors, values

    def _resume(self, path: Path) -> None:
        tensors, values = self._load(path)
        self.stream.restore(values["stream"])
        if self.watch is not None:
            self.watch.restore(tensors.under("watch."), values["watch"])
        self._step, self._tokens, self._seconds = values["step"], values["tokens"], values["seconds"]
        self._lowest = math.inf if values["lowest"] is None else values["lowest"]
        self._last, self._stopped = values["last"], values["stopped"]
        self._saved_at = self._step
        if self.run.processes.first:
            self._cut_log()

    def _cut_log(self) -> None:
        """Drops what an earlier sitting logged after the checkpoint: those steps are done again."""
        assert self.run.folder is not None, "a run that resumes has a folder"
        log = self.run.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
        with atomic_file(log) as temporary:
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self._step]
            temporary.write_text("".join(kept), encoding="utf-8")

    def _save(self) -> None:
        if self.run.checkpoint is None:
            return
        tensors, values = self.task.state()
        named = {f"optimiser.{name}": t for name, t in self.task.optimiser.state().items()}
        named |= {f"task.{name}": t for name, t in tensors.items()}
        watched = ({}, None) if self.watch is None else self.watch.state()
        named |= {f"watch.{name}": t for name, t in watched[0].items()}
        if not self.run.processes.first:
            named = {name: t for name, t in named.items() if self.task.divided(name)}
        state = {
            "config": self.config,
            "step": self._step,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "lowest": None if math.isinf(self._lowest) else self._lowest,
            "last": self._last,
            "stopped": self._stopped,
            "stream": self.stream.state(),
            "task": values,
            "watch": watched[1],
        }
        save_checkpoint(self.run.checkpoint, named, state, self.run.processes)
        self._saved_at = self._step

    def _last_checkpoint(self) -> Path | None:
        return None if self._saved_at is None else self.run.checkpoint

    def _interrupted(self) -> Interrupted:
        """Saves where the run stands, unless the interrupt fell into the middle of a step or on one process of many."""
        together = self._agreed or self.run.processes.size == 1
        if together and not self._in_step and self._saved_at != self._step:
            self._save()
        step = self._step if self._saved_at is None else self._saved_at
        return Interrupted(step, self._last_checkpoint())

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        return tqdm(
            total=self.steps,
            initial=self._step,
            desc=self.run.label,
            unit="step",
            disable=not (self.run.progress and self.run.processes.first),
            leave=False,
        )
