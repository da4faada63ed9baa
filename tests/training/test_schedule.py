"""Learning rates at the points that define them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.training.schedule import Schedule


def test_warm_up_is_a_line_that_trains_from_the_first_step():
    schedule = Schedule(peak=1.0, total_steps=100, warmup_steps=4)
    assert [schedule.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine():
    schedule = Schedule(peak=2.0, total_steps=110, warmup_steps=10, decay="cosine", floor=0.1)
    assert schedule.rate(10) == 2.0
    assert schedule.rate(60) == pytest.approx(2.0 * 0.55)
    assert schedule.rate(110) == pytest.approx(0.2)


def test_wsd():
    schedule = Schedule(peak=1.0, total_steps=100, warmup_steps=10, decay="wsd", decay_share=0.2)
    assert schedule.rate(10) == schedule.rate(50) == schedule.rate(80) == 1.0
    assert schedule.rate(90) == pytest.approx(0.5)
    assert schedule.rate(99) == pytest.approx(0.05)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from(["cosine", "wsd"]), st.floats(0, 1), st.floats(0, 1))
def test_rises_then_falls_between_floor_and_peak(total, warmup, decay, share, floor):
    warmup_steps = int(total * warmup)
    options = {"decay": decay, "decay_share": share, "floor": floor}
    schedule = Schedule(peak=3.0, total_steps=total, warmup_steps=warmup_steps, **options)
    rates = [schedule.rate(step) for step in range(total)]
    assert all(0 <= rate <= 3.0 + 1e-12 for rate in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)
    assert all(rate >= 3.0 * floor - 1e-12 for rate in rates[warmup_steps:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": 0.0}, "peak=0.0 must be positive"),
        ({"decay": "step"}, "decay='step' is unknown; choose one of cosine, wsd"),
        ({"warmup_steps": 11}, "warmup_steps=11 must be between 0 and total_steps=10"),
        ({"decay_share": 1.5}, r"decay_share=1\.5 must be between 0 and 1"),
        ({"floor": -0.1}, r"floor=-0\.1 must be between 0 and 1"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**({"peak": 1.0, "total_steps": 10} | options))
