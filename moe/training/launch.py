"""From the settings of a run, as plain data, to a trained model and the folder it leaves."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
import yaml

from moe.errors import ConfigError, MoEError
from moe.models import Decoder, DecoderConfig, generate
from moe.training.config import TrainConfig, pick_device
from moe.training.data import PreparedData, prepare
from moe.training.evaluate import Evaluation
from moe.training.optim import make_optimizer
from moe.training.report import RunSummary, write_report
from moe.training.run_folder import RunFolder
from moe.training.schedule import Schedule
from moe.training.trainer import Status, Trainer

_PACKAGES = ("moe-torch", "torch", "numpy")
"""Whose versions a report names."""

_NOT_TRAINING = ("name", "root", "device", "threads", "prompt", "sample_tokens")
"""Settings of ``run`` that are not the trainer's."""

Settings = Mapping[str, Any]
"""``model``, ``balance``, ``data``, ``tokenizer``, ``optim``, ``run`` and ``resume``; see examples/conf."""


@final
@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: RunFolder
    status: Status
    model: Decoder
    evaluation: Evaluation
    seconds: float
    """Time spent in training."""


def launch(settings: Settings) -> Run:
    """Train a decoder language model as the settings say, and write its report.

    Args:
        settings: plain data, as Hydra composes it from examples/conf.

    Raises:
        ConfigError, DataError: a setting is out of range, or the text cannot be used; before anything is written.
        CheckpointError: what is to be resumed does not fit the settings.
        TrainingError: the run was stopped; its folder and report are whole.
    """
    run = settings["run"]
    config = TrainConfig(**{name: value for name, value in run.items() if name not in _NOT_TRAINING})
    schedule = Schedule(total_steps=config.steps, peak=settings["optim"]["peak"], **settings["optim"]["schedule"])
    device = pick_device(run["device"])
    if run["threads"] is not None:
        torch.set_num_threads(run["threads"])
    folder_resume = _resumable(settings["resume"], Path(run["root"]), run["name"])
    data = prepare(**settings["data"], **settings["tokenizer"])
    torch.manual_seed(config.seed)
    model = make_model(settings, data.tokenizer.vocab_size, config.seq_len).to(device)
    optimizer = make_optimizer(model, peak=settings["optim"]["peak"], **settings["optim"]["adamw"])
    name = run["name"] if folder_resume is None else folder_resume.name
    folder = RunFolder.open(Path(run["root"]), name, resume=folder_resume is not None)
    trainer = Trainer(model, optimizer, schedule, data, config, folder)
    if folder_resume is not None:
        trainer.resume()
    folder.write_config(yaml.safe_dump(dict(settings), sort_keys=False))
    summary = _summary(model, data, config, device)
    try:
        status = trainer.run()
    except MoEError:
        write_report(folder, summary)  # a run that was stopped leaves its report too
        raise
    text = sample(model, data, run["prompt"], run["sample_tokens"])
    write_report(folder, replace(summary, prompt=run["prompt"], sample=text))
    return Run(folder, status, model, trainer.evaluate(), trainer.seconds)


def make_model(settings: Settings, vocab_size: int, seq_len: int) -> Decoder:
    """The decoder that the settings describe; a ``model.moe`` of None is a dense one."""
    options = dict(settings["model"])
    checkpointing = options.pop("activation_checkpointing")
    if options["moe"] is not None:
        options["moe"] = {**options["moe"], "balance": settings["balance"] or {}}
    config = DecoderConfig(vocab_size=vocab_size, max_seq_len=seq_len, **options)
    return Decoder(config, activation_checkpointing=checkpointing)


def sample(model: Decoder, data: PreparedData, prompt: str, num_tokens: int) -> str:
    """What the model writes after a prompt, always the same for the same model."""
    device = next(model.parameters()).device
    tokens = torch.tensor([[data.tokenizer.separator_id, *data.tokenizer.encode(prompt).tolist()]], device=device)
    room = model.config.max_seq_len - tokens.shape[1]
    generator = torch.Generator(device=device).manual_seed(0)
    out = generate(
        model, tokens, min(num_tokens, room), temperature=0.8, top_p=0.95, generator=generator,
        eos_id=data.tokenizer.separator_id,
    )  # fmt: skip
    return data.tokenizer.decode(out[0, tokens.shape[1] :].tolist())


def _resumable(resume: str, root: Path, name: str | None) -> Path | None:
    """The folder to go on in: the named one, or the newest with a checkpoint; None for a new run."""
    if resume not in ("never", "auto"):
        raise ConfigError(f"resume={resume!r} is unknown; choose 'never' or 'auto'")
    if resume == "never":
        return None
    folders = [root / name] if name is not None else sorted(root.glob("*"), key=lambda path: path.stat().st_mtime)
    found = [folder for folder in folders if any(folder.glob("checkpoints/step_*"))]
    return found[-1] if found else None


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
        skipped_files=_skipped(data),
        hardware=hardware,
        versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
    )


def _skipped(data: PreparedData) -> tuple[str, ...]:
    unnamed = data.skipped.count - len(data.skipped.named)
    return data.skipped.named + ((f"and {unnamed} more",) if unnamed else ())


def _processor() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
