"""The page about a sweep: what was trained, the tables, the plots, and what is missing."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from measure.machine import hardware
from measure.results import record, require_new

from sweep import plots, tables
from sweep.figures import Row, rows_of
from sweep.job import Job
from sweep.race import read_times
from sweep.result import Result, read_result


def write_report(jobs: Sequence[Job], folder: Path, command: str) -> None:
    """Collect every result below the sweep's folder that was made with its settings, whatever pair and seed.

    Args:
        jobs: the trainings that were meant; those without a result are named as missing.
        folder: of the page.
        command: that made it.
    """
    first = jobs[0]
    found, others = collect(first)
    if not found:
        sys.exit(f"{first.root} has no result of these settings ({others} of other settings); train first")
    device = "cuda" if first.settings["run"]["device"].startswith("cuda") else "cpu"
    stem = folder / f"utilization_{hardware(device)}_{date.today()}"
    require_new(stem.with_suffix(".md"))
    rows = rows_of(found)
    lines = [*about_settings(first), *about_time(found), "", *main_part(rows, stem), *time_part(first, stem)]
    lines += missing(jobs, found, others)
    record(stem.with_suffix(".md"), ["# Routers and balance", "", f"`{command}`", ""], lines)


def collect(job: Job) -> tuple[list[Result], int]:
    """The results of a job's sweep, and the number of those that lie there but belong to another one."""
    every = [read_result(path) for path in sorted(job.root.glob("*/result.json"))]
    found = [result for result in every if result is not None]
    own = [result for result in found if result.sweep == job.sweep]
    return own, len(found) - len(own)


def about_settings(job: Job) -> Iterator[str]:
    """The sizes that all trainings have in common."""
    model, run, optim = job.settings["model"], job.settings["run"], job.settings["optim"]
    moe = model["moe"]
    tokens = run["batch_size"] * run["seq_len"] * run["accumulation"]
    text = "the source files of Python's standard library" if job.settings["data"]["path"] is None else "other text"
    yield (
        f"Every line: {model['num_layers']} layers, dim {model['dim']}, {moe['num_experts']} experts of "
        f"hidden_dim {moe['hidden_dim']}, top-{moe['top_k']}, dropless; {run['steps']} steps of {tokens:,} tokens of "
        f"{job.settings['tokenizer']['tokenizer']} from {text}, peak learning rate {optim['peak']:g}, "
        f"{optim['schedule']['warmup_steps']} steps of warm-up; validated on {run['eval_windows']} windows of "
        f"{run['seq_len']} tokens after the last step."
    )


def about_time(results: Sequence[Result]) -> Iterator[str]:
    """On what, and how long."""
    busy = sum(result.seconds for result in results)
    start, end = min(r.ended - r.seconds for r in results), max(r.ended for r in results)
    when = [datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M") for at in (start, end)]
    yield (
        f"{len(results)} trainings took {busy / 3600:.2f} hours together, and {(end - start) / 3600:.2f} hours from "
        f"the first start to the last end ({when[0]} to {when[1]} UTC)."
    )
    for machine in sorted({result.machine for result in results}):
        yield f"{machine}."


def main_part(rows: Sequence[Row], stem: Path) -> Iterator[str]:
    """What the counts and the validation say."""
    yield (
        "Means ± half of the 95% interval over seeds (Student's t). MaxVio, the largest load over the mean load minus "
        "1, is the mean over layers: of the training batches in the first tenth of the steps (early) and the last "
        "quarter (late), of all the late steps' counts together (pooled), and of the whole validation in evaluation "
        "mode. In brackets is about what chance alone would show for as many assignments drawn one by one. Dropped is "
        "what a capacity of that factor would have dropped in the late steps; nothing was."
    )
    yield ""
    yield from tables.main_table(rows)
    yield ""
    yield from picture("quality against balance", stem, "frontier")
    plots.plot_frontier(rows, named(stem, "frontier"))
    yield from picture("what a capacity would drop", stem, "drops")
    plots.plot_drops(rows, named(stem, "drops"))
    yield (
        "CV (standard deviation of the load over its mean) is the mean of late steps; entropy (of the load, over "
        "log E) and dead experts (without a token) are of the late steps together. A step's time is the median of a "
        "training, beside which others may have run: it is not to be compared."
    )
    yield ""
    yield from tables.detail_table(rows)
    yield ""
    yield from picture("load of each expert over training", stem, "load")
    plots.plot_heat_maps(rows, named(stem, "load"))


def time_part(job: Job, stem: Path) -> Iterator[str]:
    """Steps in turns, where they were measured."""
    times = read_times(job)
    if times is None:
        yield "The time of steps in turns was not measured: `python benchmarks/utilization.py mode=timing`."
        yield ""
        return
    baseline, ratios = next(iter(times.seconds)), times.ratios()
    yield (
        f"Time of a training step, all pairs in turns in one process, the ratio within a round; {times.rounds} rounds "
        f"after {times.warmup} that do not count. {times.machine}."
    )
    yield ""
    yield from tables.time_table(ratios, baseline)
    yield ""
    yield from picture("time of a step", stem, "time")
    plots.plot_times(ratios, baseline, named(stem, "time"))


def missing(jobs: Iterable[Job], found: Sequence[Result], others: int) -> Iterator[str]:
    """What was meant to be there and is not."""
    there = {result.fingerprint for result in found}
    for job in jobs:
        if job.fingerprint not in there:
            why = (
                job.error.read_text(encoding="utf-8").strip().splitlines()[-1] if job.error.exists() else "not trained"
            )
            yield f"- {job} is missing: {why}"
    if others:
        yield f"- {others} results of other settings lie in the same folder and are not shown."


def picture(title: str, stem: Path, name: str) -> Iterator[str]:
    """A plot that lies beside the page."""
    yield f"![{title}]({named(stem, name).name})"
    yield ""


def named(stem: Path, name: str) -> Path:
    """The file of a plot."""
    return stem.with_name(f"{stem.name}_{name}.svg")
