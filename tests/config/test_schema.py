"""The schema: every setting is annotated, documented and within its own rule."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.config import schema
from ngpt.config.compose import CONF_DIR
from ngpt.config.reference import configuration_page
from ngpt.config.suggest import _NAMES_ELSEWHERE, settings

SCHEMAS = [value for value in vars(schema).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("dataclass", SCHEMAS, ids=lambda dataclass: dataclass.__name__)
def test_every_value_in_a_class_body_is_an_annotated_field_with_a_meaning(dataclass: type):
    body = ast.parse(inspect.getsource(dataclass)).body[0].body
    assert not [ast.unparse(statement) for statement in body if isinstance(statement, ast.Assign)], "OmegaConf ignores unannotated values"
    annotated = {statement.target.id for statement in body if isinstance(statement, ast.AnnAssign)}
    fields = {field.name: field for field in dataclasses.fields(dataclass)}
    assert annotated <= fields.keys()
    for name in annotated:
        is_choice = fields[name].default == "???" or fields[name].default_factory is schema.RunSectionConfig
        assert is_choice or len(fields[name].metadata["meaning"]) > 5, name


def test_the_registered_schemas_are_the_sections_of_a_run():
    sections = {field.name for field in dataclasses.fields(schema.RunConfig) if not field.metadata}
    assert sections == {*schema.GROUPS, "run"}
    assert {group.name for group in CONF_DIR.iterdir() if group.is_dir()} == {*schema.GROUPS, "experiment"}


def test_names_of_other_programs_lead_to_settings_that_exist():
    assert set(_NAMES_ELSEWHERE.values()) <= settings().keys()
    assert not _NAMES_ELSEWHERE.keys() & {path.rpartition(".")[2] for path in settings()}


def test_the_length_of_a_run_covers_its_tokens():
    assert schema.steps_in_run(schema.TrainerConfig(max_steps=7)) == 7
    trainer = schema.TrainerConfig(max_tokens=1001, global_batch_size=10, seq_len=10)
    assert schema.steps_in_run(trainer) == 11


def test_warm_up_and_decay_are_counted_in_updates():
    assert schema.warmup_steps_in_run(schema.CosineSchedulerConfig(warmup_steps=3), 100) == 3
    assert schema.warmup_steps_in_run(schema.CosineSchedulerConfig(warmup_fraction=0.25), 100) == 25
    assert schema.decay_steps_in_run(schema.WSDSchedulerConfig(decay_fraction=0.2), 100) == 20


@pytest.mark.parametrize(("policy", "interval"), [("off", 0), ("full", 1), ("every_1", 1), ("every_3", 3)])
def test_activation_checkpointing_is_an_interval_of_blocks(policy: str, interval: int):
    assert schema.checkpointing_interval(schema.TrainerConfig(activation_checkpointing=policy)) == interval


@pytest.mark.parametrize("module", ["schema", "shapes", "problems", "suggest", "file_rules", "validate", "compose", "reference"])
def test_configuration_never_imports_torch(module: str):
    program = f"import sys, ngpt.config.{module}; assert not {{'torch', 'numpy', 'sentencepiece', 'datasets'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CONF_DIR.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_of_all_settings_is_up_to_date():
    page = CONF_DIR.parent / "docs" / "configuration.md"
    assert page.read_text() == configuration_page(), "run `make docs`"


def test_the_page_names_every_setting_and_every_choice():
    page = configuration_page()
    choices_only = {f"{group}.name" for group, variants in schema.GROUPS.items() if len(variants) > 1}
    assert [path for path in settings() if path not in choices_only and f"`{path}`" not in page] == []
    files = [Path(file) for file in CONF_DIR.glob("*/*.yaml")]
    assert [file for file in files if f"`{file.parent.name}={file.stem}`: " not in page] == []
