"""Who takes part: this library, other libraries, plain PyTorch, and the floors."""

from collections.abc import Callable, Sequence
from functools import partial

from peers.baselines import BareProducts, dense, plain
from peers.contestant import Contestant, Problem, UnavailableError
from peers.hf import transformers
from peers.megatron import megatron
from peers.ours import ours
from peers.titan import torchtitan

FLOOR = "dense"

OWN: dict[str, Callable[[Problem], Contestant]] = {
    "ours": ours,
    "ours_recompute_up": partial(ours, recompute="up"),
    "plain": plain,
    "bare": BareProducts,
    FLOOR: dense,
}
"""What must work everywhere: an error in it ends the benchmark."""

FOREIGN: dict[str, Callable[[Problem], Contestant]] = {
    "transformers_eager": partial(transformers, experts="eager"),
    "transformers_grouped_mm": partial(transformers, experts="grouped_mm"),
    "transformers_batched_mm": partial(transformers, experts="batched_mm"),
    "torchtitan": torchtitan,
    "megatron-core": megatron,
}
"""What may be missing or fail, and is skipped by name then."""

NAMES = (*OWN, *FOREIGN)


def build(
    problem: Problem, names: Sequence[str], tried: Callable[[str, Contestant], None]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Make contestants.

    Args:
        problem: what all of them compute.
        names: which of ``NAMES``.
        tried: is called with each; takes a step at least, so that what cannot run here is found before the race.

    Returns:
        Those that can take part, and for the others why not, by name.
    """
    found: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            contestant = (OWN[name] if name in OWN else FOREIGN[name])(problem)
            tried(name, contestant)
        except UnavailableError as error:
            skipped[name] = str(error)
        except Exception as error:
            if name in OWN:
                raise
            # Whatever goes wrong in other people's code is a reason to leave it out, not our failure.
            line = str(error).partition("\n")[0]
            kind = "not installed" if isinstance(error, ImportError) else "fails"
            skipped[name] = f"{kind}: {line or type(error).__name__}"
        else:
            found[name] = contestant
    return found, skipped
