"""What the model promises besides its mathematics: initial weights, documents, checkpointing, compilation, errors."""

from __future__ import annotations

import shutil

import pytest
import torch

from ngpt.model.layers import RMSNorm
from ngpt.model.llama import LlamaForCausalLM, compile_blocks, num_parameters


def build(config, **options):
    torch.manual_seed(3)
    return LlamaForCausalLM(config, **options)


def gradients(model, *inputs):
    model.zero_grad()
    model(*inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def batch(small_config):
    torch.manual_seed(0)
    return torch.randint(small_config().vocab_size, (2, 3, 24)).unbind()


# ------------------------------------------------------------------------------------------------------ initial weights
def test_same_seed_gives_same_weights_and_another_seed_others(small_config):
    first, second = build(small_config()), build(small_config())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    torch.manual_seed(4)
    assert not torch.equal(LlamaForCausalLM(small_config()).lm_head.weight, first.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_do_not_depend_on_the_default_dtype_of_the_moment(dtype, small_config):
    expected = build(small_config()).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        model = build(small_config())
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_initial_weights_are_the_published_ones(small_config):
    model = build(small_config(hidden_size=128, intermediate_size=341, initializer_range=0.02))
    for name, weight in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            deviation_in_standard_errors = (weight.std() / 0.02 - 1).abs() * (2 * weight.numel()) ** 0.5
            assert deviation_in_standard_errors < 5, name
            assert weight.mean().abs() * weight.numel() ** 0.5 < 5 * 0.02, name


def test_a_tied_head_is_one_parameter(small_config):
    tied, untied = build(small_config(tie_word_embeddings=True)), build(small_config())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert num_parameters(untied) - num_parameters(tied) == tied.lm_head.weight.numel()
    assert tied.bfloat16().lm_head.weight is tied.model.embed_tokens.weight


def test_state_holds_parameters_only(small_config):
    model = build(small_config())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not list(model.buffers())


# ------------------------------------------------------------------------------------------------------------ sequences
def test_a_sequence_of_one_token_and_a_batch_of_one(small_config):
    model = build(small_config())
    input_ids, labels = torch.tensor([[5]]), torch.tensor([[7]])
    logits = model(input_ids)
    assert logits.shape == (1, 1, 101)
    torch.testing.assert_close(model(input_ids, labels), -logits[0, 0].log_softmax(-1)[7])


def test_longer_than_the_model_was_built_for_is_refused(small_config):
    with pytest.raises(ValueError, match=r"17 tokens is longer than model.max_seq_len=16"):
        build(small_config(max_seq_len=16))(torch.zeros(1, 17, dtype=torch.long))


def test_the_future_does_not_change_the_past(small_config, batch):
    model, (input_ids, _) = build(small_config()), batch
    changed = input_ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 101
    logits, changed_logits = model(input_ids), model(changed)
    assert torch.equal(logits[:, :10], changed_logits[:, :10])
    assert not torch.equal(logits[:, 10:], changed_logits[:, 10:])


def test_bf16_weights_stay_near_the_same_weights_in_fp32(small_config, batch):
    model, (input_ids, labels) = build(small_config(initializer_range=0.05)).bfloat16(), batch
    with torch.no_grad():
        rounded, rounded_loss = model(input_ids), model(input_ids, labels)
        exact, exact_loss = model.float()(input_ids), model(input_ids, labels)
    assert rounded.dtype == torch.bfloat16
    assert rounded_loss.dtype == torch.float32
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()
    assert (rounded_loss - exact_loss).abs() < 1e-3 * exact_loss


def test_norm_statistics_of_bf16_are_taken_in_fp32():
    norm = RMSNorm(48, eps=1e-6).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (torch.randn(7, 48) * 30).bfloat16()
    wide = x.double()
    expected = norm.weight * (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size=32 over model.num_attention_heads=5"),
        ({"num_attention_heads": 32}, "even number per head"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of model.num_key_value_heads=3"),
    ],
)
def test_impossible_heads_are_refused(changes, message, small_config):
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM(small_config(**changes))


@pytest.mark.parametrize("options", [{"loss_chunk_tokens": 0}, {"checkpoint_every": -1}])
def test_impossible_options_are_refused(options, small_config):
    with pytest.raises(ValueError, match=next(iter(options))):
        LlamaForCausalLM(small_config(), **options)


# ------------------------------------------------------------------------------------------------------------ documents
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["all_heads", "grouped_query"])
def test_masked_documents_equal_documents_run_alone(changes, small_config):
    model = build(small_config(**changes))
    lengths = [[9, 1, 14], [24, 0, 0]]
    input_ids = torch.randint(101, (2, 24))
    document_ids = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    logits = model(input_ids, document_ids=document_ids)
    for row, row_lengths in enumerate(lengths):
        alone = [model(piece[None])[0] for piece in input_ids[row].split([n for n in row_lengths if n])]
        torch.testing.assert_close(logits[row], torch.cat(alone), atol=1e-5, rtol=0)
    assert (model(input_ids)[0] - logits[0])[9:].abs().max() > 0.1  # the mask matters


def test_an_id_that_returns_after_another_is_a_new_document(small_config):
    model, input_ids = build(small_config()), torch.randint(101, (1, 6))
    returning, distinct = torch.tensor([[4, 4, 9, 9, 4, 4]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    assert torch.equal(model(input_ids, document_ids=returning), model(input_ids, document_ids=distinct))


# -------------------------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(every, small_config, batch):
    config = small_config(num_hidden_layers=4)
    plain, recomputed = build(config), build(config, checkpoint_every=every)
    assert torch.equal(plain(*batch), recomputed(*batch))
    expected, actual = gradients(plain, *batch), gradients(recomputed, *batch)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_checkpointing_keeps_fewer_activations_the_more_blocks_it_covers(small_config, batch):
    def saved_bytes(every):
        storages = {}

        def count(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = build(small_config(num_hidden_layers=4), checkpoint_every=every)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(*batch)  # kept alive, so that no storage is reused and counted once for two
        assert loss.requires_grad
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    off, every_second, every_block = (saved_bytes(every) for every in (0, 2, 1))
    assert every_block < 0.3 * off
    assert every_block < every_second < 0.7 * off


def test_evaluation_does_not_checkpoint(small_config, batch, monkeypatch):
    monkeypatch.setattr("ngpt.model.llama.checkpoint", lambda *_, **__: pytest.fail("recomputation without gradients"))
    with torch.no_grad():
        build(small_config(), checkpoint_every=1)(*batch)


# ---------------------------------------------------------------------------------------------------------- compilation
def test_compiling_blocks_changes_no_name_and_no_number(small_config, batch):
    plain, compiled = build(small_config()), build(small_config(), checkpoint_every=2)
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected, actual = gradients(plain, *batch), gradients(compiled, *batch)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_one_compilation_serves_all_blocks(small_config, batch):
    def compilations(num_layers):
        graphs = []
        torch._dynamo.reset()
        model = build(small_config(num_hidden_layers=num_layers))
        compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        model(*batch).backward()
        return len(graphs)

    assert 1 <= compilations(2) == compilations(5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_inductor_agrees_with_eager(small_config, batch):
    torch._dynamo.reset()
    plain, compiled = build(small_config()), build(small_config())
    compile_blocks(compiled)
    expected, actual = gradients(plain, *batch), gradients(compiled, *batch)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=1e-4)
