"""What a token is sent to: routed experts, and the dense block that every token goes through."""

from moe.experts.activation import activate
from moe.experts.feed_forward import FeedForward
from moe.experts.grouped import GroupedExperts

__all__ = ["FeedForward", "GroupedExperts", "activate"]
