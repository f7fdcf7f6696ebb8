"""Rotary positions and document borders, against formulas that share nothing with the code."""

from __future__ import annotations

import math

import pytest
import torch

from ngpt.model.attention import apply_rotary, document_causal_mask, document_index, positions_in_document, rotary_tables


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_is_multiplication_by_a_complex_phase(theta):
    x = torch.randn(2, 9, 3, 8)
    turned = apply_rotary(x, rotary_tables(torch.arange(9), 8, theta))
    for position in range(9):
        for pair in range(4):
            phase = position * theta ** (-2 * pair / 8)
            expected = torch.complex(x[:, position, :, pair], x[:, position, :, pair + 4]) * complex(math.cos(phase), math.sin(phase))
            actual = torch.complex(turned[:, position, :, pair], turned[:, position, :, pair + 4])
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_angles_are_fp32_exact_at_far_positions_of_a_bf16_model():
    positions = torch.tensor([0, 1000, 4093])
    cos, sin = rotary_tables(positions, 64, 10000.0)
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    for table, expected in ((cos, angles.cos()), (sin, angles.sin())):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table[:, 0].double(), expected, atol=1e-3, rtol=0)  # 4093 rounded to bf16 is 3 radians off
    x = torch.randn(1, 3, 2, 64).bfloat16()
    turned = apply_rotary(x, (cos, sin))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), (cos, sin)).bfloat16())


def test_positions_and_mask_by_hand():
    index = document_index(torch.tensor([[7, 7, 3, 7, 7], [1, 1, 1, 1, 1]]))
    assert index.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert positions_in_document(index).tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]
    mask = document_causal_mask(index)
    assert mask.shape == (2, 1, 5, 5)
    for row, documents in enumerate(index.tolist()):
        for query in range(5):
            allowed = [key <= query and documents[key] == documents[query] for key in range(5)]
            assert mask[row, 0, query].tolist() == allowed
