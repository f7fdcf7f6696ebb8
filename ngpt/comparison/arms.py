"""The arms of a comparison: composed and checked before anything starts, and refused where they would not learn from the same."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from ngpt.config.compose import compose_run, jobs_of_sweep, sweep_name
from ngpt.config.problems import ConfigError, problem, shown
from ngpt.config.redaction import redact_settings
from ngpt.config.schema import RunConfig, steps_in_run

_NAME = re.compile(r"[\w.,=+-]+", re.ASCII)  # it becomes part of a folder's name
_OURS = {  # settings that the comparison makes, and how to ask for them
    "seed": "give --seeds 0,1,2",
    "run.name": "the folder of a run is named by its arm and seed; give --to FOLDER for their parent",
    "run.dir": "give --to FOLDER",
    "resume": "a comparison always continues what it finds",
}
_SOURCE_ONLY = {"max_bad_documents", "prefetch_batches", "max_retries", "retry_seconds", "verify"}  # of data.*: say nothing of the text
# What arms must have in common, and why. --allow-different takes these words.
SHARED = {
    "tokens": "arms train on as many tokens, in the same batches",
    "data": "arms read the same text in the same order",
    "held-out": "arms are judged by the same held-out tokens",
    "model": "arms train the same model, unless their own overrides name another",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: as it is reported; unique within its column.
        overrides: of `python -m ngpt.train`, without seed and folder.
        config: what they compose to.
        column: arms are compared with those of their own column: of a table a size, otherwise empty.
        own: those of the overrides that not all arms have.
    """

    name: str
    overrides: tuple[str, ...]
    config: RunConfig
    column: str = ""
    own: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Unique among all arms, and part of a folder's name."""
        return f"{self.column}-{self.name}" if self.column else self.name

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that bear on what a run comes to, by their paths, without secrets and without those that the comparison makes."""
        flat = dict(_flatten("", redact_settings(dataclasses.asdict(self.config))))
        return {path: value for path, value in flat.items() if path not in _OURS and not path.startswith(("logger.", "checkpoint."))}


@dataclasses.dataclass(frozen=True)
class Request:
    """An arm as it was asked for: `words` are overrides, of which one with several values stands for several arms."""

    name: str
    words: tuple[str, ...]
    column: str = ""

    @property
    def label(self) -> str:
        return f"{self.column}-{self.name}" if self.column else self.name


def requested(words: Sequence[str]) -> Request:
    """What `--arm NAME OVERRIDE...` asks for. Overrides may also stand together in one word, separated by blanks."""
    name, *given = words
    overrides: list[str] = []
    for word in given:
        try:
            parts = shlex.split(word)
        except ValueError:
            parts = []
        overrides += parts if len(parts) > 1 and all("=" in part for part in parts) else [word]
    return Request(name, tuple(overrides))


def compose_arms(common: Sequence[str], requests: Sequence[Request], *, allow: Collection[str] = ()) -> list[Arm]:
    """The arms, all of whose settings are valid.

    Args:
        common: overrides of all arms; those of an arm come after them and win.
        requests: the arms. Where there are none, the overrides in `common` with several values make them.
        allow: words of `SHARED` in which arms may differ.

    Raises:
        ConfigError: every problem of every arm, or every difference that is not allowed.
    """
    jobs = [job for request in requests or [Request("", ())] for job in _jobs(common, request)]
    problems = [*_request_problems(common, requests), *_labels(jobs)]
    if problems:
        raise ConfigError(problems)
    arms: list[Arm] = []
    found: dict[str, list[str]] = {}  # problem -> the arms that have it
    for job in jobs:
        try:
            config = compose_run(list(job.words))
        except ConfigError as error:
            for line in error.problems:
                found.setdefault(line, []).append(job.label)
            continue
        arms.append(Arm(job.name, job.words, config, job.column, tuple(word for word in job.words if word not in common)))
    if found:
        of_all = [line for line, names in found.items() if len(names) == len(jobs)]
        raise ConfigError([*of_all, *(f"{', '.join(names)}: {line}" for line, names in found.items() if line not in of_all)])
    problems = list(_ends(arms))
    for column in dict.fromkeys(arm.column for arm in arms):
        problems += _differences([arm for arm in arms if arm.column == column], allow)
    if problems:
        raise ConfigError(problems)
    return arms


def _jobs(common: Sequence[str], request: Request) -> Iterator[Request]:
    """One request for each combination of what has several values, named by those, with all its overrides."""
    argv = [*common, *request.words]
    for job in jobs_of_sweep(argv):
        yield Request(sweep_name(request.name, job, argv).lstrip("-"), tuple(job), request.column)


# ----------------------------------------------------------------------------------------------------------------- rules
def _request_problems(common: Sequence[str], requests: Iterable[Request]) -> Iterator[str]:
    for request in requests:
        if not _NAME.fullmatch(request.name):
            fix = "give the name first: --arm adamw optimizer=adamw"
            yield problem("--arm", request.name, "an arm's name has letters, digits and . , = + - _ alone", fix)
        elif "=" in request.name:
            rule = "this is an override, and the first word after --arm is a name"
            yield problem("--arm", request.name, rule, "write --arm NAME OVERRIDE...")
    for word in dict.fromkeys([*common, *(word for request in requests for word in request.words)]):
        path = word.partition("=")[0].lstrip("+~")
        if path in _OURS:
            yield f"{word}: is set by the comparison; {_OURS[path]}"
        elif word and "=" not in word and not word.startswith("~"):
            yield f"{word}: is no override; write SETTING=VALUE (an option of this command starts with --)"


def _labels(jobs: Sequence[Request]) -> Iterator[str]:
    if len(jobs) < 2:
        fix = "give --arm NAME OVERRIDE... once for each, or several values: optimizer.lr=0.005,0.01"
        yield problem("--arm", ", ".join(job.name for job in jobs if job.name) or "none", "a comparison has two arms or more", fix)
    labels = [job.label for job in jobs]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        yield problem("--arm", label, "two arms have this name", "give each its own")


def _ends(arms: Sequence[Arm]) -> Iterator[str]:
    for arm in arms:
        if not arm.config.eval.at_end:
            yield f"{arm.label}: {problem('eval.at_end', False, 'arms are judged by the evaluation at their end', 'leave it true')}"


def _differences(arms: Sequence[Arm], allow: Collection[str]) -> Iterator[str]:
    """A line for every setting in which arms differ although they must have it in common."""
    if not arms:
        return
    shared = [_shared(arm) for arm in arms]
    for kind, path in dict.fromkeys(key for values in shared for key in values):
        values = [of_arm.get((kind, path), "not a setting of it") for of_arm in shared]
        asked_for = kind == "model" and any(word.lstrip("+").startswith(("model=", "model.")) for arm in arms for word in arm.own)
        if any(value != values[0] for value in values) and kind not in allow and not asked_for:
            each = ", ".join(f"{shown(value)} ({arm.name})" for arm, value in zip(arms, values, strict=True))
            yield f"{path} = {each}: {SHARED[kind]}; set it for all arms, before the first --arm, or add --allow-different {kind}"


def differing(arms: Sequence[Arm]) -> list[str]:
    """The settings of `SHARED` in which arms of a column differ, as they are allowed to: what a reader of the verdict must know."""
    return [line.partition(":")[0] for line in _differences([dataclasses.replace(arm, own=()) for arm in arms], ())]


def _shared(arm: Arm) -> dict[tuple[str, str], Any]:
    """What arms must have in common: (word of `SHARED`, setting) -> value."""
    trainer = arm.config.trainer
    values: dict[tuple[str, str], Any] = {
        ("tokens", "trainer.max_steps"): steps_in_run(trainer),
        ("tokens", "trainer.global_batch_size"): trainer.global_batch_size,
        ("tokens", "trainer.seq_len"): trainer.seq_len,
        ("held-out", "eval.max_tokens"): arm.config.eval.max_tokens,
    }
    for path, value in arm.settings.items():
        section, _, name = path.partition(".")
        if (section == "data" and name not in _SOURCE_ONLY) or path == "tokenizer.path":
            values["data", path] = value
        elif section == "model" and name != "name":
            values["model", path] = value
    return values


def _flatten(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
