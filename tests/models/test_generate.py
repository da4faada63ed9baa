"""Sampling: against a loop without cache, by its statistics, at its edges, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.models import Decoder, generate
from moe.models.generate import check_request, nucleus, sample


@torch.no_grad()
def test_greedy_is_the_likeliest_token_of_a_full_pass_each_time(model, tokens):
    expected = tokens
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, tokens, 12, temperature=0), expected)
    assert expected[:, 11:].unique().numel() > 3  # an untrained model that repeats itself would prove little


def test_a_generator_decides_everything(model, tokens):
    def drawn(seed: int) -> torch.Tensor:
        return generate(model, tokens, 15, generator=torch.Generator().manual_seed(seed))

    first = drawn(1)
    torch.manual_seed(99)  # PyTorch's own source has no part
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    assert first.shape == (2, 26)
    assert torch.equal(first[:, :11], tokens)


@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_neighbours(model, tokens):
    together = generate(model, tokens, 8, temperature=0)
    assert torch.equal(generate(model, tokens[1:], 8, temperature=0), together[1:])


def test_samples_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -30.0]]).expand(20_000, -1)
    for temperature in (0.5, 1.0, 3.0):
        chosen = sample(logits, temperature, 1.0, torch.Generator().manual_seed(0))
        share = chosen.bincount(minlength=5) / 20_000
        expected = (logits[0] / temperature).softmax(-1)
        # Five standard deviations of a share of 20,000 draws are 0.018 at most.
        torch.testing.assert_close(share, expected, rtol=0, atol=0.018)


def test_top_p_samples_within_the_nucleus_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    chosen = sample(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    share = chosen.bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.018)  # as above
    assert share[2:].sum() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.2e-38])
def test_cold_sampling_takes_the_maximum(temperature):
    logits = torch.tensor([[0.0, 3.0, -1.0], [100.0, 3.0, 99.0], [-5.0, -3.0, -4.0]])
    assert sample(logits, temperature, 1.0).tolist() == [1, 0, 1]
    assert sample(logits, temperature, 0.5).tolist() == [1, 0, 1]


def test_greedy_takes_the_lowest_of_equals():
    assert sample(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 0.0, 1.0).tolist() == [1]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.floats(0.01, 0.99),
    st.booleans(),
)
def test_the_nucleus_is_the_smallest_likeliest_set(counts, top_p, exactly):
    probabilities = torch.tensor([counts], dtype=torch.float64) / sum(counts)
    if exactly:  # a top_p that a prefix hits to the last bit
        top_p = min(probabilities[0].sort(descending=True).values.cumsum(0)[len(counts) // 2].item(), 0.99)
    kept = nucleus(probabilities, top_p)[0]
    inside, outside = probabilities[0, kept], probabilities[0, ~kept]
    rounding = 1e-12  # of sums of twelve float64 numbers, in two orders
    assert kept.any()
    assert inside.sum() >= top_p - rounding
    assert inside.sum() - inside.min() < top_p + rounding  # without its least likely member it falls short
    assert outside.numel() == 0 or outside.max() <= inside.min()
    if outside.numel():  # of equals on the edge, lower ids are in
        edge = probabilities[0] == inside.min()
        assert kept[edge].int().diff().le(0).all()


def test_the_nucleus_counts_exactly_reached_mass_as_reached():
    probabilities = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert nucleus(probabilities, 0.75).int().tolist() == [[0, 1, 1, 0]]
    assert nucleus(probabilities, 0.7501).int().tolist() == [[1, 1, 1, 0]]


def test_an_ended_sequence_is_filled_up_and_all_ended_stop(model, tokens):
    free = generate(model, tokens, 20, temperature=0)
    eos_id = int(free[0, 13])
    ended = generate(model, tokens, 20, temperature=0, eos_id=eos_id)
    stops = []
    for row, unlimited in zip(ended, free):
        hits = (unlimited[11:] == eos_id).nonzero()
        stop = 11 + int(hits[0]) if len(hits) else 30
        assert torch.equal(row[: stop + 1], unlimited[: min(stop + 1, ended.shape[1])])
        assert (row[stop:] == eos_id).all() or stop == 30
        stops.append(stop)
    assert ended.shape[1] == max(stops) + 1
    alone = generate(model, tokens[:1], 20, temperature=0, eos_id=eos_id)
    assert torch.equal(alone, free[:1, : stops[0] + 1])
    assert stops[0] < 30


def test_modes_are_restored_and_gradients_off_inside(model, tokens):
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    hook = model.norm.register_forward_hook(
        lambda module, *_: seen.append((torch.is_grad_enabled(), any(m.training for m in model.modules())))
    )
    generate(model, tokens, 2)
    assert seen == [(False, False)] * 2
    assert [module.training for module in model.modules()] == modes
    hook.remove()

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, tokens, 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_the_prompt_is_read_once_and_each_token_after_it_once(model, tokens):
    seen = []
    model.embedding.register_forward_hook(lambda module, args, _: seen.append(args[0].shape[1]))
    generate(model, tokens, 4)
    assert seen == [11, 1, 1, 1]


def test_no_new_tokens_is_a_copy_of_the_prompt(model, tokens):
    out = generate(model, tokens, 0)
    assert torch.equal(out, tokens)
    assert out.data_ptr() != tokens.data_ptr()


def test_token_ids_keep_their_dtype(small_config):
    assert generate(Decoder(small_config()), torch.zeros(1, 2, dtype=torch.int32), 3).dtype == torch.int32


def test_it_fills_the_model_to_its_last_position(small_config):
    assert generate(Decoder(small_config()), torch.zeros(1, 2, dtype=torch.int64), 30).shape == (1, 32)


PROMPT = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": -0.5}, ConfigError, "temperature=-0.5 must be 0 or positive"),
        ({"temperature": float("nan")}, ConfigError, "temperature=nan must be 0 or positive"),
        ({"top_p": 0.0}, ConfigError, r"top_p=0.0 is outside \(0, 1\]"),
        ({"top_p": 1.01}, ConfigError, r"top_p=1.01 is outside \(0, 1\]"),
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens=-1 must be at least 0"),
        ({"eos_id": 37}, ConfigError, "eos_id=37 is outside 0 .. vocab_size - 1 = 36"),
        ({"max_new_tokens": 28}, ShapeError, "a prompt of 5 tokens and max_new_tokens=28 .* max_seq_len=32"),
        ({"prompt": PROMPT[:, :0]}, ShapeError, r"prompt has shape \(2, 0\); expected \(batch, sequence\)"),
        ({"prompt": PROMPT[:0]}, ShapeError, r"prompt has shape \(0, 5\); expected \(batch, sequence\)"),
        ({"prompt": PROMPT[0]}, ShapeError, r"prompt has shape \(5,\); expected \(batch, sequence\)"),
        ({"prompt": PROMPT.float()}, DtypeError, "prompt has dtype torch.float32"),
        ({"prompt": PROMPT + 37}, ConfigError, "prompt has token 37, outside 0 .. vocab_size - 1 = 36"),
        ({"prompt": PROMPT - 1}, ConfigError, "prompt has token -1, outside"),
    ],
)
def test_requests_that_cannot_be_met_are_named(small_config, changes, error, message):
    request = {"prompt": PROMPT, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0, "eos_id": None, **changes}
    with pytest.raises(error, match=message):
        check_request(Decoder(small_config()), **request)


def test_generate_checks_its_request(small_config):
    with pytest.raises(ConfigError, match="top_p=2"):
        generate(Decoder(small_config()), PROMPT, 3, top_p=2.0)
