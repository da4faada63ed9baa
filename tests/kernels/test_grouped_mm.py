"""Grouped products on the CPU against every row times every expert, masked; value and both gradients."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.kernels.grouped_mm import grouped_mm
from moe.kernels.plan import make_plan
from moe.types import Plan
from tests.support.kernels import check_against_oracle, dense_grouped_mm, poison_unowned, random_ids, routings

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_inputs(plan: Plan, num_in: int, num_out: int, dtype: torch.dtype) -> list[Tensor]:
    rows = torch.randn(plan.assignments.shape[0], num_in).to(dtype)
    return [poison_unowned(rows, plan), torch.randn(plan.expert_offsets.shape[0] - 1, num_out, num_in).to(dtype)]


@given(routings(), st.integers(1, 9), st.integers(1, 9), st.sampled_from(DTYPES))
def test_against_the_oracle(routing: tuple[Tensor, int], num_in: int, num_out: int, dtype: torch.dtype) -> None:
    plan = make_plan(*routing)
    check_against_oracle(
        lambda rows, weight: grouped_mm(rows, weight, plan.expert_offsets),
        lambda rows, weight: dense_grouped_mm(rows, weight, plan.expert_offsets),
        make_inputs(plan, num_in, num_out, dtype),
        "cpu",
        poison_grad=lambda grad: poison_unowned(grad, plan),
    )


def test_gradient_in_float64() -> None:
    plan = make_plan(random_ids(6, 2, 3), 3)
    rows = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    check = lambda rows, weight: grouped_mm(rows, weight, plan.expert_offsets)  # noqa: E731
    assert torch.autograd.gradcheck(check, (rows, weight))


def test_an_expert_without_rows_and_rows_without_an_expert_get_zero() -> None:
    rows = torch.full((4, 8), float("nan"))
    rows[:3] = 1.0
    rows.requires_grad_()
    weight = torch.full((2, 5, 8), 2.0, requires_grad=True)
    out = grouped_mm(rows, weight, torch.tensor([0, 3, 3], dtype=torch.int32))
    assert out.tolist() == [[16.0] * 5] * 3 + [[0.0] * 5]
    out.backward(torch.tensor([[1.0] * 5] * 3 + [[float("nan")] * 5]))
    assert rows.grad is not None
    assert weight.grad is not None
    assert rows.grad.tolist() == [[10.0] * 8] * 3 + [[0.0] * 8]
    assert weight.grad.tolist() == [[[3.0] * 8] * 5, [[0.0] * 8] * 5]


def test_repeats_to_the_last_bit() -> None:
    plan = make_plan(random_ids(100, 2, 6), 6)
    rows = torch.randn(200, 32, requires_grad=True)
    weight = torch.randn(6, 24, 32, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = grouped_mm(rows, weight, plan.expert_offsets)
        return out, *torch.autograd.grad(out, (rows, weight), torch.ones_like(out))

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


def test_takes_any_strides() -> None:
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    rows, weight = torch.randn(4, 5).t(), torch.randn(2, 4, 3).transpose(1, 2)
    expected = grouped_mm(rows.contiguous(), weight.contiguous(), offsets)
    assert torch.equal(grouped_mm(rows, weight, offsets), expected)


def offsets_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("rows", "weight", "offsets", "error", "message"),
    [
        (torch.zeros(5), torch.zeros(2, 3, 4), offsets_of(0, 2, 5), ShapeError, r"rows has shape \(5,\)"),
        (torch.zeros(5, 4), torch.zeros(3, 4), offsets_of(0, 2, 5), ShapeError, r"weight \(3, 4\)"),
        (torch.zeros(5, 4), torch.zeros(2, 4, 3), offsets_of(0, 2, 5), ShapeError, r"must be \(N, I\) and \(E, O, I\)"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), offsets_of(0, 5), ShapeError, r"must be \(3,\)"),
        (torch.zeros(5, 4), torch.zeros(0, 3, 4), offsets_of(0), ShapeError, r"weight has 0 experts, shape \(0, 3"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), offsets_of(0, 2, 6), ShapeError, r"\[0, 2, 6\] must start at 0"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), offsets_of(1, 2, 5), ShapeError, "must start at 0"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), offsets_of(0, 4, 3), ShapeError, "ascend to at most 5"),
        (torch.zeros(5, 4).int(), torch.zeros(2, 3, 4), offsets_of(0, 2, 5), DtypeError, "rows has dtype torch.int32"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4).half(), offsets_of(0, 2, 5), DtypeError, "must be torch.float32"),
        (torch.zeros(5, 4), torch.zeros(2, 3, 4), offsets_of(0, 2, 5).long(), DtypeError, "expert_offsets has dtype"),
    ],
)
def test_refuses(rows: Tensor, weight: Tensor, offsets: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grouped_mm(rows, weight, offsets)


@pytest.mark.skipif(find_spec("triton") is None, reason="the tiles are Triton's")
class TestTiles:
    @pytest.mark.parametrize(
        ("backend", "arch", "family"),
        [
            ("cuda", 75, None),
            ("cuda", 80, "ampere"),
            ("cuda", 89, "ampere"),
            ("cuda", 90, "hopper"),
            ("cuda", 100, "blackwell"),
            ("cuda", 103, "blackwell"),
            ("cuda", 120, "ampere"),
            ("hip", "gfx942", "cdna"),
            ("hip", "gfx90a:sramecc+:xnack-", "cdna"),
            ("hip", "gfx1100", None),
            ("xpu", "pvc", None),
        ],
    )
    def test_family(self, backend: str, arch: int | str, family: str | None) -> None:
        from moe.kernels.triton_gpus import family_of

        assert family_of(backend, arch) == family

    def simulate(self, monkeypatch: pytest.MonkeyPatch, arch: int, shared_memory: int) -> None:
        import triton

        driver = SimpleNamespace(
            get_current_target=lambda: SimpleNamespace(backend="cuda", arch=arch),
            get_current_device=lambda: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared_memory}),
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)

    def test_a_gpu_without_kernels_is_refused_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe.kernels.grouped_mm.triton_tiles import gpu_family

        self.simulate(monkeypatch, 75, 65_536)
        with pytest.raises(ConfigError, match=r"cuda GPU of architecture 75; .* capability 8\.0 .* to the CPU"):
            gpu_family()

    def test_a_part_with_less_shared_memory_gets_smaller_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe.kernels.grouped_mm.triton_tiles import gpu_family

        self.simulate(monkeypatch, 90, 232_448)
        assert gpu_family() == "hopper"
        self.simulate(monkeypatch, 90, 101_376)
        assert gpu_family() == "ampere"

    def test_the_narrowest_tile_that_holds_a_width(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe.kernels.grouped_mm.triton_tiles import tile_for

        def widths(dtype: torch.dtype, *of: int, other: int) -> list[int]:
            return [tile_for(dtype, width, other).width for width in of]

        self.simulate(monkeypatch, 80, 166_912)
        assert widths(torch.bfloat16, 8, 64, 72, 136, 4096, other=512) == [64, 64, 128, 256, 256]
        assert widths(torch.bfloat16, 8, 64, 72, 136, 4096, other=515) == [64, 64, 128, 128, 128]
        assert widths(torch.bfloat16, 1, 63, 65, 129, 4095, other=512) == [64, 64, 128, 128, 128]
        assert widths(torch.float32, 1, 64, 65, 4096, other=515) == [64, 64, 128, 128]

    def test_rows_that_are_not_aligned_are_not_fetched_by_tma(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moe.kernels.grouped_mm.triton_tiles import rows_fit_tma, tile_for, weight_fits_tma

        self.simulate(monkeypatch, 90, 232_448)
        assert tile_for(torch.bfloat16, 1024, 512).tma
        assert not tile_for(torch.bfloat16, 1024, 516).tma
        assert not tile_for(torch.bfloat16, 516, 1024).tma
        rows = torch.zeros(65, dtype=torch.bfloat16)
        assert rows_fit_tma(rows[:64].view(4, 16))
        assert not rows_fit_tma(rows[1:].view(4, 16))  # starts in between
        row = rows[:16].view(1, 16)[:, :5]  # contiguous, because its stride of 16 leads nowhere
        assert row.is_contiguous()
        assert not rows_fit_tma(row)
        weight = torch.zeros(3, 64, 16, dtype=torch.bfloat16)
        assert weight_fits_tma(weight, 64)
        assert weight_fits_tma(weight.transpose(1, 2), 64)
        assert not weight_fits_tma(weight[:, :48].transpose(1, 2), 64)  # a block of 64 would reach the next expert
        assert not weight_fits_tma(weight[:, :, ::2], 64)
        assert not weight_fits_tma(weight[:, :, 1:], 64)
