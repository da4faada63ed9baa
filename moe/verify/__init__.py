"""Proof that a model spread over ranks computes what one process computes; ``python -m moe.verify`` is its command."""

from moe.verify.check import verify
from moe.verify.factory import Batch, Factory, Loss, MakeBatch
from moe.verify.faults import FAULTS, Fault
from moe.verify.options import VerifyOptions
from moe.verify.report import Report, Row

__all__ = ["FAULTS", "Batch", "Factory", "Fault", "Loss", "MakeBatch", "Report", "Row", "VerifyOptions", "verify"]
