"""From the command line to a typed RunConfig: Hydra composes, the dataclasses decide, and a mistake is named with its remedy.

Hydra's own answer to an unknown key is to append it with `+`, which the dataclasses would then silently ignore. So
`check_arguments` looks at the overrides before Hydra does, and `to_run_config` rejects whatever still got past the schema.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ngpt.config.problems import ConfigError, problem, shown
from ngpt.config.schema import GROUPS, RunConfig
from ngpt.config.suggest import nearest, nearest_settings, unknown_setting, variants_with
from ngpt.config.validate import validate

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

_HYDRA_FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--shell-completion",
    "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
)  # fmt: skip
# With these Hydra reads other files than ours, or arguments that are not meant for this run: it does its own checks then.
_UNCHECKED_FLAGS = ("--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")

_OPEN = "engine.deepspeed"  # a section whose keys are not ours


# ------------------------------------------------------------------------------------------------------- command line
def strip_launcher_arguments(argv: list[str]) -> list[str]:
    """`argv` without the local rank that launchers append (`--local_rank=N`, `--local-rank N`, ...) and Hydra refuses."""
    kept: list[str] = []
    value_expected = False
    for argument in argv:
        is_value = value_expected and argument.lstrip("-").isdigit()
        value_expected = argument in ("--local_rank", "--local-rank")
        if not (is_value or value_expected or argument.startswith(("--local_rank=", "--local-rank="))):
            kept.append(argument)
    return kept


def with_open_settings(argv: Sequence[str]) -> list[str]:
    """`argv` with `++` before settings below `engine.deepspeed`, which are DeepSpeed's and not in our schema: Hydra wants that."""
    return [f"++{argument}" if argument.startswith((f"{_OPEN}=", f"{_OPEN}.")) else argument for argument in argv]


def refuse_multirun_under_launcher(argv: list[str], world_size: int) -> None:
    """Raise ConfigError for a sweep (`-m`) under several ranks: each rank would run every job, out of step with the others."""
    flags = [argument for argument in argv if argument == "-m" or (len(argument) > 3 and "--multirun".startswith(argument))]
    flags += [argument for argument in argv if argument.replace("RunMode.", "") == "hydra.mode=MULTIRUN"]
    if world_size > 1 and flags:
        raise ConfigError(
            [
                f"{flags[0]}: a sweep cannot run inside one launch of several ranks; start one launch per job, in turn:\n"
                f'      python -m ngpt.compare --launcher "torchrun --standalone --nproc_per_node {world_size}" optimizer.lr=0.005,0.01'
            ]
        )


def check_arguments(argv: Sequence[str], *, world_size: int = 1, check_files: bool = True) -> None:
    """Raise one ConfigError for unknown groups, choices and settings and for values of a wrong type in `argv`.

    `argv` is without the program's name. Arguments that are no overrides, and text that Hydra cannot parse, are left to
    Hydra. The error lists all such problems, and those that `validate` sees in the rest of the configuration.
    """
    register_schema()
    if any(argument.partition("=")[0] in _UNCHECKED_FLAGS for argument in argv):
        return
    problems = list(_dashed_settings(argv))
    overrides = _parse(argv)
    choices, choice_problems = _group_choices(overrides)
    problems += choice_problems
    values = [override for override in overrides if override.key_or_group not in choices | GROUPS.keys() | {"experiment"}]
    unfit: list[str] = []
    configs: list[DictConfig] = []
    for job in itertools.product(*([f"{group}={choice}" for choice in chosen] for group, chosen in choices.items())):
        try:
            configs.append(_compose(list(job)))
        except ConfigError as error:
            unfit += error.problems
            configs.append(_compose([choice for choice in job if not choice.startswith("experiment=")]))
    problems += [*unfit, *(line for config in configs for override in values for line in _override_problems(override, config))]
    if problems:
        named = {line.partition(" = ")[0].lstrip("+") for line in problems}
        others = [] if unfit else _problems_of(configs[0], world_size, check_files)  # without its experiment a run says nothing true
        problems += [line for line in others if line.partition(" = ")[0] not in named]
        raise ConfigError(list(dict.fromkeys(problems)))


def _problems_of(config: DictConfig, world_size: int, check_files: bool) -> list[str]:
    try:
        validate(to_run_config(config), world_size=world_size, check_files=check_files)
    except ConfigError as error:
        return error.problems
    return []


def _dashed_settings(argv: Sequence[str]) -> Iterator[str]:
    """Settings written in the manner of argparse: `--rank 128`, `--optimizer.rank=128`."""
    for argument in argv:
        flag, _, value = argument.partition("=")
        if flag.startswith("--") and not any(known.startswith(flag) for known in _HYDRA_FLAGS):
            meant = nearest_settings(flag[2:].replace("-", "_"))
            fix = "write " + " or ".join(f"{path}={value or 'VALUE'}" for path in meant) if meant else "see --help"
            yield f"{argument}: settings are written without dashes; {fix}"


def _parse(argv: Sequence[str]) -> list[Override]:
    overrides = [argument for argument in argv if not argument.startswith("-") and ("=" in argument or argument.startswith("~"))]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return []  # Hydra, which comes next, points at the character
    return [override for override in parsed if override.key_or_group.partition(".")[0].partition("/")[0] != "hydra"]


def _group_choices(overrides: list[Override]) -> tuple[dict[str, list[str]], list[str]]:
    """The choices made per group (several in a sweep), without the unknown ones, and a problem for each of those."""
    choices: dict[str, list[str]] = {}
    problems = []
    for override in overrides:
        group = override.key_or_group
        if (group not in GROUPS and group != "experiment") or override.is_delete() or isinstance(override.value(), dict | None):
            continue
        accepted = group_choices(group)
        given = _values_in_sweep(override) if override.is_sweep_override() else [str(override.value())]
        for choice in given:
            if choice not in accepted:
                guess = nearest(choice, accepted)
                fix = f"did you mean {group}={guess}?" if guess else "see --help"
                problems.append(problem(group, choice, f"must be one of {', '.join(accepted)}", fix))
        known = [choice for choice in given if choice in accepted]
        if known:
            choices[group] = known
    return choices, problems


def _values_in_sweep(override: Override) -> list[str]:
    """What a sweep varies over. Globs are for groups, and match the names of their choices."""
    value = override.value()
    return value.filter(group_choices(override.key_or_group)) if isinstance(value, Glob) else list(override.sweep_string_iterator())


def _override_problems(override: Override, config: DictConfig) -> Iterator[str]:
    key = override.key_or_group
    text = (override.input_line or "").partition("=")[2]
    if key == _OPEN or key.startswith(f"{_OPEN}."):
        return
    if key not in _paths(config):
        yield unknown_setting(key, text, _variants(config))
    elif override.is_delete():
        yield problem(key, OmegaConf.select(config, key), "a setting cannot be removed", "give it a value")
    elif override.is_add():
        yield problem(f"+{key}", text, "is a setting already", "write it without +")
    elif not override.is_sweep_override():
        try:
            OmegaConf.update(config, key, override.value())
        except OmegaConfBaseException:
            yield problem(key, text, *_expected(key, text, config))


def _expected(key: str, text: str, config: DictConfig) -> tuple[str, str]:
    """The rule and the fix for a value of the wrong type; for whole numbers, what it probably meant."""
    section, _, name = key.rpartition(".")
    schema = OmegaConf.get_type(config, section) if section else RunConfig
    assert schema is not None
    wanted = typing.get_type_hints(schema)[name]
    inner = typing.get_args(wanted)
    kind = next((kind for kind in (*inner, wanted) if kind in _KINDS), str)
    if typing.get_origin(wanted) is list:
        return f"must be a list, each item {_KINDS[kind]}", f"write {key}='[...]'"
    rule = f"must be {_KINDS[kind]}" + (" or null" if type(None) in inner else "")
    number = _plain_number(text) if kind is int else None
    return rule, f"write {key}={number}" if number is not None else "see docs/configuration.md"


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _plain_number(text: str) -> int | None:
    """1e9, "1.1B" and "131K" as whole numbers."""
    match = re.fullmatch(r"([\d_.]+(?:e\+?\d+)?)([kmbgt]?)", text.lower())
    try:
        number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}[match[2]] if match else 0.5
    except ValueError:
        return None
    return round(number) if number == round(number) else None


def _paths(config: DictConfig, prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for key in config:
        path = f"{prefix}{key}"
        child = config._get_node(key)
        paths |= _paths(child, f"{path}.") if isinstance(child, DictConfig) and not child._is_missing() else {path}
    return paths


def _variants(config: DictConfig) -> dict[str, str]:
    """The variant of each group in `config`."""
    types = {group: OmegaConf.get_type(config, group) for group in GROUPS}
    return {group: name for group, variants in GROUPS.items() for name, schema in variants.items() if schema is types[group]}


# -------------------------------------------------------------------------------------------------------- composition
@functools.cache  # Hydra keeps them for the process, and it takes as long as a third of a composition
def register_schema() -> None:
    """Make the dataclasses known to Hydra, once: `schema_run`, and `<group>/schema_<variant>`, which the files of conf/ extend."""
    store = ConfigStore.instance()
    store.store(name="schema_run", node=RunConfig)
    for group, variants in GROUPS.items():
        for variant, schema in variants.items():
            store.store(group=group, name=f"schema_{variant}", node=schema)
    OmegaConf.register_new_resolver("choices", lambda group: _wrapped(group_choices(group)), replace=True)  # for --help


def group_choices(group: str) -> list[str]:
    """The files of conf/<group>/, by the names with which they are chosen; a model after the smaller ones."""
    return sorted((path.stem for path in (CONF_DIR / group).glob("*.yaml")), key=_natural_order)


_WORDS = re.compile(r"(\d+)([mb](?![a-z]))?|(\D+)")


def _natural_order(name: str) -> list[tuple[float, str]]:
    """60m before 130m before 1b."""
    units = {"m": 1, "b": 1000}
    return [(float(digits) * units.get(unit, 1), "") if digits else (0.0, rest) for digits, unit, rest in _WORDS.findall(name)]


def _wrapped(words: list[str]) -> str:
    return textwrap.fill(", ".join(words), width=110, subsequent_indent=" " * 14)


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The typed configuration of what Hydra composed. Raises ConfigError for missing values and for keys outside the schema."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError([problem(key, "???", "has no value", f"give {key}=...") for key in missing])
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key or 'configuration'} = ?: {str(error).splitlines()[0]}; correct the value"]) from error
    assert isinstance(config, RunConfig)
    strays = [unknown_setting(path, shown(value), _variants(cfg)) for path, value in _stray(config)]
    if strays:
        raise ConfigError(strays)
    return config


def compose_run(overrides: list[str], *, world_size: int = 1, check_files: bool = True) -> RunConfig:
    """The validated configuration that `python -m ngpt.train OVERRIDES` would run with. Raises ConfigError."""
    check_arguments(overrides, world_size=world_size, check_files=check_files)
    config = to_run_config(_compose(overrides))
    validate(config, world_size=world_size, check_files=check_files)
    return config


def _compose(overrides: list[str]) -> DictConfig:
    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            return compose("config", with_open_settings(overrides))
        except Exception as error:  # Hydra's own, OmegaConf's, PyYAML's, or an OSError: an argument or a file that they cannot use
            refused = error
    problems = list(_experiment_problems(overrides)) if isinstance(refused, HydraException) else []
    raise ConfigError(problems or [f"{' '.join(overrides)} = : {refused}; see --help"]) from refused


def _experiment_problems(overrides: list[str]) -> Iterator[str]:
    """What the chosen experiment sets although the chosen variants of the groups do not have it. (Hydra names the first such key only.)"""
    chosen, _ = _group_choices(_parse(overrides))
    for name in chosen.pop("experiment", []):
        content = OmegaConf.load(CONF_DIR / "experiment" / f"{name}.yaml")
        if not isinstance(content, DictConfig):
            yield problem("experiment", name, "its file in conf/experiment holds no settings by name", "see quickstart.yaml there")
            continue
        defaults = [entry for entry in content.pop("defaults", []) if isinstance(entry, DictConfig)]
        groups = {str(key).rpartition("/")[2]: [str(choice)] for entry in defaults for key, choice in entry.items()} | chosen
        config = _compose([f"{group}={choices[0]}" for group, choices in groups.items()])
        missing = [path for path in sorted(_paths(content) - _paths(config)) if not path.startswith("hydra.")]
        for section in dict.fromkeys(path.partition(".")[0] for path in missing):
            paths = [path for path in missing if path.partition(".")[0] == section]
            elsewhere = variants_with(paths)
            if elsewhere:
                rule = f"sets {' and '.join(paths)}, which {section}={_variants(config)[section]} does not have"
                choices = " or ".join(f"{section}={variant}" for variant in elsewhere)
                fix = f"choose {choices}, or copy conf/experiment/{name}.yaml to a name of your own, without that"
                yield problem("experiment", name, rule, fix)
            else:
                for path in paths:
                    line = unknown_setting(path, shown(OmegaConf.select(content, path)), _variants(config))
                    yield f"{line} (in conf/experiment/{name}.yaml)"


def _stray(config: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Attributes that are no fields: keys that `+key=value` or a foreign yaml file carried past the schema."""
    names = {field.name for field in dataclasses.fields(config)}
    for name, value in vars(config).items():
        if name not in names:
            yield f"{path}{name}", value
        elif dataclasses.is_dataclass(value):
            yield from _stray(value, f"{path}{name}.")


# ------------------------------------------------------------------------------------------------------------- sweeps
def run_name_in_sweep(name: str, argv: Sequence[str]) -> str:
    """`name`, made different in every job of a sweep by what the sweep varies; `name` itself outside of a sweep.

    Call it inside the Hydra task. `argv` is the command line without the program's name: an override that stands there
    word for word is the same in all jobs. Only characters that every file system takes are used.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return name
    return sweep_name(name, list(HydraConfig.get().overrides.task), argv)


def jobs_of_sweep(argv: Sequence[str]) -> list[list[str]]:
    """The command lines of all jobs of a sweep: of settings in `argv` with several values, every combination, as with `-m`."""
    overrides = {override.input_line: override for override in _parse(argv) if override.is_sweep_override()}
    values = [
        [f"{overrides[argument].key_or_group}={value}" for value in _values_in_sweep(overrides[argument])]
        if argument in overrides
        else [argument]
        for argument in argv
    ]
    return [list(job) for job in itertools.product(*values)]


def sweep_name(name: str, job_overrides: Sequence[str], argv: Sequence[str], *, longest: int = 120) -> str:
    """`name` followed by those of `job_overrides` that are not in `argv`; a hash stands for what does not fit a folder's name."""
    constant = {(override.key_or_group, str(override.value())) for override in _parse(argv) if not override.is_sweep_override()}
    varied = [
        f"{override.key_or_group}={override.get_value_element_as_str()}"
        for override in _parse(job_overrides)
        if (override.key_or_group, str(override.value())) not in constant and override.key_or_group != "run.name"
    ]
    if not varied:
        return name
    text = "-".join([name, *varied])
    safe = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if safe == text and len(text) <= longest:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{safe[: longest - 9]}-{digest}"
