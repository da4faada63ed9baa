"""Training over ranks: the same curves as on one device, the same checkpoints, and errors before the first step."""

import copy
import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from moe.errors import CheckpointError, ConfigError, ParallelError
from moe.parallel.local_ranks import run_local
from moe.training.launch import launch
from moe.training.metrics import read_metrics
from moe.training.trainer import Status
from tests.support.runs import at_step, lines_of

# float32: sums over ranks add up in another order, and eight steps of AdamW carry it on.
TOLERANCE = 1e-4


@pytest.fixture
def shared(settings):
    """A run whose curve does not depend on how a batch is divided: what balances it is counts, which are added up."""
    settings["balance"] = {"score_bias": {"rate": 0.01}}
    settings["model"] |= {"num_kv_heads": 2, "tie_embeddings": False}
    settings["run"] |= {"batch_size": 4, "steps": 6, "eval_windows": 5, "eval_every": 3, "precision": "float32"}
    settings["parallel"] = {"timeout": 60.0}
    return settings


def with_settings(settings, name, **groups):
    changed = copy.deepcopy(settings)
    changed["run"]["name"] = name
    for group, values in groups.items():
        changed[group] = changed[group] | values if isinstance(values, dict) else values
    return changed


def train(settings):
    """What a rank does: how the run ended, or the error that it ended with."""
    try:
        return launch(settings).outcome.status
    except (ConfigError, ParallelError, CheckpointError) as error:
        return error


def on_ranks(world_size, settings):
    return run_local(train, world_size, (settings,), timeout=60)


def assert_same_lines(settings, name, expected):
    lines = lines_of(settings["run"]["root"], name)
    assert len(lines) == len(expected)
    for line, right in zip(lines, expected):
        assert line.keys() == right.keys()
        for key, value in right.items():
            # An expert's load is a count: rounding may move a token of the few there are, which the tests' seeds avoid.
            assert line[key] == (
                value if isinstance(value, str) else pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
            )


@pytest.mark.slow
def test_curves_do_not_depend_on_the_degrees(shared):
    launch(with_settings(shared, "one"))
    expected = lines_of(shared["run"]["root"], "one")
    for world_size, degrees in (
        (2, {"ep": 2}),
        (2, {"tp": 2}),
        (2, {"pp": 2, "microbatches": 4}),
        (4, {"dp_replicate": 2, "ep": 4, "node_size": 2, "chunks": 2, "max_received_tokens": 8}),
        (4, {"pp": 2, "ep": 2}),
    ):
        name = "_".join(f"{axis}{size}" for axis, size in degrees.items())
        ended = on_ranks(world_size, with_settings(shared, name, parallel=degrees))
        assert ended == [Status.FINISHED] * world_size
        assert_same_lines(shared, name, expected)
        folder = Path(shared["run"]["root"], name)
        assert (folder / "report.html").exists()
        assert sorted(p.name for p in folder.glob("checkpoints/step_*")) == ["step_00000003", "step_00000006"]


def test_balance_losses_are_those_of_smaller_micro_batches(shared):
    """Over two data ranks a batch of four is two micro-batches of two, and so are its balance losses."""
    shared["balance"] = {"squared_deviation": {"coefficient": 0.1}}
    shared["run"]["steps"] = 3
    launch(with_settings(shared, "one", run={"name": "one", "batch_size": 2, "accumulation": 4}))
    on_ranks(2, with_settings(shared, "two", parallel={"ep": 2}))
    expected = lines_of(shared["run"]["root"], "one")
    assert expected[0]["train/balance_loss"] > 0.001
    assert_same_lines(shared, "two", expected)


@pytest.mark.slow
def test_a_run_goes_on_over_other_degrees(shared):
    """ep=2, then one process, then tp=2 with dp_shard=2: as if nothing had happened."""
    launch(with_settings(shared, "whole"))
    shared["resume"] = "auto"
    for steps, world_size, degrees in ((3, 2, {"ep": 2}), (4, 0, {}), (6, 4, {"tp": 2, "dp_shard": 2, "ep": 2})):
        part = with_settings(shared, "parts", parallel=degrees)
        part["run"]["steps"] = steps
        # The rate is that of the whole run: constant here, since neither warm-up nor decay depends on its length.
        part["optim"]["schedule"] = {"warmup_steps": 2, "decay": "wsd", "decay_share": 0.0}
        ended = on_ranks(world_size, part) if world_size else [train(part)]
        assert set(ended) == {Status.FINISHED}
    shared["resume"] = "never"
    whole = with_settings(shared, "whole2", optim={"schedule": part["optim"]["schedule"]})
    launch(whole)
    trained = [
        [line for line in lines_of(shared["run"]["root"], name) if "train/loss" in line] for name in ("whole2", "parts")
    ]
    assert [line["step"] for line in trained[1]] == [1, 2, 3, 4, 5, 6]
    for right, line in zip(*trained):
        for key in ("train/loss", "train/grad_norm", "tokens", "balance/max_vio/blocks.1.ffn"):
            assert line[key] == pytest.approx(right[key], rel=TOLERANCE), key


def stop_one(settings):
    """SIGTERM to the second rank, twice: launchers pass on what a terminal has already sent."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            at_step(patch, 2, lambda _: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
        return train(settings)


def test_a_signal_to_one_rank_ends_all_at_the_same_step_with_a_checkpoint(shared):
    assert run_local(stop_one, 2, (shared,), timeout=60) == [Status.INTERRUPTED] * 2
    lines = read_metrics(Path(shared["run"]["root"]) / "tiny" / "metrics.jsonl")
    assert lines[-1]["run/status"] == "interrupted"
    assert lines[-1]["step"] == 3  # the step in which the signal came is finished
    assert (Path(shared["run"]["root"]) / "tiny" / "checkpoints" / "step_00000003").is_dir()


def refused(settings_by_rank):
    return train(settings_by_rank[dist.get_rank()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"ep": 3}}, "ep=3 * etp=1 = 3 ranks hold all experts once; that must divide dp_shard=2"),
        ({"parallel": {"dp_shard": 4}}, "pp=1 * dp_replicate=1 * dp_shard=4 * tp=1 = 4 ranks, but there are 2"),
        ({"run": {"batch_size": 3}}, "batch_size=3 is no multiple of dp_replicate=1 * dp_shard=2 = 2"),
        (
            {"model": {"tie_embeddings": True}, "parallel": {"pp": 2}},
            "tie_embeddings=True puts one weight on",
        ),
        ({"parallel": {"pp": 2, "microbatches": 6}}, "batch_size=4 is no multiple of dp_replicate=1 * dp_shard=1 * mi"),
        (
            {"parallel": {"pp": 2, "microbatches": 1}},
            "microbatches=1 must be a multiple of pp=2, and at least the",
        ),
        ({"data": {"path": "/no/such/text"}}, "/no/such/text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_an_error_on_every_rank_before_anything_is_written(shared, change, message):
    for error in run_local(train_plain, 2, (with_settings(shared, "bad", **change),), timeout=60):
        assert message in error
    assert not Path(shared["run"]["root"]).exists()


def train_plain(settings):
    """The error's words: its class may be anything."""
    try:
        return str(launch(settings).outcome.status)
    except Exception as error:
        return str(error)


def test_ranks_with_other_settings_are_told(shared):
    other = copy.deepcopy(shared)
    other["optim"]["peak"] = 0.5
    errors = run_local(refused, 2, ((shared, other),), timeout=60)
    for rank, (error, value) in enumerate(zip(errors, (0.01, 0.5))):
        assert isinstance(error, ConfigError)
        assert str(error).startswith("ranks differ in optim.peak: 1 from the first")
        assert f"this is rank {rank} of 2 with {value}" in str(error)


def test_degrees_without_a_launcher_are_refused(shared):
    shared["parallel"]["ep"] = 2
    with pytest.raises(ConfigError, match="ep=2 needs 2 processes and this is one; start them with torchrun"):
        launch(shared)


def test_a_run_whose_checkpoints_are_gone_is_not_started_again(shared):
    launch(shared)
    folder = Path(shared["run"]["root"]) / "tiny"
    for checkpoint in folder.glob("checkpoints/step_*"):
        checkpoint.rename(folder / checkpoint.name)
    before = (folder / "metrics.jsonl").read_bytes()
    shared["resume"] = "auto"
    with pytest.raises(CheckpointError, match=r"goes up to step 6, but there is no checkpoint in .* another name"):
        launch(shared)
    assert (folder / "metrics.jsonl").read_bytes() == before
