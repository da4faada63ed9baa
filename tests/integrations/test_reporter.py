"""What a reporter pools and hands on, and what its sinks write."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import moe
from moe.errors import ConfigError
from moe.integrations import BalanceReporter, JsonLines
from moe.integrations.rich import RichTable
from moe.integrations.tensorboard import TensorBoard
from moe.monitor import LoadStats


def stats(counts, dropped=0, top=1.0, tokens=None, nulls=0):
    total = tokens or sum(counts)
    numbers = (torch.tensor(counts), torch.tensor(dropped), torch.tensor(total), torch.tensor(top))
    return LoadStats(*numbers, nulls)


STEPS = [  # by hand: "a" gets worse than "b" in the pool of the last two, not in the pool of all
    {"a": stats([1, 7], dropped=1, top=4.0), "b": stats([9, 7], dropped=0, top=12.0)},
    {"a": stats([8, 0], dropped=2, top=4.0), "b": stats([16, 0], dropped=4, top=8.0)},
    {"a": stats([6, 2], dropped=0, top=4.0), "b": stats([4, 12], dropped=0, top=16.0)},
]


class Kept(list):
    def __call__(self, step, figures):
        self.append((step, dict(figures)))


def added(reporter, steps=STEPS):
    for loads in steps:
        reporter.add(loads)
    return reporter


def test_figures_are_those_of_the_last_steps_together() -> None:
    figures = added(BalanceReporter(pool_steps=2)).figures()
    # a: [14, 2] of 16, 2 dropped, 8 / 16; b: [20, 12] of 32, 4 dropped, 24 / 32.
    assert figures["balance/max_vio/a"] == pytest.approx(14 / 8 - 1)
    assert figures["balance/max_vio/b"] == pytest.approx(20 / 16 - 1)
    assert figures["balance/max_vio_floor/a"] == pytest.approx(math.sqrt(2 * math.log(2) / 8))
    assert figures["balance/cv/a"] == pytest.approx(6 / 8)
    assert figures["balance/drop_rate/b"] == pytest.approx(4 / 32)
    assert figures["balance/confidence/b"] == pytest.approx(24 / 32)
    entropy = -(14 / 16 * math.log(14 / 16) + 2 / 16 * math.log(2 / 16)) / math.log(2)
    assert figures["balance/entropy/a"] == pytest.approx(entropy)
    assert figures["balance/dead_experts/a"] == 0


def test_all_figures_of_a_layer_are_there() -> None:
    loads = {"a": stats([1, 2, 3, 4], nulls=1)}
    figures = added(BalanceReporter(), [loads]).figures()
    own = {key: value for key, value in figures.items() if "worst" not in key}
    assert own == {f"balance/{name}/a": value for name, value in loads["a"].floats().items()}
    assert "balance/null_rate/a" in own


def test_the_worst_of_all_layers() -> None:
    worst = added(BalanceReporter(pool_steps=2, each_layer=False)).figures()
    each = added(BalanceReporter(pool_steps=2)).figures()
    assert worst == {
        "balance/worst/max_vio": each["balance/max_vio/a"],
        "balance/worst/max_vio_floor": each["balance/max_vio_floor/a"],
        "balance/worst/cv": each["balance/cv/a"],
        "balance/worst/entropy": each["balance/entropy/a"],
        "balance/worst/dead_experts": 0,
        "balance/worst/drop_rate": each["balance/drop_rate/a"],  # 2 / 16 and 4 / 32
    }
    first = added(BalanceReporter(each_layer=False), [{"a": stats([1, 1, 0]), "b": stats([1, 1, 1, 1], dropped=1)}])
    assert first.figures()["balance/worst/dead_experts"] == 1
    assert first.figures()["balance/worst/drop_rate"] == pytest.approx(1 / 4)
    assert first.figures()["balance/worst/entropy"] == pytest.approx(math.log(2) / math.log(3))


def test_the_floor_beside_the_worst_is_that_of_its_layer() -> None:
    loads = {"a": stats([2, 1, 0]), "b": stats([30, 0, 0]), "c": stats([1, 1, 1])}
    figures = added(BalanceReporter(each_layer=False), [loads]).figures()
    assert figures["balance/worst/max_vio"] == pytest.approx(2)
    assert figures["balance/worst/max_vio_floor"] == pytest.approx(math.sqrt(2 * math.log(3) / 10))


def test_reports_are_handed_on_when_due() -> None:
    kept, others = Kept(), Kept()
    added(BalanceReporter(kept, others, every=2), STEPS * 2)
    assert [step for step, _ in kept] == [2, 4, 6]
    assert kept == others
    # Each is of the two steps since the report before it.
    assert kept[1][1] == added(BalanceReporter(), [STEPS[2], STEPS[0]]).figures()


def test_steps_may_be_named_and_a_smaller_one_is_of_another_run() -> None:
    kept = Kept()
    reporter = BalanceReporter(kept, every=10, pool_steps=100)
    for step, loads in zip((18, 19, 20), STEPS):
        reporter.add(loads, step)
    reporter.add(STEPS[0], 10)
    assert [step for step, _ in kept] == [20, 10]
    assert kept[1][1] == added(BalanceReporter(), STEPS[:1]).figures()
    reporter.add(STEPS[1])
    assert reporter.step == 11


def test_another_process_reports_nothing() -> None:
    kept = Kept()
    reporter = BalanceReporter(kept, every=1)
    reporter.add(STEPS[0], report=False)
    assert not kept
    assert reporter.figures()


def test_nothing_is_reported_of_nothing() -> None:
    kept = Kept()
    reporter = BalanceReporter(kept, every=1)
    assert reporter.figures() == {}
    reporter.add({})
    assert not kept


def test_a_layer_that_is_the_whole_model_and_one_that_was_not_always_called() -> None:
    figures = added(BalanceReporter(), [{"": stats([1, 3])}, {"": stats([1, 3]), "b": stats([1, 1])}]).figures()
    assert figures["balance/max_vio/moe"] == pytest.approx(0.5)
    assert figures["balance/max_vio/b"] == 0


@pytest.mark.parametrize("options", [{"every": 0}, {"pool_steps": 0}, {"every": -1}])
def test_numbers_of_steps_are_positive(options) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        BalanceReporter(**options)


def test_only_a_report_waits_for_the_device(monkeypatch) -> None:
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(1) or tolist(tensor))
    for name in ("item", "__bool__", "__int__", "__float__", "__index__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, plain=plain: waits.append(1) or plain(tensor))
    reporter = BalanceReporter(Kept(), every=3)
    added(reporter, STEPS[:2])
    assert not waits
    reporter.add(STEPS[2])
    assert len(waits) == 2  # one a layer


def test_a_layer_in_a_loop_of_ones_own() -> None:
    model = moe.MoE(8, 16, 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept, loads = Kept(), []
    reporter = BalanceReporter(kept, every=2)
    for _ in range(4):
        (model(torch.randn(5, 8)).square().mean() + moe.balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(moe.balance_step(model))
        reporter.add(loads[-1])
    last = (loads[2][""] + loads[3][""]).floats()
    assert {key: value for key, value in kept[1][1].items() if "worst" not in key} == {
        f"balance/{name}/moe": pytest.approx(value) for name, value in last.items()
    }


def test_json_lines_are_appended(tmp_path) -> None:
    path = tmp_path / "new" / "balance.jsonl"
    JsonLines(path)(1, {"balance/max_vio/a": 0.5, "balance/confidence/a": math.nan})
    JsonLines(path)(2, {"balance/max_vio/a": math.inf})
    assert path.read_text(encoding="utf-8") == (
        '{"step": 1, "balance/max_vio/a": 0.5, "balance/confidence/a": null}\n{"step": 2, "balance/max_vio/a": null}\n'
    )


def test_json_lines_are_there_at_once(tmp_path) -> None:
    reporter = BalanceReporter(JsonLines(str(tmp_path / "balance.jsonl")), every=1)
    for number in (1, 2):
        reporter.add(STEPS[0])
        lines = (tmp_path / "balance.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == number
    assert json.loads(lines[1]) == {"step": 2, **added(BalanceReporter(pool_steps=1), STEPS[:1]).figures()}


def test_a_table_has_a_row_a_layer_and_one_for_the_worst() -> None:
    out = io.StringIO()
    reporter = BalanceReporter(RichTable(Console(file=out, width=120)), every=2, pool_steps=2)
    added(reporter, [{"x.[b]": loads["a"], "y": loads["b"]} for loads in STEPS[1:]])
    text = out.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert "balance at step 2" in text
    assert rows == [
        ["x.[b]", "0.750", "0.416", "0.750", "0.544", "0", "12.5%", "0.500"],
        ["y", "0.250", "0.294", "0.250", "0.954", "0", "12.5%", "0.750"],
        ["worst", "0.750", "0.416", "0.750", "0.544", "0", "12.5%", ""],
    ]
    (head,) = [line for line in text.splitlines() if line.startswith("┃")]
    assert " ".join(head.replace("┃", "").split()) == "layer MaxVio floor CV entropy dead dropped confidence"


def test_a_table_of_the_worst_alone() -> None:
    out = io.StringIO()
    added(BalanceReporter(RichTable(Console(file=out, width=120)), every=3, each_layer=False))
    rows = [line for line in out.getvalue().splitlines() if line.startswith("│")]
    assert len(rows) == 1
    assert "worst" in rows[0]


def test_tensorboard_has_every_finite_figure(tmp_path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        reporter = BalanceReporter(TensorBoard(writer), every=1, pool_steps=1)
        added(reporter, [STEPS[0], {"a": stats([1, 3], top=math.nan)}])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == added(BalanceReporter(), STEPS[:1]).figures().keys()
    read = [(event.step, event.value) for event in events.Scalars("balance/max_vio/a")]
    assert read == [(1, pytest.approx(0.75)), (2, pytest.approx(0.5))]
    assert [event.step for event in events.Scalars("balance/confidence/a")] == [1]


def test_tensorboard_has_a_report_at_once(tmp_path) -> None:
    with SummaryWriter(str(tmp_path), flush_secs=600) as writer:
        added(BalanceReporter(TensorBoard(writer), every=1, each_layer=False), STEPS[:1])
        assert len(EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]) == 6
