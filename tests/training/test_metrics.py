import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe.errors import DataError
from moe.training.metrics import MetricsWriter, read_metrics, worst_max_vio
from moe.training.run_folder import RunFolder


def measure(step: int) -> dict[str, float | int | list[float]]:
    """What a run measures at a step; 1/3 and 1/7 have no short decimal form."""
    return {"tokens": 64 * step, "train/loss": 1 / (3 * step), "balance/load/blocks.0.ffn": [step / 7, 1 - step / 7]}


def write_steps(writer: MetricsWriter, steps: Iterable[int]) -> None:
    for step in steps:
        writer.write(step, measure(step))


def scalars(folder: RunFolder, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path, "run")


def test_a_line_is_on_disk_when_write_returns(folder: RunFolder) -> None:
    with MetricsWriter(folder) as writer:
        for step in (1, 2):
            writer.write(step, measure(step))
            # Read while the writer is open: this is what a process killed now would leave.
            assert read_metrics(folder.metrics)[-1] == {"step": step} | measure(step)
            assert scalars(folder, "train/loss")[-1] == (step, pytest.approx(1 / (3 * step), rel=1e-6))
    assert len(folder.metrics.read_text().splitlines()) == 2


def test_numbers_that_are_not_finite_are_null(folder: RunFolder) -> None:
    values = {"train/loss": math.nan, "a": math.inf, "b": -math.inf, "c": 1.5, "list": [0.5, math.nan]}
    with MetricsWriter(folder) as writer:
        writer.write(3, values)
        writer.write(4, {"a": torch.tensor(math.inf), "list": torch.tensor([math.nan, 1.0]), "count": torch.tensor(7)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in folder.metrics.read_text().splitlines()]
    assert lines == [
        {"step": 3, "train/loss": None, "a": None, "b": None, "c": 1.5, "list": [0.5, None]},
        {"step": 4, "a": None, "list": [None, 1.0], "count": 7},
    ]


def test_tensorboard_has_the_finite_numbers_and_nothing_else(folder: RunFolder) -> None:
    with MetricsWriter(folder) as writer:
        writer.write(1, {"train/loss": 2.5, "val/loss": math.nan, "load": [0.5, 0.5], "run/status": "finished"})
        writer.write(2, {"train/loss": 1.25, "dead": 3})
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["dead", "train/loss"]
    assert scalars(folder, "train/loss") == [(1, 2.5), (2, 1.25)]
    assert scalars(folder, "dead") == [(2, 3.0)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reads_back_to_the_last_bit(number: float) -> None:
    assert json.loads(json.dumps(number)).hex() == number.hex()  # what _cut rests on when it writes lines anew


@pytest.mark.parametrize("torn", ["", '{"step": 8, "train/lo', '{"step": 8}', "\0\0\0\0"])
def test_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, torn: str) -> None:
    whole, killed = RunFolder.open(tmp_path, "whole"), RunFolder.open(tmp_path, "killed")
    with MetricsWriter(whole) as writer:
        write_steps(writer, range(1, 11))
    with MetricsWriter(killed) as writer:
        write_steps(writer, range(1, 8))
    with killed.metrics.open("a") as file:
        file.write(torn)
    with MetricsWriter(killed, resume_step=4) as writer:
        assert [line["step"] for line in read_metrics(killed.metrics)] == [1, 2, 3, 4]
        write_steps(writer, range(5, 11))
    assert killed.metrics.read_bytes() == whole.metrics.read_bytes()
    assert scalars(killed, "train/loss") == scalars(whole, "train/loss")


def test_resuming_takes_back_how_the_run_had_ended(folder: RunFolder) -> None:
    with MetricsWriter(folder) as writer:
        write_steps(writer, [1, 2])
        before = folder.metrics.read_text()
        writer.write(2, {"run/status": "interrupted"})
    MetricsWriter(folder, resume_step=2).close()
    assert folder.metrics.read_text() == before


def test_a_start_from_nothing_empties_the_log(folder: RunFolder) -> None:
    with MetricsWriter(folder) as writer:
        write_steps(writer, [1, 2, 3])
    with MetricsWriter(folder) as writer:
        write_steps(writer, [1])
    assert [line["step"] for line in read_metrics(folder.metrics)] == [1]
    assert [step for step, _ in scalars(folder, "train/loss")] == [1]


def test_a_log_that_is_missing_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 2, "x"', "{", "\0\0", '{"step": 2, "x": "\xff'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode("latin-1"))
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"train/loss": 1.0}', ""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl', line 2"):
        read_metrics(path)


def test_worst_layer() -> None:
    line = {"step": 3, "balance/max_vio/a": 0.25, "balance/max_vio/b": 0.5, "balance/max_vio/c": None, "x": 9.0}
    assert worst_max_vio(line) == ("b", 0.5)
    assert worst_max_vio({"step": 3, "train/loss": 1.0, "balance/max_vio/c": None}) is None
