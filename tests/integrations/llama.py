"""A tiny Llama of random weights whose feed-forward blocks are MoE layers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moe
from tests.integrations.loops import BALANCE

VOCABULARY = 19


def moe_llama(balance=BALANCE):
    """float64, 2 layers, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = moe.MoE(16, 8, 6, 2, balance=balance)
    return model.double().train()


def sentences(number, length=7):
    """Token ids, and as labels the same with some of them ignored: another number in each."""
    torch.manual_seed(1)
    found = []
    for row in range(number):
        ids = torch.randint(VOCABULARY, (length,))
        found.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < row % 5, -100)})
    return found
