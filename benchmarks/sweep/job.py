"""One training of the sweep: its settings, its names, and what tells it from others.

Everything that a training depends on comes from conf/utilization.yaml and the command line, so a new router or balance
is a file in conf/router or conf/balance and no code.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hydra import compose
from omegaconf import OmegaConf

_TRAINING = ("model", "balance", "data", "tokenizer", "optim", "parallel", "run")
"""The settings that `moe.training.launch` takes."""


@final
@dataclass(frozen=True)
class Job:
    """A router, a balance and a seed, in settings that the whole sweep shares."""

    router: str
    """The file in conf/router, and behind it what the command line changed in it."""
    balance: str
    """Likewise, of conf/balance."""
    settings: Mapping[str, Any]
    """For `moe.training.launch`."""
    root: Path
    """Where the sweep's trainings lie."""

    @property
    def seed(self) -> int:
        """Of the model and of the order of the text."""
        seed: int = self.settings["run"]["seed"]
        return seed

    @property
    def pair(self) -> str:
        """A fingerprint that all seeds of a router and a balance have in common."""
        return _fingerprint(self.settings, "run.seed")

    @property
    def sweep(self) -> str:
        """A fingerprint that all trainings which may be compared have in common."""
        return _fingerprint(self.settings, "run.seed", "model.moe.router", "balance")

    @property
    def fingerprint(self) -> str:
        """Of all that decides what the training comes to."""
        return _fingerprint(self.settings)

    @property
    def folder(self) -> Path:
        """Where this training lies."""
        names = "-".join(name.replace("/", "_") for name in (self.router, self.balance))
        return self.root / f"{names}-{self.seed}-{self.fingerprint}"

    @property
    def result(self) -> Path:
        """The file that is there once the training has ended."""
        return self.folder / "result.json"

    @property
    def error(self) -> Path:
        """What went wrong the last time, where something did."""
        return self.folder / "error.txt"

    def __str__(self) -> str:
        return f"{self.router}, {self.balance}, seed {self.seed}"


def read_job(overrides: Sequence[str]) -> Job:
    """Compose the training that a command line describes; within ``hydra.main``, or after Hydra was initialised.

    Raises:
        HydraException: a setting is unknown, or cannot have its value.
    """
    composed = compose("utilization", overrides=list(overrides), return_hydra_config=True)
    chosen = composed.hydra.runtime.choices
    tree: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(composed, [*_TRAINING, "root", "router", "seed"]), resolve=True
    )
    router, balance = (_name(chosen[group], group, composed.hydra.overrides.task) for group in ("router", "balance"))
    return Job(router, balance, {key: tree[key] for key in _TRAINING} | {"resume": "never"}, Path(tree["root"]))


def _name(choice: str, group: str, overrides: Sequence[str]) -> str:
    """The chosen file, and what was changed in it: ``score_bias(score_bias.rate=0.003)``."""
    prefix = f"{group}."
    changed = [text.lstrip("+~").removeprefix(prefix) for text in overrides if text.lstrip("+~").startswith(prefix)]
    return f"{choice}({','.join(changed)})" if changed else choice


def _fingerprint(settings: Mapping[str, Any], *left_out: str) -> str:
    """Of settings; where files lie is no part of it."""
    tree = json.loads(json.dumps(settings))
    for key in ("run.root", "run.name", "data.cache_dir", *left_out):
        *path, last = key.split(".")
        branch = tree
        for name in path:
            branch = branch[name]
        branch.pop(last, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
