"""What every router does: logits in float32, scores, a decision, weights.

Sizes: T tokens, D dim, E experts, K experts per token, Z null experts, S slots a token (K for most routers).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from moe.buffers import Float32Buffers
from moe.config import NullOutput, option, require_positive, require_positive_integer, require_top_k
from moe.errors import ConfigError
from moe.init import fan_in_normal_
from moe.kernels.route import ScoreFunction, check_groups, choose, route, weigh, weights_of
from moe.kernels.route.logits import router_logits
from moe.routing.null_experts import count_null_experts
from moe.types import Routing

Replay = Callable[[Tensor, Tensor], Tensor] | Tensor
"""Ids of an earlier decision ``(T, S)``, or what finds them from ids and scores ``(T, E + Z)`` of a repeated one."""


@final
@dataclass(frozen=True)
class Tokens:
    """What a decision may look at beside logits and scores."""

    mask: Bool[Tensor, " T"] | None = None
    """False for padding."""
    ids: Integer[Tensor, " T"] | None = None
    """Token ids of the vocabulary, where the caller gave them."""


class Router(Float32Buffers, ABC):
    """A linear map from tokens to experts, and a decision made from its logits.

    Logits, scores, selection and weights are computed in float32 whatever the dtype of the layer or of autocast, since
    a bfloat16 logit has 8 bits and flips decisions between near experts. (In a float64 layer all of it is float64.)

    Ties go to the expert with the lower id, so that a decision does not depend on the device.

    A subclass with scores of its own overrides ``score``, one with a decision of its own ``select`` or ``weigh``; these
    then run as the PyTorch code that they are. A router that names a ``score_function`` and overrides none of them runs
    as one fused operation instead.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        normalize: divide a token's kept scores by their sum. None means "where K > 1": with one expert the weight would
            always be 1, and the router would get no gradient from the model's loss.
        scale: factor on the weights (``routed_scaling_factor`` in DeepSeek's models).
        score_bias: keep a bias per expert that is added to the scores for *selection* only (arXiv 2408.15664). It is a
            buffer, stays float32 under any ``.to(dtype)``, and is moved by ``moe.balance_step``.
        num_groups: the experts form this many groups of consecutive ids, and a token chooses within the ``top_groups``
            whose two best scores, biases included, have the largest sum (DeepSeek-V3, arXiv 2412.19437, section 2.1.2:
            a group there is a node, so that a token reaches few of them). None: no groups.
        top_groups: see ``num_groups``.
        null_ratio: this share of all experts compute nothing, so that a balanced router leaves this share of a token's
            K choices to them, more for some tokens and less for others (AdaMoE, arXiv 2406.13233). They are chosen,
            weighed and balanced as any other; their ids follow those of the E real ones. 0 for none.
        null_output: what a null expert gives back, see ``moe.config.NullOutput``.
        batch_invariant: a token's logits are the same bits whatever else is in the batch. On a GPU they are in any
            case; on the CPU it makes their product slower.

    Raises:
        ConfigError: sizes that are not positive, top_k of 0 or above num_experts, a normalize that is neither a bool
            nor None, normalize=True with top_k=1, groups that do not divide num_experts or whose best hold less than
            top_k experts, a null_ratio outside [0, 1) or that gives no whole number of null experts, null experts
            beside groups, a score_bias where the router has no use for one.

    Init:
        ``weight (E + Z, D)``: truncated normal of standard deviation sqrt(0.1 / D), see ``moe.init``.
    """

    score_function: ClassVar[ScoreFunction | None] = None
    """What ``score`` computes, where the library knows it."""

    selects_by_score: ClassVar[bool] = False
    """Select on scores even without a bias, where a router is defined that way."""

    takes_score_bias: ClassVar[bool] = True
    """Whether a bias for each expert changes what is selected."""

    takes_groups: ClassVar[bool] = True
    """Whether a token can be held to its best groups of experts."""

    takes_null_experts: ClassVar[bool] = True
    """Whether there can be experts that compute nothing."""

    is_causal: ClassVar[bool] = True
    """Whether, in evaluation mode, a token's experts depend on no later token; else it cannot generate."""

    adds_noise: ClassVar[bool] = False
    """Whether decisions in training mode are drawn at random, so that the same tokens decided again differ.

    One that draws in ``select`` must say so: where the ids are given, as in a recomputation, the others do not select.
    """

    _is_fused: ClassVar[bool] = False

    weight: nn.Parameter
    score_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool | None = None,
        scale: float = 1.0,
        score_bias: bool = False,
        num_groups: int | None = None,
        top_groups: int | None = None,
        null_ratio: float = 0.0,
        null_output: str = "zero",
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive_integer(dim=dim)
        require_positive(scale=scale)
        require_top_k(top_k, num_experts)
        check_groups(num_experts, top_k, num_groups, top_groups)
        self.num_null_experts = count_null_experts(num_experts, null_ratio)
        self._check(top_k, normalize, score_bias, num_groups, null_ratio)
        self.dim, self.num_experts, self.top_k, self.scale = dim, num_experts, top_k, scale
        self.normalize = top_k > 1 if normalize is None else normalize
        self.null_output = option(NullOutput, "null_output", null_output)
        self.num_groups, self.top_groups, self.batch_invariant = num_groups, top_groups, batch_invariant
        columns = num_experts + self.num_null_experts
        self.weight = nn.Parameter(torch.empty(columns, dim, device=device, dtype=dtype))
        bias = torch.zeros(columns, device=device, dtype=torch.float32) if score_bias else None
        self.register_buffer("score_bias", bias)
        self.reset_parameters()

    def __init_subclass__(cls, **options: Any) -> None:
        """Fuse what names its score function, unless a part of the decision is overridden without naming it anew."""
        super().__init_subclass__(**options)
        score, named = (
            next(i for i, base in enumerate(cls.__mro__) if name in vars(base)) for name in ("score", "score_function")
        )
        decides_alike = cls.select is Router.select and cls.weigh is Router.weigh
        cls._is_fused = cls.score_function is not None and named <= score and decides_alike

    def _check(
        self, top_k: int, normalize: bool | None, score_bias: bool, num_groups: int | None, null_ratio: float
    ) -> None:
        if normalize is not None and not isinstance(normalize, bool):
            raise ConfigError(f"normalize={normalize!r} must be True, False or None")
        if normalize and top_k == 1:
            raise ConfigError(
                "normalize=True with top_k=1 makes every weight 1, so the router would learn nothing; leave "
                "normalize=None (take 'softmax' instead of 'top_k_softmax', which sets it) or raise top_k"
            )
        if score_bias and not self.takes_score_bias:
            raise ConfigError(
                f"score_bias=True: {type(self).__name__} does not select by scores, so no bias changes what it "
                "selects; balance it otherwise or not at all"
            )
        if self.num_null_experts and not self.takes_null_experts:
            raise ConfigError(
                f"null_ratio={null_ratio}: {type(self).__name__} does not choose among null experts; leave null_ratio=0"
            )
        if num_groups is not None and not self.takes_groups:
            raise ConfigError(f"num_groups={num_groups}: {type(self).__name__} has no groups; leave num_groups=None")
        if self.num_null_experts and num_groups is not None:
            raise ConfigError(f"num_groups={num_groups} beside null experts, which are in no group; leave one of both")

    @property
    def _runs_fused(self) -> bool:
        """Whether one operation decides, in the mode that the router is in."""
        return self._is_fused

    @property
    def num_slots(self) -> int:
        """S, the most experts that a token can get: the width of a decision."""
        return self.top_k

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero."""
        fan_in_normal_(self.weight, self.dim)
        if self.score_bias is not None:
            self.score_bias.zero_()

    @abstractmethod
    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Turn logits into scores; must not change the order of a token's experts."""

    def forward(
        self,
        x: Float[Tensor, "T D"],
        token_mask: Bool[Tensor, " T"] | None = None,
        replay: Replay | None = None,
        token_ids: Integer[Tensor, " T"] | None = None,
    ) -> Routing:
        """Decide where each token goes.

        Args:
            x: tokens, any floating dtype.
            token_mask: False for padding, which gets no expert and is counted nowhere. None: all tokens count.
            replay: the ids of a decision made earlier, which stand instead of a new one; or a function that is called
                with the ids and scores of the new one, without gradients, and returns them. Scores and weights are
                those of ``x`` all the same, so that gradients flow; and a router that draws random numbers
                (``adds_noise``) draws them as it did then.
            token_ids: of the vocabulary, for routers that look at them.

        Returns:
            The decision; gradients flow through ``weights``, ``scores`` and ``logits``.
        """
        return self.decide(self.logits(x), Tokens(token_mask, token_ids), replay)

    def logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Router outputs in float32 (float64 for float64 tokens), outside any autocast."""
        return router_logits(x, self.weight, batch_invariant=self.batch_invariant)

    def decide(self, logits: Float[Tensor, "T E"], tokens: Tokens, replay: Replay | None) -> Routing:
        """The decision that these logits lead to; arguments as in ``forward``."""
        decide = self._decide_fused if self._runs_fused else self._decide_in_steps
        expert_ids, weights, scores = decide(logits, tokens, replay)
        return Routing(
            expert_ids, weights, scores, logits, token_mask=tokens.mask, num_null_experts=self.num_null_experts
        )

    def _decide_in_steps(self, logits: Tensor, tokens: Tokens, replay: Replay | None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, weights and scores by the methods below."""
        scores = self.score(logits)
        if isinstance(replay, Tensor) and not self.adds_noise:
            # Nothing is drawn in ``select`` that what follows would miss, and it may be dear.
            return replay, self.weigh(scores, replay), scores
        expert_ids = self.select(logits.detach(), scores.detach(), tokens)
        if tokens.mask is not None:
            expert_ids = expert_ids.masked_fill(~tokens.mask[:, None], -1)
        if replay is not None:
            expert_ids = replay if isinstance(replay, Tensor) else replay(expert_ids, scores.detach())
        return expert_ids, self.weigh(scores, expert_ids), scores

    def _decide_fused(self, logits: Tensor, tokens: Tokens, replay: Replay | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same by one operation; a decision that has to be found from this one is weighed by a second one."""
        weighting: dict[str, Any] = {
            "score_function": self.score_function,
            "normalize": self.normalize,
            "scale": self.scale,
        }
        if isinstance(replay, Tensor):
            return replay, *weigh(logits, replay, **weighting)
        expert_ids, weights, scores = route(
            logits if replay is None else logits.detach(),
            self.top_k,
            **weighting,
            score_bias=self.score_bias,
            token_mask=tokens.mask,
            by_score=self.selects_by_score,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )
        if replay is None:
            return expert_ids, weights, scores
        found = replay(expert_ids, scores)
        return found, *weigh(logits, found, **weighting)

    def select(
        self,
        logits: Float[Tensor, "T E"],
        scores: Float[Tensor, "T E"],
        tokens: Tokens,  # noqa: ARG002 (for those that override this)
    ) -> Int[Tensor, "T S"]:
        """Choose the experts of each token, int32, best first, -1 in slots that stay empty.

        Without a bias the order of the logits decides (but for ``selects_by_score``), which keeps apart what scores
        round to the same value: a sigmoid of 20 and of 25 are both 1 in float32. What is chosen for padding does not
        matter.
        """
        by_score, groups = self.selects_by_score, (self.num_groups or 1, self.top_groups or 1)
        return choose(logits, scores, self.score_bias, self.top_k, by_score, *groups)

    def weigh(self, scores: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T S"]) -> Float[Tensor, "T S"]:
        """Weights of the chosen experts: their scores without the bias, normalised if asked, scaled; 0 for none."""
        return weights_of(scores, expert_ids, self.normalize, self.scale)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        bias = self.score_bias is not None
        null = f", null_experts={self.num_null_experts}" if self.num_null_experts else ""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}, normalize={self.normalize}, "
            f"scale={self.scale}, score_bias={bias}, num_groups={self.num_groups}, top_groups={self.top_groups}, "
            f"batch_invariant={self.batch_invariant}{null}"
        )
