"""The whole verification: the reference here, the ranks in processes of their own, and what they have in common."""

from collections.abc import Iterator

import torch
from torch import nn

from moe.errors import ConfigError
from moe.layer import moe_layers
from moe.parallel import Degrees
from moe.parallel.local_ranks import run_local
from moe.verify.compare import compare
from moe.verify.factory import Factory, build, check_fits
from moe.verify.faults import FAULTS
from moe.verify.options import VerifyOptions, check_degrees
from moe.verify.report import Report
from moe.verify.run import Trace, run_rank, run_reference


def verify(
    degrees: Degrees, factory: Factory, options: VerifyOptions | None = None, *, reference: Factory | None = None
) -> Report:
    """Train the same model on the same data in one process and on as many as the degrees say, and compare.

    The processes run on this machine's CPUs, over gloo.

    Args:
        degrees: how the model is spread.
        factory: builds the model, its batches and its loss; picklable, so a function of a module.
        options: None for the defaults.
        reference: what the one process builds; None for the same. It must have the same parameters.

    Returns:
        Every comparison, and whether all of them passed.

    Raises:
        ConfigError: the degrees, the options and the model do not fit each other; or a fault cannot show here.
        ParallelError: a rank failed, or did not answer.
    """
    options = options or VerifyOptions()
    check_degrees(degrees, options)
    with torch.random.fork_rng():
        trial = build(reference or factory, options.seed, options.precision.dtype)
        check_fits(trial.model, degrees, options.stages_per_rank)
        expected = run_reference(trial, degrees, options)
    ranks = run_local(run_rank, degrees.world_size, (factory, degrees, options, expected.max_norm))
    if options.fault is not None and not any(trace.planted for trace in ranks):
        raise ConfigError(
            f"fault={options.fault!r} cannot show with degrees {degrees}, these options and this model: it needs "
            f"{FAULTS[options.fault].needs}"
        )
    title = f"{degrees} ({degrees.world_size} processes) against one process, {options.dtype}, {options.steps} steps"
    rows = tuple(compare(expected, ranks, options.allowed))
    return Report(title, rows, tuple(_routing(expected, trial.model)), options.fault)


def _routing(expected: Trace, model: nn.Module) -> Iterator[str]:
    """How uneven the routing of the reference was."""
    for name, layer in moe_layers(model):
        counts = sum(step.tokens_per_expert[name] for step in expected.steps if name in step.tokens_per_expert)
        if not isinstance(counts, torch.Tensor):
            yield f"routing of {name}: no call"
            continue
        unused = (counts == 0).nonzero().flatten().tolist()
        idle = f"no token for {', '.join(map(str, unused))}" if unused else "every expert got some"
        share = float(counts.max() / counts.sum().clamp(min=1))
        even = 1 / layer.num_experts
        yield f"routing of {name}: expert {int(counts.argmax())} got {share:.0%} (even: {even:.0%}), {idle}"
