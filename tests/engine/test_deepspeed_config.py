"""What users may tell DeepSpeed past ngpt, what they may not, and the dictionary that comes out of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ngpt.config.problems import ConfigError
from ngpt.engine.deepspeed_config import deepspeed_config, deepspeed_problems, speaks

SHAPE = {"zero_stage": 3, "micro_batch_size": 4, "accumulation_steps": 2, "world_size": 8}


def only_problem(options, stage=3):
    (line,) = deepspeed_problems(options, zero_stage=stage)
    return line


def test_the_trainers_settings_make_the_dictionary():
    config = deepspeed_config({}, **SHAPE)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"] == {"stage": 3}
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default clips
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & config.keys()


def test_further_options_are_passed_on():
    options = {
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "zero_optimization": {"stage3_prefetch_bucket_size": 5e7, "offload_param": {"device": "cpu", "pin_memory": False}},
    }
    config = deepspeed_config(options, **SHAPE)
    assert config["wall_clock_breakdown"] is True
    assert config["flops_profiler"] == {"enabled": True, "profile_step": 3}
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 50_000_000,
        "offload_param": {"device": "cpu", "pin_memory": False},
    }
    assert isinstance(config["zero_optimization"]["stage3_prefetch_bucket_size"], int)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"train_batch_size": 8}, "trainer.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "trainer.micro_batch_size"),
        ({"gradient_accumulation_steps": 8}, "trainer.global_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer=NAME"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler=NAME"),
        ({"bf16": {"enabled": True}}, "trainer.precision"),
        ({"fp16": {"enabled": True}}, "trainer.precision"),
        ({"amp": {"enabled": True}}, "trainer.precision"),
        ({"gradient_clipping": 1.0}, "trainer.grad_clip"),
        ({"activation_checkpointing": {}}, "trainer.activation_checkpointing"),
        ({"wandb": {"enabled": True}}, "logger.wandb"),
        ({"communication_data_type": "fp32"}, "engine.communication_dtype"),
        ({"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.offload_optimizer"),
    ],
)
def test_what_ngpt_sets_itself_names_both_settings(options, setting):
    line = only_problem(options)
    key, value = next(iter(options.items()))
    path = f"{key}.{next(iter(value))}" if key == "zero_optimization" else key
    assert line.startswith(f"engine.deepspeed.{path} = ")
    assert setting in line


@pytest.mark.parametrize(
    "options",
    [
        {"managed_gradient_accumulation": False},
        {"gradient_predivide_factor": 2.0},
        {"expert_parallel": {"enabled": True}},
        {"torch_autocast": {"enabled": True}},
        {"zero_optimization": {"zenflow": {}}},
        {"zero_optimization": {"zero_quantized_weights": True}},
        {"zero_optimization": {"zero_hpz_partition_size": 2}},
        {"zero_optimization": {"reduce_bucket_size": 1}},
        {"zero_optimization": {"offload_param": {"device": "nvme"}}},
        {"zero_optimization": {"offload_param": {"device": "cpu", "nvme_path": "/x"}}},
    ],
)
def test_what_our_optimizer_cannot_honour_is_refused_with_a_reason(options):
    """Options of DeepSpeed that the optimizer cannot honour | refused, each with its reason"""
    line = only_problem(options)
    assert line.count(":") >= 1
    assert "no such option" not in line


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"wall_clock_breakdwn": True}, "engine.deepspeed.wall_clock_breakdown"),
        ({"zero_optimisation": {}}, "engine.deepspeed.zero_optimization"),
        ({"zero_optimization": {"stage3_prefetch_bucket": 1}}, "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size"),
        ({"zero_optimization": {"max_live_params": 1}}, "engine.deepspeed.zero_optimization.max_live_parameters"),
    ],
)
def test_a_misspelt_option_gets_a_suggestion(options, meant):
    """A misspelt option of DeepSpeed | refused with a suggestion"""
    assert f"did you mean {meant}?" in only_problem(options)


def test_an_unknown_option_lists_what_there_is():
    assert "wall_clock_breakdown" in only_problem({"teleport": True})


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"wall_clock_breakdown": "auto"}, "true or false"),
        ({"flops_profiler": True}, "section"),
        ({"steps_per_print": -1}, "at least 0"),
        ({"zero_optimization": 3}, "engine.zero_stage"),
        ({"zero_optimization": {"max_live_parameters": "auto"}}, "whole number"),
        ({"zero_optimization": {"max_live_parameters": 1.5}}, "whole number"),
        ({"zero_optimization": {"overlap_comm": 1}}, "true or false"),
        ({"log_level": "loud"}, "debug"),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused(options, rule):
    assert rule in only_problem(options)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_options_of_stage_3_are_refused_below_it(stage):
    assert f"engine.zero_stage={stage}" in only_problem({"zero_optimization": {"overlap_comm": True}}, stage)
    assert deepspeed_problems({"zero_optimization": {}}, zero_stage=stage) == []


def test_all_problems_come_in_one_error():
    options = {"fp16": {"enabled": True}, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1, "zenflow": {}}}
    with pytest.raises(ConfigError) as error:
        deepspeed_config(options, **SHAPE)
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"wall_clock_breakdown": True}, True),
        ({"comms_logger": {"enabled": False}}, False),
        ({"comms_logger": {"enabled": True}}, True),
        ({"csv_monitor": {"enabled": True}}, False),
    ],
)
def test_deepspeed_speaks_only_when_asked(options, expected):
    assert speaks(options) is expected


def test_options_are_checked_without_torch_and_deepspeed():
    code = "import sys, ngpt.engine.deepspeed_config; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_option_of_the_installed_deepspeed_is_known():
    """What DeepSpeed gains in another version is judged before it can be used."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    fields = config.DeepSpeedZeroConfig.model_fields
    options = [name for key, field in fields.items() for name in {key, field.alias or key}]
    lines = deepspeed_problems({"zero_optimization": dict.fromkeys(options, None)}, zero_stage=3)
    assert [line for line in lines if "no such option" in line] == []
