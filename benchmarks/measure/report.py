"""The tables and the plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peers import FLOOR
from peers.contestant import Case
from torch import Tensor

from measure.gpu import Roofline
from measure.oracle import Errors
from measure.peak import Point, slope
from measure.timing import Spread, Times, over

MB = 1e6
NOTHING = "-"


def case_table(
    case: Case,
    load: Tensor,
    times: Mapping[str, Times],
    saved: Mapping[str, int | None],
    errors: Mapping[str, Errors | None],
    skipped: Mapping[str, str],
) -> Iterable[str]:
    """One case in Markdown: a line a contestant, then who is missing and why.

    Args:
        case: its sizes.
        load: ``(E,)``, tokens per expert.
        times: by contestant.
        saved: bytes kept for backward; None where nothing is differentiated.
        errors: None for what computes something else than the mixture.
        skipped: why, by name.
    """
    fullest = load.max() / load.double().mean()
    yield f"## {case}"
    yield ""
    yield (
        f"{case.flops / 1e9:.4g} GFLOP forward and backward. The fullest expert has {fullest:.2f} times the mean load, "
        f"{int((load == 0).sum())} of {case.num_experts} have no token."
    )
    yield ""
    yield (
        "| contestant | forward + backward, ms | over the floor (quartiles) | forward, ms | over the floor (quartiles) "
        "| MB saved | error of output | of gradients (worst) | tokens moved |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in sorted(times, key=lambda name: Spread.of(times[name].step).median):
        cells = [name]
        for mine, floor in ((times[name].step, times[FLOOR].step), (times[name].forward, times[FLOOR].forward)):
            cells += [f"{Spread.of(mine).median * 1e3:.4g}", ratio(over(mine, floor))]
        kept, error = saved[name], errors[name]
        cells.append(NOTHING if kept is None else f"{kept / MB:.4g}")
        if error is None:
            cells += [NOTHING] * 3
        else:
            cells += [f"{error.output:.1e}", f"{error.gradient:.1e} ({error.gradient_name})", str(error.moved_tokens)]
        yield f"| {' | '.join(cells)} |"
    yield from missing(skipped)


def gpu_table(
    case: Case, times: Mapping[str, Times], peaks: Mapping[str, int], roofline: Roofline, dtype: torch.dtype
) -> Iterable[str]:
    """What a GPU reached in a case, in Markdown."""
    yield ""
    yield "| contestant | TFLOP/s, forward + backward | of roofline | TFLOP/s, forward | of roofline | peak MB |"
    yield "|---|---|---|---|---|---|"
    for name in times:
        cells = [name]
        for seconds, flops, training in (
            (Spread.of(times[name].step).median, case.flops, True),
            (Spread.of(times[name].forward).median, case.forward_flops, False),
        ):
            cells += [
                f"{flops / seconds / 1e12:.4g}",
                f"{roofline.seconds(case, dtype.itemsize, training) / seconds:.0%}",
            ]
        yield f"| {' | '.join(cells)} | {peaks[name] / MB:.4g} |"


def missing(skipped: Mapping[str, str]) -> Iterable[str]:
    """Who is missing and why."""
    if skipped:
        yield ""
    for name, reason in skipped.items():
        yield f"- {name} is left out: {reason}"


def ratio(spread: Spread) -> str:
    """A median with its quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def memory_table(points: Sequence[Point], names: Sequence[str], sizes: Sequence[int]) -> Iterable[str]:
    """Peak memory by tokens, and bytes per token, in Markdown."""
    by_name = {name: {point.tokens: point for point in points if point.name == name} for name in names}
    yield "| contestant | " + " | ".join(f"T={size}" for size in sizes) + " |"
    yield "|---|" + "---|" * len(sizes)
    for name, found in by_name.items():
        cells = (NOTHING if (point := found[size]).skipped else f"{point.peak / MB:.4g}" for size in sizes)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "| contestant | peak, bytes per token | held between forward and backward | saved, as autograd says |"
    yield "|---|---|---|---|"
    for name in names:
        curve = [point for point in by_name[name].values() if not point.skipped]
        if len(curve) > 1:
            tokens = [point.tokens for point in curve]
            held = [point.held for point in curve if point.held is not None]
            slopes = [slope(tokens, [point.peak for point in curve]), slope(tokens, held) if held else None]
            slopes.append(slope(tokens, [point.saved for point in curve]))
            shown = (NOTHING if value is None else f"{value:,.0f}" for value in slopes)
            yield f"| {name} | {' | '.join(shown)} |"
    reasons: dict[str, str] = {}
    for point in points:
        if point.skipped:
            reasons.setdefault(point.name, f"from T={point.tokens} on: {point.skipped}")
    yield from missing(reasons)


def memory_plot(points: Sequence[Point], names: Sequence[str], path: Path) -> None:
    """A line a contestant: peak memory over tokens."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in names:
        curve = [point for point in points if point.name == name and not point.skipped]
        if curve:
            line = "--" if name == FLOOR else "-"
            axis.plot([p.tokens / 1024 for p in curve], [p.peak / MB for p in curve], line, marker="o", label=name)
    axis.set(xlabel="thousand tokens (1,024)", ylabel="peak memory of forward + backward, MB", xlim=(0, None))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path)
