"""Text to token ids and back, without losing count of the bytes.

Every tokenizer here is lossless on UTF-8 text, and each token stands for a fixed number of bytes. So the bytes of any
run of tokens are a sum over ``token_bytes``, and bits per byte are comparable between tokenizers.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer
from numpy.typing import ArrayLike

from moe.errors import ConfigError, DataError

try:
    import tokenizers
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
except ModuleNotFoundError as error:
    raise ImportError("moe.training.data needs the package tokenizers: pip install 'moe-torch[train]'") from error

TOKENIZERS_VERSION = tokenizers.__version__
"""Another version may train another BPE."""

NUM_BYTES = 256

TRAINING_SLICE = 1 << 14
"""Characters handed to the BPE trainer at once; it keeps 256 of these before it looks at them."""


@runtime_checkable
class Tokenizer(Protocol):
    """What turns text into ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""

    @property
    def separator_id(self) -> int:
        """The id that stands before each document; no text encodes to it."""

    @property
    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """``(V,)`` int64, how many bytes of UTF-8 each id stands for, 0 for the separator."""

    def encode(self, text: str) -> Integer[np.ndarray, " L"]:
        """The ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids of any shape; separators are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is outside the vocabulary.
        """


class ByteTokenizer:
    """UTF-8 bytes as they are, ids 0 to 255, and the separator, 256."""

    vocab_size = NUM_BYTES + 1
    separator_id = NUM_BYTES

    @property
    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """One byte each, 0 for the separator."""
        return np.array([1] * NUM_BYTES + [0])

    def encode(self, text: str) -> Integer[np.ndarray, " L"]:
        """``(L,)`` uint8, the text's bytes."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids of any shape, without separators."""
        return _checked(ids, self).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BpeTokenizer:
    """Byte-pair encoding over UTF-8 bytes, by the ``tokenizers`` package.

    The separator is no token of that package, but the id after its last one, so that no text can spell it.

    Args:
        raw: a tokenizer that `train` made.
    """

    def __init__(self, raw: tokenizers.Tokenizer) -> None:
        self._raw = raw
        self.separator_id: int = raw.get_vocab_size()
        self.vocab_size: int = self.separator_id + 1
        self.token_bytes: Int[np.ndarray, " V"] = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in raw.get_vocab().items():
            self.token_bytes[index] = len(token)  # byte-level BPE writes each byte as one character

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn merges from text; memory grows with the number of different words, not with the text.

        Args:
            texts: pieces of text.
            vocab_size: ids wanted, the separator included; there are fewer if the text has no more pairs to merge.

        Raises:
            ConfigError: vocab_size does not even hold the bytes and the separator.
        """
        if vocab_size <= NUM_BYTES:
            raise ConfigError(f"vocab_size={vocab_size} is less than {NUM_BYTES} bytes and a separator")
        raw = tokenizers.Tokenizer(BPE())
        raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
        raw.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
        )
        slices = (text[at : at + TRAINING_SLICE] for text in texts for at in range(0, len(text), TRAINING_SLICE))
        raw.train_from_iterator(slices, trainer)
        return cls(raw)

    @classmethod
    def from_json(cls, text: str) -> "BpeTokenizer":
        """Read what `to_json` wrote."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def to_json(self) -> str:
        """The merges and the vocabulary, in the format of the ``tokenizers`` package."""
        return self._raw.to_str()

    def encode(self, text: str) -> Integer[np.ndarray, " L"]:
        """``(L,)`` uint32 ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, uint32; texts are shared among threads."""
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in self._raw.encode_batch_fast(list(texts))]

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids of any shape, without separators."""
        return self._raw.decode(_checked(ids, self).tolist())


def _checked(ids: ArrayLike, tokenizer: Tokenizer) -> np.ndarray:
    """The ids in one row without separators; DataError if the tokenizer has no such id."""
    row = np.asarray(ids).astype(np.int64).reshape(-1)
    outside = (row < 0) | (row >= tokenizer.vocab_size)
    if outside.any():
        raise DataError(f"token id {row[outside][0]} is outside the vocabulary of {tokenizer.vocab_size}")
    return row[row != tokenizer.separator_id]
