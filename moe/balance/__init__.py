"""What makes the load of experts even: losses, bias rules, and the book-keeping that counts each call once."""

from moe.balance.adaptive import AdaptiveL1
from moe.balance.attach import attach, in_backward
from moe.balance.balancer import Balancer, StepLoad
from moe.balance.bias import MomentumBias, RmsBias, ScoreBias
from moe.balance.calls import Call, CallLog, PendingLoss
from moe.balance.device_losses import CommunicationBalance, DeviceBalance
from moe.balance.importance import ImportanceLoss, LoadLoss
from moe.balance.lookahead import LookaheadBias
from moe.balance.observed import MarginCounter
from moe.balance.protocols import AdaptiveLoss, BalanceLoss, BiasRule, MarginRequest, WeightLoss
from moe.balance.quantile import QuantileBias, exact_quantile_bias
from moe.balance.router_losses import RouterOrthogonality, RouterSimilarity, RouterZLoss
from moe.balance.share_losses import SquaredDeviation, SwitchLoss
from moe.balance.shares import (
    Scope,
    ShareLoss,
    count_tokens,
    load_share,
    mean_probability,
    probability_sum,
    squared_deviation,
)
from moe.balance.step_counts import StepCounts
from moe.balance.tape import Tape, checkpoint_contexts, read_call, write_call
from moe.balance.terms import BIAS_RULES, LOSSES, BalanceSpec, Terms, make_balance

__all__ = [
    "BIAS_RULES",
    "LOSSES",
    "AdaptiveL1",
    "AdaptiveLoss",
    "BalanceLoss",
    "BalanceSpec",
    "Balancer",
    "BiasRule",
    "Call",
    "CallLog",
    "CommunicationBalance",
    "DeviceBalance",
    "ImportanceLoss",
    "LoadLoss",
    "LookaheadBias",
    "MarginCounter",
    "MarginRequest",
    "MomentumBias",
    "PendingLoss",
    "QuantileBias",
    "RmsBias",
    "RouterOrthogonality",
    "RouterSimilarity",
    "RouterZLoss",
    "Scope",
    "ScoreBias",
    "ShareLoss",
    "SquaredDeviation",
    "StepCounts",
    "StepLoad",
    "SwitchLoss",
    "Tape",
    "Terms",
    "WeightLoss",
    "attach",
    "checkpoint_contexts",
    "count_tokens",
    "exact_quantile_bias",
    "in_backward",
    "load_share",
    "make_balance",
    "mean_probability",
    "probability_sum",
    "read_call",
    "squared_deviation",
    "write_call",
]
