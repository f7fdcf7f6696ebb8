"""LoRA adapters: nothing changes at first, W stays frozen, one step against the formulas, and export to plain weights."""

from __future__ import annotations

import pytest
import torch

from ngpt.config.shapes import block_matrices
from ngpt.model.layers import Linear
from ngpt.model.llama import LlamaForCausalLM, compile_blocks, num_parameters
from ngpt.model.lora import LoRALinear, adapters, add_adapters, merged_weights


def build(config, *, rank=3, alpha=6.0, **options):
    torch.manual_seed(3)
    model = LlamaForCausalLM(config, **options)
    if rank:
        add_adapters(model, rank=rank, alpha=alpha)
    return model


def with_full_adapters(model):
    """The model with an arbitrary B in each adapter, as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, adapter in adapters(model):
            adapter.lora_B.normal_(0, 0.1, generator=generator)
    return model


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def batch(small_config):
    torch.manual_seed(0)
    return torch.randint(small_config().vocab_size, (2, 3, 24)).unbind()


def test_at_first_the_model_is_the_plain_one_of_the_same_seed(small_config, batch):
    plain, adapted = build(small_config(), rank=0), build(small_config())
    own = dict(adapted.named_parameters())
    assert [name for name in own if "lora_" not in name] == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(weight, own[name]) for name, weight in plain.named_parameters())
    assert torch.equal(plain(*batch), adapted(*batch))
    assert torch.equal(plain(batch[0]), adapted(batch[0]))


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_adapters_are_all_that_trains_in_the_blocks_matrices(small_config, key_value_heads):
    config = small_config(num_key_value_heads=key_value_heads)
    plain, adapted = build(config, rank=0), build(config)
    shapes = block_matrices(hidden=32, inner=84, key_value=8 * key_value_heads).values()
    in_adapters, in_matrices = (2 * sum(count(m, n) for m, n in shapes) for count in (lambda m, n: 3 * (m + n), lambda m, n: m * n))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert num_parameters(adapted) == num_parameters(plain) + in_adapters
    assert trainable == num_parameters(plain) - in_matrices + in_adapters
    frozen = {name for name, p in adapted.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name, _ in adapters(adapted)}
    assert len(frozen) == 2 * len(shapes)


def test_a_is_kaiming_uniform_and_b_zero(small_config):
    _, (weight, down, up) = adapters(build(small_config(hidden_size=128, intermediate_size=340), rank=40))[-1]  # down_proj: 340 inputs
    assert (tuple(weight.shape), tuple(down.shape), tuple(up.shape)) == ((128, 340), (40, 340), (128, 40))
    reference = torch.nn.init.kaiming_uniform_(torch.empty(40, 340), a=5**0.5)
    assert down.abs().max() <= 340**-0.5
    assert down.std().item() == pytest.approx(reference.std().item(), rel=0.02)
    assert not up.any()


def test_one_step_is_that_of_the_formulas():
    torch.manual_seed(1)
    layer = LoRALinear(Linear(7, 5, std=0.5), rank=2, alpha=3.0).double()
    with torch.no_grad():
        layer.lora_B.normal_()
    weight, down, up = (p.detach().clone() for p in (layer.weight, layer.lora_A, layer.lora_B))
    x, target = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, x @ (weight + 1.5 * up @ down).T)
    ((y - target) ** 2).sum().div(2).backward()
    error = y.detach() - target
    torch.testing.assert_close(layer.lora_B.grad, 1.5 * error.T @ x @ down.T)
    torch.testing.assert_close(layer.lora_A.grad, 1.5 * up.T @ error.T @ x)
    assert layer.weight.grad is None
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    torch.testing.assert_close(layer.lora_B, up - 0.1 * 1.5 * error.T @ x @ down.T)
    assert torch.equal(layer.weight, weight)


def test_merged_weights_are_those_of_a_plain_model_with_the_same_outputs(small_config, batch):
    adapted = with_full_adapters(build(small_config()))
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    merged = merged_weights({name: weight.detach() for name, weight in adapted.named_parameters()}, alpha=6.0)
    assert all(torch.equal(before[name], weight) for name, weight in adapted.named_parameters())
    plain = build(small_config(), rank=0)
    assert not torch.allclose(plain(batch[0]), adapted(batch[0]), atol=1e-2)
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(batch[0]), adapted(batch[0]), atol=1e-4, rtol=1e-4)


def test_merged_bf16_weights_are_rounded_once():
    torch.manual_seed(2)
    weights = {
        "q.weight": torch.randn(6, 5).bfloat16(),
        "q.lora_A": torch.randn(2, 5).bfloat16(),
        "q.lora_B": torch.randn(6, 2).bfloat16(),
        "norm.weight": torch.ones(3).bfloat16(),
    }
    merged = merged_weights(weights, alpha=1.0)
    exact = weights["q.weight"].double() + 0.5 * weights["q.lora_B"].double() @ weights["q.lora_A"].double()
    assert merged.keys() == {"q.weight", "norm.weight"}
    assert torch.equal(merged["q.weight"], exact.to(torch.bfloat16))


def test_checkpointing_and_compiling_change_no_gradient(small_config, batch):
    torch._dynamo.reset()
    expected = gradients(with_full_adapters(build(small_config())), *batch)
    recomputing, compiled = (with_full_adapters(build(small_config(), checkpoint_every=every)) for every in (1, 2))
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(recomputing.state_dict())
    for model in (recomputing, compiled):
        actual = gradients(model, *batch)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


def test_a_model_without_storage_gets_adapters_too(small_config):
    with torch.device("meta"):
        model = build(small_config())
    assert all(p.is_meta for p in model.parameters())


def test_impossible_adapters_are_refused_and_leave_the_model_as_it_was(small_config):
    model = build(small_config(num_key_value_heads=1), rank=0)
    for rank in (0, 8):
        with pytest.raises(ValueError, match=f"rank = {rank} must be at least 1 and below 8"):
            add_adapters(model, rank=rank, alpha=1.0)
    assert adapters(model) == []
    add_adapters(model, rank=7, alpha=1.0)
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(model, rank=7, alpha=1.0)
