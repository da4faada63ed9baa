"""Tensor and sequence parallelism against one process: steps, sizes, generation, a user's plan and what is refused."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel
from torch.nn import functional as F

import moe
from moe.errors import ConfigError, MoEError, ShapeError
from moe.models import Decoder, DecoderConfig, generate
from moe.models.block import Block
from moe.parallel import Degrees, Parallel, ParallelMesh, parallelize
from moe.parallel.gather import gather
from moe.parallel.local_ranks import run_local
from moe.parallel.tensor_parallel import block_runs

SIZES: dict[str, Any] = {"vocab_size": 19, "dim": 16, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4}
SIZES |= {"ffn_hidden_dim": 11, "max_seq_len": 16, "first_dense": 1}
MOE: dict[str, Any] = {"hidden_dim": 6, "num_experts": 5, "top_k": 2, "bias": True}
MOE |= {"shared_hidden_dim": 5, "shared_gate": True}
MOE |= {"balance": {"squared_deviation": {"coefficient": 0.1}, "score_bias": {"rate": 0.01}}}
LIMIT = 1e-10  # relative; float64 sums in another order differ by 1e-14


def make_decoder(checkpointing: str = "none", moe: dict[str, Any] = MOE, **sizes: Any) -> Decoder:
    """A float64 decoder, the same on every rank; one dense block, two with MoE."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{**SIZES, "moe": moe, **sizes}), activation_checkpointing=checkpointing).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def decoder_loss(model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
    """Mean cross entropy over the tokens of a micro-batch, with its balance losses."""
    tokens, mask = batch
    logits = model(tokens[:, :-1], token_mask=mask)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + moe.balance_loss(model)


def token_batch(seed: int, length: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Two sequences."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, length + 1), generator=generator)
    return tokens, torch.rand(2, length, generator=generator) < 0.7 if masked else None


Loss = Callable[[nn.Module, Any], Tensor]


def differences(parallel: Parallel, reference: nn.Module, loss: Loss, batch: Callable[[int], Any]) -> dict[str, float]:
    """Two steps of two micro-batches on both; what differs, relative to its largest number, on rank 0."""
    dp, rank = parallel.mesh.degrees.dp, parallel.mesh.data_rank
    model = parallel.parts[0]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, reference)]
    found: dict[str, float] = {}

    def compare(kind: str, of: Callable[[Tensor], Tensor | None]) -> None:
        wanted = {name: of(p) for name, p in reference.named_parameters() if of(p) is not None}
        got = {whole.name: whole for whole in gather(parallel, of)}
        if torch.distributed.get_rank() == 0:
            assert got.keys() == wanted.keys()
            for name, whole in got.items():
                scale = wanted[name].abs().max().clamp(min=1e-30)
                found[f"{kind} of {name}"] = ((whole.tensor - wanted[name]).abs().max() / scale).item()
                found[f"{kind} of {name} between ranks"] = whole.disagreement

    for step in range(2):
        for micro in (2 * step, 2 * step + 1):
            own = loss(model, batch(dp * micro + rank)) / 2
            own.backward()
            parts = [loss(reference, batch(dp * micro + each)) / 2 for each in range(dp)]
            (torch.stack(parts).sum() / dp).backward()
            found[f"loss {micro}"] = max(found.get(f"loss {micro}", 0.0), abs(own.item() / parts[rank].item() - 1))
        compare(f"step {step}: gradient", lambda p: p.grad)
        norm, wanted = parallel.clip_grad_norm_(0.1), nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        found[f"step {step}: norm"] = abs(norm.item() / wanted.item() - 1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loads, expected = moe.balance_step(model), moe.balance_step(reference)
        assert all(torch.equal(loads[n].tokens_per_expert, expected[n].tokens_per_expert) for n in expected)
    compare("parameter", lambda p: p)
    return {what: size for what, size in found.items() if not size < LIMIT}


def step_decoder(spec: str, checkpointing: str, length: int, masked: bool, sizes: dict[str, Any]) -> dict[str, float]:
    """What differs between a spread decoder and the same in one process."""
    warnings.simplefilter("error")
    mesh = ParallelMesh(Degrees.parse(spec))
    model = make_decoder(checkpointing, **sizes)
    reference = copy.deepcopy(model)
    parallel = parallelize(model, mesh)
    return differences(parallel, reference, decoder_loss, lambda seed: token_batch(seed, length, masked))


@pytest.mark.parametrize(
    ("spec", "checkpointing", "length", "masked", "sizes"),
    [
        ("tp=2", "none", 8, True, {}),
        ("tp=2", "reentrant", 7, True, {"tie_embeddings": False}),
        ("tp=2", "nonreentrant", 1, False, {"dim": 24, "num_heads": 6, "num_kv_heads": 3}),
        ("tp=2", "none", 5, False, {"moe": {**MOE, "batch_invariant": True, "capacity_factor": 0.5}}),
        ("tp=4", "nonreentrant", 6, False, {}),
        ("tp=4", "none", 3, True, {"moe": None, "first_dense": 0}),
        ("tp=2,ep=2", "reentrant", 7, False, {}),
        ("tp=2,etp=2", "nonreentrant", 8, True, {}),
        ("tp=2,dp_shard=2", "reentrant", 7, True, {}),
        ("tp=2,dp_shard=2,ep=2,etp=2", "none", 7, False, {"tie_embeddings": False}),
        ("tp=2,dp_replicate=2,dp_shard=1", "nonreentrant", 7, False, {}),
    ],
)
def test_steps_equal_those_of_one_process(spec, checkpointing, length, masked, sizes):
    """Lengths that tp does not divide, and shorter than tp, too; 3 key heads and 11 hidden units over 2 ranks."""
    world_size = Degrees.parse(spec).world_size
    for rank, found in enumerate(run_local(step_decoder, world_size, (spec, checkpointing, length, masked, sizes))):
        assert found == {}, f"rank {rank}"


def sizes_on_a_rank() -> tuple[dict[str, int], int, list[int], list[int]]:
    """A rank's numbers by parameter, its tokens to a part, and lengths and storage sizes where only parts may be."""
    mesh = ParallelMesh(Degrees.parse("tp=4"))
    model = make_decoder()
    parallelize(model, mesh)
    lengths: list[int] = []
    stored: list[int] = []

    def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lengths.append(args[0].shape[1])
        stored.append(args[0].untyped_storage().nbytes() // 8)

    for number, block in enumerate(model.blocks):
        block.attention_norm.register_forward_pre_hook(look)
        block.ffn_norm.register_forward_pre_hook(look)
        if number > 0:
            block.register_forward_pre_hook(look)
    tokens, _ = token_batch(0, 10, False)
    decoder_loss(model, (tokens, None)).backward()
    return {name: p.numel() for name, p in model.named_parameters()}, mesh.rank_on("tp"), lengths, stored


def test_a_rank_holds_its_part_of_parameters_and_activations():
    whole = {name: p.numel() for name, p in make_decoder().named_parameters()}
    for held, rank, lengths, stored in run_local(sizes_on_a_rank, 4):
        # 10 tokens over 4 ranks: 3, 3, 3, 1; two norms in each of three blocks, and two blocks that follow another.
        part = (3, 3, 3, 1)[rank]
        assert lengths == [part] * 8
        assert stored == [2 * part * 16] * 8
        # 8 query and 4 key heads of width 2: 2 + 1 + 1 a rank; 11 hidden units: 2, 3, 3, 3; 5 shared ones: 1, 1, 1, 2.
        expected = {name: size for name, size in whole.items() if ".experts." not in name}
        for layer, hidden in ((0, (2, 3, 3, 3)[rank]), (1, (1, 1, 1, 2)[rank]), (2, (1, 1, 1, 2)[rank])):
            expected[f"blocks.{layer}.attention.qkv.weight"] = 4 * 2 * 16
            expected[f"blocks.{layer}.attention.out.weight"] = 16 * 2 * 2
            ffn = f"blocks.{layer}.ffn." + ("shared." if layer else "")
            expected |= {f"{ffn}up.weight": 2 * hidden * 16, f"{ffn}down.weight": 16 * hidden}
            if layer:
                expected[f"{ffn}up.bias"] = 2 * hidden
                if rank > 0:
                    del expected[f"{ffn}down.bias"]
        assert {name: size for name, size in held.items() if ".experts." not in name} == expected


def generated(whole: bool) -> tuple[Tensor, Tensor]:
    """Greedy continuations, and logits in evaluation mode; of all ranks together or of each by itself."""
    model = make_decoder()
    prompt = token_batch(1, 5, False)[0]
    if not whole:
        parallelize(model, ParallelMesh(Degrees.parse("tp=2")))
    model.eval()
    with torch.no_grad():
        return generate(model, prompt, 6, temperature=0), model(prompt)


def test_generation_and_evaluation_equal_those_of_one_process():
    tokens, logits = generated(whole=True)
    assert len(tokens.unique()) > 3  # not one token for ever
    for got, scores in run_local(generated, 2, (False,)):
        assert torch.equal(got, tokens)
        torch.testing.assert_close(scores, logits, rtol=LIMIT, atol=LIMIT)


class UserModel(nn.Module):
    """A block of somebody else's, with a MoE layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.norm = nn.Linear(4, 12), nn.Sequential(nn.LayerNorm(12))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.moe = moe.MoE(12, 6, 5, 3, bias=True, shared_hidden_dim=7, shared_gate=True)
        self.outward = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.outward(x + self.moe(x))


def make_user_model() -> UserModel:
    torch.manual_seed(0)
    return UserModel().double()


def plan() -> dict[str, Any]:
    """A norm on parts of the sequence, whose gradient is partial; a product divided by rows and one by columns."""
    return {
        "norm": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
        "norm.*": SequenceParallel(),
        "u*": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }


def user_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean() + moe.balance_loss(model)


def step_user_model(spec: str, planned: bool) -> dict[str, float]:
    mesh = ParallelMesh(Degrees.parse(spec))
    model = make_user_model()
    reference = copy.deepcopy(model)
    parallel = parallelize(model, mesh, tp_plan=plan() if planned else None)
    weight = model.up.weight
    assert planned == (isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ()))

    def batch(seed: int) -> Tensor:
        return torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    return differences(parallel, reference, user_loss, batch)


@pytest.mark.parametrize("planned", [False, True])
# Nothing is sharded under tp=2,ep=2, so that FSDP2 does not see to the gradients.
@pytest.mark.parametrize("spec", ["tp=2", "dp_shard=1,tp=2,ep=2", "tp=2,dp_shard=2"])
def test_a_users_model_is_exact_with_and_without_a_plan(spec, planned):
    for found in run_local(step_user_model, Degrees.parse(spec).world_size, (spec, planned)):
        assert found == {}


def refusals() -> list[str]:
    """The errors' types and texts, of one model after the other."""
    mesh = ParallelMesh(Degrees.parse("tp=2"))
    told = []

    def refuse(model: nn.Module, tp_plan: dict[str, Any] | None = None) -> None:
        with pytest.raises(MoEError) as error:
            parallelize(model, mesh, tp_plan=tp_plan)
        assert error.type is ConfigError
        told.append(str(error.value))

    refuse(make_decoder(num_kv_heads=1))
    refuse(make_decoder(ffn_hidden_dim=1))
    refuse(make_decoder(moe={**MOE, "shared_hidden_dim": 1}))
    refuse(make_user_model(), {"upp": ColwiseParallel()})
    refuse(make_user_model(), {"moe.shared.up": ColwiseParallel()})
    refuse(make_decoder(), {"blocks.*.attention.out": RowwiseParallel()})
    model = make_decoder()
    parallelize(model, mesh)
    model.blocks = model.blocks[1:]  # the first one would have cut the sequence
    with pytest.raises(ShapeError) as error:
        model(token_batch(0, 8, False)[0][:, :8])
    told.append(str(error.value))
    return told


def test_what_cannot_be_divided_is_refused_on_every_rank():
    for told in run_local(refusals, 2, timeout=20):
        assert told[:2] == [
            "tp=2 is more than num_kv_heads=1: a rank would hold none",
            "tp=2 is more than ffn_hidden_dim=1: a rank would hold none",
        ]
        assert told[2] == "tp=2 is more than shared_hidden_dim=1: a rank would hold none"
        assert told[3] == "tp_plan has 'upp', but no module of the model has such a name"
        assert told[4].startswith("tp_plan divides moe.shared.up.")
        assert told[5].startswith("tp_plan divides blocks.0.attention.out.weight")
        assert "(2, 8, 16) are not this rank's part of sequences of 8 tokens, which has 4" in told[6]


def test_runs_are_lists_and_dicts_of_blocks():
    a, b, c, d, e, f = (Block(make_decoder().config, 0) for _ in range(6))
    model = nn.Module()
    model.inside = nn.Sequential(nn.ModuleList([a, b]))
    model.named = nn.ModuleDict({"0": c})
    model.mixed = nn.ModuleList([d, nn.Linear(2, 2)])
    model.twice = nn.ModuleList([e, f, e])
    assert block_runs(model) == [[a, b], [c], [d], [e], [f]]
    assert block_runs(a) == [[a]]
