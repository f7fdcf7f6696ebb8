"""The chunked loss is the plain one: value, gradients, edges, and the memory that it is there for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.loss_memory import peak_bytes, plain_cross_entropy
from ngpt.model.llama import LlamaForCausalLM
from ngpt.model.loss import IGNORE_INDEX, chunked_cross_entropy

POSITIONS, VOCAB, HIDDEN = (3, 11), 53, 16


def make_inputs(dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*POSITIONS, HIDDEN), torch.randn(VOCAB, HIDDEN) * scale
    labels = torch.randint(VOCAB, POSITIONS)
    labels[0, 2:6] = IGNORE_INDEX
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def value_and_gradients(loss, hidden, weight):
    """Of a third of the loss: the incoming gradient is not 1."""
    return loss.detach(), *torch.autograd.grad(loss / 3, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 32, 33, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_equals_plain_cross_entropy(dtype, tolerance, chunk_tokens):
    hidden, weight, labels = make_inputs(dtype)
    expected = value_and_gradients(plain_cross_entropy(hidden, weight, labels), hidden, weight)
    actual = value_and_gradients(chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens), hidden, weight)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("chunk_tokens", [8, 64, 512])
def test_bf16_is_as_near_to_fp64_as_the_plain_loss_in_bf16(chunk_tokens):
    torch.manual_seed(0)
    # Small weights: every position then adds to every row of the weight's gradient, and a sum in bf16 would show.
    hidden, weight = (tensor.bfloat16().requires_grad_() for tensor in (torch.randn(512, 64), torch.randn(301, 64) * 0.02))
    labels = torch.randint(301, (512,))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = value_and_gradients(plain_cross_entropy(*wide, labels), *wide)
    plain = value_and_gradients(plain_cross_entropy(hidden, weight, labels), hidden, weight)
    chunked = value_and_gradients(chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens), hidden, weight)
    assert [x.dtype for x in chunked] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for c, p, e in zip(chunked, plain, exact, strict=True):
        # One rounding more than the plain loss (the incoming gradient comes last), and none more for more chunks.
        assert (c.double() - e).norm() <= 1.6 * (p.double() - e).norm() + 1e-7 * e.norm()


def test_extreme_logits_stay_finite():
    hidden, weight, labels = make_inputs(scale=1e4)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=7)
    torch.testing.assert_close(loss, plain_cross_entropy(hidden, weight, labels))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_ignored_positions_count_nothing_even_where_they_hold_nan():
    hidden, weight, labels = make_inputs()
    poisoned = hidden.detach().clone()
    poisoned[0, 2:6] = float("nan")
    counted = labels != IGNORE_INDEX
    expected = plain_cross_entropy(hidden[counted], weight, labels[counted])
    loss = chunked_cross_entropy(poisoned.requires_grad_(), weight, labels, chunk_tokens=4)
    torch.testing.assert_close(loss, expected)


def test_all_labels_ignored_is_zero_loss_and_zero_gradients():
    hidden, weight, labels = make_inputs()
    loss, *gradients = value_and_gradients(
        chunked_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), chunk_tokens=8), hidden, weight
    )
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("label", [VOCAB, -1, -101])
def test_a_label_outside_the_vocabulary_is_named(label):
    hidden, weight, labels = make_inputs()
    labels[1, 1] = label
    with pytest.raises(ValueError, match=rf"label {label} is no token: labels are 0 to {VOCAB - 1}"):
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8)


def test_labels_of_another_shape_are_refused():
    hidden, weight, labels = make_inputs()
    with pytest.raises(ValueError, match="one label a position"):
        chunked_cross_entropy(hidden, weight, labels[:, :-1], chunk_tokens=8)


def test_non_contiguous_hidden_states_and_labels():
    hidden, weight, labels = make_inputs()
    expected = value_and_gradients(plain_cross_entropy(hidden, weight, labels), hidden, weight)
    strided, strided_labels = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1), labels.t().contiguous().t()
    assert not strided.is_contiguous()
    strided.requires_grad_()
    actual = value_and_gradients(chunked_cross_entropy(strided, weight, strided_labels, chunk_tokens=8), strided, weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_one_of_hidden_and_weight_needs_a_gradient(frozen):
    hidden, weight, labels = make_inputs()
    _, *gradients = value_and_gradients(plain_cross_entropy(hidden, weight, labels) * 3, hidden, weight)
    expected = dict(zip(("hidden", "weight"), gradients, strict=True))
    tensors = {"hidden": hidden.detach(), "weight": weight.detach()}
    wanted = next(name for name in tensors if name != frozen)
    tensors[wanted].requires_grad_()
    chunked_cross_entropy(tensors["hidden"], tensors["weight"], labels, chunk_tokens=8).backward()
    torch.testing.assert_close(tensors[wanted].grad, expected[wanted])
    assert tensors[frozen].grad is None


def test_evaluation_computes_no_gradient():
    hidden, weight, labels = make_inputs()
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([func] if "mm" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=11)
    assert not loss.requires_grad
    assert len(products) == 3  # one product a chunk: the logits
    torch.testing.assert_close(loss, plain_cross_entropy(hidden, weight, labels))


def test_a_second_backward_through_the_same_graph_is_an_error_not_a_wrong_number():
    hidden, weight, labels = make_inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_weight_gets_one_gradient_a_backward(tied, small_config):
    model = LlamaForCausalLM(small_config(tie_word_embeddings=tied), loss_chunk_tokens=5)
    fired = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for name, parameter in model.named_parameters():

        def count(_, name=name):
            fired[name] += 1

        parameter.register_post_accumulate_grad_hook(count)
    input_ids, labels = torch.randint(101, (2, 2, 16))
    model(input_ids, labels).backward()
    assert set(fired.values()) == {1}


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_loss_is_the_cross_entropy_of_its_logits(tied, small_config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(small_config(tie_word_embeddings=tied), loss_chunk_tokens=7)
    input_ids, labels = torch.randint(101, (2, 2, 16))
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected_loss = F.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.autograd.grad(expected_loss, parameters)
    loss = model(input_ids, labels)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected_loss)
    for name, a, e in zip(names, torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


def test_memory_peaks_far_below_that_of_the_plain_loss():
    shape = {"num_tokens": 256, "hidden_size": 16, "vocab_size": 500, "dtype": torch.float32}
    plain, chunked = peak_bytes(None, **shape), peak_bytes(32, **shape)
    logits_bytes = 256 * 500 * 4
    assert plain >= 2 * logits_bytes
    assert chunked < 0.4 * logits_bytes  # two matrices of an eighth, and the gradients
