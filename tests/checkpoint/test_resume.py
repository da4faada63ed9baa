"""Training that is interrupted and resumed is, bit for bit, training that is not."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from moe.checkpoint import CheckpointStore, load_model, read_checkpoint
from moe.checkpoint.files import read_tensors
from moe.checkpoint.random_state import encode_random, restore_random
from moe.errors import CheckpointError

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "adamw_tensor_lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2), amsgrad=True, foreach=False),
    "adamw_fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "sgd_without_state": lambda ps: torch.optim.SGD(ps, lr=1e-2),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=1e-2, max_iter=3),
}


def assert_identical(left, right, path="") -> None:
    """Compare nested values, tensors by their bits, dtype and shape."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device), path
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*bits), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_identical(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right)):
            assert_identical(a, b, f"{path}/{i}")
    else:
        assert left == right, path


def test_five_steps_equal_three_and_two(tmp_path, awkward, trainer, seeder):
    whole = awkward(0)
    trainer(*whole, 5)
    draws = torch.rand(3).tolist() + np.random.rand(3).tolist()

    first = awkward(0)
    trainer(*first, 3)
    CheckpointStore(tmp_path).save(3, *first, {"tokens": 60})

    resumed = awkward(99)  # other initial values, and other states of all generators
    trainer(*resumed, 1)
    store = CheckpointStore(tmp_path)
    assert store.load(store.latest(), *resumed) == {"tokens": 60}
    trainer(*resumed, 2)

    assert_identical(dict(whole[0].state_dict()), dict(resumed[0].state_dict()), "model")
    assert_identical(whole[1].state_dict(), resumed[1].state_dict(), "optimizer")
    assert draws == torch.rand(3).tolist() + np.random.rand(3).tolist()
    assert resumed[0].tokens_seen.item() == 5 * 20
    assert resumed[0].head.weight is resumed[0].embedding.weight
    assert resumed[0].strided.stride() == (1, 6)


def test_saving_changes_nothing(tmp_path, awkward, trainer):
    undisturbed = awkward(0)
    trainer(*undisturbed, 2)
    draws = torch.rand(3).tolist(), np.random.rand()
    saved = awkward(0)
    trainer(*saved, 1)
    CheckpointStore(tmp_path).save(1, *saved, {})
    trainer(*saved, 1)
    assert_identical(dict(undisturbed[0].state_dict()), dict(saved[0].state_dict()))
    assert_identical(undisturbed[1].state_dict(), saved[1].state_dict())
    assert draws == (torch.rand(3).tolist(), np.random.rand())


def draws() -> list[float]:
    """From every global generator; a normal number leaves a second one waiting in numpy's and Python's."""
    return [torch.rand(()).item(), np.random.normal(), np.random.rand(), random.gauss(0, 1), random.random()]


def test_generators_are_restored_in_the_middle_of_a_pair_of_normal_numbers(seeder):
    seeder(5)
    draws()
    record, tensors = encode_random()
    expected = draws() + draws()
    seeder(6)
    restore_random(json.loads(json.dumps(record)), tensors)
    assert draws() + draws() == expected


def test_load_restores_every_generator(tmp_path, tiny, seeder):
    store = CheckpointStore(tmp_path)
    seeder(5)
    store.save(1, *tiny(), {})
    checkpoint = store.latest()
    store.load(checkpoint, tiny()[0])
    expected = draws()
    seeder(6)
    store.load(checkpoint, *tiny())
    assert draws() == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2], ids=["unfilled", "filled"])
def test_every_kind_of_optimizer(tmp_path, name, steps, trainer, seeder):
    def make(value):
        seeder(value)
        model = nn.Sequential(nn.Embedding(16, 8), nn.Dropout(0.5), nn.Linear(8, 16))
        return model, OPTIMIZERS[name](model.parameters())

    whole = make(0)
    trainer(*whole, steps + 2)
    first = make(0)
    trainer(*first, steps)
    store = CheckpointStore(tmp_path)
    store.save(steps, *first, {})
    resumed = make(1)
    trainer(*resumed, 1)
    store.load(store.latest(), *resumed)
    assert_identical(first[1].state_dict(), resumed[1].state_dict())
    trainer(*resumed, 2)
    assert_identical(dict(whole[0].state_dict()), dict(resumed[0].state_dict()))
    assert_identical(whole[1].state_dict(), resumed[1].state_dict())


def test_float32_state_of_bfloat16_weights_keeps_its_bits(tmp_path):
    def make():
        model = nn.Linear(4, 4, dtype=torch.bfloat16)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    master = torch.randn(4, 4)
    optimizer.state[model.weight] = {"master": master, "pair": [master * 3, 7], "note": "kept", "step": 5}
    store = CheckpointStore(tmp_path)
    store.save(1, model, optimizer, {})
    fresh, other = make()
    store.load(store.latest(), fresh, other)
    restored = other.state[fresh.weight]
    assert_identical(
        {"master": master, "pair": [master * 3, 7], "note": "kept", "step": 5}, {k: restored[k] for k in restored}
    )


def test_state_is_found_by_name_not_by_position(tmp_path, awkward, trainer):
    model, optimizer = awkward(0)
    trainer(model, optimizer, 2)
    store = CheckpointStore(tmp_path)
    store.save(2, model, optimizer, {})
    fresh, _ = awkward(1)
    turned = [{**group, "params": group["params"][::-1]} for group in reversed(optimizer.param_groups)][::-1]
    names = {id(p): name for name, p in model.named_parameters()}
    ours = dict(fresh.named_parameters())
    turned = [{**group, "params": [ours[names[id(p)]] for p in group["params"]]} for group in turned]
    other = torch.optim.AdamW(turned)
    store.load(store.latest(), fresh, other)
    for name, parameter in model.named_parameters():
        assert_identical(optimizer.state[parameter], other.state[ours[name]], name)
    assert [g["weight_decay"] for g in other.param_groups] == [0.1, 0.0]
    assert [g["betas"] for g in other.param_groups] == [(0.9, 0.95)] * 2


def test_files_are_named_by_parameter_and_tied_tensors_stored_once(tmp_path, awkward, trainer):
    model, optimizer = awkward(0)
    trainer(model, optimizer, 1)
    path = CheckpointStore(tmp_path).save(1, model, optimizer, {})
    names = set(read_tensors(path / "optimizer.safetensors"))
    assert {"embedding.weight/exp_avg", "embedding.weight/exp_avg_sq", "embedding.weight/step"} <= names
    stored = read_tensors(path / "model.safetensors")
    assert "embedding.weight" in stored
    assert "head.weight" not in stored
    assert stored["upper"].tolist() == [4, 5, 6, 7]
    entry = json.loads((path / "checkpoint.json").read_text())["architecture"]["head.weight"]
    assert entry == {"shape": [16, 8], "dtype": "float32", "tied_to": "embedding.weight"}


def test_load_model_takes_the_model_only(tmp_path, awkward, trainer):
    model, optimizer = awkward(0)
    trainer(model, optimizer, 2)
    path = CheckpointStore(tmp_path).save(2, model, optimizer, {"name": "best"})
    (path / "optimizer.safetensors").unlink()
    path = path.rename(tmp_path / "exported")
    fresh, _ = awkward(1)
    before = torch.get_rng_state()
    assert load_model(str(path), fresh) == {"name": "best"}
    assert_identical(dict(model.state_dict()), dict(fresh.state_dict()))
    assert torch.equal(before, torch.get_rng_state())


def test_loaded_tensors_are_independent_of_the_file(tmp_path, tiny):
    store = CheckpointStore(tmp_path)
    path = store.save(1, *tiny(1.0), {})
    model, optimizer = tiny(2.0)
    store.load(store.latest(), model, optimizer)
    with torch.no_grad():
        model.weight.add_(1)
        optimizer.state[model.weight]["exp_avg"].add_(1)
    expected = optimizer.state[model.weight]["exp_avg"].clone()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (path / name).write_bytes(b"\0" * (path / name).stat().st_size)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], expected)
    assert model.weight.unique().tolist() == [2.0]


def test_state_comes_back_as_it_was(tmp_path, tiny):
    state = {"lr": 0.1, "best": float("inf"), "names": ["ä", None, True], "pair": (1, 2.5), "deep": {"n": 2**70}}
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), state)
    assert_identical(store.latest().state, state)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"a": {"b": torch.ones(1)}}, "state/a/b is a tensor"),
        ({"a": [object()]}, "state/a/0 is a object"),
        ({"a": {1: 2}}, "state/a has the key 1"),
        ({"$tuple": 1}, r"the key '\$tuple'"),
    ],
)
def test_state_that_json_cannot_hold_is_refused(tmp_path, tiny, state, named):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        store.save(1, *tiny(), state)
    assert store.latest() is None


def test_cuda_generators_are_saved_and_restored_where_there_are_devices(tmp_path, tiny, monkeypatch):
    # A stand-in for two devices that are there at saving, and one at loading.
    states = [torch.arange(16, dtype=torch.uint8), torch.arange(16, 32, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), {})
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state.tolist()}))
    store.load(store.latest(), tiny()[0])
    assert restored == {0: states[0].tolist()}


def test_a_checkpoint_says_what_it_holds(tmp_path, tiny):
    path = CheckpointStore(tmp_path).save(7, *tiny(), {})
    checkpoint = read_checkpoint(path)
    assert (checkpoint.path, checkpoint.step) == (path, 7)
    assert {name: spec.shape for name, spec in checkpoint.architecture.items()} == {"weight": (2, 3), "bias": (2,)}
    assert checkpoint.optimizer["class"] == "AdamW"
