"""The training loop: steps, measurements, checkpoints, and a clean end whatever ends it."""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.checkpoint import Checkpoint, CheckpointStore
from moe.errors import CheckpointError, TrainingError
from moe.layer import balance_loss, balance_step
from moe.training.config import TrainConfig
from moe.training.data import PreparedData, WindowLoader, eval_batches
from moe.training.evaluate import Evaluation, evaluate
from moe.training.interrupt import StopRequest
from moe.training.load_pool import LoadPool
from moe.training.metrics import STATUS, MetricsWriter
from moe.training.progress import Progress
from moe.training.run_folder import RunFolder
from moe.training.schedule import Schedule


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    """All steps are done."""
    INTERRUPTED = "interrupted"
    """Somebody asked it to stop; it can be resumed."""
    STOPPED = "stopped"
    """Too many steps in a row were not finite."""


@final
@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, on the device."""

    loss: Tensor
    """Mean cross entropy of the step's micro-batches, nats per token."""
    balance_loss: Tensor
    """Mean over them of what was added to it."""
    gradient_norm: Tensor
    """Before clipping."""

    def is_finite(self) -> bool:
        """Whether the step may be taken; waits for the device."""
        return bool(torch.isfinite(self.loss + self.balance_loss + self.gradient_norm))


@final
@dataclass(frozen=True)
class Outcome:
    """What ``Trainer.run`` came to."""

    status: Status
    seconds: float
    """Time spent in training, validations included, that before a resumption too."""
    evaluation: Evaluation | None
    """The validation after the last step; None where the run was interrupted between two, or had no step left."""


@final
class Trainer:
    """Trains a language model and leaves what it did in a run folder.

    Args:
        model: token ids ``(B, S)`` to logits ``(B, S, V)``, on its device; any module, with or without MoE layers.
        optimizer: over the model's parameters; the trainer sets its learning rate.
        schedule: the learning rate of each step.
        data: the text.
        config: how long and how often.
        folder: where metrics and checkpoints go.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        data: PreparedData,
        config: TrainConfig,
        folder: RunFolder,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.data, self.config, self.folder = data, config, folder
        self.device = next(model.parameters()).device
        self.loader = WindowLoader(data.train, config.seq_len, config.batch_size, config.seed, data.fingerprint)
        self.store = CheckpointStore(folder.checkpoints, config.keep_checkpoints)
        self.pool = LoadPool(config.pool_steps)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self._clock = clock
        self._seconds_before, self._started = 0.0, clock()
        self._tokens = 0
        self._evaluation: Evaluation | None = None
        self._unlogged_steps, self._unlogged_seconds = 0, 0.0
        self._resumed: Checkpoint | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training, that before a resumption included."""
        return self._seconds_before + self._clock() - self._started

    def resume(self) -> bool:
        """Go back to the newest good checkpoint of the folder; False where there is none yet.

        The optimizer keeps the hyper-parameters it was made with: settings that were changed since count.

        Raises:
            CheckpointError: there are checkpoints and none is whole, or the newest is of another architecture,
                optimizer or corpus.
        """
        checkpoint = self.store.latest()
        if checkpoint is None:
            if any(self.folder.checkpoints.glob("step_*")):
                raise CheckpointError(
                    f"no checkpoint in {self.folder.checkpoints} is whole; start a run of another name"
                )
            return False
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = self.store.load(checkpoint, self.model, self.optimizer)
        for group, wanted in zip(self.optimizer.param_groups, groups):
            group.update(wanted)
        self.loader.load_state_dict(state["loader"])
        self.pool.load_state_dict(state["pool"], self.device)
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.step, self._tokens, self._seconds_before = checkpoint.step, state["tokens"], state["seconds"]
        self._resumed = checkpoint
        return True

    def run(self) -> Outcome:
        """Train until the last step, or until somebody asks to stop (Ctrl-C), and write a checkpoint either way.

        Waits for the device once a step: a loss or gradient that is not finite must be seen before the weights move.

        Raises:
            TrainingError: ``max_skipped`` steps in a row were not finite, or the metrics cannot be written.
            CheckpointError: the last checkpoint cannot be written. (An earlier one that cannot is a warning.)
        """
        self._started = self._clock()
        self.model.train()
        total = self.config.steps
        resume_step = None if self._resumed is None else self.step
        progress = Progress(total, start_step=self.step, clock=self._clock)
        try:
            with StopRequest() as stop, MetricsWriter(self.folder, resume_step=resume_step) as metrics, progress:
                while self.step < total and not stop.requested:
                    self._one_step(metrics, progress)
                    if self.step % self.config.checkpoint_every == 0 and self.step < total:
                        self._checkpoint_or_warn(metrics)
                status = Status.FINISHED if self.step >= total else Status.INTERRUPTED
                self._save(metrics)
                seconds = self.seconds
                metrics.write(self.step, self._times() | {STATUS: status.value})
        except OSError as error:
            raise TrainingError(f"step {self.step}: {error}; {self._last_good()}") from error
        return Outcome(status, seconds, self._evaluation)

    def train_step(self) -> StepResult:
        """Forward, backward and gradient norm of the next step's micro-batches; moves no weight."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        loss = torch.zeros((), device=self.device)
        extra = torch.zeros((), device=self.device)
        for _ in range(self.config.accumulation):
            batch = self.loader.next_batch()
            with self._autocast():
                logits = self.model(batch["inputs"].to(self.device))
            targets = batch["targets"].to(self.device)
            micro_loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            micro_extra = balance_loss(self.model)
            ((micro_loss + micro_extra) / self.config.accumulation).backward()
            loss += micro_loss.detach() / self.config.accumulation
            extra += micro_extra.detach() / self.config.accumulation
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        return StepResult(loss, extra, norm)

    def evaluate(self) -> Evaluation:
        """Validate on the configured windows."""
        batches = eval_batches(self.data.val, self.config.seq_len, self.config.batch_size, self.config.eval_windows)
        return evaluate(self.model, batches, self.data.token_bytes, self.device, self._autocast())

    def _one_step(self, metrics: MetricsWriter, progress: Progress) -> None:
        """Take a step, or skip it, and write down what is due."""
        before = self.seconds
        result = self.train_step()
        finite = result.is_finite()
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loads = balance_step(self.model, skipped=not finite)
        self.step += 1
        self._tokens += self.config.tokens_per_step
        self._evaluation = None
        self._unlogged_steps += 1
        self._unlogged_seconds += self.seconds - before
        if finite:
            self.pool.add(loads)
            self.skipped_in_a_row = 0
        else:
            self._skip(metrics)
        line: dict[str, Any] = {}
        last = self.step == self.config.steps
        if last or self.step % self.config.log_every == 0:
            line = self._training_line(result)
            metrics.write(self.step, line)
        if last or self.step % self.config.eval_every == 0:
            self._evaluation = found = self.evaluate()
            words = {"val/loss": found.loss, "val/bits_per_byte": found.bits_per_byte}
            words |= {f"val/max_vio/{layer}": value for layer, value in found.max_vio.items()}
            metrics.write(self.step, self._times() | words)
            line |= words
        progress.update(self.step, line)

    def _skip(self, metrics: MetricsWriter) -> None:
        """Count a step that was not finite, and stop the run if there are too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.config.max_skipped:
            return
        metrics.write(self.step, self._times() | {STATUS: Status.STOPPED.value})
        raise TrainingError(
            f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step "
            f"{self.step} (max_skipped={self.config.max_skipped}); {self._last_good()}. "
            "Lower the learning rate, or look at the data"
        )

    def _last_good(self) -> str:
        good = self.store.latest()
        return "there is no checkpoint yet" if good is None else f"the last good checkpoint is {good.path}"

    def _save(self, metrics: MetricsWriter) -> None:
        metrics.sync()
        self.store.save(self.step, self.model, self.optimizer, self._state())

    def _checkpoint_or_warn(self, metrics: MetricsWriter) -> None:
        """Save on the way; a run goes on without, since a full disk may be emptied before the next."""
        try:
            self._save(metrics)
        except CheckpointError as error:
            warnings.warn(f"training goes on without this checkpoint: {error}", RuntimeWarning, stacklevel=2)

    def _state(self) -> dict[str, Any]:
        """What a resumed run needs beside model, optimizer and random generators."""
        return {
            "loader": self.loader.state_dict(),
            "pool": self.pool.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self._tokens,
            "seconds": self.seconds,
        }

    def _training_line(self, result: StepResult) -> dict[str, Any]:
        """The measures of a step; the speed is that of all steps since the last line, without validations."""
        tokens = self._unlogged_steps * self.config.tokens_per_step
        speed = tokens / max(self._unlogged_seconds, 1e-9)
        self._unlogged_steps, self._unlogged_seconds = 0, 0.0
        return {
            **self._times(),
            "train/loss": result.loss.item(),
            "train/balance_loss": result.balance_loss.item(),
            "train/grad_norm": result.gradient_norm.item(),
            "train/learning_rate": self.schedule.rate(self.step - 1),
            "train/tokens_per_second": speed,
            "train/skipped_steps": self.skipped,
            **self.pool.measures(),
        }

    def _times(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "seconds": self.seconds}

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self.config.autocast_dtype(self.device)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
