"""Nested values come back from JSON as they were."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.checkpoint.tree import decode, encode
from moe.errors import CheckpointError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text().filter(lambda key: not key.startswith("$"))
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(TREES)
def test_values_survive_json(tree):
    text = json.dumps(encode(tree, "root", {}), allow_nan=False)
    # repr tells apart what == does not: -0.0, tuples, True and 1; and NaN is equal to itself.
    assert repr(decode(json.loads(text), {})) == repr(tree)


def test_tensors_are_put_apart_under_their_paths():
    tensors = {}
    value = {"a": [torch.ones(2), {"b": (torch.zeros(()),)}]}
    record = encode(value, "root", tensors)
    assert sorted(tensors) == ["root/a/0", "root/a/1/b/0"]
    back = decode(json.loads(json.dumps(record)), tensors)
    assert back["a"][0] is value["a"][0]
    assert back["a"][1]["b"][0] is value["a"][1]["b"][0]


@pytest.mark.parametrize("value", [{1: 2}, {"$float": 1}, {1, 2}, b"bytes", 1j])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(CheckpointError, match="root/x"):
        encode({"x": value}, "root", {})
