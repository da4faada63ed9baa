"""Launches at the standard shape, for whoever looks at the machine code; nothing here is run on a GPU.

Each case makes its own ``device="cuda"`` tensors and calls launch functions of a ``triton_backend.py``: under a driver
that compiles and does not launch, on any machine. To add one, write a function and its line in ``CASES``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe.kernels.combine import triton_backend as combine
from moe.kernels.experts import triton_activation as activation
from moe.kernels.experts import triton_backend as experts
from moe.kernels.gather import triton_backend as gather
from moe.kernels.grouped_mm import triton_backend as products
from moe.kernels.margins import triton_backend as margins
from moe.kernels.plan import triton_backend as plan
from moe.kernels.route import triton_backend as router
from moe.kernels.route.logits import triton_backend as logits

EXPERTS, TOP_K, TOKENS, DIM, HIDDEN = 128, 8, 8192, 2048, 1024
ROWS = TOKENS * TOP_K


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cuda", dtype=torch.int32)


def offsets() -> Tensor:
    return integers(EXPERTS + 1)


def forward(num_out: int = HIDDEN) -> None:
    products.grouped_mm(empty(ROWS, DIM), empty(EXPERTS, num_out, DIM), offsets())


def forward_gather(num_out: int = HIDDEN) -> None:
    products.grouped_mm(empty(TOKENS, DIM), empty(EXPERTS, num_out, DIM), offsets(), tokens=integers(ROWS))


def forward_gather_bias() -> None:
    rows, weight, bias = empty(TOKENS, DIM), empty(EXPERTS, HIDDEN, DIM), empty(EXPERTS, HIDDEN)
    products.grouped_mm(rows, weight, offsets(), tokens=integers(ROWS), bias=bias)


def input_gradient(num_in: int = DIM) -> None:
    products.grouped_mm(empty(ROWS, HIDDEN), empty(EXPERTS, HIDDEN, num_in).transpose(1, 2), offsets())


def weight_gradient(num_in: int = DIM) -> None:
    products.grouped_mm_weight_grad(empty(ROWS, HIDDEN), empty(ROWS, num_in), offsets())


def weight_gradient_gather_rows(num_out: int = HIDDEN) -> None:
    grad, rows = empty(ROWS, num_out), empty(TOKENS, DIM)
    products.grouped_mm_weight_grad(grad, rows, offsets(), row_tokens=integers(ROWS))


def weight_gradient_gather_grad() -> None:
    grad, rows = empty(TOKENS, HIDDEN), empty(ROWS, DIM)
    products.grouped_mm_weight_grad(grad, rows, offsets(), grad_tokens=integers(ROWS), out_dtype=torch.float32)


def odd_widths(num_in: int, num_out: int) -> None:
    """Products of rows that do not start at multiples of 16 bytes."""
    weight, bias = empty(EXPERTS, num_out, num_in), empty(EXPERTS, num_out)
    tokens, grad, row_ids = empty(TOKENS, num_in), empty(ROWS, num_out), integers(ROWS)
    products.grouped_mm(tokens, weight, offsets(), tokens=row_ids, bias=bias)
    products.grouped_mm(grad, weight.transpose(1, 2), offsets())
    products.grouped_mm_weight_grad(grad, empty(ROWS, num_in), offsets(), out_dtype=torch.float32)
    products.grouped_mm_weight_grad(grad, tokens, offsets(), row_tokens=row_ids)


def bias_gradient() -> None:
    weights = empty(ROWS, dtype=torch.float32)
    products.grouped_sum(empty(TOKENS, DIM), offsets(), tokens=integers(ROWS), row_weights=weights)


def make_plan() -> None:
    plan.make_plan(integers(TOKENS, TOP_K), EXPERTS)


def gather_rows() -> None:
    gather.gather_rows(empty(TOKENS, DIM), integers(ROWS), integers(TOKENS, TOP_K))


def combine_rows() -> None:
    weights = empty(TOKENS, TOP_K, dtype=torch.float32)
    combine.combine_rows(empty(ROWS, DIM), weights, integers(TOKENS, TOP_K), integers(ROWS), offsets())


def combine_backward() -> None:
    weights = empty(TOKENS, TOP_K, dtype=torch.float32)
    combine.combine_rows_backward(empty(TOKENS, DIM), empty(ROWS, DIM), weights, integers(ROWS), offsets())


def activation_forward() -> None:
    activation.activation_forward(empty(ROWS, 2 * HIDDEN), offsets(), "swiglu")


def activation_backward() -> None:
    up, weights = empty(ROWS, 2 * HIDDEN), empty(TOKENS, TOP_K, dtype=torch.float32)
    grad, bias = empty(TOKENS, DIM), empty(EXPERTS, DIM)
    rows = integers(ROWS), offsets()
    grad_hidden = empty(ROWS, HIDDEN)
    activation.activation_backward(
        up, grad_hidden, weights, *rows, grad, bias, torch.empty_like(up), grad_hidden, "swiglu"
    )


def _operands() -> tuple[list[Tensor], list[Tensor | None]]:
    """Tokens, weights and plan; and the parameters of experts without bias."""
    weights = empty(TOKENS, TOP_K, dtype=torch.float32)
    inputs = [empty(TOKENS, DIM), weights, integers(ROWS), offsets(), integers(TOKENS, TOP_K)]
    return inputs, [empty(EXPERTS, 2 * HIDDEN, DIM), empty(EXPERTS, DIM, HIDDEN), None, None]


def experts_forward() -> None:
    inputs, parameters = _operands()
    experts.experts_forward(*inputs, *parameters, "swiglu", True, None, True)


def experts_backward() -> None:
    inputs, parameters = _operands()
    grad, up, needs = empty(TOKENS, DIM), empty(ROWS, 2 * HIDDEN), [True] * 4 + [False] * 2
    experts.experts_backward(grad, *inputs, up, *parameters, "swiglu", needs, None, True)


def route() -> None:
    scores = empty(TOKENS, EXPERTS, dtype=torch.float32)
    for score_function in ("softmax", "sqrt_softplus"):  # sigmoid has fewer numbers to keep than either
        options = (TOP_K, score_function, False, True, 1.0, 1, 1)
        ids, weights, _ = router.route(scores, None, None, None, *options)
        router.route(scores, None, None, ids, *options)
        router.route_backward(weights, scores, scores, ids, score_function, True, 1.0)


def count_margins() -> None:
    scores, bias = empty(TOKENS, EXPERTS, dtype=torch.float32), empty(EXPERTS, dtype=torch.float32)
    margins.count_margins(scores, integers(TOKENS, TOP_K), bias, empty(TOKENS, dtype=torch.bool))


def router_logits() -> None:
    x, weight, grad = empty(TOKENS, DIM), empty(EXPERTS, DIM), empty(TOKENS, EXPERTS, dtype=torch.float32)
    logits.router_logits(x, weight, False)
    logits.router_logits_input_grad(grad, weight, torch.bfloat16, False)
    logits.router_logits_weight_grad(grad, x, torch.bfloat16)


CASES: dict[str, Callable[[], None]] = {
    "forward": forward,
    "forward gather": forward_gather,
    "input gradient": input_gradient,
    "weight gradient": weight_gradient,
    "weight gradient gather rows": weight_gradient_gather_rows,
    "weight gradient gather grad": weight_gradient_gather_grad,
    "bias gradient": bias_gradient,
    "plan": make_plan,
    "gather": gather_rows,
    "combine": combine_rows,
    "combine backward": combine_backward,
    "activation forward": activation_forward,
    "activation backward": activation_backward,
    "experts forward": experts_forward,
    "experts backward": experts_backward,
    "router": route,
    "router logits": router_logits,
    "margins": count_margins,
}

# The same kernels with tiles that the standard shape does not choose.
OTHER_TILES: dict[str, Callable[[], None]] = {
    "forward gather, bias": forward_gather_bias,
    **{f"forward, {width} wide": lambda width=width: forward(width) for width in (128, 64)},
    **{f"forward gather, {width} wide": lambda width=width: forward_gather(width) for width in (128, 64)},
    **{f"input gradient, {width} wide": lambda width=width: input_gradient(width) for width in (128, 64)},
    **{f"weight gradient, {width} wide": lambda width=width: weight_gradient(width) for width in (128, 64)},
    **{
        f"weight gradient gather rows, {width} wide": lambda width=width: weight_gradient_gather_rows(width)
        for width in (128, 64)
    },
    **{f"{i} to {o} wide": lambda i=i, o=o: odd_widths(i, o) for i, o in ((1030, 515), (1025, 37))},
}


def all_cases() -> None:
    """Every case at the standard shape, in order."""
    for case in CASES.values():
        case()
