"""The command line, given anything: a valid configuration, or a ConfigError with a line for every problem."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngpt.config import compose
from ngpt.config.compose import check_arguments, compose_run, group_choices, jobs_of_sweep
from ngpt.config.problems import ConfigError
from ngpt.config.schema import GROUPS, RunConfig
from ngpt.config.suggest import settings as all_settings
from ngpt.config.validate import validate

FACTOR = int(os.environ.get("NGPT_FUZZ", "1"))
NUMBERS = {
    f"{section}.{field.name}": str(field.type)
    for section, variants in GROUPS.items()
    for variant in variants.values()
    for field in dataclasses.fields(variant)
    if any(kind in str(field.type) for kind in ("int", "float")) and "list" not in str(field.type)
}
BASE = ["data=synthetic", "trainer.max_steps=3"]
VALUES = (
    "", "null", "true", "abc", "-3", "0", "1", "nan", "inf", "1e400", "1" * 400, "999999999989", "0.5", "[]", "[1,2]", "[a,[b]]", "{}",
    "{a: {b: [1,{c: 2}]}}", "${oc.env:NO_SUCH_NAME}", "${seed}", "${run.name}", "${", "}", "'", '"', "'a b'", "1,2,3", "choice(1,2)",
    "range(1,4)", "interval(0,1)", "int(3)", "float(abc)", "???", "\\", "é\udc80", "\0", "a\nb", "/", "../..", "a" * 5000, "[[" * 200,
    "glob(*)", "tag(x,1)", "=", "~", "+", "0x10", "5e7", "~/x", "${choices:model}", "${oc.decode:xx}", "$", "%", "*", "/dev/null", "/tmp",
)  # fmt: skip
KEYS = (
    "hydra", "hydra.run.dir", "hydra.mode", "hydra/launcher", "", "=", "a.b.c", "model@x", "model@_global_", "~trainer.max_steps",
    "engine.deepspeed.flops_profiler", "engine.deepspeed.zero_optimization", "engine.deepspeed.", "model.", "..", "model..x", "run.name.x",
    "defaults", "_self_", "experiment@x", "hydra.searchpath", "--x", "-", "-m", "--cfg", "/model", "model/", "\0", "\ud800",
)  # fmt: skip
ANY_YAML = (
    "", "null", "[]", "- a", "a: [", "\0", "\t", "a: b: c", "defaults: 3", "defaults: [x]", "defaults: [{override /model: nothing}]",
    "defaults: [{override /optimizer: [a, b]}]", "model: 3", "model: {}", "model: null", "model: {rank: 3}",
    "optimizer: {lr: {a: 1}}", "trainer: {max_steps: [1]}", "trainer: {max_steps: .nan}", "seed: 1e400", "? {a: b}\n: c", "&a [*a]",
    "a: &a {b: *a}", "!!python/object/apply:os.abort []", "!!binary x", "trainer: {max_steps: 7}", "1: 2", "run: {name: '${run.name}'}",
    "run: {name: '${nothing}'}", "engine: {deepspeed: {1: 2}}", "engine: {deepspeed: {zero_optimization: {stage: {a: [1]}}}}", "x: 1",
)  # fmt: skip


def arguments_from(choice: random.Random) -> list[str]:
    """One to three overrides, some of them sensible."""

    def one() -> str:
        kind = choice.random()
        key = choice.choice(list(all_settings()) if kind < 0.6 else [*GROUPS, "experiment"] if kind < 0.75 else KEYS)
        key = choice.choice(("", "", "", "", "", "", "", "+", "++", "~")) + key
        sensible = key in GROUPS and choice.random() < 0.7
        value = choice.choice(group_choices(key)) if sensible else choice.choice(VALUES)
        return key if choice.random() < 0.05 else f"{key}={value}"

    return BASE * choice.choice((0, 1, 1)) + [one() for _ in range(choice.randint(1, 3))]


def composed(arguments: list[str]) -> RunConfig | list[str]:
    """A configuration, or the problems of one; anything else that is raised is not ours."""
    try:
        return compose_run(arguments)
    except ConfigError as error:
        return error.problems


@settings(max_examples=25 * FACTOR)
@given(choice=st.randoms(use_true_random=False))
def test_any_overrides_give_a_configuration_or_a_list_of_problems(choice: random.Random) -> None:
    """Random overrides | a configuration or a list of problems"""
    result = composed(arguments_from(choice))
    assert isinstance(result, RunConfig) or (result and all(isinstance(line, str) and line for line in result))


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    return compose_run(BASE)


@settings(max_examples=300 * FACTOR)
@given(path=st.sampled_from(sorted(NUMBERS)), data=st.data())
def test_any_number_for_any_setting_is_accepted_or_refused_in_no_time(sound: RunConfig, path: str, data: st.DataObject) -> None:
    """Any number for any setting | accepted or refused, in no time"""
    whole = st.integers() | st.integers(2**60, 2**70) | st.just(10**400)
    value = data.draw(st.floats() if "float" in NUMBERS[path] else whole)
    config = copy.deepcopy(sound)
    section, _, name = path.rpartition(".")
    target = getattr(config, section) if section else config
    if not hasattr(target, name):
        return  # of another variant
    setattr(target, name, value)
    began = time.monotonic()
    try:
        validate(config)
    except ConfigError as error:
        assert any(path.partition(".")[0] in line for line in error.problems)  # noqa: PT017 (both ends are right)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("text", ANY_YAML, ids=range(len(ANY_YAML)))
def test_any_experiment_file_gives_a_configuration_or_a_list_of_problems(
    text: str, conf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any text as an experiment file | a configuration or a list of problems"""
    (conf_folder / "experiment" / "fuzz.yaml").write_text(f"# @package _global_\n{text}\n")
    monkeypatch.setattr(compose, "CONF_DIR", conf_folder)
    assert composed([*BASE, "experiment=fuzz"])


@pytest.fixture(scope="module")
def conf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    shutil.copytree(compose.CONF_DIR, folder, dirs_exist_ok=True)
    return folder


def test_a_batch_size_without_small_divisors_is_answered_at_once() -> None:
    """A huge prime as a batch size | answered at once"""
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"trainer\.global_batch_size = 999999999989: must be a multiple"):
        compose_run([*BASE, "trainer.global_batch_size=999999999989", "trainer.micro_batch_size=499999999979"])
    assert time.monotonic() - began < 20


def test_a_number_that_torch_cannot_count_to_is_refused() -> None:
    """A seed of 41 digits | refused"""
    with pytest.raises(ConfigError, match=r"seed = 1{40}: must be at least 0 and at most 9223372036854775807"):
        compose_run([*BASE, f"seed={'1' * 40}"])


def test_a_file_of_any_other_size_is_not_read_as_a_tokenizer(tmp_path: Path) -> None:
    """A tokenizer file of gigabytes | refused unread"""
    with (tmp_path / "huge.model").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ConfigError, match=r"tokenizer\.path = .*huge\.model: is no SentencePiece model"):
        compose_run(["data=builtin", "trainer.max_steps=3", f"tokenizer.path={tmp_path / 'huge.model'}"])


def test_a_glob_over_the_choices_of_a_group_is_a_sweep() -> None:
    jobs = jobs_of_sweep(["scheduler=glob(*)", "seed=1"])
    assert jobs == [[f"scheduler={name}", "seed=1"] for name in group_choices("scheduler")]
    check_arguments([*BASE, "scheduler=glob(*)"])
