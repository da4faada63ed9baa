"""A checkpoint of another architecture is refused by name, before anything is changed."""

import copy

import pytest
import torch
from torch import nn

from moe.checkpoint import CheckpointStore, load_model
from moe.errors import CheckpointError


def saved(tmp_path, model, optimizer=None):
    store = CheckpointStore(tmp_path)
    store.save(1, model, optimizer or torch.optim.AdamW(model.parameters()), {})
    return store, store.latest()


def refused(store, checkpoint, model, optimizer=None) -> str:
    """Load, expect a refusal that leaves everything alone, and return its message."""
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()) if optimizer else None
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        store.load(checkpoint, model, optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generator, torch.get_rng_state())
    if optimizer:
        assert str(state) == str(optimizer.state_dict())
    assert str(checkpoint.path) in str(caught.value) or optimizer
    return str(caught.value)


def block(**layers) -> nn.Module:
    return nn.ModuleDict(layers)


def test_missing_unexpected_and_reshaped_tensors_are_named(tmp_path):
    store, checkpoint = saved(tmp_path, block(a=nn.Linear(2, 3), b=nn.Linear(4, 5), c=nn.Linear(1, 1, bias=False)))
    message = refused(store, checkpoint, block(a=nn.Linear(2, 3), b=nn.Linear(6, 5), d=nn.Linear(2, 2, bias=False)))
    assert "3 tensors differ" in message
    assert "b.weight: shape (5, 4) in the checkpoint, (5, 6) in the model" in message
    assert "c.weight: not in the model, float32[1, 1] in the checkpoint" in message
    assert "d.weight: not in the checkpoint, float32[2, 2] in the model" in message
    assert "a.weight" not in message


def test_other_dtypes_are_named(tmp_path):
    store, checkpoint = saved(tmp_path, nn.Linear(2, 2, bias=False))
    message = refused(store, checkpoint, nn.Linear(2, 2, bias=False, dtype=torch.bfloat16))
    assert "weight: dtype float32 in the checkpoint, bfloat16 in the model" in message


@pytest.mark.parametrize("tied_first", [True, False])
def test_other_ties_are_named(tmp_path, tied_first):
    def make(tied):
        model = block(a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 2, bias=False))
        if tied:
            model["b"].weight = model["a"].weight
        return model

    store, checkpoint = saved(tmp_path, make(tied_first))
    message = refused(store, checkpoint, make(not tied_first))
    expected = "a.weight in the checkpoint, None" if tied_first else "None in the checkpoint, a.weight"
    assert f"b.weight: tied_to {expected} in the model" in message


def test_many_differences_are_counted_not_listed(tmp_path):
    store, checkpoint = saved(tmp_path, nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(20)]))
    message = refused(store, checkpoint, nn.Sequential(*[nn.Linear(1, 2, bias=False) for _ in range(20)]))
    assert "20 tensors differ" in message
    assert "7.weight" in message
    assert "8.weight" not in message
    assert "and 12 more" in message


def test_load_model_refuses_too(tmp_path):
    _, checkpoint = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"weight: shape \(2, 2\) in the checkpoint, \(2, 3\) in the model"):
        load_model(checkpoint.path, nn.Linear(3, 2))


def test_empty_and_meta_tensors_are_not_taken_for_tied(tmp_path):
    model = nn.ParameterDict({"a": torch.zeros(0, 2), "b": torch.zeros(0, 2)})
    store, checkpoint = saved(tmp_path, model)
    assert all(spec.tied_to is None for spec in checkpoint.architecture.values())
    with pytest.raises(CheckpointError, match="not in the model") as caught:
        store.load(
            checkpoint, nn.ModuleDict({"c": nn.Linear(2, 2, device="meta"), "d": nn.Linear(2, 2, device="meta")})
        )
    assert "tied" not in str(caught.value)


def test_another_optimizer_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    store, checkpoint = saved(tmp_path, model)
    other = nn.Linear(2, 2)
    assert "is a SGD, the checkpoint's a AdamW" in refused(
        store, checkpoint, other, torch.optim.SGD(other.parameters(), lr=0.1)
    )
    split = torch.optim.AdamW([{"params": [other.weight]}, {"params": [other.bias]}])
    assert "optimizer has 2 groups, the checkpoint's has 1" in refused(store, checkpoint, other, split)
    part = torch.optim.AdamW([other.weight])
    assert "group 0 of optimizer: bias is in it in the checkpoint only" in refused(store, checkpoint, other, part)


def test_foreign_parameters_are_refused_when_saving(tmp_path):
    model, stranger = nn.Linear(2, 2), nn.Linear(3, 4)
    store = CheckpointStore(tmp_path)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": stranger.parameters()}])
    with pytest.raises(CheckpointError, match=r"group 1 of optimizer: parameter 0, of shape \[4, 3\]"):
        store.save(1, model, optimizer, {})
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state["global"] = {"count": 1}
    with pytest.raises(CheckpointError, match="'global', which belongs to no parameter"):
        store.save(1, model, optimizer, {})


def test_extra_state_that_is_no_tensor_is_refused_when_saving(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="_extra_state'] is a dict, not a tensor"):
        saved(tmp_path, Extra(1, 1))
