"""The weight matrices of a decoder block, for validation and for the cost formulas alike."""

from __future__ import annotations


def block_matrices(*, hidden: int, inner: int, key_value: int) -> dict[str, tuple[int, int]]:
    """Shapes (outputs, inputs) of the matrices of one decoder block, by name, in the order of the model.

    Args:
        hidden: width of the residual stream.
        inner: width of the feed-forward layer.
        key_value: width of all key heads together, as of all value heads.
    """
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
