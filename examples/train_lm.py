"""Train a Mixture-of-Experts language model, and leave a report of the run.

    python examples/train_lm.py
    python examples/train_lm.py data.path=~/books balance=score_bias run.steps=2000
    python examples/train_lm.py run.name=first resume=auto

Settings are composed by Hydra from the folder conf/ beside this file.
"""

import sys
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from moe.errors import MoEError
from moe.training.launch import launch


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Train as the settings say, and print where the run lies."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    try:
        run = launch(settings)
    except MoEError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"\n{run.status}: {run.evaluation.bits_per_byte:.3f} bits per byte on held-out text")
    print(f"run:    {run.folder.path}")
    print(f"report: {run.folder.report}")


if __name__ == "__main__":
    main()
