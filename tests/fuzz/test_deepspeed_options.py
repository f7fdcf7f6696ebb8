"""Options of DeepSpeed, given anything: a dictionary that says what ngpt means, or a ConfigError."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.config.problems import ConfigError
from ngpt.engine import deepspeed_config as module
from ngpt.engine.deepspeed_config import ZERO, deepspeed_config, speaks

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))
KNOWN = [*module._SET_BY_NGPT, *module._REFUSED, *module._PASSED_ON, *module._PASSED_ON_AT_STAGE_3, ZERO, "enabled", "device", "stage"]
KEYS = st.sampled_from([name.rpartition(".")[2] for name in KNOWN]) | st.text(max_size=4) | st.none() | st.integers() | st.booleans()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["cpu", "none", "info", 10**400, 5e7]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150 * FACTOR)
@given(options=st.dictionaries(KEYS, VALUES, max_size=2), zero=st.none() | VALUES, stage=st.integers(0, 3))
def test_any_options_make_a_dictionary_of_ours_or_a_list_of_problems(options: dict[Any, Any], zero: Any, stage: int) -> None:
    """Any options of DeepSpeed (hypothesis) | a dictionary whose values are ours, or a list of problems"""
    options = options | ({} if zero is None else {ZERO: zero})
    try:
        result = deepspeed_config(options, zero_stage=stage, micro_batch_size=2, accumulation_steps=3, world_size=4)
    except ConfigError as error:
        assert all(line.startswith("engine.deepspeed.") for line in error.problems)  # noqa: PT017 (both ends are right)
        return
    assert isinstance(speaks(options), bool)
    json.dumps(result)
    own = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 24, "gradient_clipping": 0.0}
    assert own.items() <= result.items()
    assert result[ZERO]["stage"] == stage
    assert not result.keys() & {"optimizer", "scheduler", "fp16", "bf16", "amp"}


@pytest.mark.parametrize("count", [10**400, -(10**400), 2**63, float("nan"), float("inf"), 1e300, True, "5"])
def test_a_count_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.steps_per_print = .*: must be "):
        deepspeed_config({"steps_per_print": count}, zero_stage=0, micro_batch_size=1, accumulation_steps=1, world_size=1)
