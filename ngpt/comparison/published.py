"""The published table of the GaLore benchmark, methods x sizes, and ours in its layout: perplexity, and memory of weights and states."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ngpt.comparison.arms import Request
from ngpt.comparison.results import Standing
from ngpt.config.compose import group_choices
from ngpt.config.problems import ConfigError, problem
from ngpt.config.schema import steps_in_run
from ngpt.config.suggest import nearest
from ngpt.report.page import Section, Table

TABLES = ("c4",)
_EXPERIMENT = re.compile(r"(?P<table>[a-z0-9]+)_(?P<size>\d+[mb])_(?P<method>\w+)")


@dataclass(frozen=True)
class Published:
    """A row of a published table: perplexity and GB of weights and optimizer states in bf16, by size."""

    method: str
    label: str
    source: str
    cells: dict[str, tuple[float, float]]


# Their perplexities divide the summed loss by n + 1 batches, as val/perplexity_galore_protocol does. Natural GaLore's are exp of its
# paper's losses 3.53, 3.22, 2.93 and 2.80.
PUBLISHED = (
    Published("adamw", "Full rank, AdamW", "GaLore, arXiv:2403.03507, Table 2",
              {"60m": (34.06, 0.36), "130m": (25.08, 0.76), "350m": (18.80, 2.06), "1b": (15.56, 7.80)}),
    Published("galore", "GaLore", "GaLore, arXiv:2403.03507, Table 2",
              {"60m": (34.88, 0.24), "130m": (25.36, 0.52), "350m": (18.95, 1.22), "1b": (15.64, 4.38)}),
    Published("natural_galore", "Natural GaLore", "arXiv:2410.16029",
              {"60m": (34.1, 0.24), "130m": (25.0, 0.52), "350m": (18.7, 1.22), "1b": (16.4, 4.38)}),
    Published("low_rank", "Low-Rank", "GaLore, arXiv:2403.03507, Table 2",
              {"60m": (78.18, 0.26), "130m": (45.51, 0.54), "350m": (37.41, 1.08), "1b": (142.53, 3.57)}),
    Published("lora", "LoRA", "GaLore, arXiv:2403.03507, Table 2",
              {"60m": (34.99, 0.36), "130m": (33.92, 0.80), "350m": (25.58, 1.76), "1b": (19.21, 6.17)}),
    Published("relora", "ReLoRA", "GaLore, arXiv:2403.03507, Table 2",
              {"60m": (37.04, 0.36), "130m": (29.37, 0.80), "350m": (29.08, 1.76), "1b": (18.33, 6.17)}),
)  # fmt: skip


def requests_of_table(table: str, sizes: Sequence[str], methods: Sequence[str]) -> list[Request]:
    """An arm for each experiment `<table>_<size>_<method>` of conf/experiment, a column for each size; no sizes or methods: all.

    Raises ConfigError for a size or a method without an experiment.
    """
    found = [match for name in group_choices("experiment") if (match := _EXPERIMENT.fullmatch(name)) and match["table"] == table]
    problems = []
    for option, given, group in (("--sizes", sizes, "size"), ("--methods", methods, "method")):
        there = list(dict.fromkeys(match[group] for match in found))
        for word in given:
            if word not in there:
                guess = nearest(word, there)
                fix = f"did you mean {guess}?" if guess else f"choose from {', '.join(there)}"
                problems.append(problem(option, word, f"conf/experiment has no {table}_SIZE_METHOD of it", fix))
    if problems:
        raise ConfigError(problems)
    return [
        Request(match["method"], (f"experiment={match[0]}",), match["size"])
        for match in found
        if (not sizes or match["size"] in sizes) and (not methods or match["method"] in methods)
    ]


def table_section(standings: Sequence[Standing]) -> Section:
    """Ours and the published rows, one column a size."""
    sizes = list(dict.fromkeys(each.arm.column for each in standings))
    methods = list(dict.fromkeys(each.arm.name for each in standings))
    ours = {(each.arm.name, each.arm.column): each for each in standings}
    rows = []
    for method in methods:
        published = next((row for row in PUBLISHED if row.method == method), None)
        rows.append([f"{published.label if published else method}, here", *(_cell(ours.get((method, size))) for size in sizes)])
        rows += [_published_row(published, sizes)] if published else []
    rows += [_published_row(row, sizes) for row in PUBLISHED if row.method not in methods]
    steps = [f"{_tokens(next(each for each in standings if each.arm.column == size)):.2g} B" for size in sizes]
    rows.append(["tokens in a run, here", *steps])
    caption = (
        "Perplexity by the published arithmetic (mean over seeds), and memory of weights and optimizer states; the exact perplexities are "
        "below. Rows that say published are not measured here."
    )
    return Section("Methods and sizes", [Table(["method", *map(str.upper, sizes)], rows, caption)])


def _published_row(row: Published, sizes: Sequence[str]) -> list[str]:
    cells = [f"{row.cells[size][0]:.2f} ({row.cells[size][1]:.2f}G)" if size in row.cells else "-" for size in sizes]
    return [f"{row.label}, published ({row.source})", *cells]


def _cell(standing: Standing | None) -> str:
    if standing is None or not standing.results:
        return "-"
    perplexity = standing.mean(lambda result: result.galore_perplexity)
    gigabytes = standing.mean(lambda result: result.weights + result.state) / 1e9
    return f"{perplexity:.2f} ({gigabytes:.2f}G)" if math.isfinite(perplexity) else "-"


def _tokens(standing: Standing) -> float:
    """Billions of token positions."""
    trainer = standing.arm.config.trainer
    return steps_in_run(trainer) * trainer.global_batch_size * trainer.seq_len / 1e9
