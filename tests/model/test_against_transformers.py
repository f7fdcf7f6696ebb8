"""The model is Hugging Face's LLaMA: same names, same logits, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ngpt.model.llama import LlamaForCausalLM

transformers = pytest.importorskip("transformers")

# The presets' ratios, the 1B's odd intermediate size included, 4 to 32 times narrower.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SCALED_PRESETS = {
    "9m": (32, 88, 4, 4),
    "20m": (64, 172, 4, 4),
    "60m": (64, 172, 8, 8),
    "130m": (96, 256, 3, 12),
    "350m": (128, 342, 3, 16),
    "1b": (128, 341, 3, 32),
    "7b": (128, 344, 2, 32),
}
CASES = {name: dict(zip(SHAPE, shape, strict=True)) for name, shape in SCALED_PRESETS.items()} | {
    "grouped_query": {"num_key_value_heads": 2},
    "one_key_value_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "other_rope_theta": {"rope_theta": 500000.0},
    "other_norm_eps": {"rms_norm_eps": 1e-2},
}
OTHER_SETTINGS = ("vocab_size", "num_key_value_heads", "rms_norm_eps", "initializer_range", "tie_word_embeddings")


def reference_model(config):
    """transformers' model of the same shape, randomly initialised, norm weights included."""
    shape = {name: getattr(config, name) for name in SHAPE + OTHER_SETTINGS} | {"max_position_embeddings": config.max_seq_len}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    else:
        rotary = {"rope_theta": config.rope_theta}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **rotary, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_weights_load_strictly_and_logits_and_gradients_agree(changes, small_config):
    config = small_config(**({"initializer_range": 0.08} | changes))
    reference, model = reference_model(config), LlamaForCausalLM(config, loss_chunk_tokens=17)
    model.load_state_dict(reference.state_dict(), strict=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]

    input_ids, labels = torch.randint(config.vocab_size, (2, 3, 40))
    labels[0, :7] = -100
    expected = reference(input_ids=input_ids, use_cache=False).logits
    logits = model(input_ids)
    assert expected.abs().max() > 1  # else an absolute tolerance says nothing
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)

    F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(input_ids, labels).backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected_grad = gradients[name].grad
        assert (parameter.grad - expected_grad).norm() <= 2e-5 * expected_grad.norm(), name


def test_our_weights_load_into_transformers(small_config):
    config = small_config(num_key_value_heads=2)
    model, reference = LlamaForCausalLM(config), reference_model(config)
    reference.load_state_dict(model.state_dict(), strict=True)
    input_ids = torch.randint(config.vocab_size, (1, 9))
    torch.testing.assert_close(model(input_ids), reference(input_ids=input_ids, use_cache=False).logits, atol=1e-5, rtol=0)
