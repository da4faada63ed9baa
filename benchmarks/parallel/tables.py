"""The tables: what all ranks saw of a case, in Markdown."""

from collections.abc import Iterable, Sequence
from statistics import mean

from measure.report import ratio
from measure.timing import Spread, Times, over
from peers.contestant import Case

from parallel.traffic import KINDS
from parallel.trial import PLAIN, Trial


def case_tables(case: Case, ranks: Sequence[Trial]) -> Iterable[str]:
    """One case on some ranks: bytes, then time, then overlap."""
    everywhere, elsewhere = targets(ranks)
    fullest = max(trial.received for trial in ranks) / mean(trial.received for trial in ranks)
    distinct = mean(trial.reach.ranks for trial in ranks)
    yield f"## {case}, {len(ranks)} processes"
    yield ""
    yield (
        f"T is of one process. A token's {case.top_k} experts are on {distinct:.3f} ranks in the mean: target "
        f"{everywhere:.4f} of the plain one's bytes; of those to other ranks {elsewhere:.4f}. The fullest rank "
        f"computes {fullest:.2f} times the mean."
    )
    yield ""
    yield from _bytes(ranks, case.tokens * len(ranks))
    yield ""
    yield from _times(ranks)
    yield ""
    yield from _overlap(ranks)


def slowest(ranks: Sequence[Trial], name: str) -> Times:
    """Of every round, the time of the rank that took longest."""
    times = [trial.times[name] for trial in ranks]
    steps = [max(each) for each in zip(*(one.step for one in times))]
    return Times(steps, [max(each) for each in zip(*(one.forward for one in times))])


def targets(ranks: Sequence[Trial]) -> tuple[float, float]:
    """Ranks over experts that a token goes to: all of them, and those elsewhere."""
    reaches = [trial.reach for trial in ranks]
    everywhere = sum(each.ranks for each in reaches) / sum(each.experts for each in reaches)
    return everywhere, sum(each.ranks_elsewhere for each in reaches) / sum(each.experts_elsewhere for each in reaches)


def _bytes(ranks: Sequence[Trial], tokens: int) -> Iterable[str]:
    """A line a contestant; bytes per token of one forward and backward pass, the mean over ranks."""
    compared = "over plain | over target"
    yield f"| bytes per token | {' | '.join(KINDS)} | all | {compared} | to other ranks | {compared} |"
    yield "|---" * (len(KINDS) + 7) + "|"
    of_plain: list[float] = []
    for name in ranks[0].sent:
        kinds = [sum(trial.sent[name][kind].everywhere for trial in ranks) / tokens for kind in KINDS]
        elsewhere = sum(sent.elsewhere for trial in ranks for sent in trial.sent[name].values()) / tokens
        totals = [sum(kinds), elsewhere]
        of_plain = totals if name == PLAIN else of_plain
        cells = [name, *(f"{count:,.1f}" for count in kinds)]
        for mine, its, target in zip(totals, of_plain, targets(ranks)):
            cells += [f"{mine:,.1f}", f"{mine / its:.4f}", "-" if name == PLAIN else f"{mine / its / target:.4f}"]
        yield f"| {' | '.join(cells)} |"


def _times(ranks: Sequence[Trial]) -> Iterable[str]:
    """A line a contestant; the slowest rank of every round."""
    yield (
        "| time | forward + backward, ms | over plain (quartiles) | forward, ms | over plain (quartiles) "
        "| difference of the output | of gradients (worst) |"
    )
    yield "|---|---|---|---|---|---|---|"
    plain = slowest(ranks, PLAIN)
    for name in ranks[0].times:
        mine = slowest(ranks, name)
        cells = [name]
        for times, its in ((mine.step, plain.step), (mine.forward, plain.forward)):
            cells += [f"{Spread.of(times).median * 1e3:.4g}", ratio(over(times, its))]
        cells += [f"{max(trial.output_difference[name] for trial in ranks):.1e}"]
        cells += [f"{max(trial.gradient_difference[name] for trial in ranks):.1e}"]
        yield f"| {' | '.join(cells)} |"


def _overlap(ranks: Sequence[Trial]) -> Iterable[str]:
    """A line a contestant; of one forward and backward pass, the mean over ranks."""
    yield "| overlap | experts compute, ms | exchange runs, ms | while experts compute, ms | of the exchange |"
    yield "|---|---|---|---|---|"
    for name in ranks[0].overlap:
        seen = [trial.overlap[name] for trial in ranks]
        experts, exchange, both = (mean(each) for each in zip(*((one.experts, one.exchange, one.both) for one in seen)))
        times = " | ".join(f"{seconds * 1e3:.4g}" for seconds in (experts, exchange, both))
        yield f"| {name} | {times} | {both / exchange:.0%} |"
