"""From overrides to a RunConfig: mistakes are named with what was meant, sweeps get folders of their own, launchers are understood."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ngpt.config.compose import (
    CONF_DIR,
    check_arguments,
    compose_run,
    refuse_multirun_under_launcher,
    strip_launcher_arguments,
    sweep_name,
    to_run_config,
)
from ngpt.config.optimizers import NaturalGaLoreConfig
from ngpt.config.schema import RunConfig
from ngpt.config.suggest import settings as paths_of_all_settings
from ngpt.config.validate import ConfigError

VALID = ["data=synthetic", "trainer.max_steps=100"]


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_run([*VALID, *overrides])
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------------- mistakes
NO_SUCH = {
    "optimizer.rnk=64": "optimizer.rnk = 64: no such setting; did you mean optimizer.rank?",
    "+optimizer.rnk=64": "optimizer.rnk = 64: no such setting; did you mean optimizer.rank?",
    "++optimizer.rnk=64": "optimizer.rnk = 64: no such setting; did you mean optimizer.rank?",
    "~optimizer.rnk": "optimizer.rnk = : no such setting; did you mean optimizer.rank?",
    "optimizer.galore_scale=0.25": "optimizer.galore_scale = 0.25: no such setting; did you mean optimizer.scale?",
    "optimizer.update_freq=200": "optimizer.update_freq = 200: no such setting; did you mean optimizer.update_proj_gap?",
    "train.max_steps=5": "train.max_steps = 5: no such setting; did you mean trainer.max_steps?",
    "trainer.batch_size=5": "trainer.batch_size = 5: no such setting; did you mean trainer.micro_batch_size?",
    "lr=0.1": "lr = 0.1: no such setting; did you mean optimizer.lr?",
    "+lr=0.1": "lr = 0.1: no such setting; did you mean optimizer.lr?",
    "num_training_steps=5": "num_training_steps = 5: no such setting; did you mean trainer.max_steps?",
    "optimiser=adamw": "optimiser = adamw: no such setting; did you mean optimizer=adamw?",
    "trainer.xyzzy=5": "trainer.xyzzy = 5: no such setting; docs/configuration.md lists all of them",
    "data.train_files=[a]": "data.train_files = [a]: not a setting of data=synthetic; choose data=local_c4 or data=tokenized, or remove it",
    "optimizer.betas.0=0.5": "optimizer.betas.0 = 0.5: no such setting; did you mean optimizer.betas?",
}


@pytest.mark.parametrize("override", NO_SUCH)
def test_an_unknown_setting_is_an_error_that_names_the_nearest(override: str):
    """Settings that do not exist, with and without + | refused, naming the nearest"""
    assert problems_of(override) == [NO_SUCH[override]]


OPTIMIZERS = "adamw, adarankgrad, galore, lora, natural_galore, natural_galore_paper, relora"
WRONG = {
    "optimizer=natural_galor": f"optimizer = natural_galor: must be one of {OPTIMIZERS}; did you mean optimizer=natural_galore?",
    "optimizer=zzz": f"optimizer = zzz: must be one of {OPTIMIZERS}; see --help",
    "~optimizer.rank": "optimizer.rank = 128: a setting cannot be removed; give it a value",
    "+seed=3": "+seed = 3: is a setting already; write it without +",
    "seed=three": "seed = three: must be a whole number; see docs/configuration.md",
    "seed=null": "seed = null: must be a whole number; see docs/configuration.md",
    "optimizer.lr=fast": "optimizer.lr = fast: must be a number; see docs/configuration.md",
    "trainer.max_tokens=1.1B": "trainer.max_tokens = 1.1B: must be a whole number or null; write trainer.max_tokens=1100000000",
    "trainer.max_tokens=1e9": "trainer.max_tokens = 1e9: must be a whole number or null; write trainer.max_tokens=1000000000",
    "optimizer.rank=1.5": "optimizer.rank = 1.5: must be a whole number; see docs/configuration.md",
    "trainer.compile=maybe": "trainer.compile = maybe: must be true or false; see docs/configuration.md",
    "optimizer.betas=0.9": "optimizer.betas = 0.9: must be a list, each item a number; write optimizer.betas='[...]'",
    "--rank=64": "--rank=64: settings are written without dashes; write optimizer.rank=64",
    "--max-steps": "--max-steps: settings are written without dashes; write trainer.max_steps=VALUE",
    "--zzz": "--zzz: settings are written without dashes; see --help",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_right_kind(override: str):
    """Values of the wrong kind | refused, naming the right kind"""
    assert problems_of(override) == [WRONG[override]]


def test_all_mistakes_come_in_one_error():
    assert problems_of("optimizer.rnk=64", "+train.max_steps=5", "seed=x", "optimizer.lr=-1", "trainer.seq_len=4096") == [
        "optimizer.rnk = 64: no such setting; did you mean optimizer.rank?",
        "train.max_steps = 5: no such setting; did you mean trainer.max_steps?",
        "seed = x: must be a whole number; see docs/configuration.md",
        "optimizer.lr = -1.0: must be above 0; the default is 0.01",
        "trainer.seq_len = 4096: must be at most model.max_seq_len = 1024; set trainer.seq_len=1024 or model.max_seq_len=4096",
    ]


def test_a_setting_of_another_optimizer_names_those_that_have_it():
    choices = " or ".join(f"optimizer={name}" for name in ("galore", "natural_galore", "adarankgrad", "lora", "relora"))
    line = f"optimizer.rank = 4: not a setting of optimizer=adamw; choose {choices}, or remove it"
    assert problems_of("optimizer=adamw", "optimizer.rank=4") == [line]
    assert problems_of("optimizer=adamw", "+optimizer.rank=4") == [line]


EXPERIMENT = """# @package _global_
defaults:
  - override /optimizer: galore
optimizer:
  rank: 8
  proj_type: full
"""


@pytest.fixture
def own_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add lines to an experiment `mine`, which is for GaLore, in a copy of conf/."""
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    monkeypatch.setattr("ngpt.config.compose.CONF_DIR", tmp_path / "conf")

    def write(*lines: str) -> None:
        (tmp_path / "conf/experiment/mine.yaml").write_text(EXPERIMENT + "".join(f"{line}\n" for line in lines))

    return write


def test_an_experiment_for_another_optimizer_says_which_of_its_settings_do_not_fit(own_experiment):
    own_experiment()
    assert compose_run([*VALID, "experiment=mine"]).optimizer.rank == 8
    without = ", or copy conf/experiment/mine.yaml to a name of your own, without that"
    missing = "optimizer.proj_type and optimizer.rank, which optimizer=adamw does not have"
    adamw = f"experiment = mine: sets {missing}; choose optimizer=galore{without}"
    assert problems_of("experiment=mine", "optimizer=adamw") == [adamw]
    assert problems_of("optimizer=adamw", "experiment=mine", "optimizer.rnk=3", "seed=x") == [
        adamw,
        "optimizer.rnk = 3: no such setting; did you mean optimizer.rank?",
        "seed = x: must be a whole number; see docs/configuration.md",
    ]
    lora = f"experiment = mine: sets optimizer.proj_type, which optimizer=lora does not have; choose optimizer=galore{without}"
    with pytest.raises(ConfigError) as caught:
        check_arguments([*VALID, "-m", "experiment=mine", "optimizer=adamw,galore,lora"])
    assert caught.value.problems == [adamw, lora]


def test_a_mistake_in_an_experiment_is_named_with_its_file(own_experiment):
    own_experiment("  rnk: 4", "trainer:", "  max_stps: 3")
    assert problems_of("experiment=mine") == [
        "optimizer.rnk = 4: no such setting; did you mean optimizer.rank? (in conf/experiment/mine.yaml)",
        "trainer.max_stps = 3: no such setting; did you mean trainer.max_steps? (in conf/experiment/mine.yaml)",
    ]


def test_text_that_hydra_cannot_parse_is_an_error():
    """An override that cannot be parsed | refused"""
    assert "no viable alternative" in problems_of("optimizer.lr=[3")[0]


@pytest.mark.parametrize("argument", ["--help", "--cfg=job", "--multirun", "--multi", "--info", "hydra.verbose=true", "-m"])
def test_hydras_own_arguments_are_let_through(argument: str):
    check_arguments([*VALID, argument])


def test_every_choice_of_a_sweep_is_checked():
    check_arguments([*VALID, "optimizer=galore,natural_galore", "optimizer.rank=8,16", "-m"])
    with pytest.raises(ConfigError, match=r"optimizer\.rank = 8,16: not a setting of optimizer=adamw"):
        check_arguments([*VALID, "optimizer=galore,adamw", "optimizer.rank=8,16", "-m"])


def test_a_key_that_slips_past_the_schema_is_caught_in_the_composed_configuration():
    cfg = OmegaConf.structured(compose_run(VALID))
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, "optimizer.rnk", 3, force_add=True)
    OmegaConf.update(cfg, "extra", 5, force_add=True)
    with pytest.raises(ConfigError) as caught:
        to_run_config(cfg)
    assert caught.value.problems[0] == "optimizer.rnk = 3: no such setting; did you mean optimizer.rank?"
    assert caught.value.problems[1].startswith("extra = 5: no such setting")


def test_a_missing_group_is_named():
    assert problems_of("~scheduler") == ["scheduler = ???: has no value; give scheduler=..."]


def test_an_interpolation_that_leads_nowhere_is_named():
    assert problems_of("run.name=${model.nam}")[0].startswith("run.name = ?: Interpolation key 'model.nam' not found")


# ---------------------------------------------------------------------------------------------------------- composition
def test_overrides_reach_typed_sections():
    config = compose_run([*VALID, "optimizer.rank=64", "model=llama_20m", "run.name=${model.name}-${optimizer.rank}", "seed=7"])
    assert type(config) is RunConfig
    assert type(config.optimizer) is NaturalGaLoreConfig
    assert (config.optimizer.rank, config.model.name, config.run.name, config.seed) == (64, "llama_20m", "llama_20m-64", 7)


def test_a_run_is_named_after_model_data_and_optimizer():
    assert compose_run(VALID).run.name == "llama_60m-synthetic-natural_galore"


def test_options_of_deepspeed_are_written_like_settings():
    options = ["engine.deepspeed.zero_optimization.overlap_comm=true", "engine.deepspeed.wall_clock_breakdown=true"]
    for arguments in (options, [f"++{option}" for option in options], [f"+{option}" for option in options]):
        config = compose_run([*VALID, "engine=deepspeed", *arguments])
        assert config.engine.deepspeed == {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    assert compose_run([*VALID, "engine=deepspeed", "engine.deepspeed={steps_per_print: 5}"]).engine.deepspeed == {"steps_per_print": 5}
    with pytest.raises(ConfigError, match=r"engine\.deepspeeed"):
        compose_run([*VALID, "engine.deepspeeed.wall_clock_breakdown=true"])


# -------------------------------------------------------------------------------------------------------------- sweeps
def test_jobs_of_a_sweep_are_named_by_what_varies():
    argv = ["-m", "data=synthetic", "optimizer.lr=1e-3,1e-2", "run.name=x", "data.shuffle_window=0"]
    job = ["data=synthetic", "optimizer.lr=0.001", "run.name=x", "data.shuffle_window=0"]
    assert sweep_name("x", job, argv) == "x-optimizer.lr=0.001"
    assert sweep_name("x", ["run.name=x"], ["run.name=x,y", "-m"]) == "x"


PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=200)


@settings(max_examples=30, deadline=None)
@given(st.lists(PRINTABLE, min_size=2, max_size=4, unique=True))
def test_names_of_jobs_are_different_and_safe(values: list[str]):
    quoted = ["tokenizer.path='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" for value in values]
    names = [sweep_name("x", [override], ["-m"]) for override in quoted]
    assert len(set(names)) == len(values)
    assert all(len(name) <= 120 and name.isascii() and not set(name) & set("/\\ *?'\"<>|:") for name in names)


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_a_sweep_under_several_ranks_is_refused_with_the_right_way(flag: str):
    refuse_multirun_under_launcher([*VALID, flag, "optimizer.lr=1,2"], 1)
    refuse_multirun_under_launcher([*VALID, "optimizer.lr=1"], 4)
    with pytest.raises(ConfigError) as caught:
        refuse_multirun_under_launcher([*VALID, flag, "optimizer.lr=1,2"], 4)
    assert f"{flag}: a sweep cannot run inside one launch of several ranks; start one launch per job" in str(caught.value)
    assert 'python -m ngpt.compare --launcher "torchrun --standalone --nproc_per_node 4"' in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ launchers
NAMES = st.sampled_from(["--local_rank", "--local-rank"])
RANKS = st.integers(-1, 4095).map(str)
LAUNCHER = st.one_of(st.tuples(NAMES, RANKS), st.tuples(NAMES, RANKS).map(lambda pair: ("=".join(pair),)))
ORDINARY = st.one_of(
    st.sampled_from(["-m", "--multirun", "--cfg", "job", "optimizer.rank=4", "+local_rank=3", "~experiment", "--local_rankings=3", "7"]),
    st.text(min_size=1).filter(lambda text: not text.startswith(("--local_rank", "--local-rank"))),
)


@settings(deadline=None)
@given(st.lists(st.one_of(ORDINARY.map(lambda argument: (argument,)), LAUNCHER)))
def test_stripping_removes_what_launchers_add_and_nothing_else(pieces: list[tuple[str, ...]]):
    argv = [argument for piece in pieces for argument in piece]
    kept = [piece[0] for piece in pieces if piece[0].partition("=")[0] not in ("--local_rank", "--local-rank")]
    assert strip_launcher_arguments(argv) == kept
    assert strip_launcher_arguments(kept) == kept


def test_a_local_rank_without_a_number_takes_nothing_along():
    assert strip_launcher_arguments(["--local_rank", "seed=1"]) == ["seed=1"]
    assert strip_launcher_arguments(["seed=1", "--local-rank"]) == ["seed=1"]


# ----------------------------------------------------------------------------------------------------- the command line
APPLICATION = """
import sys
import hydra
from ngpt.config.compose import CONF_DIR, check_arguments, register_schema, run_name_in_sweep, strip_launcher_arguments, to_run_config

@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def main(cfg):
    import logging
    assert not logging.getLogger().handlers, "Hydra has configured logging"
    print("job", run_name_in_sweep(to_run_config(cfg).run.name, sys.argv[1:]))

sys.argv = strip_launcher_arguments(sys.argv)
check_arguments(sys.argv[1:])
register_schema()
main()
"""


@pytest.fixture
def command_line(folder: Path):
    def run(*arguments: str) -> list[str]:
        (folder / "application.py").write_text(APPLICATION)
        command = [sys.executable, "application.py", *arguments]
        environment = {"PYTHONPATH": str(CONF_DIR.parent), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "application.py").unlink()
        return done.stdout.splitlines()

    return run


def test_a_job_leaves_no_files_and_no_logging_of_hydras(command_line, folder: Path):
    assert command_line(*VALID, "--local_rank=0", "run.name=mine") == ["job mine"]
    assert list(folder.iterdir()) == []


def test_a_sweep_runs_one_named_job_after_another_and_leaves_one_file(command_line, folder: Path):
    lines = command_line("-m", *VALID, "optimizer=galore,adamw", "optimizer.lr=0.1,0.2", "run.name=mine")
    jobs = [f"job mine-optimizer={name}-optimizer.lr={lr}" for name in ("galore", "adamw") for lr in (0.1, 0.2)]
    assert [line for line in lines if line.startswith("job")] == jobs
    assert lines[0] == "Launching 4 jobs locally"
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["multirun.yaml"]
    assert len(list(folder.glob("runs/sweeps/*/multirun.yaml"))) == 1


def test_the_configuration_can_be_shown_without_running(command_line, folder: Path):
    lines = command_line(*VALID, "--cfg", "job", "--resolve")
    assert "  name: llama_60m-synthetic-natural_galore" in lines
    assert any(line.startswith("Hydra 1.3") for line in command_line("--info"))
    assert list(folder.iterdir()) == []


def test_help_lists_groups_and_settings_that_exist(command_line):
    text = "\n".join(command_line("--help"))
    assert f"optimizer     {OPTIMIZERS}\n" in text
    assert "model         llama_9m, llama_20m" in text
    assert "schema_" not in text
    named = text.partition("== Settings used most ==")[2].replace(";", " ").replace(",", " ").split()
    keys = {word.partition("=")[0] for word in named if word.count("=") == 1 and "." in word.partition("=")[0]}
    assert len(keys) > 20
    assert keys <= paths_of_all_settings().keys()
