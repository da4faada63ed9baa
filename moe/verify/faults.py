"""Mistakes that training under expert parallelism is known for, to be planted and caught.

Each replaces one seam of the library in the processes of the ranks, and none in the reference. What it replaces tells
whether there was anything to change, so that a fault that cannot show is not taken for one that was missed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final
from unittest.mock import patch

from moe.verify.planting import Fire, Patch, data, exchange, stages, steps

Plant = Callable[[Fire], Sequence[Patch]]
"""Makes the patches of a fault; they call what they are given when they change something."""


@final
@dataclass(frozen=True)
class Fault:
    """A mistake that can be planted.

    Attributes:
        explanation: what is wrong, in a sentence.
        shows: the quantity in whose row it must show.
        plant: what it replaces.
        needs: what it takes to show.
    """

    explanation: str
    shows: str
    plant: Plant
    needs: str


FAULTS: Mapping[str, Fault] = {
    "expert-average": Fault(
        "expert gradients are averaged as if experts lived on the ranks of dense parameters",
        "gradient",
        steps.wrong_expert_average,
        "experts on other ranks than dense parameters: ep * etp other than tp",
    ),
    "norm-experts": Fault(
        "the gradient norm counts each rank's experts as if all ranks held them",
        "gradient norm",
        steps.norm_without_other_experts,
        "experts that are divided: ep * etp > 1",
    ),
    "norm-local": Fault(
        "each rank clips by the norm of the gradients that it holds itself",
        "gradient norm",
        steps.local_norm,
        "more than one rank",
    ),
    "clip-twice": Fault(
        "gradients are scaled by the clip factor twice", "clip factor", steps.clip_twice, "gradients that are clipped"
    ),
    "bias-twice": Fault(
        "selection biases are moved twice a step",
        "selection bias",
        steps.bias_twice,
        "a layer with a score_bias whose counts are uneven",
    ),
    "counts-local": Fault(
        "expert counts are not summed over data ranks",
        "expert counts",
        steps.local_counts,
        "several data ranks: dp_replicate * dp_shard > 1",
    ),
    "counts-twice": Fault(
        "expert counts are summed over data ranks, and the sums counted once more",
        "expert counts",
        steps.double_counts,
        "several data ranks: dp_replicate * dp_shard > 1",
    ),
    "dense-average": Fault(
        "the first router's gradient is not averaged over data ranks",
        "gradient",
        data.router_not_averaged,
        "several data ranks: dp_replicate * dp_shard > 1",
    ),
    "dense-sum": Fault(
        "gradients are summed over ranks where they should be averaged",
        "gradient",
        data.summed,
        "several ranks that hold the same parameters",
    ),
    "dropped-chunk": Fault(
        "what the experts return in the last round of an exchange is lost",
        "gradient",
        exchange.drop_last_round,
        "an exchange in several rounds: --chunks, or a small --max-received-tokens",
    ),
    "receive-order": Fault(
        "rows that arrive are not in the order of the routing that came with them",
        "gradient",
        exchange.reverse_received,
        "a layer that gets tokens",
    ),
    "weights-ones": Fault(
        "routing weights stay behind, and the experts' ranks take 1",
        "gradient",
        exchange.weights_of_one,
        "top_k > 1",
    ),
    "router-gradient": Fault(
        "the exchange sends no gradient of the routing weights back",
        "gradient",
        exchange.detached_weights,
        "a router that is trained through its weights",
    ),
    "sent-twice": Fault(
        "a token goes to a rank once for each of its experts there, and each time all of them are computed",
        "gradient",
        exchange.no_deduplication,
        "tokens with two experts on one rank: top_k > 1, and ranks with several experts",
    ),
    "bias-slices": Fault(
        "every rank with a slice of an expert's hidden dimension adds the expert's whole down_bias",
        "gradient",
        exchange.down_bias_everywhere,
        "etp > 1, and experts with biases",
    ),
    "last-part": Fault(
        "tokens beyond a multiple of the tp ranks are lost",
        "gradient",
        exchange.lose_remainder,
        "tp > 1, and a number of tokens that it does not divide",
    ),
    "stage-balance": Fault(
        "of a pipeline, only the last stage adds its balance losses",
        "gradient",
        stages.balance_of_last_stage,
        "pp > 1, and a balance loss on another stage than the last",
    ),
    "microbatch-sum": Fault(
        "the losses of a pipeline's micro-batches are summed where their mean is due",
        "gradient",
        stages.sum_of_microbatches,
        "pp > 1",
    ),
    "cleared-gradients": Fault(
        "a pipeline forgets the gradients before a batch of another shape",
        "gradient",
        stages.cleared_gradients,
        "pp > 1, several data ranks, and more than one backward pass a step",
    ),
}
"""What ``--fault`` can plant, by name."""


@contextmanager
def planted(name: str | None) -> Iterator[list[str]]:
    """Plant a fault for as long as the context is open.

    Args:
        name: in ``FAULTS``; None for none.

    Yields:
        A list that has the name in it once the fault has changed something.
    """
    fired: list[str] = []

    def fire() -> None:
        assert name is not None
        fired[:] = [name]

    with ExitStack() as stack:
        for owner, attribute, replacement in FAULTS[name].plant(fire) if name is not None else ():
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield fired
