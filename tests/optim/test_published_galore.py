"""GaLore with the published settings repeats what the published optimizer did on recorded gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ngpt.optim import GaLore, NaturalGaLore

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
SHAPES = ("tall", "wide", "square")
METHODS = {"galore": GaLore, "galore_two_sided": GaLore, "natural_two_sided": NaturalGaLore}
CASES = [
    *(f"galore_{shape}{decay}" for shape in SHAPES for decay in ("", "_decay")),
    *(f"galore_two_sided_{shape}" for shape in SHAPES),
    *(f"natural_two_sided_{shape}{length}" for shape in SHAPES for length in ("", "_short")),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_optimizer(case: str) -> None:
    file = GOLDEN / f"{case}.npz"
    if not file.exists():
        pytest.skip(f"no recorded run of the published optimizer at {file}")
    record = np.load(file)
    method = str(record["method"])
    options = {"fisher": "two_sided", "history": int(record["history"]), "damping": 1e-3}
    weight = torch.nn.Parameter(torch.tensor(record["initial"]))
    group = {
        "params": [weight],
        "rank": int(record["rank"]),
        "update_proj_gap": int(record["update_proj_gap"]),
        "scale": float(record["scale"]),
        "proj_type": "std" if method == "galore" else "full",
    }
    optimizer = METHODS[method](
        [group],
        lr=float(record["lr"]),
        betas=tuple(record["betas"].tolist()),
        eps=float(record["eps"]),
        weight_decay=float(record["weight_decay"]),
        on_refresh="keep",
        subspace="svd",
        stagger=False,
        **(options if method == "natural_two_sided" else {}),
    )
    for gradient, expected in zip(record["gradients"], record["weights"], strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_equals_the_formulas_written_out_in_float64(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rank, lr, b1, b2, eps, scale, decay = 3, 0.02, 0.9, 0.99, 1e-6, 0.5, 0.1
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected = weight.detach().clone()
    optimizer = GaLore([{"params": [weight], "rank": rank, "scale": scale}], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    basis, first, second = None, 0, 0
    for t in range(1, 8):
        grad = torch.randn(shape, dtype=torch.float64)
        weight.grad = grad.clone()
        optimizer.step()
        if basis is None:
            left, _, right = np.linalg.svd(grad.numpy())
            basis = torch.tensor(right[:rank].T if shape[0] >= shape[1] else left[:, :rank])
        low = grad @ basis if shape[0] >= shape[1] else basis.T @ grad
        first, second = b1 * first + (1 - b1) * low, b2 * second + (1 - b2) * low**2
        direction = first / (second.sqrt() + eps)
        lifted = direction @ basis.T if shape[0] >= shape[1] else basis @ direction
        expected = expected - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * scale * lifted
        expected = expected - lr * decay * expected
        torch.testing.assert_close(weight.detach(), expected, atol=1e-10, rtol=0)
