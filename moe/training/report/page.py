"""Puts a run's page together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import EngFormatter

from moe.errors import DataError
from moe.training.atomic import replace_text
from moe.training.metrics import read_metrics
from moe.training.report.balance import BalanceRow, Swatch, balance_rows, draw_balance, draw_loads, swatches, worst_row
from moe.training.report.figures import Chart, Drawing, Line, draw
from moe.training.report.history import History
from moe.training.report.numbers import MISSING, decimal, duration, short_count
from moe.training.report.summary import RunSummary, read_summary, write_summary
from moe.training.run_folder import RunFolder


@dataclass(frozen=True)
class Card:
    """One headline number."""

    title: str
    """What it is."""

    value: str
    """The number, as a reader wants it."""

    notes: tuple[str, ...] = ()
    """What to hold it against, one line each."""


@dataclass(frozen=True)
class Section:
    """A part of the settings."""

    title: str
    """The group's name, "general" for settings outside of any."""

    body: str
    """YAML."""


def write_report(folder: RunFolder, summary: RunSummary | None = None) -> Path:
    """Write a run's ``report.html``: one page that needs no other file and asks for nothing from outside.

    Args:
        folder: the run, with its ``metrics.jsonl`` and, unless it is lost, its ``config.yaml``.
        summary: facts that stand in neither; stored beside them. None takes those that were stored before.

    Returns:
        Where the page is.

    Raises:
        DataError: the folder is not that of a run, or one of its files is damaged.
    """
    if not folder.metrics.exists():
        raise DataError(f"path={str(folder.path)!r} is not a run folder: it has no {folder.metrics.name}")
    if summary is None:
        summary = read_summary(folder)
    else:
        write_summary(folder, summary)
    history = History(read_metrics(folder.metrics))
    config = folder.config.read_text(encoding="utf-8") if folder.config.exists() else ""
    replace_text(folder.report, _render(folder.name, history, summary, config))
    return folder.report


def _render(name: str, history: History, summary: RunSummary, config: str) -> str:
    rows = balance_rows(history, summary)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # the sample, the settings and every name in them are text, whatever they look like
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers: list[Swatch] = swatches(history)
    return environment.get_template("report.html.j2").render(
        name=name,
        status=_status(history),
        cards=_cards(history, summary, rows),
        training=_draw_training(history, summary),
        balance=draw_balance(history, summary),
        loads=draw_loads(history),
        layers=layers,
        rows=rows,
        summary=summary,
        settings=split_settings(config),
    )


def _status(history: History) -> str:
    return history.status or "running, or killed"


def _cards(history: History, summary: RunSummary, rows: Sequence[BalanceRow]) -> list[Card]:
    tokens, seconds = history.last("tokens"), history.last("seconds")
    speed = tokens / seconds if tokens and seconds else None
    skipped = history.last("train/skipped_steps")
    cards = [
        Card(
            "Validation, bits per byte",
            decimal(history.last("val/bits_per_byte")),
            (
                f"unigram bytes {decimal(summary.unigram_bits_per_byte)}",
                f"gzip -9 {decimal(summary.gzip_bits_per_byte)}",
                _share_measured(summary),
            ),
        )
    ]
    worst = worst_row(rows)
    if worst is None:
        cards.append(Card("Worst MaxVio", MISSING, ("no layer with experts",)))
    else:
        cards.append(Card("Worst MaxVio", worst.max_vio, (worst.layer.name, f"sampling floor {worst.floor}")))
    active = f"{short_count(summary.active_parameters)} met by one token"
    cards += [
        Card("Tokens per second", short_count(speed), ("over the whole run", "evaluation included")),
        Card("Parameters", short_count(summary.total_parameters), (active,)),
        Card("Wall time", duration(seconds), (f"{history.last_step:,} steps",)),
        Card("Tokens seen", short_count(tokens), (f"{short_count(history.tokens_per_step())} a step",)),
        Card("Skipped steps", decimal(skipped, 0), ("loss or gradient not finite",)),
        Card("Data files skipped", f"{summary.skipped_count:,}", ("not readable as text",)),
    ]
    return cards


def _share_measured(summary: RunSummary) -> str:
    """The references are those of all validation text; the model is measured on windows spread over it."""
    return f"on {short_count(summary.validation_tokens)} of its tokens"


def _draw_training(history: History, summary: RunSummary) -> list[Drawing]:
    curve = history.curve
    balance = curve("train/balance_loss")
    levels = {"unigram bytes": summary.unigram_bits_per_byte, "gzip -9": summary.gzip_bits_per_byte}
    references = [(name, level) for name, level in levels.items() if level is not None]
    loss = [Line(curve("train/loss"), 0, "training"), Line(curve("val/loss"), 1, "validation", dots=True)]
    drawings = [
        draw(Chart("loss", "Loss", "Cross entropy of the next token.", "nats per token"), loss),
        draw(
            Chart("bits-per-byte", "Bits per byte", "Held-out text; lower is better.", "bits per byte"),
            [Line(curve("val/bits_per_byte"), 1)],
            references,
        ),
        draw(
            Chart("learning-rate", "Learning rate", "What the optimizer used.", "learning rate", bottom=0),
            [Line(curve("train/learning_rate"))],
        ),
        draw(
            Chart("grad-norm", "Gradient norm", "All parameters, before clipping.", "L2 norm", logarithmic=True),
            [Line(curve("train/grad_norm"))],
        ),
        draw(
            Chart("balance-loss", "Balance loss", "Added to the loss, coefficients included.", "nats"),
            [Line(balance)] if history.layers and balance.values.any() else [],  # a bias rule alone adds nothing
        ),
        draw(
            Chart(
                "speed",
                "Tokens per second",
                "Since the line before, validation and checkpoints left out.",
                "tokens/s",
                bottom=0,
                ticks=EngFormatter(sep=""),
            ),
            [Line(curve("train/tokens_per_second"))],
        ),
    ]
    return [drawing for drawing in drawings if drawing is not None]


def split_settings(config: str) -> list[Section]:
    """Cut settings into their groups, so that they can be set side by side; every line stays as it is.

    Args:
        config: YAML. A group begins with a line that is not indented and ends with a colon.

    Returns:
        The groups in order; settings outside of any come first.
    """
    loose: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    inside = False
    for line in config.splitlines():
        continues = line[:1] in {" ", "\t", "-", ""}
        if not continues:
            inside = line.rstrip().endswith(":")
            if inside:
                groups.append((line.rstrip().removesuffix(":"), []))
                continue
        (groups[-1][1] if inside else loose).append(line)
    sections = [Section("general", "\n".join(loose))] if any(line.strip() for line in loose) else []
    return sections + [Section(title, dedent("\n".join(lines))) for title, lines in groups]
