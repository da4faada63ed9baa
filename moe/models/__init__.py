"""Decoder language models with dense or Mixture-of-Experts feed-forward layers."""

from moe.models.cache import KVCache
from moe.models.config import DecoderConfig
from moe.models.decoder import Decoder
from moe.models.generate import generate

__all__ = ["Decoder", "DecoderConfig", "KVCache", "generate"]
