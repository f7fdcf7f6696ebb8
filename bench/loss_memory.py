"""Peak memory of the chunked head and loss against the plain one, forward and backward: `python -m bench.loss_memory`.

On CUDA the allocator's peak; on the CPU the bytes of all tensors alive at one time, as the dispatcher sees them (not the temporaries
inside one kernel). The inputs (hidden states, weight, labels) are there in both and not counted; the gradients of both are.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.live_bytes import LiveTensorBytes
from ngpt.model.loss import IGNORE_INDEX, chunked_cross_entropy


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is commonly written, in at least fp32: all logits at one time."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def peak_bytes(
    chunk_tokens: int | None, *, num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> int:
    """Most bytes alive in one forward and backward beyond the inputs; `chunk_tokens=None` for the plain loss."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, dtype=dtype, device=device) * 0.02).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,), device=device)

    def forward_and_backward() -> None:
        if chunk_tokens is None:
            loss = plain_cross_entropy(hidden, weight, labels)
        else:
            loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        (loss / num_tokens).backward()

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward()
        return torch.cuda.max_memory_allocated() - before
    with LiveTensorBytes() as count:
        forward_and_backward()
    return count.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="positions of a micro-batch")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 1024, 512, 128], help="positions whose logits exist at one time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape = {"num_tokens": options.tokens, "hidden_size": options.hidden_size, "vocab_size": options.vocab_size}
    common = shape | {"dtype": getattr(torch, options.dtype), "device": options.device}
    plain = peak_bytes(None, **common)
    print(f"{options.tokens} tokens, hidden {options.hidden_size}, vocabulary {options.vocab_size}, {options.dtype}, {options.device}")
    print(f"plain                {plain / 2**20:9.1f} MiB")
    for chunk_tokens in options.chunks:
        chunked = peak_bytes(chunk_tokens, **common)
        print(f"chunks of {chunk_tokens:<6}     {chunked / 2**20:9.1f} MiB  {chunked / plain:.3f} of the plain one")


if __name__ == "__main__":
    main()
