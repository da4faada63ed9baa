"""Tokenizers lose nothing, and count bytes right."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, DataError
from moe.training.data import BpeTokenizer, ByteTokenizer, Tokenizer

SAMPLE = ["def f(x):\n    return x\n" * 20, "the cat sat on the mat; the cat ate. " * 20, "漢字 漢字 naïve naïve"]
BPE = BpeTokenizer.train(SAMPLE, vocab_size=280)
BYTES = ByteTokenizer()

any_tokenizer = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@any_tokenizer
@given(text=st.text() | st.text("the cat\n\r\t <|>", max_size=200))
def test_text_survives_and_its_bytes_are_the_sum_of_its_tokens(tokenizer: Tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.separator_id not in ids


@any_tokenizer
def test_every_prefix_of_tokens_has_the_bytes_that_it_decodes_to(tokenizer: Tokenizer):
    text = "".join(SAMPLE)
    ids = tokenizer.encode(text)
    raw = text.encode()
    for length in range(0, len(ids), 7):
        prefix = raw[: tokenizer.token_bytes[ids[:length]].sum()]
        assert tokenizer.decode(ids[:length]) == prefix.decode(errors="replace")


@any_tokenizer
def test_batches_are_the_same_as_one_by_one(tokenizer: Tokenizer):
    for text, ids in zip(SAMPLE, tokenizer.encode_batch(SAMPLE), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@any_tokenizer
def test_separators_have_no_bytes_and_no_text(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == tokenizer.separator_id + 1
    assert tokenizer.token_bytes[tokenizer.separator_id] == 0
    assert (tokenizer.token_bytes[:-1] > 0).all()
    ids = [tokenizer.separator_id, *tokenizer.encode("one").tolist(), tokenizer.separator_id]
    ids += tokenizer.encode(" two").tolist()
    assert tokenizer.decode(ids) == "one two"
    assert tokenizer.decode(torch.tensor([ids])) == "one two"
    assert tokenizer.decode([]) == ""


@any_tokenizer
def test_half_a_character_is_replaced(tokenizer: Tokenizer):
    ids = np.concatenate([tokenizer.encode("a"), tokenizer.encode("\U0001f600")[:1], tokenizer.encode("b")])
    assert tokenizer.decode(ids) == "a\ufffdb"


@any_tokenizer
@pytest.mark.parametrize("outside", [-1, 300])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, outside):
    with pytest.raises(DataError, match=f"token id {outside} is outside the vocabulary of {tokenizer.vocab_size}"):
        tokenizer.decode([65, outside])


def test_bpe_merges_what_is_frequent_up_to_the_size_asked_for():
    assert BPE.vocab_size == 280
    assert len(BPE.encode(SAMPLE[1])) < len(SAMPLE[1]) / 2
    assert BpeTokenizer.train(["nothing twice"], vocab_size=1000).vocab_size == 257
    assert BpeTokenizer.train(SAMPLE, vocab_size=257).vocab_size == 257


def test_bpe_survives_json():
    again = BpeTokenizer.from_json(BPE.to_json())
    assert again.vocab_size == BPE.vocab_size
    np.testing.assert_array_equal(again.token_bytes, BPE.token_bytes)
    np.testing.assert_array_equal(again.encode("the cat 漢"), BPE.encode("the cat 漢"))


def test_bpe_training_is_the_same_each_time():
    assert {BpeTokenizer.train(SAMPLE, vocab_size=280).to_json() for _ in range(10)} == {BPE.to_json()}


def test_bpe_too_small_for_the_bytes():
    with pytest.raises(ConfigError, match="vocab_size=256 is less than 256 bytes and a separator"):
        BpeTokenizer.train(SAMPLE, vocab_size=256)
