"""Natural GaLore on a module of your own: it learns to shift bytes."""

import torch
from torch import nn

from ngpt.optim import NaturalGaLore, low_rank_groups, state_bytes

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 256))
groups = low_rank_groups(model, rank=16, update_proj_gap=50, scale=1.0)  # the linear layers are projected, the embedding is not
optimizer = NaturalGaLore(groups, lr=0.003, fisher="diagonal")

for step in range(100):
    inputs = torch.randint(0, 256, (512,))
    loss = nn.functional.cross_entropy(model(inputs), (inputs + 3) % 256)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"optimizer state: {state_bytes(optimizer)['total']:,} bytes; AdamW has {8 * sum(p.numel() for p in model.parameters()):,}")
