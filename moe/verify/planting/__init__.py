"""What each fault replaces; ``moe.verify.faults`` says what they are."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe.parallel.parallelize import parallelize

Fire = Callable[[], None]
"""Called by a replacement when it has changed something."""
Patch = tuple[Any, str, Any]
"""A module or class, the name of what is replaced in it, and what replaces it."""
PARALLELIZE: ModuleType = sys.modules[parallelize.__module__]
"""The module; in its package the function of the same name hides it."""
