"""Settings that must not change are refused by name; the others are reported."""

from __future__ import annotations

import functools

import pytest

from ngpt.checkpoint.resume import ResumeError, check_settings, settings_of
from ngpt.config.compose import compose_run


@functools.cache
def settings(*overrides, fingerprint="abc"):
    optimizer = [] if any(override.startswith("optimizer=") for override in overrides) else ["optimizer=natural_galore_paper"]
    config = compose_run(["model=llama_9m", "data=synthetic", *optimizer, "optimizer.rank=16", "trainer.max_steps=10", *overrides])
    return settings_of(config, tokenizer_fingerprint=fingerprint)


def test_the_same_settings_are_silent():
    assert check_settings(settings(), settings(), checkpoint="c") == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=256", "model.hidden_size: 128 in the checkpoint, 256 now"),
        ("model.rope_theta=5e5", "model.rope_theta"),
        ("optimizer.rank=8", "optimizer.rank: 16 in the checkpoint, 8 now"),
        ("optimizer=galore", "optimizer.name: 'natural_galore' in the checkpoint, 'galore' now"),
        ("optimizer.fisher=two_sided", "optimizer.fisher: 'history' in the checkpoint, 'two_sided' now"),
        ("optimizer.history=3", "optimizer.history: 20 in the checkpoint, 3 now"),
        ("optimizer.moments=adafactor", "optimizer.moments: 'adam' in the checkpoint, 'adafactor' now"),
        ("optimizer.complement=fira", "optimizer.complement: 'none' in the checkpoint, 'fira' now"),
        ("optimizer.state_dtype=8bit", "optimizer.state_dtype: 'fp32' in the checkpoint, '8bit' now"),
        ("optimizer.embeddings=true", "optimizer.embeddings"),
        ("trainer.seq_len=64", "trainer.seq_len"),
        ("trainer.global_batch_size=64", "trainer.global_batch_size"),
        ("data.shuffle_window=3", "data.shuffle_window"),
        ("trainer.precision=fp32", "trainer.precision: 'bf16' in the checkpoint, 'fp32' now"),
        ("seed=1", "seed: 0 in the checkpoint, 1 now"),
    ],
)
def test_what_must_stay_is_refused_by_name(override, named):
    """Resume with another model, rank, precision, batch, data or seed | refused, naming the setting and both values"""
    with pytest.raises(ResumeError, match="must not change") as error:
        check_settings(settings(), settings(override), checkpoint="runs/x/step-0000100")
    assert named in str(error.value)
    assert "runs/x/step-0000100" in str(error.value)
    assert "run.name=" in str(error.value)


def test_another_tokenizer_is_refused_by_its_content():
    """Resume with another tokenizer under the same path | refused by its content"""
    with pytest.raises(ResumeError, match=r"tokenizer\.fingerprint: 'abc' in the checkpoint, 'def' now"):
        check_settings(settings(), settings(fingerprint="def"), checkpoint="c")


def test_all_refusals_come_at_once():
    with pytest.raises(ResumeError) as error:
        check_settings(settings(), settings("seed=1", "trainer.seq_len=64"), checkpoint="c")
    assert "seed" in str(error.value)
    assert "trainer.seq_len" in str(error.value)


def test_what_may_change_is_reported():
    lines = check_settings(settings(), settings("trainer.max_steps=20", "optimizer.lr=0.5", "trainer.micro_batch_size=8"), checkpoint="c")
    assert lines == ["optimizer.lr: 0.01 -> 0.5", "trainer.max_steps: 10 -> 20", "trainer.micro_batch_size: 16 -> 8"]


def test_how_a_run_is_spread_over_processes_may_change():
    lines = check_settings(settings(), settings("engine=deepspeed", "engine.zero_stage=3"), checkpoint="c")
    assert "engine.zero_stage: 1 -> 3" in lines
    assert all(line.startswith("engine.") for line in lines)


def test_where_and_how_to_watch_is_nobodys_business():
    assert check_settings(settings(), settings("run.name=other", "logger.every_steps=3", "checkpoint.keep=9"), checkpoint="c") == []
