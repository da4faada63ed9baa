"""The choice of a backend, and what the registration with PyTorch promises: compilation without a graph break."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe.errors import ConfigError, DtypeError
from moe.kernels import backends
from moe.kernels.combine import combine_rows
from moe.kernels.gather import gather_rows
from moe.kernels.grouped_mm import grouped_mm
from moe.kernels.plan import make_plan
from moe.types import Plan
from tests.support.kernels import naive_plan, random_ids


def compose(x: Tensor, weight: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """All four ops, as the experts' operation chains them."""
    plan = make_plan(expert_ids, weight.shape[0])
    return combine_rows(grouped_mm(gather_rows(x, plan), weight, plan.expert_offsets), weights, plan)


def run(function: Callable[..., Tensor], tokens: int) -> list[Tensor]:
    """Value and gradients of ``function``, on inputs that depend on the number of tokens only."""
    torch.manual_seed(tokens)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((tokens, 8), (4, 12, 8), (tokens, 2))]
    y = function(*leaves, random_ids(tokens, 2, 4, seed=tokens))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_compiles_whole_without_recompiling_for_another_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # The shape checks that the test run wraps around the record cannot be traced; users do not have them.
    monkeypatch.setattr(Plan, "__init__", inspect.unwrap(Plan.__init__))
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(compose, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 9, 30):
        for result, expected in zip(run(compiled, tokens), run(compose, tokens)):
            assert torch.equal(result, expected)
    assert len(graphs) == 1


PLAN = naive_plan(random_ids(5, 2, 3), 3)
FLOATS = {"x": (5, 4), "rows": (10, 4), "weights": (5, 2), "weight": (3, 6, 4), "grad": (5, 4), "grad_mm": (10, 6)}
CALLS = {
    "make_plan": (random_ids(5, 2, 3), 3),
    "gather_rows": ("x", PLAN.assignments, PLAN.rows),
    "sum_rows": ("rows", PLAN.rows),
    "combine_rows": ("rows", "weights", PLAN.rows, PLAN.assignments, PLAN.expert_offsets),
    "combine_rows_backward": ("grad", "rows", "weights", PLAN.assignments, PLAN.expert_offsets),
    "grouped_mm": ("rows", "weight", PLAN.expert_offsets),
    "grouped_mm_weight_grad": ("grad_mm", "rows", PLAN.expert_offsets),
}
NO_GRADIENT = {"make_plan", "sum_rows", "combine_rows_backward", "grouped_mm_weight_grad"}  # gradients themselves


@pytest.mark.parametrize("name", CALLS)
def test_registration_keeps_its_promises(name: str) -> None:
    """Schema, fake outputs, autograd and tracing with dynamic shapes, by PyTorch's own checks."""
    tensors = {key: torch.randn(shape, requires_grad=name not in NO_GRADIENT) for key, shape in FLOATS.items()}
    args = tuple(tensors[value] if isinstance(value, str) else value for value in CALLS[name])
    torch.library.opcheck(getattr(torch.ops.moe, name), args)


def test_tensors_on_the_cpu_use_the_reference() -> None:
    assert backends.backend_of(torch.empty(1)) == "reference"
    assert backends.backend_of(torch.empty(1, device="meta")) == "reference"


def test_a_gpu_uses_triton_and_says_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda")
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    assert backends.backend_of(tensor) == "triton"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match="device=cuda:0 needs the package triton"):
        backends.backend_of(tensor)


def test_a_gpu_that_is_not_the_current_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        first, second = torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1")
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    assert backends.backend_of(second) == "triton"  # CUDA has not started: a tensor that is only described
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert backends.backend_of(first) == "triton"
    with pytest.raises(ConfigError, match=r"device=cuda:1 is not the current one, cuda:0.*set_device\(1\)"):
        backends.backend_of(second)


def test_another_device_is_refused() -> None:
    with FakeTensorMode():
        tensor = torch.empty(1, device="xpu")
    with pytest.raises(ConfigError, match=r"device=xpu.* has no kernels: use a cpu or cuda tensor"):
        backends.backend_of(tensor)


def test_float64_is_refused_on_a_gpu() -> None:
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda", dtype=torch.float64)
    with pytest.raises(DtypeError, match=r"x has dtype torch.float64, must be bfloat16, float16 or float32 on a GPU"):
        backends.check_float("x", tensor)
