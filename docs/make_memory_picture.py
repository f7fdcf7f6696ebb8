"""Draws docs/memory.png: what an update needs at its peak beside activations, by model and optimizer, as `python -m ngpt.plan` computes it.

python docs/make_memory_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

from ngpt.config.compose import compose_run
from ngpt.planning.memory import estimate_memory

PICTURE = Path(__file__).resolve().parent / "memory.png"
MODELS = ("350m", "1b", "7b")
# One micro-batch an update, so that all can be applied inside backward.
WAYS = {
    "AdamW, plain backward": ["optimizer=adamw", "optimizer.apply=whole"],
    "GaLore, plain backward": ["optimizer=galore", "optimizer.apply=whole"],
    "GaLore, layer by layer": ["optimizer=galore", "optimizer.apply=immediate"],
    "Natural GaLore (default), layer by layer": ["optimizer=natural_galore", "optimizer.apply=immediate"],
    "the same, rank / 4, embeddings too": ["optimizer=natural_galore", "optimizer.apply=immediate", "optimizer.embeddings=true"],
}
RANKS = {"350m": 256, "1b": 512, "7b": 1024}
KINDS = {"weights": "#4477aa", "optimizer state": "#ee6677", "gradients": "#ccbb44"}


def sizes(model: str, way: str) -> dict[str, float]:
    """GiB by kind; of gradients the most that is alive at one time."""
    rank = RANKS[model] // (4 if "rank / 4" in way else 1)
    low_rank = [] if "adamw" in WAYS[way][0] else [f"optimizer.rank={rank}"]
    common = ["trainer.precision=bf16", "optimizer.state_dtype=bf16", "trainer.global_batch_size=16", "trainer.micro_batch_size=16"]
    overrides = [f"model=llama_{model}", "data=synthetic", "trainer.max_steps=10", *common, *WAYS[way], *low_rank]
    largest = estimate_memory(compose_run(overrides)).largest
    return {kind: largest[kind] / 2**30 for kind in KINDS}


def main() -> None:
    """Entry point."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(11, 2.9), sharey=True, layout="constrained")
    for axis, model in zip(axes, MODELS, strict=True):
        rows = [sizes(model, way) for way in WAYS]
        left = [0.0] * len(rows)
        for kind, colour in KINDS.items():
            axis.barh(list(WAYS), [row[kind] for row in rows], left=left, color=colour, label=kind)
            left = [start + row[kind] for start, row in zip(left, rows, strict=True)]
        for place, total in enumerate(left):
            axis.text(total + max(left) * 0.02, place, f"{total:.1f}" if total >= 10 else f"{total:.2f}", va="center", fontsize=9)
        axis.set(title=f"LLaMA {model.upper()}, GiB", xlim=(0, max(left) * 1.18))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
