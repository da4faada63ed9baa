"""Routing: from a token's logits to its experts and their weights.

Example, 2 tokens, E=4, K=2, softmax, the chosen scores normalised::

    logits     = [[0., 2., 1., 2.], [3., 0., 0., 1.]]
    scores     = [[.05, .40, .15, .40], [.81, .04, .04, .11]]  # softmax of the logits
    expert_ids = [[1, 3], [0, 3]]                              # best first; of equals the lower id
    weights    = [[.5, .5], [.88, .12]]                        # scores of the chosen, over their sum

With ``score_bias = [0, 0, .5, 0]`` the first token chooses ``[2, 1]``: .15 + .5 is the largest. Its weights are
``[.27, .73]``, from the scores without the bias.
"""

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe.config import require_positive_integer
from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, register
from moe.kernels.route import reference
from moe.kernels.route.reference import ScoreFunction, choose, weights_of

if HAS_TRITON:
    from moe.kernels.route import triton_backend

__all__ = ["ScoreFunction", "check_groups", "choose", "route", "weigh", "weights_of"]


def _fake_route(
    logits: Tensor,
    _score_bias: Tensor | None,
    _token_mask: Tensor | None,
    _given: Tensor | None,
    top_k: int,
    _score_function: str,
    _by_score: bool,
    _normalize: bool,
    _scale: float,
    _num_groups: int,
    _top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape), torch.empty_like(logits)


def _fake_backward(
    _grad_weights: Tensor | None,
    _grad_scores: Tensor | None,
    scores: Tensor,
    _expert_ids: Tensor,
    _score_function: str,
    _normalize: bool,
    _scale: float,
) -> Tensor:
    return torch.empty_like(scores)


def _setup_route(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    expert_ids, _, scores = output
    ctx.save_for_backward(scores, expert_ids)
    ctx.set_materialize_grads(False)  # scores without a loss on them have no gradient, not one of zeros
    _, _, _, _, _, score_function, _, normalize, scale, *_ = inputs
    ctx.options = score_function, normalize, scale


def _register_autograd(route_op: CustomOpDef, backward_op: CustomOpDef) -> None:
    def backward(ctx, _grad_ids, grad_weights, grad_scores):  # type: ignore[no-untyped-def]
        grads = (None if grad is None else grad.contiguous() for grad in (grad_weights, grad_scores))
        return (backward_op(*grads, *ctx.saved_tensors, *ctx.options), *[None] * 10)

    route_op.register_autograd(backward, setup_context=_setup_route)


_ROUTE = register("route", _fake_route, reference.route, triton_backend.route if HAS_TRITON else None)
_BACKWARD = register(
    "route_backward", _fake_backward, reference.route_backward, triton_backend.route_backward if HAS_TRITON else None
)
for _backend, _op in _ROUTE.items():
    _register_autograd(_op, _BACKWARD[_backend])


def route(
    logits: Tensor,
    top_k: int,
    *,
    score_function: str = ScoreFunction.SOFTMAX,
    normalize: bool = False,
    scale: float = 1.0,
    score_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    by_score: bool = False,
    num_groups: int | None = None,
    top_groups: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the experts of each token, choose the K best of them, and weigh these.

    Without a bias the order of the logits decides, which keeps apart what scores round to the same value: a sigmoid of
    20 and of 25 are both 1 in float32. NaN counts as the largest value, so that a poisoned token has K distinct experts
    too. Gradients reach the logits through the weights and the scores, each from one pass over a token in a fixed
    order.

    Args:
        logits: ``(T, E)`` float32; on the CPU also float64.
        top_k: K.
        score_function: a ``ScoreFunction``.
        normalize: divide a token's chosen scores by their sum.
        scale: factor on the weights.
        score_bias: ``(E,)`` float32, on the device of ``logits``, added to the scores for selection only.
        token_mask: ``(T,)`` bool, on the device of ``logits``, False for tokens that get no expert.
        by_score: compare scores, not logits, even without a bias.
        num_groups: the experts form this many groups of consecutive ids, and a token chooses within its best
            ``top_groups``. A group is as good as the sum of its two best scores with their biases.
        top_groups: see ``num_groups``.

    Returns:
        ``expert_ids (T, K)`` int32, best first, of equals the lower id first, -1 for a masked token; ``weights (T, K)``
        and ``scores (T, E)`` in the dtype of ``logits``.

    Raises:
        ShapeError: ``logits`` is not a matrix, or ``score_bias`` or ``token_mask`` does not fit it.
        DtypeError: of ``logits``, ``score_bias`` or ``token_mask``.
        ConfigError: ``top_k`` or the groups do not fit E, or ``score_function`` is unknown.

    Source: the bias, arXiv 2408.15664, equation 3. The groups, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a group
    there counts its best ``K / top_groups`` scores, which are 2 in that model. DeepSeek-V2 (arXiv 2405.04434, section
    2.1.3) takes a group's best score alone.
    """
    _check(logits, score_function)
    num_tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k={top_k} must be between 1 and the number of experts, {num_experts}")
    check_groups(num_experts, top_k, num_groups, top_groups)
    if score_bias is not None:
        if score_bias.shape != (num_experts,):
            raise ShapeError(f"score_bias has shape {tuple(score_bias.shape)}, must be ({num_experts},)")
        if score_bias.dtype != torch.float32:
            raise DtypeError(f"score_bias has dtype {score_bias.dtype}, must be torch.float32")
        score_bias = score_bias.contiguous()
    if token_mask is not None:
        if token_mask.shape != (num_tokens,):
            raise ShapeError(f"token_mask has shape {tuple(token_mask.shape)}, must be ({num_tokens},)")
        if token_mask.dtype != torch.bool:
            raise DtypeError(f"token_mask has dtype {token_mask.dtype}, must be torch.bool")
        token_mask = token_mask.contiguous()
    return _ROUTE[backend_of(logits)](
        logits.contiguous(),
        score_bias,
        token_mask,
        None,
        top_k,
        str(score_function),
        by_score,
        normalize,
        float(scale),
        num_groups or 1,
        top_groups or 1,
    )


def weigh(
    logits: Tensor,
    expert_ids: Tensor,
    *,
    score_function: str = ScoreFunction.SOFTMAX,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Score the experts of each token and weigh those chosen earlier: :func:`route` with its decision given.

    Args:
        logits: ``(T, E)`` float32; on the CPU also float64.
        expert_ids: ``(T, K)`` int32, on the device of ``logits``, values in -1 .. E - 1, -1 for no expert.
        score_function: a ``ScoreFunction``.
        normalize: divide a token's chosen scores by their sum.
        scale: factor on the weights.

    Returns:
        ``weights (T, K)`` and ``scores (T, E)`` in the dtype of ``logits``.

    Raises:
        ShapeError: ``logits`` is not a matrix, or ``expert_ids`` does not fit it.
        DtypeError: of ``logits`` or ``expert_ids``.
        ConfigError: ``score_function`` is unknown.
    """
    _check(logits, score_function)
    if expert_ids.ndim != 2 or expert_ids.shape[0] != logits.shape[0] or expert_ids.shape[1] == 0:
        raise ShapeError(f"expert_ids has shape {tuple(expert_ids.shape)}, must be ({logits.shape[0]}, top_k)")
    if expert_ids.dtype != torch.int32:
        raise DtypeError(f"expert_ids has dtype {expert_ids.dtype}, must be torch.int32")
    # The same operation as for a decision of its own: selective checkpointing wants a recomputation, which weighs what
    # was chosen, to run what the forward pass ran.
    _ids, weights, scores = _ROUTE[backend_of(logits)](
        logits.contiguous(),
        None,
        None,
        expert_ids.contiguous(),
        expert_ids.shape[1],
        str(score_function),
        False,
        normalize,
        float(scale),
        1,
        1,
    )
    return weights, scores


def check_groups(num_experts: int, top_k: int, num_groups: int | None, top_groups: int | None) -> None:
    """Check that K experts can be chosen from ``top_groups`` of ``num_groups`` equal groups.

    Raises:
        ConfigError: only one of the two is given, the groups are not equal, or they hold less than K experts.
    """
    if num_groups is None and top_groups is None:
        return
    if num_groups is None or top_groups is None:
        raise ConfigError(f"num_groups={num_groups} and top_groups={top_groups} must be given together or not at all")
    require_positive_integer(num_groups=num_groups, top_groups=top_groups)
    if num_experts % num_groups:
        raise ConfigError(f"num_groups={num_groups} must divide num_experts={num_experts}")
    if top_groups > num_groups:
        raise ConfigError(f"top_groups={top_groups} must be at most num_groups={num_groups}")
    if top_k > (experts := num_experts // num_groups * top_groups):
        raise ConfigError(f"top_k={top_k} is more than the {experts} experts in top_groups={top_groups} groups")


def _check(logits: Tensor, score_function: str) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ShapeError(f"logits has shape {tuple(logits.shape)}, must be (tokens, experts) with experts > 0")
    expected = (torch.float32,) if logits.device.type == "cuda" else (torch.float32, torch.float64)
    if logits.dtype not in expected:
        raise DtypeError(f"logits has dtype {logits.dtype}, must be {' or '.join(map(str, expected))}")
    if score_function not in set(ScoreFunction):
        raise ConfigError(f"score_function={score_function!r} is unknown; choose one of {', '.join(ScoreFunction)}")
