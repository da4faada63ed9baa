"""Tensor parallelism of dense blocks with sequence parallelism between them, by forward hooks.

Heads of attention and hidden units of feed-forwards are divided over the ``tp`` axis, as plain local tensors; between
branches a rank has its part of every sequence, so that norms and residual stream are divided too::

    x part ── norm ── all-gather ── qkv, attention, out of some heads ── reduce-scatter ── + x part
    x part ── norm ── all-gather ── up, down of some hidden units ────── reduce-scatter ── + x part
    x part ── norm ── all-gather ── MoE, all tokens on every rank ────── take the part ─── + x part

A run of blocks cuts the sequence before its first and joins it after its last one, so embedding, final norm and output
projection are the same on every rank, and so is what passes between pipeline stages. Per dense block and pass that is
two all-gathers and two reduce-scatters of the activations ``(B, S, D)``, in backward likewise: what two all-reduces
without sequence parallelism cost, while norms and residuals are divided. Backward also sums each norm's gradient, of D
numbers. A MoE layer sends one all-gather either way, and an all-reduce either way for its shared expert.

Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from moe.errors import ConfigError
from moe.experts import FeedForward
from moe.layer import MoE
from moe.models.attention import Attention
from moe.models.block import Block
from moe.parallel.dispatcher import even_bounds
from moe.parallel.experts import Shard
from moe.parallel.mesh import ParallelMesh
from moe.parallel.sequence import cut_sequence, join_alike, join_divided, sum_to_part, sum_to_whole, use_divided


def divide_dense(model: nn.Module, mesh: ParallelMesh, plan: Mapping[str, ParallelStyle] | None) -> dict[str, Shard]:
    """Divide what is dense in a model over the ``tp`` axis, in place.

    Decoder blocks and the shared experts of all MoE layers are divided by hooks; other modules by the plan, or not at
    all. Heads and hidden units are spread as evenly as they go; query heads stay with the key head that they share.

    Args:
        model: whole, and the same on all ranks; or on the meta device.
        mesh: of this rank.
        plan: styles by the module's name, with ``*`` for a part of it; torch.distributed.tensor.parallel's own. A
            MoE layer in between takes whole plain tensors, the same on all ranks, and gives such.

    Returns:
        What was cut into plain local tensors, by the parameter's name. Rank 0 alone has a ``down.bias``: in a sum it is
        enough.

    Raises:
        ConfigError: fewer key heads or hidden units than ranks; the plan names a module that is not there or one that
            is divided without it.
    """
    if mesh.degrees.tp == 1:
        return {}
    group = mesh.group("tp")
    if plan:
        _apply_plan(model, mesh, plan)
    shards: dict[str, Shard] = {}
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        if isinstance(module, Block):
            shards |= _cut_attention(module.attention, f"{prefix}attention.", group)
            if isinstance(module.ffn, FeedForward):
                shards |= _cut_feed_forward(module.ffn, f"{prefix}ffn.", "ffn_hidden_dim", group)
        elif isinstance(module, MoE) and module.shared is not None:
            shards |= _cut_feed_forward(module.shared, f"{prefix}shared.", "shared_hidden_dim", group)
            module.shared.register_forward_pre_hook(lambda _, args: (use_divided(args[0], group), *args[1:]))
            module.shared.register_forward_hook(lambda _module, _args, y: sum_to_whole(y, group))
    for run in block_runs(model):
        for block in run:
            _divide_sequence(block, group, first=block is run[0], last=block is run[-1])
    return shards


def block_runs(model: nn.Module) -> list[list[Block]]:
    """Blocks that follow each other: the members of a list or dict of nothing else; any other block is alone."""
    runs: list[list[Block]] = []
    placed: set[Block] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            members = list(module.values() if isinstance(module, nn.ModuleDict) else module)
            blocks = [member for member in members if isinstance(member, Block) and member not in placed]
            if blocks and len(set(blocks)) == len(members):  # a block that comes twice is first at one time only
                runs.append(blocks)
                placed.update(blocks)
        elif isinstance(module, Block) and module not in placed:
            runs.append([module])
            placed.add(module)
    return runs


@final
class _Length:
    """Tokens in the sequences of the forward call that a block is in; known at its start, in a recomputation too."""

    tokens = 0

    def note(self, _block: nn.Module, args: Sequence[Any]) -> None:
        """Forward pre-hook of a block, whose second argument has a row a position."""
        self.tokens = args[1].shape[0]


def _divide_sequence(block: Block, group: dist.ProcessGroup, *, first: bool, last: bool) -> None:
    """Hooks that bring a block's branches from parts of sequences to whole ones and back."""
    length = _Length()
    block.register_forward_pre_hook(length.note)
    if first:
        block.register_forward_pre_hook(lambda _, args: (cut_sequence(args[0], group), *args[1:]))
    if last:
        block.register_forward_hook(lambda _module, _args, y: join_alike(y, length.tokens, group))
    for norm in (block.attention_norm, block.ffn_norm):
        _sum_gradient(norm, norm, group)
    for branch in (block.attention, block.ffn):
        if isinstance(branch, MoE):
            branch.register_forward_pre_hook(lambda _, args: (join_alike(args[0], length.tokens, group), *args[1:]))
            branch.register_forward_hook(lambda _module, _args, y: cut_sequence(y, group))
        else:
            branch.register_forward_pre_hook(lambda _, args: (join_divided(args[0], length.tokens, group), *args[1:]))
            branch.register_forward_hook(lambda _module, _args, y: sum_to_part(y, group))


def _sum_gradient(around: nn.Module, owner: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradient of the owner's ``weight`` over ranks, each of which uses it on a part of the work.

    While ``around`` runs, the weight is the result of an operation that has this gradient. A hook on the weight itself
    would not do: FSDP2 puts other tensors in its place.
    """
    own: list[Tensor | None] = []

    def before(_module: nn.Module, _args: Any) -> None:
        own.append(owner._parameters["weight"])
        # The type says parameters only, but that is how torch.func.functional_call does it.
        owner._parameters["weight"] = use_divided(owner.weight, group)  # type: ignore[assignment,arg-type]

    def after(_module: nn.Module, _args: Any, _y: Any) -> None:
        if own:
            owner._parameters["weight"] = own.pop()  # type: ignore[assignment]

    around.register_forward_pre_hook(before)
    # Also where forward ends by an exception: checkpointing so ends a recomputation that has all it needs.
    around.register_forward_hook(after, always_call=True)


def _cut_attention(attention: Attention, prefix: str, group: dist.ProcessGroup) -> dict[str, Shard]:
    """Leave the rank's heads: some key and value heads with the query heads that share them."""
    queries, keys, _ = attention.heads
    first, end = _own(keys, "num_kv_heads", group)
    shared_by, width = queries // keys, attention.head_dim
    attention.heads = ((end - first) * shared_by, end - first, end - first)
    query_rows = slice(first * shared_by * width, end * shared_by * width)
    starts = (queries * width, (queries + keys) * width)
    key_rows, value_rows = (slice(start + first * width, start + end * width) for start in starts)
    return {
        **_cut_rows(attention.qkv, f"{prefix}qkv.", (query_rows, key_rows, value_rows)),
        **_cut_columns(attention.out, f"{prefix}out.", query_rows, group),
    }


def _cut_feed_forward(ffn: FeedForward, prefix: str, option: str, group: dist.ProcessGroup) -> dict[str, Shard]:
    """Leave the rank's hidden units, of which ``option`` says how many there are."""
    hidden = ffn.down.in_features
    first, end = _own(hidden, option, group)
    halves = range(0, ffn.up.out_features, hidden)
    if ffn.gate is not None:
        # Around the whole module: batch-invariant, it does not run its linear layers one by one.
        _sum_gradient(ffn, ffn.gate, group)
    return {
        **_cut_rows(ffn.up, f"{prefix}up.", [slice(start + first, start + end) for start in halves]),
        **_cut_columns(ffn.down, f"{prefix}down.", slice(first, end), group),
    }


def _own(size: int, name: str, group: dist.ProcessGroup) -> tuple[int, int]:
    if size < group.size():
        raise ConfigError(f"tp={group.size()} is more than {name}={size}: a rank would hold none")
    bounds = even_bounds(size, group.size())
    return bounds[group.rank()], bounds[group.rank() + 1]


def _cut_rows(linear: nn.Linear, prefix: str, rows: Sequence[slice]) -> dict[str, Shard]:
    linear.out_features = sum(each.stop - each.start for each in rows)
    return {prefix + name: _cut(linear, name, 0, rows) for name, _ in list(linear.named_parameters())}


def _cut_columns(linear: nn.Linear, prefix: str, columns: slice, group: dist.ProcessGroup) -> dict[str, Shard]:
    linear.in_features = columns.stop - columns.start
    shards = {f"{prefix}weight": _cut(linear, "weight", 1, (columns,))}
    if linear.bias is not None and group.rank() == 0:
        shards[f"{prefix}bias"] = _cut(linear, "bias", 0, (slice(0, linear.out_features),))
    elif linear.bias is not None:
        linear.register_parameter("bias", None)
    return shards


def _cut(linear: nn.Linear, name: str, dim: int, spans: Sequence[slice]) -> Shard:
    """Leave some spans of a parameter's dimension."""
    parameter = linear.get_parameter(name)
    everything = [slice(0, size) for size in parameter.shape]
    pieces = tuple((*everything[:dim], span, *everything[dim + 1 :]) for span in spans)
    shard = Shard(tuple(parameter.shape), pieces, dim, ("tp",))
    with torch.no_grad():
        part = shard.cut(parameter).contiguous()
    linear.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return shard


def _apply_plan(model: nn.Module, mesh: ParallelMesh, plan: Mapping[str, ParallelStyle]) -> None:
    names = [name.split(".") for name, _ in model.named_modules()]
    for key in plan:
        levels = key.split(".")
        if not any(len(name) == len(levels) and all(map(fnmatchcase, name, levels)) for name in names):
            raise ConfigError(f"tp_plan has {key!r}, but no module of the model has such a name")
    parallelize_module(model, mesh.dense["tp"], dict(plan))
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters() if isinstance(module, Block | MoE) else ():
            if isinstance(parameter, DTensor):
                raise ConfigError(f"tp_plan divides {name}.{part}, which needs no plan: leave it out")
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            # A norm on parts of sequences gets a gradient that is yet to be summed, and optimizers would not do it.
            parameter.register_hook(lambda gradient, p=parameter: gradient.redistribute(placements=p.placements))
