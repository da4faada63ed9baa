"""The training loop: steps, measurements, checkpoints, and a clean end whatever ends it."""

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from rich.console import Console
from torch import nn

from moe.checkpoint import Checkpoint, CheckpointStore
from moe.errors import CheckpointError, ParallelError, TrainingError
from moe.layer import balance_step, moe_layers
from moe.monitor import LoadStats
from moe.training.config import TrainConfig
from moe.training.data import PreparedData, WindowLoader, eval_batches
from moe.training.evaluate import Evaluation, evaluate
from moe.training.interrupt import StopRequest
from moe.training.load_pool import LoadPool
from moe.training.metrics import STATUS, MetricsWriter, NoMetrics, read_metrics, record_step
from moe.training.outcome import Outcome, Status, StepResult
from moe.training.progress import Progress
from moe.training.run_folder import RunFolder
from moe.training.runner import OneDevice, Runner
from moe.training.schedule import Schedule

OnStep = Callable[[int, Mapping[str, LoadStats]], None]
"""Sees how many steps are done and the load of each layer in the last one, as ``moe.balance_step`` returns it: tensors
on the device, over all processes that see other tokens; of a pipeline, of the layers in this process. A step that was
skipped because it was not finite is seen too."""


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
        runner: how the model runs where it is spread over many devices; None for one.
        on_step: called after each step; should not wait for the device.
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
        runner: Runner | None = None,
        on_step: OnStep | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.runner: Runner = OneDevice(model) if runner is None else runner
        self.ranks = self.runner.ranks
        self.data, self.config, self.folder = data, config, folder
        self.device = next(model.parameters()).device
        self.loader = WindowLoader(data.train, config.seq_len, config.batch_size, config.seed, data.fingerprint)
        self.store = CheckpointStore(folder.checkpoints, config.keep_checkpoints)
        self.pool = LoadPool(config.pool_steps)
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self._on_step, self._clock = on_step, clock
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
            CheckpointError: there are checkpoints and none is whole, the run had come past one and there is none, or
                the newest is of another architecture, optimizer or corpus.
        """
        checkpoint = self.runner.newest(self.store)
        if checkpoint is None:
            self.ranks.first(self._refuse_to_lose)
            return False
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = self.runner.load(self.store, checkpoint, self.optimizer)
        for group, wanted in zip(self.optimizer.param_groups, groups):
            group.update(wanted)
        self.loader.load_state_dict(state["loader"])
        layers = {name for part in self.runner.parts for name, _ in moe_layers(part)}
        here = [{layer: load for layer, load in loads.items() if layer in layers} for loads in state["pool"]]
        self.pool.load_state_dict(here, self.device)
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.step, self._tokens, self._seconds_before = checkpoint.step, state["tokens"], state["seconds"]
        self._resumed = checkpoint
        return True

    def run(self) -> Outcome:
        """Train until the last step, or until somebody asks to stop (Ctrl-C), and write a checkpoint either way.

        Waits for the device once a step: a loss or gradient that is not finite must be seen before the weights move.

        Raises:
            TrainingError: ``max_skipped`` steps in a row were not finite, or the metrics cannot be written.
            ParallelError: another process of the run was lost.
            CheckpointError: the last checkpoint cannot be written. (An earlier one that cannot is a warning.)
        """
        self._started = self._clock()
        self.model.train()
        total = self.config.steps
        stop = StopRequest(insistent=isinstance(self.runner, OneDevice))
        try:
            with stop, self.ranks.watching(), self._metrics() as metrics, self._progress() as progress:
                while self.step < total and not self.ranks.any(stop.requested):
                    self._one_step(metrics, progress)
                    if self.step % self.config.checkpoint_every == 0 and self.step < total:
                        self._checkpoint_or_warn(metrics)
                status = Status.FINISHED if self.step >= total else Status.INTERRUPTED
                self._save(metrics)
                seconds = self.seconds
                metrics.write(self.step, self._times() | {STATUS: status.value})
        except OSError as error:
            raise TrainingError(f"step {self.step}: {error}; {self._last_good()}") from error
        except ParallelError as error:
            raise ParallelError(f"after step {self.step}: {error}; {self._last_good()}") from error
        return Outcome(status, seconds, self._evaluation)

    def train_step(self) -> StepResult:
        """Forward, backward and gradient norm of the next step's micro-batches; moves no weight."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        losses = torch.zeros(2, device=self.device)
        scale = 1 / self.config.accumulation
        for _ in range(self.config.accumulation):
            batch = self.runner.share(self.loader.next_batch())
            losses += torch.stack(self.runner.forward_backward(batch, scale, self._autocast())) * scale
        loss, extra = self.ranks.mean(losses).unbind()
        return StepResult(loss, extra, self.runner.clip(self.config.clip_norm))

    def evaluate(self) -> Evaluation:
        """Validate on the configured windows."""
        batches = eval_batches(self.data.val, self.config.seq_len, self.config.batch_size, self.config.eval_windows)
        return evaluate(self.runner, batches, self.data.token_bytes, self.device, self._autocast())

    def _metrics(self) -> MetricsWriter | NoMetrics:
        """Where lines go: of the first process to the folder, of the others nowhere."""
        if not self.ranks.is_first:
            return NoMetrics()
        return MetricsWriter(self.folder, resume_step=None if self._resumed is None else self.step)

    def _progress(self) -> Progress:
        console = None if self.ranks.is_first else Console(quiet=True, force_terminal=False)
        return Progress(self.config.steps, start_step=self.step, console=console, clock=self._clock)

    def _refuse_to_lose(self) -> None:
        """Where there is no good checkpoint, see that the run had not come as far as one."""
        if any(self.folder.checkpoints.glob("step_*")):
            raise CheckpointError(f"no checkpoint in {self.folder.checkpoints} is whole; start a run of another name")
        steps = [record_step(record) for record in read_metrics(self.folder.metrics)]
        if steps and max(steps) > self.config.checkpoint_every:
            raise CheckpointError(
                f"{self.folder.metrics} goes up to step {max(steps)}, but there is no checkpoint in "
                f"{self.folder.checkpoints} to go on from; start a run of another name"
            )

    def _one_step(self, metrics: MetricsWriter | NoMetrics, progress: Progress) -> None:
        """Take a step, or skip it, and write down what is due."""
        before = self.seconds
        result = self.train_step()
        finite = result.is_finite()
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loads: dict[str, LoadStats] = {}
        for part in self.runner.parts:
            loads |= balance_step(part, skipped=not finite)
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
        if self._on_step is not None:
            self._on_step(self.step, loads)
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

    def _skip(self, metrics: MetricsWriter | NoMetrics) -> None:
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

    def _save(self, metrics: MetricsWriter | NoMetrics) -> None:
        metrics.sync()
        self.runner.save(self.store, self.step, self.optimizer, self._state())

    def _checkpoint_or_warn(self, metrics: MetricsWriter | NoMetrics) -> None:
        """Save on the way; a run goes on without, since a full disk may be emptied before the next."""
        try:
            self._save(metrics)
        except CheckpointError as error:
            if not self.ranks.is_first:
                return
            warnings.warn(f"training goes on without this checkpoint: {error}", RuntimeWarning, stacklevel=2)

    def _state(self) -> dict[str, Any]:
        """What a resumed run needs beside model, optimizer and random generators."""
        return {
            "loader": self.loader.state_dict(),
            "pool": [self.runner.merge(loads) for loads in self.pool.state_dict()],
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
            **self.runner.merge(self.pool.measures()),
        }

    def _times(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "seconds": self.seconds}

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self.config.autocast_dtype(self.device)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
