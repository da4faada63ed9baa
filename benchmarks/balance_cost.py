"""What statistics and bias rules cost: their share of a training step, by balance.

    python benchmarks/balance_cost.py
    python benchmarks/balance_cost.py model.dim=1024 model.moe.hidden_dim=512 model.num_heads=16 timing.rounds=5

Counted are the load of each call, what a bias rule observes there, and ``moe.balance_step``; losses are not, which are
part of the model's. Steps of all balances are taken in turns in one process, and each step's share is of that step
alone, so that a neighbour on the machine slows both; what a run pays is the share of all steps together, since some
rules do more in some steps than in others. Settings are those of conf/utilization.yaml.
"""

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import mean, quantiles
from time import perf_counter
from typing import Any
from unittest.mock import patch

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from sweep import race
from sweep.job import read_job

from moe.layer import MoE
from moe.training.data import prepare

HERE = Path(__file__).resolve().parent
BALANCES = ("none", "score_bias", "rms_bias", "momentum_bias", "quantile_bias")


class Stopwatch:
    """Adds up the time spent in some functions; one inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, function: Any) -> Any:
        """The function, timed."""

        def wrapped(*args: Any, **options: Any) -> Any:
            self._depth += 1
            started = perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += perf_counter() - started

        return wrapped


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """Time the layer's counting and the end of each step."""
    watch = Stopwatch()
    with (
        patch.object(MoE, "_count", watch.timed(MoE._count)),
        patch.object(race, "balance_step", watch.timed(race.balance_step)),
    ):
        yield watch


def shares(steppers: dict[str, race.Stepper], warmup: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Of each balance and round, the seconds of its step and those for balance in it."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steppers}
    with watched() as watch:
        for number in range(-warmup, rounds):
            for name, stepper in steppers.items():
                watch.seconds, started = 0.0, perf_counter()
                stepper.step()
                if number >= 0:
                    found[name].append((perf_counter() - started, watch.seconds))
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """One line a balance."""
    yield "| balance | step, ms | for balance, ms | share of all steps | of one, quartiles |"
    yield "|---|---|---|---|---|"
    for name, rounds in found.items():
        part = [own / whole for whole, own in rounds]
        step, own = (1e3 * mean(column) for column in zip(*rounds))
        quartiles = ", ".join(f"{quartile:.2%}" for quartile in quantiles(part, n=4))
        yield f"| {name} | {step:.1f} | {own:.2f} | {own / step:.2%} | {quartiles} |"


def composed(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """A job for each balance; of the look-ahead rule one that is within its early steps, and one that is past them."""
    own = [*(text for text in arguments if not text.startswith("timing.")), "router=sigmoid"]
    for balance in BALANCES:
        yield balance, read_job([*own, f"balance={balance}"])
    for name, early_steps in (("early", 10**6), ("late", 1)):
        steps = f"+balance.lookahead_bias.early_steps={early_steps}"
        yield f"lookahead_bias, {name}", read_job([*own, "balance=lookahead_bias", steps])


@hydra.main(version_base=None, config_path="conf", config_name="utilization")
def main(config: DictConfig) -> None:
    """Time all balances in turns, and write the table to benchmarks/results/."""
    arguments = list(HydraConfig.get().overrides.task)
    settings: Any = OmegaConf.to_container(config.timing)
    jobs = dict(composed(arguments))
    torch.set_num_threads(1)
    first = next(iter(jobs.values())).settings
    data = prepare(**first["data"], **first["tokenizer"])
    found = shares({name: race.Stepper(job, data) for name, job in jobs.items()}, **settings)
    model, run = first["model"], first["run"]
    sizes = f"dim {model['dim']}, {model['num_layers']} layers, E {model['moe']['num_experts']}"
    sizes += (
        f", K {model['moe']['top_k']}, hidden {model['moe']['hidden_dim']}, {run['batch_size'] * run['seq_len']} tokens"
    )
    text = [
        "# What statistics and bias rules cost",
        "",
        f"`python benchmarks/balance_cost.py {' '.join(arguments)}`".replace(" `", "`"),
        f"{sizes}; sigmoid router, {run['precision']}, one thread; {settings['rounds']} steps of each in turns, after",
        f"{settings['warmup']}. torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.",
        "",
        *table(found),
    ]
    path = HERE / "results" / f"balance_cost_dim{model['dim']}_{platform.machine()}_1cores_{date.today()}.md"
    if path.exists():
        sys.exit(f"{path} exists; move it away, results are not overwritten")
    path.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
