"""Loops of accelerate: their steps and logs against the same loop by hand."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch.utils.data import DataLoader

import moe
from moe.integrations import BalanceReporter
from moe.integrations.accelerate import Trackers, step_if_synced
from tests.integrations.loops import LR, Tiny, assert_same, by_hand, of_layers, pooled, samples


@pytest.fixture(autouse=True)
def _own_state():
    """The library keeps one state a process: none of another test's, and none for the next."""
    _reset()
    yield
    _reset()


def _reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Kept(GeneralTracker):
    name, requires_logging_directory, main_process_only = "kept", False, False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))


def train(accelerator, model, reporter, epochs=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(samples(10), batch_size=2))
    biases = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"] + moe.balance_loss(model))
                optimizer.step()
                optimizer.zero_grad()
                step_if_synced(accelerator, model, reporter)
            biases.append(next(moe.moe_layers(model))[1].router.score_bias.clone())
    return biases


def steps_by_hand(model, accumulation):
    """The library divides by ``gradient_accumulation_steps`` also where an epoch's last step has fewer."""
    batches = list(DataLoader(samples(10), batch_size=2))
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return by_hand(model, steps * 2, divisor=accumulation)


@pytest.mark.parametrize(("accumulation", "ends"), [(1, range(10)), (2, (1, 3, 4, 6, 8, 9))])
def test_training_is_that_of_the_loop_by_hand(accumulation, ends) -> None:
    model, tracker = Tiny(), Kept()
    other = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, log_with=tracker)
    accelerator.init_trackers("test")
    reporter = BalanceReporter(Trackers(accelerator), every=3)
    biases = train(accelerator, model, reporter)
    loads = steps_by_hand(other, accumulation)
    assert reporter.step == len(loads) == len(ends)
    assert_same(model, other)
    # The bias has moved by the end of each batch that was a step's last, and of no other.
    before = [torch.zeros(5), *biases]
    assert [batch for batch in range(10) if not torch.equal(before[batch], before[batch + 1])] == list(ends)
    found = [(step, of_layers(figures)) for step, figures in tracker.lines]
    assert found == [(step, pooled(loads[step - 3 : step])) for step in range(3, len(loads) + 1, 3)]


def test_layers_have_the_names_of_the_model_before_it_was_wrapped() -> None:
    model, reporter = Tiny(), BalanceReporter()
    (model(**samples(1)[0])["loss"] + moe.balance_loss(model)).backward()
    step_if_synced(Accelerator(cpu=True), torch.nn.DataParallel(model), reporter)
    assert {"balance/max_vio/first", "balance/max_vio/last"} < reporter.figures().keys()


def test_only_the_main_process_reports(monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    reporter = BalanceReporter(lambda step, figures: kept.append(step), every=1)
    train(Accelerator(cpu=True), Tiny(), reporter, epochs=1)
    assert reporter.step == 5
    assert not kept


def test_a_skipped_step_leaves_the_biases(monkeypatch) -> None:
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    biases = train(Accelerator(cpu=True), Tiny(), BalanceReporter(), epochs=1)
    assert biases[-1].abs().max() == 0
