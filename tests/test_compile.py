"""A whole layer under torch.compile. In a process of its own: the checks of annotations cannot be traced."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys

import torch, moe
from torch._dynamo.testing import CompileCounterWithBackend

torch.manual_seed(0)
backend, recompute = sys.argv[1:]
balance = [moe.SquaredDeviation(), moe.ScoreBias()]
layer = moe.MoE(16, 8, 4, 2, bias=True, shared_hidden_dim=8, balance=balance, recompute=recompute)
counter = CompileCounterWithBackend(backend)
compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)

def step(call, batches):
    if len(batches) > 3:  # one loss for all
        (sum((y := call(x)).square().sum() for x in batches) + moe.balance_loss(layer)).backward()
    else:
        for x in batches:  # micro-batches
            y = call(x)
            (y.square().sum() + moe.balance_loss(layer)).backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    return y, gradients, moe.balance_step(layer, skipped=True)[""].tokens_per_expert

compilations = []
for sizes in ((12,), (7,), (33, 12, 20), (50, 64), (3,), (9, 9), (4,) * 12):
    batches = [torch.randn(tokens, 16) for tokens in sizes]
    y, gradients, counts = step(layer, batches)
    y_compiled, gradients_compiled, counts_compiled = step(compiled, batches)
    torch.testing.assert_close(y_compiled, y)
    torch.testing.assert_close(gradients_compiled, gradients)
    assert torch.equal(counts_compiled, counts), (counts_compiled, counts)
    compilations.append(counter.frame_count)
# Once for a step's first micro-batch, which starts the counts of the step, once for those that add to them, and once
# where losses already wait: not for each number of any of these.
first, again, both, *rest, waiting = compilations
assert first == again and rest == [both] * 3 and waiting <= both + 2, f"compiled again: {compilations}"
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "recompute"), [("aot_eager", "up"), ("inductor", "none")])
def test_a_compiled_layer_is_the_layer_and_is_not_compiled_for_each_batch(backend, recompute):
    command = [sys.executable, "-c", SCRIPT, backend, recompute]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]
