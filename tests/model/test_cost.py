"""The closed formulas against torch: real models' parameters, and the operations that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ngpt.config.schema import ModelConfig
from ngpt.model.cost import (
    adapter_parameter_count,
    flops_per_token,
    matrix_shapes,
    parameter_count,
    projected_parameter_count,
    weight_bytes,
)
from ngpt.model.llama import LlamaForCausalLM, num_parameters
from ngpt.model.lora import add_adapters

# hidden, intermediate, layers, heads and the parameters in millions: the published benchmark's shapes.
PRESETS = {
    "60m": (512, 1376, 8, 8, 58.1),
    "130m": (768, 2048, 12, 12, 134.1),
    "350m": (1024, 2736, 24, 16, 368.0),
    "1b": (2048, 5461, 24, 32, 1339.1),
}


def preset(hidden, intermediate, layers, heads):
    return ModelConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads)


@pytest.mark.parametrize("shape", PRESETS.values(), ids=PRESETS)
def test_published_parameter_counts(shape):
    *dimensions, millions = shape
    config = preset(*dimensions)
    assert round(parameter_count(config) / 1e6, 1) == millions
    assert weight_bytes(config) == 2 * parameter_count(config)
    with torch.device("meta"):
        assert num_parameters(LlamaForCausalLM(config)) == parameter_count(config)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"intermediate_size": 85}], ids=str)
def test_matrices_are_those_of_the_model(changes, small_config):
    config = small_config(**changes)
    parameters = dict(LlamaForCausalLM(config).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == parameter_count(config)
    matrices = {name: tuple(p.shape) for name, p in parameters.items() if p.ndim == 2}
    assert [(m.name, (m.rows, m.columns)) for m in matrix_shapes(config)] == list(matrices.items())
    in_blocks = sum(p.numel() for name, p in parameters.items() if p.ndim == 2 and ".layers." in name)
    assert projected_parameter_count(config) == in_blocks
    assert {m.name for m in matrix_shapes(config) if not m.projected} <= {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 5, "intermediate_size": 85, "vocab_size": 57},
        {"hidden_size": 48, "num_attention_heads": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (2, 17), (3, 64)])
@pytest.mark.parametrize("backward", [False, True])
def test_operations_are_those_that_torch_counts(backward, batch_size, seq_len, changes, small_config):
    config = small_config(**changes)
    model = LlamaForCausalLM(config, loss_chunk_tokens=16)
    input_ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    # The plain attention: torch's counter knows no formula for the fused one of the CPU, and adds the recomputed scores of the GPU's.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        loss = model(input_ids, input_ids)
        if backward:
            loss.backward()
    assert counter.get_total_flops() == batch_size * seq_len * flops_per_token(config, seq_len, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
def test_operations_of_adapters_are_those_that_torch_counts(backward, small_config):
    config, rank = small_config(num_key_value_heads=2), 3
    model = LlamaForCausalLM(config, loss_chunk_tokens=16)
    add_adapters(model, rank=rank, alpha=8.0)
    assert num_parameters(model) == parameter_count(config) + adapter_parameter_count(config, rank)
    input_ids = torch.zeros(2, 17, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        loss = model(input_ids, input_ids)
        if backward:
            loss.backward()
    assert counter.get_total_flops() == 2 * 17 * flops_per_token(config, 17, backward=backward, adapter_rank=rank)
