"""Where a token's experts are: the seam between a layer and the devices its experts live on."""

from moe.dispatch.local import Dispatcher, Experts, LocalDispatcher

__all__ = ["Dispatcher", "Experts", "LocalDispatcher"]
