"""The record of a watched update: flat names, means over projected matrices, nothing that JSON does not know."""

from __future__ import annotations

import json

from ngpt.engine.base import UpdateOutcome
from ngpt.loop.train_step import StepResult
from ngpt.telemetry.layers import layer_record


def record_of(statistics):
    update = UpdateOutcome(1.0, 1.0, 1.0, lr=0.1, applied=True, skipped_matrices=0, gradient_bytes=0, statistics=statistics)
    return layer_record(StepResult(7, 700, 100, update, skipped_steps=0, step_seconds=1.0, data_seconds=0.1, batches=[]))


def test_means_are_over_the_matrices_of_which_a_figure_is_known():
    up = {"gradient_rms": 1.0, "captured_energy": 0.5, "rank": 4}
    down = {"gradient_rms": 2.0, "captured_energy": 0.7, "rank": 8, "overlap": 0.25}
    record = record_of({"up": up, "down": down, "norm": {"gradient_rms": 3.0}})
    assert record["step"] == 7
    assert record["tokens"] == 700
    assert record["subspace/captured_energy"] == 0.6
    assert record["subspace/rank"] == 6
    assert record["subspace/overlap"] == 0.25
    assert record["layers/down/overlap"] == 0.25
    assert record["layers/norm/gradient_rms"] == 3.0
    assert "layers/up/overlap" not in record


def test_a_run_without_subspaces_has_no_means_of_them():
    assert not [name for name in record_of({"norm": {"gradient_rms": 3.0}}) if name.startswith("subspace/")]


def test_what_is_not_finite_is_null_and_in_no_mean():
    record = record_of({"up": {"captured_energy": float("nan"), "gradient_rms": float("inf")}, "down": {"captured_energy": 0.5}})
    assert record["layers/up/gradient_rms"] is None
    assert record["layers/up/captured_energy"] is None
    assert record["subspace/captured_energy"] == 0.5
    json.dumps(record, allow_nan=False)
