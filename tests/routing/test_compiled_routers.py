"""Every router under torch.compile. In a process of its own: the checks of annotations cannot be traced."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from tests.routing.zoo import build, ids_of
from moe.routing import ROUTERS

x, mask = torch.randn(24, 16), torch.arange(24) % 4 > 0
for name in ROUTERS:
    for training in (True, False):
        router = build(name).train(training)
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        results = []
        for call in (router, compiled):
            torch.manual_seed(1)
            own = x.clone().requires_grad_()
            routing = call(own, mask, token_ids=ids_of(x))
            (routing.weights.square().sum() + routing.scores.square().sum()).backward()
            results.append((routing.expert_ids, routing.weights, own.grad))
        (ids, *rest), (compiled_ids, *compiled_rest) = results
        if name != "noisy_top_k" or not training:  # a compiled graph draws other noise
            assert torch.equal(ids, compiled_ids), name
            torch.testing.assert_close(rest, compiled_rest)
        torch._dynamo.reset()
compiled = torch.compile(build("hash"), fullgraph=True, backend="aot_eager")
for outside in (-1, 97):
    try:
        compiled(x, token_ids=torch.full((24,), outside))
    except (IndexError, RuntimeError) as error:
        assert "out of range" in str(error), error
    else:
        raise AssertionError(f"{outside} found experts")
print("same")
"""


@pytest.mark.slow
def test_a_compiled_router_is_the_router():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]
