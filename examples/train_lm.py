"""Train a Mixture-of-Experts language model, and leave a report of the run.

    python examples/train_lm.py
    python examples/train_lm.py data.path=$HOME/books balance=score_bias run.steps=2000
    python examples/train_lm.py run.name=first resume=auto
    torchrun --nproc-per-node 4 examples/train_lm.py parallel.ep=2 run.name=first resume=auto

Settings are composed by Hydra from the folder conf/ beside this file.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import DictConfig, OmegaConf

from moe.errors import MoEError
from moe.training.launch import launch

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Train as the settings say, and print where the run lies."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    try:
        run = launch(settings)
    except MoEError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if not run.is_first:  # of the processes that torchrun started, one speaks for all
        return
    found = run.outcome.evaluation
    print(f"\n{run.outcome.status}" + (f": {found.bits_per_byte:.3f} bits per byte on held-out text" if found else ""))
    print(f"run:    {run.folder.path}")
    print(f"report: {run.folder.report}")


def known_keys() -> Iterator[str]:
    """Every key of conf/, whichever file of a group is chosen, and every group."""
    yield "resume"
    for file in CONF.glob("*/*.yaml"):
        yield file.parent.name
        yield from (f"{file.parent.name}.{key}" for key in flat_keys(yaml.safe_load(file.read_text()) or {}))


def flat_keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of a mapping, those of its mappings too."""
    for key, value in tree.items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in flat_keys(value))


def nearest_keys(arguments: Sequence[str]) -> Iterator[str]:
    """For each argument that sets an unknown key, a line that names the nearest known one."""
    known = sorted(set(known_keys()))
    for key in (argument.lstrip("+~").split("=")[0] for argument in arguments if "=" in argument):
        near = get_close_matches(key, known, n=1)
        if key not in known and near:
            yield f"{key!r} is no setting; did you mean {near[0]!r}?"


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code == 1:  # Hydra has said what is wrong with a setting; this adds what may have been meant
            print(*nearest_keys(sys.argv[1:]), sep="\n", file=sys.stderr)
        raise
