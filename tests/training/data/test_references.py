"""What simple compressors reach."""

import gzip
import math

import numpy as np
import pytest

from moe.training.data.references import GzipMeter, count_bytes, unigram_bits_per_byte

TEXT = " ".join(map(str, np.random.default_rng(0).integers(500, size=8000))).encode()


@pytest.mark.parametrize("step", [len(TEXT), 100])
def test_gzip_is_gzip_however_the_text_comes(step):
    meter = GzipMeter()
    for start in range(0, len(TEXT), step):
        meter.add(TEXT[start : start + step])
    assert meter.bits_per_byte() == 8 * len(gzip.compress(TEXT, compresslevel=9)) / len(TEXT)
    assert len(gzip.compress(TEXT, compresslevel=9)) != len(gzip.compress(TEXT, compresslevel=6))


def test_noise_costs_more_than_8_bits():
    meter = GzipMeter()
    meter.add(np.random.bytes(10_000))
    assert meter.bits_per_byte() > 8


def test_unigram_by_hand():
    train, val = count_bytes(b"aab"), count_bytes(b"abc")
    # add-one: a 3, b 2, c 1 of 3 + 256
    expected = (3 * math.log2(259) - math.log2(3) - math.log2(2) - math.log2(1)) / 3
    assert unigram_bits_per_byte(train, val) == pytest.approx(expected, rel=1e-12)  # a few roundings in float64


def test_unigram_of_the_same_text_is_its_entropy():
    counts = count_bytes(TEXT * 100)
    share = counts[counts > 0] / counts.sum()
    # 256 added counts on 2.4 million move the bits by about 256 / 2.4e6 / log(2)
    assert unigram_bits_per_byte(counts, counts) == pytest.approx(-(share * np.log2(share)).sum(), abs=2e-4)


def test_count_bytes():
    counts = count_bytes(b"\x00\xff\xff")
    assert counts.shape == (256,)
    assert counts[0] == 1
    assert counts[255] == 2
    assert counts.sum() == 3
