"""Text for training: found, split, tokenized once into memory-mapped files, and handed out in batches.

A file per stage: ``corpus`` (which files), ``readers`` (their documents), ``split`` (train and validation),
``tokenizer``, ``prepare`` (all of it in one call, kept by ``cache`` in ``token_file``s), ``loader`` (batches in the
order of ``permutation``), and ``references`` (what simple compressors reach on the same text).
"""

from moe.training.data.corpus import open_corpus
from moe.training.data.loader import Batch, WindowLoader, eval_batches, target_bytes
from moe.training.data.prepare import PreparedData, prepare
from moe.training.data.split import Skipped
from moe.training.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "PreparedData",
    "Skipped",
    "Tokenizer",
    "WindowLoader",
    "eval_batches",
    "open_corpus",
    "prepare",
    "target_bytes",
]
