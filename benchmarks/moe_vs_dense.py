"""A mixture of experts against a dense model: the same active parameters, then the same tokens or the same time.

    python benchmarks/moe_vs_dense.py
    python benchmarks/moe_vs_dense.py run.steps=200 seeds=[0,1]

Three runs a seed: the MoE of examples/conf; a dense model whose feed-forward is as wide as what one token meets in the
MoE, on the same tokens in the same order; and that dense model again, for as long as the MoE took. Writes a table and a
plot to benchmarks/results/.
"""

import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from moe.training.launch import launch
from moe.training.metrics import read_metrics
from moe.training.trainer import Status

HERE = Path(__file__).resolve().parent
MOE, DENSE, DENSE_LONGER = "MoE", "dense, same tokens", "dense, same time"


@dataclass(frozen=True)
class Result:
    """One run."""

    model: str
    seed: int
    steps: int
    total_parameters: int
    active_parameters: int
    tokens: int
    seconds: float
    bits_per_byte: float
    curve: list[tuple[int, float, float]]
    """Tokens, seconds and bits per byte at each validation."""


def train(model: str, config: str, seed: int, overrides: Sequence[str]) -> Result:
    """One run of examples/conf with a seed."""
    with initialize_config_dir(str(HERE.parent / "examples" / "conf"), version_base=None):
        chosen = compose("config", overrides=[f"model={config}", *overrides, f"run.seed={seed}", "run.name=null"])
    settings: Any = OmegaConf.to_container(chosen, resolve=True)
    run = launch(settings)
    if run.outcome.status is not Status.FINISHED or run.outcome.evaluation is None:
        sys.exit(f"the run in {run.folder.path} is {run.outcome.status}, not finished: no result")
    lines = [line for line in read_metrics(run.folder.metrics) if "val/bits_per_byte" in line]
    curve: list[Any] = [(line["tokens"], line["seconds"], line["val/bits_per_byte"]) for line in lines]
    steps = settings["run"]["steps"]
    tokens, bits = curve[-1][0], run.outcome.evaluation.bits_per_byte
    sizes = run.model.num_parameters(), run.model.num_active_parameters()
    return Result(model, seed, steps, *sizes, tokens, run.outcome.seconds, bits, curve)


def compare(seed: int, overrides: Sequence[str]) -> list[Result]:
    """The three runs of a seed."""
    moe = train(MOE, "small", seed, overrides)
    dense = train(DENSE, "dense", seed, overrides)
    steps = round(dense.steps * moe.seconds / dense.seconds)
    return [moe, dense, train(DENSE_LONGER, "dense", seed, [*overrides, f"run.steps={steps}"])]


def table(results: Sequence[Result]) -> Iterable[str]:
    """One line a run and one a model, in Markdown."""
    yield "| model | seed | parameters | active | steps | tokens | seconds | bits per byte |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in results:
        sizes = f"{r.total_parameters:,} | {r.active_parameters:,} | {r.steps} | {r.tokens:,}"
        yield f"| {r.model} | {r.seed} | {sizes} | {r.seconds:.0f} | {r.bits_per_byte:.3f} |"
    yield ""
    yield "| model | bits per byte, mean and standard deviation over seeds | seconds |"
    yield "|---|---|---|"
    for model in (MOE, DENSE, DENSE_LONGER):
        bits = [r.bits_per_byte for r in results if r.model == model]
        seconds = mean(r.seconds for r in results if r.model == model)
        spread = f" ± {stdev(bits):.3f}" if len(bits) > 1 else ""
        yield f"| {model} | {mean(bits):.3f}{spread} | {seconds:.0f} |"


def plot(results: Sequence[Result], path: Path) -> None:
    """Validation over tokens and over time, a line a run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colors = {MOE: "tab:blue", DENSE: "tab:orange", DENSE_LONGER: "tab:green"}
    for axis, (index, label, scale) in zip(figure.subplots(1, 2), ((0, "million tokens", 1e-6), (1, "seconds", 1.0))):
        for r in results:
            name = r.model if r.seed == results[0].seed else None
            values = [point[2] for point in r.curve]
            axis.plot([point[index] * scale for point in r.curve], values, color=colors[r.model], label=name, alpha=0.8)
        axis.set(xlabel=label, ylabel="validation bits per byte")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path)


def main(arguments: Sequence[str]) -> None:
    """Run all seeds; arguments are overrides of examples/conf, and ``seeds=[...]``."""
    chosen = next((a.removeprefix("seeds=") for a in arguments if a.startswith("seeds=")), "[0,1,2]")
    seeds = [int(seed) for seed in chosen.strip("[]").split(",")]
    overrides = ["run.root=runs/moe_vs_dense", *(a for a in arguments if not a.startswith("seeds="))]
    stem = HERE / "results" / f"moe_vs_dense_{platform.machine()}_{torch.get_num_threads()}cores_{date.today()}"
    stem.parent.mkdir(exist_ok=True)
    if stem.with_suffix(".md").exists():
        sys.exit(f"{stem.with_suffix('.md')} exists; move it away, results are not overwritten")
    results = [r for seed in seeds for r in compare(seed, overrides)]
    plot(results, stem.with_suffix(".svg"))
    text = [
        "# A mixture of experts against a dense model",
        "",
        f"`python benchmarks/moe_vs_dense.py {' '.join(arguments)}`".replace(" `", "`"),
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads.",
        "",
        *table(results),
        "",
        f"![validation bits per byte]({stem.name}.svg)",
    ]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
