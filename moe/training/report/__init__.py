"""The page that a training run leaves: ``report.html``, one file that asks for nothing from outside."""

from moe.training.report.page import write_report
from moe.training.report.summary import RunSummary

__all__ = ["RunSummary", "write_report"]
