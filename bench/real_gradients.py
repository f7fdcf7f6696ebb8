"""Gradients of a real LLaMA on real text, for measuring what is done to gradients: a small model of ours, trained for a few steps."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ngpt.config.schema import LocalC4DataConfig, ModelConfig
from ngpt.data.json_lines import expand_globs
from ngpt.data.loader import build_train_loader
from ngpt.data.tokenizer import Tokenizer
from ngpt.dist.ranks import Ranks
from ngpt.model.llama import LlamaForCausalLM
from ngpt.optim import AdamW


def real_gradients(
    model: ModelConfig, files: list[str], tokenizer: Tokenizer, *, at_steps: list[int], rows: int, seq_len: int = 256, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """The gradients of the first block's matrices, by name, after each of these numbers of AdamW's updates on the text of `files`.

    They are gradients of the mean loss of `rows` rows of `seq_len` tokens, and so of a rank of at most rows times seq_len: take more
    tokens than the rank that is asked of them.
    """
    torch.manual_seed(0)
    llama = LlamaForCausalLM(model).to(device)
    optimizer = AdamW(llama.parameters(), lr=1e-3, weight_decay=0.0)
    loader = build_train_loader(
        LocalC4DataConfig(train_files=expand_globs(files, option="--files")),
        tokenizer,
        vocab_size=model.vocab_size,
        seq_len=seq_len,
        micro_batch_size=rows,
        global_batch_size=rows,
        seed=0,
        ranks=Ranks(0, 1, 0),
    )
    matrices = {name: p for name, p in llama.model.layers[0].named_parameters() if p.ndim == 2}
    taken: list[dict[str, Tensor]] = []
    with contextlib.closing(loader):
        for step in range(max(at_steps) + 1):
            batch = next(loader)
            inputs = {name: tensor.to(device) for name, tensor in batch.model_inputs().items()}
            (llama(**inputs) / batch.num_label_tokens).backward()
            if step in at_steps:
                taken.append({name: p.grad.clone() for name, p in matrices.items() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    return taken
