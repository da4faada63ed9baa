"""``python -m moe.verify``: prove that a model spread over ranks computes what one process computes."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from moe.errors import ConfigError, MoEError, ParallelError
from moe.parallel import Degrees
from moe.parallel.degrees import rank_table
from moe.verify.check import verify
from moe.verify.decoder import BUILT_IN, DecoderFactory
from moe.verify.factory import Factory, import_factory
from moe.verify.faults import FAULTS
from moe.verify.options import Precision, VerifyOptions
from moe.verify.settings import read_settings

AGREES, DIFFERS, NOT_RUN = 0, 1, 2
"""Exit codes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if everything agrees, 1 if something differs, 2 if there was nothing to compare: bad arguments, or a rank
        that failed.
    """
    given = _parser().parse_args(arguments)
    if given.fault == "list":
        for name, fault in FAULTS.items():
            print(f"{name}: {fault.explanation}; shows in: {fault.shows}; needs {fault.needs}")
        return AGREES
    try:
        if given.degrees is None:
            raise ConfigError("--degrees is missing; for example --degrees ep=2,tp=2")
        degrees = Degrees.parse(given.degrees)
        options = VerifyOptions(**{f.name: getattr(given, f.name) for f in fields(VerifyOptions)})
        factory, reference = _factories(given)
        report = verify(degrees, factory, options, reference=reference)
    except MoEError as error:
        print(f"error: {_own_words(error)}", file=sys.stderr)
        return NOT_RUN
    except Exception:  # the user's own code can raise anything, and 1 means that something differs
        traceback.print_exc()
        return NOT_RUN
    print(f"{rank_table(degrees)}\n\n{report}")
    return AGREES if report.ok else DIFFERS


def _factories(given: argparse.Namespace) -> tuple[Factory, Factory]:
    """What the ranks build, and what the reference builds: the same without checkpointing, where that is ours."""
    if given.factory is not None:
        if given.model is not None:
            raise ConfigError(f"--model {given.model} and --factory {given.factory} are two models; give one")
        if given.checkpoint is not None:
            raise ConfigError(
                f"--checkpoint {given.checkpoint} is for our decoder; the model of --factory {given.factory} uses "
                "torch.utils.checkpoint itself"
            )
        factory = import_factory(given.factory)
        return factory, factory
    settings = BUILT_IN if given.model is None else read_settings(given.model)
    return DecoderFactory(settings, given.checkpoint or "nonreentrant"), DecoderFactory(settings)


def _own_words(error: MoEError) -> str:
    """The message; of a rank's traceback only the end, where it is an error of this library."""
    lines = str(error).strip().splitlines() or [""]
    is_ours = isinstance(error, ParallelError) and lines[-1].startswith("moe.errors.")
    return f"{lines[0].partition(':')[0]}: {lines[-1]}" if is_ours else str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.verify",
        description="Train a model in one process and in several, on the same data, and compare all that there is.",
        epilog="Exit code: 0 if everything agrees, 1 if something differs, 2 if there was nothing to compare.",
    )
    add = parser.add_argument
    defaults = VerifyOptions()
    add("--degrees", help="axes and their sizes, as in ep=2,tp=2; of pp, dp_replicate, dp_shard, tp, ep, etp")
    add("--model", type=Path, help="YAML with the settings of a moe.models.DecoderConfig; default: a small one")
    add("--factory", help="module:function, which returns (model, make_batch, loss)")
    add("--dtype", default=defaults.dtype, help=f"{', '.join(Precision)} (default: %(default)s)")
    add("--steps", type=int, default=defaults.steps, help="optimizer steps (default: %(default)s)")
    add("--accumulate", type=int, default=defaults.accumulate, help="backward passes a step (default: %(default)s)")
    add("--microbatches", type=int, help="of one pass through a pipeline (default: pp + 1)")
    add("--stages-per-rank", type=int, default=defaults.stages_per_rank, help="of a pipeline (default: %(default)s)")
    checkpointing = "activation checkpointing of our decoder: none, reentrant, nonreentrant (default: nonreentrant)"
    add("--checkpoint", nargs="?", const="nonreentrant", help=checkpointing)
    add("--compile", nargs="?", const="inductor", help="compile the model that is spread; or name another backend")
    add("--fault", help="plant a mistake and see it caught; `list` explains each")
    add("--chunks", type=int, default=defaults.chunks, help="rounds of an exchange at least (default: %(default)s)")
    add("--max-received-tokens", type=int, help="of a layer on one rank at a time (default: no limit)")
    add("--node-size", type=int, help="consecutive ranks that share a node (default: one node)")
    add("--max-norm", type=float, help="gradients are clipped to it (default: half the first step's norm)")
    add("--batch-size", type=int, help="rows of one step, all ranks and micro-batches (default: 3 a micro-batch)")
    add("--seed", type=int, default=defaults.seed, help="of parameters and data (default: %(default)s)")
    add("--tolerance", type=float, help="largest relative error (default: 1e-10 in float64, 1e-5 in float32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
