"""The tables of the report, in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence

from measure.timing import Spread

from sweep.figures import Estimate, Row

NOTHING = "-"


def main_table(rows: Sequence[Row]) -> Iterable[str]:
    """Quality and balance: what the frontier is drawn of."""
    yield (
        "| # | router / balance | seeds | bits per byte | validation loss, nats | MaxVio, early | late | late, pooled "
        "| evaluation | dropped at 1.0, % | at 1.25, % |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for number, row in enumerate(rows, start=1):
        f = row.figures
        cells = [
            *(str(number), row.name, str(len(row.results))),
            *(estimate(f[name], 3) for name in ("bits_per_byte", "loss")),
            estimate(f["early"], 2),
            *(f"{estimate(f[name], 2)} ({f[floor].mean:.2f})" for name, floor in FLOORS.items()),
            *(estimate(f[name], 1, scale=100) for name in ("drop_1.0", "drop_1.25")),
        ]
        yield f"| {' | '.join(cells)} |"


FLOORS = {"late": "step_floor", "pooled": "pooled_floor", "evaluation": "evaluation_floor"}
"""The figures of balance that stand beside what chance alone would show."""


def detail_table(rows: Sequence[Row]) -> Iterable[str]:
    """What else the counts say."""
    yield "| # | router / balance | CV | entropy | dead experts | experts a token | null, % | a step, ms |"
    yield "|---|---|---|---|---|---|---|---|"
    for number, row in enumerate(rows, start=1):
        f = row.figures
        null = estimate(f["null"], 1, scale=100) if f["null"].mean else NOTHING
        cells = [
            *(str(number), row.name, estimate(f["cv"], 2), estimate(f["entropy"], 3), estimate(f["dead"], 1)),
            *(estimate(f["experts"], 2), null, estimate(f["seconds"], 0, scale=1000)),
        ]
        yield f"| {' | '.join(cells)} |"


def time_table(ratios: Mapping[str, Spread], baseline: str) -> Iterable[str]:
    """The time of a step over the baseline's."""
    yield f"| router / balance | step over that of {baseline}, median (quartiles) |"
    yield "|---|---|"
    for name, spread in sorted(ratios.items(), key=lambda item: item[1].median):
        yield f"| {name} | {spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f}) |"


def estimate(value: Estimate, digits: int, scale: float = 1.0) -> str:
    """A mean with half of its interval, which a single seed does not have."""
    text = f"{value.mean * scale:.{digits}f}"
    return text if math.isnan(value.half) else f"{text} ± {value.half * scale:.{digits}f}"
