"""Where a token's experts are: the seam between a layer and the devices its experts live on."""

from moe.dispatch.local import Dispatched, Dispatcher, LocalDispatcher

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher"]
