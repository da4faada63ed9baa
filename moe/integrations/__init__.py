"""How evenly experts are used, reported from training loops that are not this library's.

Each framework has a file of its own, which imports it: ``moe.integrations.transformers``, ``.lightning`` and
``.accelerate``, and for sinks ``.rich`` and ``.tensorboard``.
"""

from moe.integrations.json_lines import JsonLines
from moe.integrations.reporter import BalanceReporter, Sink

__all__ = ["BalanceReporter", "JsonLines", "Sink"]
