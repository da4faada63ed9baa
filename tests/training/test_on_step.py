"""What a caller of a training run sees of its loads: those of each step, and those of the validation."""

import json
import re

import pytest
import torch

from moe.monitor import LoadStats, max_violation
from moe.training.launch import launch
from tests.support.runs import at_step, lines_of, poison

LAYER = "blocks.1.ffn"


def test_every_step_is_seen_with_the_counts_that_are_logged(settings):
    seen = []
    launch(settings, on_step=lambda step, loads: seen.append((step, loads)))
    assert [step for step, _ in seen] == list(range(1, 13))
    tokens = 2 * 16 * 2
    for _, loads in seen:
        assert loads.keys() == {LAYER}
        assert loads[LAYER].tokens.item() == tokens
        assert loads[LAYER].tokens_per_expert.sum().item() == 2 * tokens
    pooled = LoadStats.zero(4, torch.device("cpu"))
    for _, loads in seen[-4:]:
        pooled = pooled + loads[LAYER]
    (last,) = (line for line in lines_of(settings["run"]["root"]) if line["step"] == 12 and "train/loss" in line)
    assert last[f"balance/load/{LAYER}"] == pytest.approx(pooled.load.tolist())


def test_a_skipped_step_is_seen_too(settings, monkeypatch):
    at_step(monkeypatch, 0, lambda trainer: poison(trainer, {2}))
    seen = []
    launch(settings, on_step=lambda step, loads: seen.append((step, loads[LAYER].tokens.item())))
    assert seen == [(step, 2 * 16 * 2) for step in range(1, 13)]


def test_the_validation_gives_its_loads(settings):
    found = launch(settings).outcome.evaluation
    load = found.loads[LAYER]
    assert load.tokens.item() == 4 * 16
    assert load.tokens_per_expert.sum().item() == 2 * 4 * 16
    assert found.max_vio == {LAYER: pytest.approx(max_violation(load.tokens_per_expert).item())}


@pytest.mark.parametrize(
    ("tokens", "sample"), [(4, r"\[no sample: layer 'blocks\.1\.ffn' has router=Expert.*\]"), (0, "")]
)
def test_a_model_that_cannot_generate_is_trained_and_reported_all_the_same(settings, tokens, sample):
    settings["model"]["moe"]["router"] = "expert_choice"
    settings["balance"] = None
    settings["run"]["sample_tokens"] = tokens
    run = launch(settings)
    assert re.fullmatch(sample, json.loads(run.folder.summary.read_text())["sample"])
