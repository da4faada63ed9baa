"""The Triton ops under torch.compile: one program serves many numbers of tokens.

Traced for a GPU that is not there, in a process of its own: the Triton ops are registered at import or never, and the
test run wraps records in checks that cannot be traced.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton, whose ops are traced, is not installed"),
]

ROOT = Path(__file__).parents[2]

# A compiler that prints what it was given, and makes a program that only stops.
TRACE = """
from unittest.mock import patch
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
with patch.object(torch.cuda, "is_available", lambda: True):
    from moe.kernels import experts, plan, route
    from moe.kernels.route import logits
for module in (experts, plan, route, logits):
    module.backend_of = lambda tensor: "triton"
from tests.support.codegen import GPUS, pretended

class Stop(Exception):
    pass

def compiler(name):
    def record(graph, inputs):
        launches = sum("triton_kernel" in str(node.target) for node in graph.graph.nodes)
        print(f"{name}: {launches} launches", flush=True)
        for guard in TracingContext.get().fake_mode.shape_env.guards:
            print("guard:", guard.expr, flush=True)
        def stop(*inputs):
            raise Stop
        return stop
    return record

def layer(x, router, up, down):
    ids, weights, _ = route.route(logits.router_logits(x, router), 2, normalize=True)
    return experts.run_experts(x, weights, plan.make_plan(ids, 8), up, down)

compiled = torch.compile(
    layer, fullgraph=True, backend=aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
)
parameters = [torch.randn(shape, requires_grad=True) for shape in ((8, 64), (8, 128, 64), (8, 64, 64))]
with pretended(GPUS["sm90"]):
    for tokens in (20_000, 15_000, 1_100, 1_000, 70, 40, 2):
        x = torch.randn(tokens, 64, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        try:
            compiled(x, *parameters)
        except Stop:
            print("ran with", tokens, flush=True)
"""


# The number of tokens times two choices is below 2^31. And PyTorch treats a size of one apart: one block of the plan's
# 128 assignments, and one range of 1,024 tokens that the gradient of the router's weight is summed over.
TRIVIAL = {"2*T < 2147483648", "one(((2*T + 127)//128))", "one(Min(16, ((T + 1023)//1024)))"}


def test_one_program_serves_any_number_of_tokens_but_for_sizes_of_one() -> None:
    done = subprocess.run([sys.executable, "-c", TRACE], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    guards = {re.sub(r"s\d+", "T", line.removeprefix("guard: ")) for line in lines if line.startswith("guard: ")}
    guards = {re.sub(r"^(?:Eq|Ne)\((.*), 1\)$", r"one(\1)", guard) for guard in guards}
    assert guards == TRIVIAL, done.stderr[-3000:]
    program = ["forward: 8 launches", "backward: 9 launches"]
    assert [line for line in lines if not line.startswith("guard: ")] == [
        *(*program, "ran with 20000", "ran with 15000", "ran with 1100"),
        *(*program, "ran with 1000", "ran with 70"),
        *(*program, "ran with 40", "ran with 2"),
    ]
