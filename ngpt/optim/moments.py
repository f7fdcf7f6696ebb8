"""The moments of a projected gradient and the direction they give: Adam, Adam with a factored second moment, or momentum.

GaLore's claim (arXiv:2403.03507) is that its projection goes with any of them. All work on a low-rank gradient of shape (r, b), r rank
and b long side. `t` is the number of updates that the moments have seen since they were last zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngpt.optim import adam, rotation
from ngpt.optim.storage import Stored, allocate, compute_dtype, rows_per_piece

MOMENTS = ("adam", "adafactor", "momentum")
MOMENT_KEYS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "exp_avg_sq_row", "exp_avg_sq_col")

State = dict[str, Tensor]


def allocate_moments(kind: str, shape: torch.Size, state_dtype: str, like: Tensor, device: torch.device) -> State:
    """Zero state for a low-rank gradient of this shape of the parameter `like`."""
    state = allocate("exp_avg", shape, state_dtype, like, device)
    if kind == "adam":
        state |= allocate("exp_avg_sq", shape, state_dtype, like, device)
    if kind == "adafactor":
        state["exp_avg_sq_row"] = torch.zeros(shape[0], dtype=compute_dtype(like), device=device)
        state["exp_avg_sq_col"] = torch.zeros(shape[1], dtype=compute_dtype(like), device=device)
    return state


def clear_moments_(state: State) -> None:
    """Set the moments to zero."""
    for key in MOMENT_KEYS:
        if key in state:
            state[key].zero_()


def step_factor(kind: str, betas: tuple[float, float], t: int) -> float:
    """The factor on lr N that corrects the bias of the moments."""
    return 1 / (1 - betas[0] ** t) if kind == "momentum" else adam.galore_step_factor(betas, t)


def direction(
    kind: str,
    state: State,
    low_rb: Tensor,
    betas: tuple[float, float],
    eps: float,
    generator: torch.Generator | None,
    row_means_r: Tensor | None = None,
) -> Tensor:
    """Update the moments with R and return N, shape (r, b).

    `adam`: N = m / (sqrt(v) + eps). `momentum`: N = m. `adafactor`: Adam with v_ij = p_i q_j / mean(p), p and q the EMAs of the row and
    column means of R o R (Adafactor, arXiv:1804.04235, section 3, without its clipping and its own rate); it is given the row means
    (`row_means`), as R may be a part of the columns.
    """
    if kind == "adafactor":
        assert row_means_r is not None
        row_r, col_b = state["exp_avg_sq_row"][: low_rb.shape[0]], state["exp_avg_sq_col"]
        row_r.lerp_(row_means_r, 1 - betas[1])
        col_b.lerp_(low_rb.square().mean(0), 1 - betas[1])
        row_scale_r1 = (row_r / row_r.mean().clamp(min=torch.finfo(row_r.dtype).tiny))[:, None]
    rows = rows_per_piece(low_rb, state)
    result = torch.empty_like(low_rb)
    firsts = Stored.of(state, "exp_avg", low_rb.shape).split(rows)
    seconds = Stored.of(state, "exp_avg_sq", low_rb.shape).split(rows) if kind == "adam" else firsts
    for number, (grad, out, first, second) in enumerate(zip(low_rb.split(rows), result.split(rows), firsts, seconds, strict=True)):
        m = first.read()
        grad = grad.to(m.dtype)  # fp64 gradients meet fp32 copies of moments in fewer bits
        if kind == "adam":
            v = second.read()
            adam.update_moments_(m, v, grad, betas)
            adam.galore_direction(m, v, eps, out=out)
            second.write_(v, generator)
        else:
            m.lerp_(grad, 1 - betas[0])
            if kind == "momentum":
                out.copy_(m)
            else:
                adam.galore_direction(m, row_scale_r1[number * rows : (number + 1) * rows] * col_b, eps, out=out)
        first.write_(m, generator)
    return result


def row_means(low_rb: Tensor, width: int) -> Tensor:
    """Row means (r) of R o R over `width` columns. Of a part of them they are a part of the sum."""
    return low_rb.square().sum(1) / width


def read_moments(kind: str, state: State, shape: torch.Size) -> State:
    """The moments of shape (rank in use, columns) as values for arithmetic."""
    stored = ("exp_avg", "exp_avg_sq") if kind == "adam" else ("exp_avg",)
    values = {key: Stored.of(state, key, shape).read() for key in stored}
    if kind == "adafactor":
        values |= {"exp_avg_sq_row": state["exp_avg_sq_row"][: shape[0]], "exp_avg_sq_col": state["exp_avg_sq_col"]}
    return values


def rotated_moments(values: State, changes: tuple[Tensor, ...], betas: tuple[float, float], t: int) -> State:
    """Moments in a new basis, which may have another rank, after t > 0 updates.

    `changes` holds C = P_new' P_old of shape (r_new, r_old) and, where the long side is projected too, the same for its basis: then the
    moments must have all of their columns.
    """
    first = values["exp_avg"]
    across, *along_long = (change_rr.to(first.dtype) for change_rr in changes)
    if "exp_avg_sq" in values:
        first, second = rotation.rotate_moments(across, first, values["exp_avg_sq"], betas, t)
        for change_rr in along_long:
            first, second = (turned.mT for turned in rotation.rotate_moments(change_rr, first.mT, second.mT, betas, t))
        return {"exp_avg": first, "exp_avg_sq": second}
    first = across @ first
    for change_rr in along_long:
        first = first @ change_rr.mT
    if "exp_avg_sq_row" not in values:
        return {"exp_avg": first}
    row_r, col_b = _rotated_factors(values["exp_avg_sq_row"], values["exp_avg_sq_col"], changes)
    return {"exp_avg": first, "exp_avg_sq_row": row_r, "exp_avg_sq_col": col_b}


def replace_moments_(state: State, values: State, generator: torch.Generator | None) -> None:
    """Keep new values."""
    for key, value in values.items():
        state[key].zero_()  # where the rank shrinks, nothing may stay behind
        if value.ndim == 2:
            Stored.of(state, key, value.shape).write_(value, generator)
        else:
            state[key][: len(value)] = value


def _rotated_factors(row_r: Tensor, col_b: Tensor, changes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """p <- (C o C) p: the mean square of each new coordinate if the old ones are uncorrelated. p and q keep their one common mean."""
    tiny = torch.finfo(row_r.dtype).tiny
    mean = row_r.mean().clamp(min=tiny)
    turned_row = changes[0].square() @ row_r
    if len(changes) > 1:
        turned_col = changes[1].square() @ col_b
        turned_row *= turned_col.mean() / mean  # what the long side lost
        mean = turned_col.mean().clamp(min=tiny)
        col_b = turned_col
    return turned_row, col_b * (turned_row.mean() / mean)
