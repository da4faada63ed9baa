"""Quantile balancing: the bias that gives every expert its share of the tokens, found instead of approached.

Notation: ``s_te`` scores, ``b_e`` bias, K experts a token of E. ``m_te`` is the margin by which a token misses an
expert: the K-th best of the other experts' scores with bias, less ``s_te + b_e``. Expert e gets the tokens of negative
margin. If its bias rose by the K/E quantile of its margins, and nothing else changed, it would get K/E of the tokens.

So each bias solves its own equation while the others stay. The bias is the dual variable of a linear program, the
assignment of largest total score under which each token has K experts and each expert as many tokens as any other.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.balance.protocols import MarginRequest
from moe.balance.step_counts import StepCounts
from moe.config import require_positive, require_positive_integer, require_top_k
from moe.errors import ConfigError
from moe.kernels.margins import quantile


@final
@dataclass(frozen=True)
class QuantileBias:
    """Move each bias by the K/E quantile of its expert's margins, read from one histogram of the whole step.

    ``b_e += damping * quantile_{K/E}(m_e)``, then centred: ``b -= mean(b)``. There is no rate: a step is as long as the
    scores ask for, and an expert that nobody chooses is back after one. All experts move at once, each as if the others
    stayed, so it takes some steps to balance even the same tokens; and with ``damping=1`` the noise of each batch goes
    into the bias whole. The quantile is exact to the width of a bin (see `moe.kernels.margins`), and histograms of
    micro-batches and devices add up exactly.

    Args:
        damping: the part of each move that is made, in (0, 1].

    Raises:
        ConfigError: a damping outside (0, 1].

    Source: J. Su 2026, kexue.fm/archives/11619. There a token's (K+1)-th best score is what every expert is measured
    by, which moves experts that have to win tokens too little: measured here, loads pooled over many steps were two to
    three times as far off.
    """

    damping: float = 1.0

    state_rows: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_positive(damping=self.damping)
        if self.damping > 1:
            raise ConfigError(f"damping={self.damping} must be at most 1")

    def margins_at(self, step: int) -> MarginRequest:  # noqa: ARG002
        """Those of all decisions."""
        return MarginRequest()

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "0 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "0 E"]]:
        """The bias for the next step.

        Raises:
            ConfigError: the counts are without margins.
        """
        if counts.margins is None:
            raise ConfigError("counts.margins=None must be a histogram: a QuantileBias moves by the margins of a step")
        moved = bias + self.damping * quantile(counts.margins, counts.share)
        return torch.where(counts.tokens > 0, moved - moved.mean(), bias), state


def exact_quantile_bias(
    scores: Float[Tensor, "T E"], bias: Float[Tensor, " E"], top_k: int, sweeps: int = 100
) -> Float[Tensor, " E"]:
    """The bias that makes the top K of one batch exactly even, by coordinate descent on the dual.

    A sweep sets each ``alpha_t`` between the K-th and the (K+1)-th best of ``s_t + b``, then each ``-b_e`` between the
    q_e-th and the (q_e + 1)-th largest of ``s_te - alpha_t``, where the quotas ``q_e`` are T K / E, rounded up for the
    first experts so that they sum to T K. Both go half-way between the two: any point between is as good for that
    variable alone, but at an end two variables block each other, and the descent stalls some tokens short of balance.

    On scores without ties the loads come within one token of equal. Of 800 random batches of up to 128 tokens and 16
    experts all did within 50 sweeps, and 1024 tokens with 64 experts within 100.

    This is for study and for tests: it needs the whole batch, sorts it in every sweep, and the bias it finds must not
    select for the batch that it was found on, or a token's experts depend on later tokens.

    Args:
        scores: floating, best in float64.
        bias: to start from, of the dtype of the scores.
        top_k: K.
        sweeps: how many.

    Returns:
        The bias, centred; ``bias`` as it is where there is no token or every token goes to all experts.

    Raises:
        ConfigError: top_k or sweeps out of range.

    Source: J. Su 2026, kexue.fm/archives/11619, whose sweep takes the (K+1)-th and the (q+1)-th.
    """
    T, E = scores.shape
    require_top_k(top_k, E)
    require_positive_integer(sweeps=sweeps)
    if T == 0 or top_k == E:
        return bias
    quota = (T * top_k) // E + (torch.arange(E, device=scores.device) < (T * top_k) % E).long()
    ends = torch.stack([quota - 1, quota]).clamp(0, T - 1)
    for _ in range(sweeps):
        alpha = (scores + bias).topk(top_k + 1, -1).values[:, -2:].mean(-1, keepdim=True)
        bias = -(scores - alpha).sort(0, descending=True).values.gather(0, ends).mean(0)
        bias = bias - bias.mean()
    return bias
