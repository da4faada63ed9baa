"""A base for modules whose buffers stay float32 whatever the model is cast to."""

from abc import ABC
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Float32Buffers(nn.Module, ABC):
    """A module that keeps its own floating buffers in float32: steps of 0.001 vanish in bfloat16."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Float32Buffers":
        """Move as any module does, and change no buffer's dtype."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                is_meta = old.is_meta and not new.is_meta
                self._buffers[name] = torch.empty_like(new, dtype=old.dtype) if is_meta else old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Load as any module does; what comes in another dtype (``assign=True``) becomes float32 again."""
        super()._load_from_state_dict(*args, **options)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
