"""A whole layer under torch.compile. In a process of its own: the checks of annotations cannot be traced."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch, moe
torch.manual_seed(0)
layer = moe.MoE(16, 8, 4, 2, bias=True, shared_hidden_dim=8, balance=[moe.SquaredDeviation(), moe.ScoreBias()])
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

def step(call, x):
    y = call(x)
    (y.square().sum() + moe.balance_loss(layer)).backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    return y, gradients, moe.balance_step(layer, skipped=True)[""].tokens_per_expert

for tokens in (12, 12, 7):
    x = torch.randn(tokens, 16)
    y, gradients, counts = step(layer, x)
    y_compiled, gradients_compiled, counts_compiled = step(compiled, x)
    torch.testing.assert_close(y_compiled, y)
    torch.testing.assert_close(gradients_compiled, gradients)
    assert torch.equal(counts_compiled, counts), (counts_compiled, counts)
print("same")
"""


@pytest.mark.slow
def test_a_compiled_layer_is_the_layer():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr[-3000:]
