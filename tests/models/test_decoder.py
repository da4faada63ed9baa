"""The whole decoder: causality, padding, precision, counts, activation checkpointing, and that it learns."""

import copy

import pytest
import torch
import torch.nn.functional as F

import moe
from moe.errors import ConfigError, DtypeError, ShapeError
from moe.models import Decoder, KVCache
from moe.models.decoder import check_inputs

# Float64 throughout: three layers of sums of 40 products, so that 1e-12 is loose and any wrong term is far above it.
TIGHT = {"rtol": 0, "atol": 1e-12}


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(model, tokens):
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % model.config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6], **TIGHT)
    assert ((after - before)[:, 6:].abs().amax(-1) > 1e-6).all()  # the tokens from there on all see it


@torch.no_grad()
@pytest.mark.parametrize("steps", [[11], [1] * 11, [4, 1, 1, 5], [1, 10]])
def test_a_cache_changes_no_logit(model, tokens, steps):
    cache = KVCache(model.config, 2, 11, dtype=torch.float64)
    pieces = [model(piece, cache=cache) for piece in tokens.split(steps, dim=1)]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), **TIGHT)


@torch.no_grad()
def test_padding_changes_no_real_logit(model, tokens):
    rows = [[1] * 11, [0] * 3 + [1] * 8, [1] * 5 + [0] * 6, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], [0] * 11]
    token_mask = torch.tensor(rows).bool()
    tokens = torch.randint(0, model.config.vocab_size, token_mask.shape)
    logits = model(tokens, token_mask=token_mask)
    assert logits.isfinite().all()
    for row in (0, 1, 2):  # padding in front or behind: positions differ by a constant, which rotary scores ignore
        real = token_mask[row]
        torch.testing.assert_close(logits[row, real], model(tokens[row : row + 1, real])[0], **TIGHT)
    other = tokens.where(token_mask, (tokens + 1) % model.config.vocab_size)
    torch.testing.assert_close(model(other, token_mask=token_mask)[token_mask], logits[token_mask], **TIGHT)
    torch.testing.assert_close(
        model(tokens, token_mask=torch.ones_like(token_mask)), model(tokens), **TIGHT
    )  # the masked kernel and the causal one


def test_padding_leaves_gradients_finite_and_experts_alone(small_config):
    model = Decoder(small_config(moe={"hidden_dim": 8, "num_experts": 4, "top_k": 2}))
    token_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    logits = model(torch.randint(0, 37, (2, 5)), token_mask=token_mask)
    (logits[token_mask].square().sum() + moe.balance_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    loads = moe.balance_step(model)
    assert list(loads) == ["blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn"]
    assert all(stats.tokens_per_expert.sum() == 5 * 2 for stats in loads.values())  # five real tokens, two experts each


@torch.no_grad()
def test_logits_are_float32_at_least(small_config):
    model = Decoder(small_config()).eval()
    tokens = torch.randint(0, 37, (2, 9))
    exact = copy.deepcopy(model).double()(tokens)
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(tokens)
    for logits, error in ((model(tokens), 1e-5), (autocast, 0.05), (model.bfloat16()(tokens), 0.1)):
        assert logits.dtype == torch.float32
        # Float32 and bfloat16 round at 6e-8 and 4e-3 of values of order 1, some dozen times along the way.
        assert (logits - exact).abs().max() < error * exact.abs().max()


def test_rms_norm_is_its_formula_with_float32_statistics(small_config):
    norm = Decoder(small_config(norm_eps=0.5)).blocks[0].ffn_norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(50, 24).bfloat16()
    y = norm.bfloat16()(x)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight.double()
    # One rounding of the normalised value and one of the product, 2**-9 each; statistics in bfloat16 would add more.
    torch.testing.assert_close(y.double(), expected, rtol=2.1 * 2**-9, atol=0)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_parameters_are_counted_by_hand(small_config, tie_embeddings):
    D, F_, V, experts, width, shared = 24, 40, 37, 5, 20, 12
    config = small_config(
        tie_embeddings=tie_embeddings,
        first_dense=1,
        moe={"hidden_dim": width, "num_experts": experts, "top_k": 2, "shared_hidden_dim": shared, "bias": True},
    )
    model = Decoder(config)
    attention = D * (D + 2 * 12) + D * D  # two key and two value heads of width 6
    expert = 3 * width * D + 2 * width + D  # gate, up, down, their biases
    shared_expert = 3 * shared * D + 2 * shared + D
    rest = V * D * (1 if tie_embeddings else 2) + D + 3 * (attention + 2 * D)
    rest += 3 * F_ * D + 2 * (shared_expert + experts * D)
    assert model.num_parameters() == rest + 2 * experts * expert
    assert model.num_active_parameters() == rest + 2 * 2 * expert
    with torch.device("meta"):
        assert Decoder(config).num_active_parameters() == model.num_active_parameters()


def test_a_dense_model_is_all_active(small_config):
    model = Decoder(small_config())
    assert model.num_active_parameters() == model.num_parameters()


def test_a_tied_embedding_is_one_parameter_that_both_ends_move(small_config):
    tied = Decoder(small_config(tie_embeddings=True))
    untied = Decoder(small_config(tie_embeddings=False))
    assert sum(p.shape == (37, 24) for p in tied.parameters()) == 1
    assert sum(p.shape == (37, 24) for p in untied.parameters()) == 2
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embedding.weight})
    tokens = torch.randint(0, 37, (2, 5))
    for model in (tied, untied):
        model(tokens).square().mean().backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    # The same float32 terms added in another order.
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=1e-5, atol=1e-8)


def test_built_on_the_meta_device_it_computes_the_same(config):
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    usual = Decoder(config)
    torch.manual_seed(3)
    usual.init_weights()
    tokens = torch.randint(0, 37, (1, 8))
    assert torch.equal(model.eval()(tokens), usual.eval()(tokens))


def training_step(model: Decoder, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
    """Loss, gradients, and each MoE layer's counts."""
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + moe.balance_loss(model)
    loss.backward()
    counts = [stats.tokens_per_expert.tolist() for stats in moe.balance_step(model).values()]
    return loss, [p.grad for p in model.parameters() if p.grad is not None], counts


@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
def test_activation_checkpointing_changes_no_gradient_and_no_count(config, tokens, kind):
    calls = []
    plain = Decoder(config).double()
    saving = Decoder(config, activation_checkpointing=kind).double()
    saving.load_state_dict(plain.state_dict())
    saving.blocks[1].attention_norm.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients, counts = training_step(plain, tokens)
    saved_loss, saved_gradients, saved_counts = training_step(saving, tokens)
    assert len(calls) == 2  # once forward, once again in the backward pass
    assert torch.equal(loss, saved_loss)
    assert len(gradients) == len(saved_gradients) == len(list(plain.parameters()))
    for got, want in zip(saved_gradients, gradients):
        torch.testing.assert_close(got, want, **TIGHT)
    assert counts == saved_counts
    assert all(sum(c) == 2 * 10 * 2 for c in counts)


def test_without_a_backward_pass_nothing_is_checkpointed(config, tokens):
    model = Decoder(config, activation_checkpointing="reentrant").eval()
    plain = Decoder(config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))


def test_it_learns_to_copy(small_config):
    """Attention to the token some places back is all that copying takes: it fails without positions or causality."""
    model = Decoder(small_config(num_layers=2, vocab_size=12, moe={"hidden_dim": 24, "num_experts": 4}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    first = torch.randint(0, 12, (32, 5))
    tokens = torch.cat((first, first), dim=1)
    for _ in range(60):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits[:, 4:].flatten(0, 1), tokens[:, 5:].flatten())
        optimizer.zero_grad()
        (loss + moe.balance_loss(model)).backward()
        optimizer.step()
        moe.balance_step(model)
    assert loss < 0.1  # nats; a guess costs log 12 = 2.5


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_few_tokens_or_none(model, shape):
    assert model(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 37)


def test_an_unknown_kind_of_checkpointing_is_named(small_config):
    with pytest.raises(ConfigError, match="activation_checkpointing='some' is unknown; choose one of none, reentrant"):
        Decoder(small_config(), activation_checkpointing="some")


@pytest.mark.parametrize(
    ("tokens", "token_mask", "cached", "error", "message"),
    [
        (torch.zeros(2, 5), None, None, DtypeError, "tokens has dtype torch.float32; token ids are int32 or int64"),
        (torch.zeros(5).int(), None, None, ShapeError, r"tokens has shape \(5,\); expected \(batch, sequence\)"),
        (torch.zeros(2, 33).int(), None, None, ShapeError, r"tokens has shape \(2, 33\), longer than max_seq_len=32"),
        (torch.zeros(2, 5).int(), torch.ones(2, 5), None, DtypeError, "token_mask has dtype torch.float32"),
        (torch.zeros(2, 5).int(), torch.ones(2, 4).bool(), None, ShapeError, r"token_mask has shape \(2, 4\); tokens"),
        (torch.zeros(2, 5).int(), torch.ones(2, 5).bool(), (2, 9), ShapeError, "token_mask is given beside a cache"),
        (torch.zeros(2, 5).int(), None, (3, 9), ShapeError, "room for 3 sequences of 9 more tokens"),
        (torch.zeros(2, 5).int(), None, (2, 4), ShapeError, "room for 2 sequences of 4 more tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_named(small_config, tokens, token_mask, cached, error, message):
    config = small_config()
    with pytest.raises(error, match=message):
        check_inputs(config, tokens, token_mask, cached and KVCache(config, *cached))


@pytest.mark.parametrize("max_length", [0, 33])
def test_a_cache_is_no_longer_than_the_model(small_config, max_length):
    with pytest.raises(ShapeError, match=rf"max_length={max_length} is outside 1 .. max_seq_len=32"):
        KVCache(small_config(), 1, max_length)
