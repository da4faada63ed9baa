"""The launch functions of the grouped products against float64: gathers, biases, sums, and every family's tiles.

Runs on a GPU, or on the CPU with each launch executed by Triton's semantics::

    python -m ttsem.sanitize pytest tests/kernels/test_triton_grouped_mm.py -m gpu
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe.kernels.grouped_mm import triton_backend as products
from moe.kernels.grouped_mm import triton_tiles
from tests.support.kernels import TOLERANCE, poisoned_memory

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16


@dataclass
class Case:
    """A ragged problem: rows of no expert at the end, whose operands hold NaN."""

    offsets: tuple[int, ...] = (0, 7, 7, 150, 153)  # an empty expert, one of more than a tile, one of three rows
    num_rows: int = 160
    num_tokens: int = 40
    num_in: int = 48
    num_out: int = 72
    dtype: torch.dtype = HALF

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.num_in)
        self.owned = self.offsets[-1]
        self.num_experts = len(self.offsets) - 1
        self.tokens = torch.randint(0, self.num_tokens, (self.num_rows,), generator=self.generator, dtype=torch.int32)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def rows_with_nan(self, dim: int) -> Tensor:
        rows = self.random(self.num_rows, dim)
        rows[self.owned :] = float("nan")
        return rows

    def groups(self, rows: Tensor) -> Iterator[Tensor]:
        """Each expert's rows, in float64."""
        return (rows[start:end].double() for start, end in zip(self.offsets, self.offsets[1:]))

    @property
    def on_gpu(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.int32).cuda()

    def expected_product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.zeros(self.num_rows, weight.shape[1], dtype=torch.float64)
        for e, (start, end) in enumerate(zip(self.offsets, self.offsets[1:])):
            out[start:end] = rows[start:end].double() @ weight[e].double().T + (0 if bias is None else bias[e].double())
        return out

    def expected_weight_grad(self, grad: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([a.T @ b for a, b in zip(self.groups(grad), self.groups(rows))])


def check(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.cpu().double(), expected, **TOLERANCE[result.dtype])


CASES = {
    "aligned": Case(),
    "odd widths": Case(num_in=37, num_out=19),
    "wider than a tile": Case(num_in=264, num_out=272),
    "no rows of no expert": Case(num_rows=153),
    "no expert's rows": Case(offsets=(0, 0, 0), num_rows=5),
    "float32": Case(num_in=37, num_out=136, dtype=torch.float32),
    "float16": Case(num_out=24, dtype=torch.float16),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["ampere", "hopper"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a family where launches are only simulated; on a real GPU its own, once."""
    if "ttsem" not in sys.modules:
        if request.param != "ampere":
            pytest.skip("a GPU runs the tiles of its own family")
        return
    from ttsem import mlir

    make_type = mlir.Parser._make_shaped_type

    def read_type(parser: object, kind: str, inner: str, *rest: object) -> object:
        # Triton before 3.8 writes tensordesc<tensor<...>>, which ttsem 0.1.0 reads as a descriptor without a shape.
        nested = kind == "tensordesc" and inner.startswith("tensor<")
        return make_type(parser, kind, inner[len("tensor<") : -1] if nested else inner, *rest)

    monkeypatch.setattr(mlir.Parser, "_make_shaped_type", read_type)
    monkeypatch.setattr(triton_tiles, "gpu_family", lambda: request.param)


@each_case
def test_gathered_product_with_bias(case: Case, family: None) -> None:
    tokens, weight = case.random(case.num_tokens, case.num_in), case.random(case.num_experts, case.num_out, case.num_in)
    bias = case.random(case.num_experts, case.num_out)
    with poisoned_memory():
        out = products.grouped_mm(
            tokens.cuda(), weight.cuda(), case.on_gpu, tokens=case.tokens.cuda(), bias=bias.cuda()
        )
    check(out, case.expected_product(tokens[case.tokens], weight, bias))
    assert not out[case.owned :].any()


@each_case
def test_product_with_a_transposed_weight(case: Case, family: None) -> None:
    rows, weight = case.rows_with_nan(case.num_out), case.random(case.num_experts, case.num_out, case.num_in)
    with poisoned_memory():
        out = products.grouped_mm(rows.cuda(), weight.cuda().transpose(1, 2), case.on_gpu)
    check(out, case.expected_product(rows, weight.transpose(1, 2)))


def test_product_with_a_weight_of_gaps(family: None) -> None:
    case = Case(num_in=64)
    rows, weight = case.rows_with_nan(64), case.random(case.num_experts, 2 * case.num_out, 2 * 64)
    part = weight.cuda()[:, : case.num_out, :64]
    check(products.grouped_mm(rows.cuda(), part, case.on_gpu), case.expected_product(rows, part.cpu()))
    every_second = weight.cuda()[:, : case.num_out, ::2]
    check(products.grouped_mm(rows.cuda(), every_second, case.on_gpu), case.expected_product(rows, every_second.cpu()))


@each_case
@pytest.mark.parametrize("gathered", ["nothing", "grad", "rows"])
def test_weight_gradient(case: Case, gathered: str, family: None) -> None:
    grad, rows, given = case.rows_with_nan(case.num_out), case.rows_with_nan(case.num_in), {}
    full_grad, full_rows = grad, rows
    if gathered == "grad":
        grad, given = case.random(case.num_tokens, case.num_out), {"grad_tokens": case.tokens.cuda()}
        full_grad = grad[case.tokens]
    if gathered == "rows":
        rows, given = case.random(case.num_tokens, case.num_in), {"row_tokens": case.tokens.cuda()}
        full_rows = rows[case.tokens]
    with poisoned_memory():
        out = products.grouped_mm_weight_grad(grad.cuda(), rows.cuda(), case.on_gpu, **given)
        exact = products.grouped_mm_weight_grad(grad.cuda(), rows.cuda(), case.on_gpu, **given, out_dtype=torch.float32)
    assert out.dtype == case.dtype
    assert exact.dtype == torch.float32
    expected = case.expected_weight_grad(full_grad, full_rows)
    check(out, expected)
    torch.testing.assert_close(exact.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["aligned", "odd widths", "no expert's rows", "float32"])
def test_sum_of_an_experts_rows(name: str) -> None:
    case = CASES[name]
    rows, weights = case.rows_with_nan(case.num_in), case.random(case.num_rows, dtype=torch.float32)
    with poisoned_memory():
        out = products.grouped_sum(rows.cuda(), case.on_gpu)
        check(out, torch.stack([group.sum(0) for group in case.groups(rows)]))
        table = case.random(case.num_tokens, case.num_in)
        weighted = products.grouped_sum(
            table.cuda(),
            case.on_gpu,
            tokens=case.tokens.cuda(),
            row_weights=weights.cuda(),
            out_dtype=torch.float32,
        )
    expected = table[case.tokens].double() * weights.double()[:, None]
    torch.testing.assert_close(
        weighted.cpu().double(), torch.stack([group.sum(0) for group in case.groups(expected)]), rtol=1e-5, atol=2e-5
    )


def test_a_rows_product_does_not_depend_on_its_batch(family: None) -> None:
    case = Case(num_in=200, num_out=40)
    rows, weight = case.random(153, 200).cuda(), case.random(4, 40, 200).cuda()
    out = products.grouped_mm(rows, weight, case.on_gpu)
    alone = products.grouped_mm(rows[149:150].contiguous(), weight, torch.tensor([0, 0, 0, 1, 1]).int().cuda())
    assert torch.equal(alone[0], out[149])
    fewer = products.grouped_mm(rows[5:151].contiguous(), weight, torch.tensor([0, 2, 2, 145, 146]).int().cuda())
    assert torch.equal(fewer, out[5:151])


def test_many_experts_and_columns_are_all_visited(family: None) -> None:
    offsets = torch.arange(0, 34).clamp(max=32).int()
    rows, weight = torch.eye(32).to(HALF), torch.randn(33, 72, 32).to(HALF)
    out = products.grouped_mm(rows.cuda(), weight.cuda(), offsets.cuda())
    assert torch.equal(out.cpu(), torch.stack([weight[e, :, e] for e in range(32)]))


def test_strips_of_columns_cover_a_wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "COLUMN_TILES", 2)  # five tiles across in strips of two, over two tiles of rows
    monkeypatch.setattr(
        products, "tile_for", lambda dtype, *widths: triton_tiles.Tile(rows=16, width=16, depth=16, warps=4, stages=2)
    )
    case = Case(offsets=(0, 20, 23), num_rows=25, num_in=16, num_out=70)
    rows, weight = case.rows_with_nan(16), case.random(2, 70, 16)
    out = products.grouped_mm(rows.cuda(), weight.cuda(), case.on_gpu)
    check(out, case.expected_product(rows, weight))
