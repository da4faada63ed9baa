"""Bad input over several ranks: an error on each, before anything hangs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import ConfigError, ParallelError
from moe.parallel import Degrees, ParallelMesh
from moe.parallel.local_ranks import run_local
from tests.support.exchanges import different_calls, different_settings, one_rank_fails, own_rows, refusals


def test_calls_that_differ_are_an_error_on_every_rank() -> None:
    ours, theirs = run_local(different_calls, 2, timeout=60)
    assert ours == theirs
    assert ours == [
        "dtype of x must be the same on all ranks of an exchange, but is torch.float32, torch.bfloat16",
        "grad mode must be the same on all ranks of an exchange, but is on, off",
        "top_k must be the same on all ranks of an exchange, but is 2, 3",
        "dim must be the same on all ranks of an exchange, but is 8, 6",
    ]


def test_an_error_on_one_rank_ends_the_others_within_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(ParallelError, match="over"):
        run_local(one_rank_fails, 2, (str(tmp_path),), timeout=3)
    assert (tmp_path / "said1").read_text() == "bad data on rank 1"
    assert "Timed out waiting 3000ms" in (tmp_path / "said0").read_text()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"hidden_dim": 5}, {}, "ranks differ in parameter experts.up_weight: 1 from the first; this is rank {} of 2"),
        ({"router": "sigmoid"}, {}, "ranks differ in model: 1 from"),
        ({"dtype": torch.float64}, {}, "ranks differ in parameter router.weight: 1 from"),
        ({}, {"chunks": 2}, "ranks differ in options: 1 from the first; this is rank {} of 2 with chunks="),
    ],
    ids=["sizes", "router", "dtype", "options"],
)
def test_ranks_with_different_settings_are_told_so(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for rank, said in enumerate(run_local(different_settings, 2, (change, options), timeout=60)):
        assert message.format(rank) in said


def test_refusals_name_the_argument_its_value_and_the_rule() -> None:
    whole = "2 ranks that hold all experts once, or divide them and be a multiple of etp"
    rows = "its rows must be a multiple of dp_replicate=1 * dp_shard=2 = 2"
    for said in run_local(refusals, 2, timeout=60):
        assert said == [
            "ConfigError: degrees dp_shard=3 need 3 ranks, but there are 2",
            f"ConfigError: node_size=3 must be a multiple of ep=2 * etp=1 = {whole}",
            f"ConfigError: node_size=1 must be a multiple of ep=1 * etp=2 = {whole}",
            "ConfigError: ep=2 is more than num_experts=1: a rank would hold none",
            "ConfigError: etp=2 is more than hidden_dim=1: a rank would hold none",
            "ConfigError: max_received_tokens=1 must be at least 2, a row from each rank of the exchange",
            "ConfigError: chunks=0 must be positive",
            f"ShapeError: batch['labels'] has shape (3,); {rows}",
            f"ShapeError: batch['scale'] has shape (); {rows}",
        ]


def test_a_batch_is_split_over_data_ranks() -> None:
    parts = run_local(own_rows, 4, timeout=60)
    whole = torch.arange(12).view(6, 2)
    for rank, part in enumerate(parts):
        assert torch.equal(part["ids"], whole[:3] if rank < 2 else whole[3:])  # two ranks of tp share theirs
        assert part["empty"].shape == (0, 3)


def test_without_a_process_group() -> None:
    with pytest.raises(ConfigError, match="degrees dp_shard=2,ep=2 need a process group: start with torchrun"):
        ParallelMesh(Degrees(dp_shard=2, ep=2))


def test_a_failure_is_told_with_its_rank() -> None:
    with pytest.raises(ParallelError, match=r"(?s)rank [01] of 2 failed.*ZeroDivisionError"):
        run_local(divmod, 2, (1, 0), timeout=60)
