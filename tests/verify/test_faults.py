"""Each planted mistake is caught, in the line of the table where it belongs; without one nothing is."""

from typing import Any

import pytest

from moe.errors import ConfigError
from moe.parallel import Degrees
from moe.verify import FAULTS, VerifyOptions, verify
from tests.verify.trials import small

DEGREES = {
    "last-part": "dp_shard=1,tp=2",
    "bias-slices": "dp_shard=2,etp=2",
    "stage-balance": "pp=2",
    "microbatch-sum": "pp=2",
    "cleared-gradients": "pp=2,dp_shard=2",
}
CANNOT = [  # degrees and options under which a fault cannot show, and what the error says that it needs
    ("dp_shard=1,tp=2,ep=2", {}, "expert-average", "other than tp"),
    ("dp_shard=1", {}, "norm-local", "more than one rank"),
    ("dp_shard=2", {"max_norm": 1e9}, "clip-twice", "gradients that are clipped"),
    ("dp_shard=1,tp=2", {}, "dense-average", "several data ranks"),
    ("ep=2", {}, "dropped-chunk", "--chunks"),
    ("ep=2", {}, "bias-slices", "etp > 1"),
    ("pp=2", {}, "stage-balance", "on another stage than the last"),  # the first of its two layers is dense
    ("pp=2", {"accumulate": 2}, "cleared-gradients", "several data ranks"),
    ("ep=2", {}, "microbatch-sum", "pp > 1"),
]


def test_there_are_at_least_ten() -> None:
    assert len(FAULTS) >= 10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    degrees = Degrees.parse(DEGREES.get(fault, "ep=2"))
    trial = small(decoder={"num_layers": 4}) if degrees.pp > 1 else small()
    report = verify(degrees, trial, VerifyOptions(steps=1, chunks=2, fault=fault))
    assert not report.ok
    assert FAULTS[fault].shows in {row.quantity for row in report.rows if not row.ok}, str(report)
    assert f"planted fault: {fault}" in str(report)


@pytest.mark.parametrize("degrees", ["ep=2", "dp_shard=2,tp=2", "dp_shard=1,tp=2", "dp_shard=2,etp=2", "pp=2"])
def test_without_a_fault_nothing_is_caught(degrees: str) -> None:
    report = verify(Degrees.parse(degrees), small(), VerifyOptions(steps=1, chunks=2))
    assert report.ok, str(report)
    assert report.first is report.first_parameter is None


@pytest.mark.parametrize(("degrees", "options", "fault", "needs"), CANNOT)
def test_a_fault_that_cannot_show_says_what_it_needs(
    degrees: str, options: dict[str, Any], fault: str, needs: str
) -> None:
    with pytest.raises(ConfigError, match=f"fault='{fault}' cannot show with degrees") as error:
        verify(
            Degrees.parse(degrees), small(), VerifyOptions(**{"steps": 1, "accumulate": 1, "fault": fault, **options})
        )
    assert needs in str(error.value)


def test_a_fault_that_has_nothing_to_change_in_the_model_is_no_miss() -> None:
    with pytest.raises(ConfigError, match="'sent-twice' cannot show with degrees"):
        verify(Degrees.parse("ep=2"), small(top_k=1), VerifyOptions(steps=1, accumulate=1, fault="sent-twice"))
