"""A decoder in pipeline stages learns what one process learns, balance losses and biases included."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import moe
from moe.errors import ConfigError, ParallelError, ShapeError
from moe.models import Decoder, DecoderConfig
from moe.models.stage import split_decoder
from moe.parallel import Degrees, ParallelMesh
from moe.parallel.gather import gather
from moe.parallel.local_ranks import run_local
from moe.parallel.pipeline import Pipeline

TOLERANCE = 1e-12  # float64, sums of a few thousand terms in another order


def make_decoder(checkpointing: str = "none", **options: Any) -> Decoder:
    torch.manual_seed(0)
    balance = {"squared_deviation": {"coefficient": 0.1}, "score_bias": {"rate": 0.01}}
    sizes = {"vocab_size": 17, "dim": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_dim": 24, "max_seq_len": 8}
    experts = {"hidden_dim": 6, "num_experts": 5, "top_k": 2, "shared_hidden_dim": 4, "balance": balance}
    chosen = {"tie_embeddings": False, "num_layers": 4, **options}
    config = DecoderConfig(**sizes, first_dense=1, moe=experts, **chosen)
    return Decoder(config, activation_checkpointing=checkpointing).double()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_both(degrees: Degrees, checkpointing: str, options: dict[str, Any]) -> dict[str, float]:
    """Two optimizer steps of two accumulated batches, in stages and whole; the worst relative differences."""
    mesh = ParallelMesh(degrees)
    decoder = make_decoder(checkpointing)
    whole = copy.deepcopy(decoder)
    pipeline = Pipeline(decoder, mesh, cross_entropy, **options)
    optimizers = [
        torch.optim.AdamW([p for _, p in pipeline.parallel.named_parameters()], lr=1e-2),
        torch.optim.AdamW(whole.parameters(), lr=1e-2),
    ]
    worst = dict.fromkeys(("loss", "gradient", "norm", "parameter"), 0.0)
    parts = options["microbatches"]
    for step in range(2):
        tokens = torch.randint(17, (2, degrees.dp, parts * 2, 9), generator=torch.Generator().manual_seed(step))
        for batch in tokens:
            own = batch[mesh.data_rank]
            loss = pipeline.step(own[:, :-1], own[:, 1:], scale=0.5)
            expected = torch.stack([whole_step(whole, rows, parts, 0.5 / degrees.dp) for rows in batch])
            worst["loss"] = max(worst["loss"], abs(loss - expected[mesh.data_rank]).item())
        gradients = {name: p.grad for name, p in whole.named_parameters()}
        worst["gradient"] = max(worst["gradient"], worst_of(pipeline, lambda p: p.grad, gradients))
        norm = pipeline.parallel.clip_grad_norm_(0.1)
        worst["norm"] = max(worst["norm"], abs(norm / nn.utils.clip_grad_norm_(whole.parameters(), 0.1) - 1).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        compare_balance(pipeline, whole)
    worst["parameter"] = worst_of(pipeline, lambda p: p, dict(whole.named_parameters()))
    return worst


def whole_step(decoder: Decoder, tokens: Tensor, parts: int, scale: float) -> Tensor:
    """All micro-batches of one data rank, on one device."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in tokens.chunk(parts):
        loss = cross_entropy(decoder(rows[:, :-1]), rows[:, 1:]) + moe.balance_loss(decoder)
        (loss * scale / parts).backward()
        total += loss.detach() / parts
    return total


def compare_balance(pipeline: Pipeline, whole: Decoder) -> None:
    """Counts and biases, to the last one."""
    counted, expected = pipeline.balance_step(), moe.balance_step(whole)
    assert counted.keys() <= expected.keys()
    for name, load in counted.items():
        assert torch.equal(load.tokens_per_expert, expected[name].tokens_per_expert)
    biases = dict(whole.named_buffers())
    for part in pipeline.parallel.parts:
        for name, bias in part.named_buffers():
            assert torch.equal(bias, biases[name])


def worst_of(pipeline: Pipeline, of: Any, expected: dict[str, Any]) -> float:
    """The largest relative difference on rank 0, where all parameters must turn up; 0 elsewhere."""
    worst, seen = 0.0, set()
    for found in gather(pipeline.parallel, of):
        tensor = expected[found.name]
        error = (found.tensor - tensor).abs().max() / tensor.abs().max()
        worst = max(worst, error.item(), found.disagreement)
        seen.add(found.name)
    assert dist.get_rank() != 0 or seen == set(expected)
    return worst


CASES = [
    ("pp=2", "none", {"microbatches": 2}),
    ("pp=2", "none", {"microbatches": 4, "stages_per_rank": 2}),
    ("pp=2,ep=2", "none", {"microbatches": 4}),
    ("pp=4", "nonreentrant", {"microbatches": 4}),
    ("pp=2,dp_shard=2", "nonreentrant", {"microbatches": 3}),
    ("pp=2,dp_replicate=2,dp_shard=1,ep=2", "none", {"microbatches": 3}),
    ("pp=2,tp=2,ep=2", "none", {"microbatches": 2}),
    ("pp=2,etp=2", "none", {"microbatches": 2, "stages_per_rank": 2}),
]


@pytest.mark.parametrize(("degrees", "checkpointing", "options"), CASES)
def test_stages_learn_what_one_process_learns(degrees: str, checkpointing: str, options: dict[str, Any]) -> None:
    parsed = Degrees.parse(degrees)
    for worst in run_local(train_both, parsed.world_size, (parsed, checkpointing, options), timeout=60):
        assert max(worst.values()) < TOLERANCE, worst


def test_stages_have_the_names_of_the_whole() -> None:
    decoder = make_decoder()
    names = {name for name, _ in decoder.named_parameters()}
    stages = split_decoder(decoder, 3)
    assert {name for stage in stages for name, _ in stage.named_parameters()} == names
    assert sum(len(list(stage.parameters())) for stage in stages) == len(names)
    assert [len(stage.blocks) for stage in stages] == [1, 1, 2]


def test_stages_one_after_another_are_the_decoder() -> None:
    decoder = make_decoder().eval()
    tokens = torch.randint(17, (2, 8))
    expected = decoder(tokens)
    x = tokens
    for stage in split_decoder(decoder, 4):
        x = stage(x)
    assert torch.equal(x, expected)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 pipeline stages are more than num_layers=4"):
        split_decoder(make_decoder(), 5)
    with pytest.raises(ConfigError, match="tie_embeddings=True"):
        split_decoder(make_decoder(tie_embeddings=True), 2)


def make_wrongly(kind: str) -> str:
    """The error of a pipeline that cannot be."""
    mesh = ParallelMesh(Degrees.parse("dp_shard=2" if kind == "no axis" else "pp=2"))
    layers = 4 + dist.get_rank() if kind == "ranks differ" else 4
    try:
        decoder = make_decoder(num_layers=layers)
        pipeline = Pipeline(decoder, mesh, cross_entropy, microbatches=0 if kind == "none" else 2)
        pipeline.step(torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64))
    except (ConfigError, ShapeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no axis", "pp=1 is no pipeline"),
        ("none", "microbatches=0"),
        ("ranks differ", "ranks differ in model: 1"),
        ("uneven batch", "3 sequences is no multiple of microbatches=2"),
    ],
)
def test_wrong_pipelines_fail_on_every_rank(kind: str, message: str) -> None:
    assert all(message in found for found in run_local(make_wrongly, 2, (kind,), timeout=20))


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(ParallelError, match="rank 0 of 1 failed"):
        run_local(make_wrongly, 1, ("no axis",), timeout=20)
