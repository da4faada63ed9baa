"""From the settings of a run, as plain data, to a trained model and the folder it leaves."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
import yaml

from moe.config import construct
from moe.errors import ConfigError, DataError, MoEError
from moe.models import Decoder, DecoderConfig, generate
from moe.training.config import ParallelOptions, RunOptions, TrainConfig
from moe.training.data import PreparedData, prepare
from moe.training.optim import Named, make_optimizer
from moe.training.ranks import Ranks, processes
from moe.training.report import RunSummary, write_report
from moe.training.run_folder import RunFolder
from moe.training.schedule import Schedule
from moe.training.spread import check_split, sample_together, spread
from moe.training.trainer import OnStep, Outcome, Trainer

_PACKAGES = ("moe-torch", "torch", "numpy")
"""Whose versions a report names."""

Settings = Mapping[str, Any]
"""``model``, ``balance``, ``data``, ``tokenizer``, ``optim``, ``run`` and ``resume``; see examples/conf."""


@final
@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: RunFolder
    model: Any
    """The decoder; of a pipeline, the first of this process's stages."""

    outcome: Outcome
    is_first: bool
    """Whether this process is the one of the run's that prints."""


def launch(settings: Settings, *, on_step: OnStep | None = None) -> Run:
    """Train a decoder language model as the settings say, and write its report.

    Args:
        settings: plain data, as Hydra composes it from examples/conf.
        on_step: see `moe.training.trainer.Trainer`.

    Raises:
        ConfigError, DataError: a setting is out of range, or the text cannot be used; before anything is written.
        CheckpointError: what is to be resumed does not fit the settings.
        TrainingError: the run was stopped; its folder and report are whole.
    """
    options = _options(settings)
    with processes(options.device, _parallel(settings).timeout) as (ranks, device):
        ranks.require_same(flatten(settings))
        return _launch(settings, options, ranks, device, on_step)


def _launch(settings: Settings, options: RunOptions, ranks: Ranks, device: torch.device, on_step: OnStep | None) -> Run:
    """In each of the run's processes, which have the same settings."""
    config, parallel, optim = _train_config(settings), _parallel(settings), settings["optim"]
    schedule = construct("optim", Schedule, {"total_steps": config.steps, "peak": optim["peak"], **optim["schedule"]})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    degrees = check_split(parallel, config.batch_size, ranks)
    with ranks.together():
        data = construct("data and tokenizer", prepare, {**settings["data"], **settings["tokenizer"]})
        prompt = _check_text(data, config, options)

    def whole() -> Decoder:
        return make_model(settings, data.tokenizer.vocab_size, config.seq_len)

    def optimizer_of(model: Named) -> torch.optim.Optimizer:
        return construct("optim.adamw", make_optimizer, {"model": model, "peak": optim["peak"], **optim["adamw"]})

    torch.manual_seed(config.seed)
    decoder = whole().to(device)
    summary = _summary(decoder, data, config, device)
    runner = spread(decoder, degrees, parallel, ranks, whole, optimizer_of)
    model = runner.parts[0]
    del decoder  # of a pipeline each process keeps its stages only
    optimizer = optimizer_of(runner)
    folder = ranks.first(lambda: _open(settings, options))
    trainer = Trainer(model, optimizer, schedule, data, config, folder, runner=runner, on_step=on_step)
    if settings["resume"] == "auto":
        trainer.resume()
    if ranks.is_first:
        folder.write_config(yaml.safe_dump(dict(settings), sort_keys=False))
    outcome = _train(trainer, summary)
    text = sample_together(runner, lambda model: sample(model, data, prompt, options.sample_tokens))
    if ranks.is_first:
        write_report(folder, replace(summary, prompt=options.prompt, sample=text))
    return Run(folder, model, outcome, ranks.is_first)


def _train(trainer: Trainer, summary: RunSummary) -> Outcome:
    """Train; write the report also where that fails."""
    try:
        return trainer.run()
    except MoEError:
        if trainer.ranks.is_first:
            with suppress(MoEError, OSError):  # what stopped the run is what the user must read
                write_report(trainer.folder, summary)
        raise


def _open(settings: Settings, options: RunOptions) -> RunFolder:
    name = _resumable(settings["resume"], Path(options.root), options.name)
    return RunFolder.open(Path(options.root), name, resume=settings["resume"] == "auto")


def _parallel(settings: Settings) -> ParallelOptions:
    return construct("parallel", ParallelOptions, settings.get("parallel", {}))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted key, each value as text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: repr(value)}
    return found


def _options(settings: Settings) -> RunOptions:
    own = {field.name for field in fields(RunOptions)}
    return construct("run", RunOptions, {key: value for key, value in settings["run"].items() if key in own})


def _train_config(settings: Settings) -> TrainConfig:
    """What the trainer needs of the group ``run``."""
    options = {field.name for field in fields(RunOptions)}
    return construct("run", TrainConfig, {key: value for key, value in settings["run"].items() if key not in options})


def _check_text(data: PreparedData, config: TrainConfig, options: RunOptions) -> list[int]:
    """See that there is text for a batch, a validation and a sample; returns the prompt's tokens."""
    for split, tokens in (("training", data.train), ("validation", data.val)):
        if len(tokens) <= config.seq_len:
            raise DataError(
                f"the {split} text has {len(tokens)} tokens, fewer than the {config.seq_len + 1} that a sequence of "
                f"seq_len={config.seq_len} takes; give more text, or set another data.val_fraction or run.seq_len"
            )
    prompt = [data.tokenizer.separator_id, *data.tokenizer.encode(options.prompt).tolist()]
    if len(prompt) >= config.seq_len:
        raise ConfigError(
            f"prompt={options.prompt!r} has {len(prompt)} tokens; seq_len={config.seq_len} leaves no room for a sample"
        )
    return prompt


def make_model(settings: Settings, vocab_size: int, seq_len: int) -> Decoder:
    """The decoder that the settings describe; a ``model.moe`` of None is a dense one."""
    options = dict(settings["model"])
    checkpointing = options.pop("activation_checkpointing")
    if options["moe"] is not None:
        options["moe"] = {**options["moe"], "balance": settings["balance"] or {}}
    config = construct("model", DecoderConfig, {"vocab_size": vocab_size, "max_seq_len": seq_len, **options})
    return Decoder(config, activation_checkpointing=checkpointing)


def sample(model: Decoder, data: PreparedData, prompt: Sequence[int], num_tokens: int) -> str:
    """What the model writes after a prompt, always the same for the same model; asked for no tokens, nothing."""
    if num_tokens == 0:
        return ""
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    eos_id = data.tokenizer.separator_id
    room = model.config.max_seq_len - len(prompt)
    out = generate(
        model, tokens, min(num_tokens, room), temperature=0.8, top_p=0.95, generator=generator, eos_id=eos_id
    )
    return data.tokenizer.decode(out[0, tokens.shape[1] :].tolist())


def _resumable(resume: str, root: Path, name: str | None) -> str | None:
    """The name of the run: the one that was asked for, or to resume, that of the run with the newest checkpoint."""
    if resume not in ("never", "auto"):
        raise ConfigError(f"resume={resume!r} is unknown; choose 'never' or 'auto'")
    if resume == "never" or name is not None:
        return name
    checkpoints = [path for path in root.glob("*/checkpoints/step_*") if path.is_dir()]
    if not checkpoints:
        return None
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns).parents[1].name


def _summary(model: Decoder, data: PreparedData, config: TrainConfig, device: torch.device) -> RunSummary:
    moe = model.config.moe or {}
    windows = min(config.eval_windows, (len(data.val) - 1) // config.seq_len)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return RunSummary(
        total_parameters=model.num_parameters(),
        active_parameters=model.num_active_parameters(),
        top_k=moe.get("top_k", 2) if moe else 0,
        pooled_steps=config.pool_steps,
        validation_tokens=windows * config.seq_len,
        unigram_bits_per_byte=data.unigram_bpb,
        gzip_bits_per_byte=data.gzip_bpb,
        skipped_count=data.skipped.count,
        skipped_files=data.skipped.named,
        hardware=hardware,
        versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    )


def _processor() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
