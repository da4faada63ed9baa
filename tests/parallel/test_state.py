"""The whole state out of the parts of one mesh and into those of another; what comes out is what one process has."""

import pytest
import torch

import moe
from moe.errors import CheckpointError
from moe.models import Decoder, DecoderConfig
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.local_ranks import run_local
from moe.parallel.state import WholeState, gather_state, load_state

EXPERTS = {"hidden_dim": 6, "num_experts": 5, "top_k": 2, "bias": True, "shared_hidden_dim": 4}
EXPERTS["balance"] = {"squared_deviation": {"coefficient": 0.1}, "score_bias": {"rate": 0.01}}
# 17 rows of the embedding and 5 experts do not divide by 2 or 4, so that parts differ in size.
SIZES = {"vocab_size": 17, "dim": 12, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_dim": 10}

# float64; another order of the additions in a sum over ranks, through AdamW's division in three steps.
TOLERANCE = 1e-9


def build():
    torch.manual_seed(0)
    config = DecoderConfig(**SIZES, max_seq_len=8, first_dense=1, moe=EXPERTS)
    return Decoder(config).double()


def optimizer_of(model):
    matrices = [p for _, p in model.named_parameters() if p.dim() > 1]
    vectors = [p for _, p in model.named_parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


def take_steps(model, optimizer, steps, rows, num_parts=1):
    """Optimizer steps on batches of four sequences; ``rows`` are this process's, by micro-batch."""
    for step in steps:
        tokens = torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(step))
        for own in rows:
            (model(tokens[own]).square().mean() + moe.balance_loss(model)).div(num_parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.balance_step(model)


def one_process(steps, parts, state=None):
    model = build()
    optimizer = optimizer_of(model)
    if state is not None:
        put(model, optimizer, state)
    size = 4 // parts
    take_steps(model, optimizer, steps, [slice(n * size, (n + 1) * size) for n in range(parts)], parts)
    return taken(model, optimizer)


def taken(model, optimizer):
    moments = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    return WholeState({name: t.detach().clone() for name, t in model.state_dict().items()}, moments)


def put(model, optimizer, state):
    model.load_state_dict(dict(state.tensors))
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = dict(state.optimizer[name])


def spread_steps(spec, steps, state=None):
    """The same on a mesh; a validation goes before the state is taken, as FSDP2 leaves parameters gathered by it."""
    mesh = ParallelMesh(Degrees.parse(spec))
    model = build()
    parallel = parallelize(model, mesh)
    optimizer = optimizer_of(parallel)
    if state is not None:
        load_state(parallel, optimizer, state)
    size = 4 // mesh.degrees.dp
    take_steps(model, optimizer, steps, [slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)])
    with torch.no_grad():
        model.eval()(torch.zeros(1, 8, dtype=torch.long))
    return gather_state(parallel, optimizer)


def assert_same(state, expected):
    assert state.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(state.tensors[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert state.optimizer.keys() == expected.optimizer.keys()
    for name, kept in expected.optimizer.items():
        assert state.optimizer[name].keys() == kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in kept.items():
            torch.testing.assert_close(state.optimizer[name][key], value, rtol=0, atol=TOLERANCE, msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("ep=2", 2),
        ("dp_replicate=2", 2),
        ("tp=2,ep=2,dp_shard=1", 1),
        ("ep=2,etp=2", 4),
        ("dp_shard=4,ep=2", 4),
        ("dp_replicate=2,dp_shard=2,ep=4", 4),
    ],
)
def test_the_whole_state_is_that_of_one_process(spec, parts):
    world_size = Degrees.parse(spec).world_size
    states = run_local(spread_steps, world_size, (spec, range(2)))
    assert states[1:] == [None] * (world_size - 1)
    assert_same(states[0], one_process(range(2), parts))


def test_a_state_goes_on_over_other_degrees():
    """Two ranks, then one process, then four: as one process would have done it all, batch parts as they were."""
    first = run_local(spread_steps, 2, ("ep=2", range(2)))[0]
    second = one_process(range(2, 3), 2, first)
    third = run_local(spread_steps, 4, ("tp=2,dp_shard=2,ep=2", range(3, 5), second))[0]
    assert_same(third, one_process(range(5), 2))


def refuse(state):
    mesh = ParallelMesh(Degrees.parse("ep=2"))
    parallel = parallelize(build(), mesh)
    with pytest.raises(CheckpointError) as found:
        load_state(parallel, optimizer_of(parallel), state)
    return str(found.value)


def test_another_shape_is_named():
    model = build()
    tensors = dict(model.state_dict()) | {"embedding.weight": torch.zeros(18, 12)}
    words = run_local(refuse, 2, (WholeState(tensors, {}),))
    assert set(words) == {"parameter embedding.weight has shape (17, 12), and the state (18, 12)"}
    del tensors["embedding.weight"]
    words = run_local(refuse, 2, (WholeState(tensors, {}),))
    assert set(words) == {"parameter embedding.weight has shape (17, 12), and the state nothing"}
