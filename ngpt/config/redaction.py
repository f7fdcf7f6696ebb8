"""Secrets taken out of whatever leaves the process: settings that are written down, log lines, messages, command lines.

A secret is known by the name of the setting that has it, as part of a URL, by the shape of well-known tokens, or because a variable
of the environment that is named like one has the same value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORDS = "key|token|secret|password|passwd|credentials?"
_NAMED = re.compile(rf"(?i)((?:^|[^a-z0-9])(?:{_WORDS})=)(?!\s|$).+")
_NAMED_IN_DICT = re.compile(rf"(?i)((?:^|[^a-z0-9])(?:{_WORDS})['\"]?\s*:\s*)[^,}}\]]+")
_NAME = re.compile(rf"(?i)(?:^|[^a-z0-9])(?:{_WORDS})$")
_VARIABLE = re.compile(rf"(?i)(?:^|_)(?:{_WORDS})(?:_|$)")
_SHORTEST_VALUE = 8  # of a variable: a shorter one may well be a word that stands in many places
_IN_TEXT = (
    (re.compile(r"(?<=://)[^/@\s]+@"), f"{HIDDEN}@"),
    (re.compile(rf"(?i)((?:^|[^a-z0-9])(?:{_WORDS}|sig|signature)\s*=\s*)[^\s,;&\"'\]}}]+"), rf"\1{HIDDEN}"),
    # Hugging Face, Weights & Biases, AWS, GitHub, OpenAI and its like, Slack
    (re.compile(r"\b(?:hf_|wandb_v\d_|gh[pousr]_|github_pat_|sk-|xox[a-z]-)[\w-]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
)


def redact(text: str) -> str:
    """`text` without the secrets in it."""
    for value in sorted(_values_of_environment(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def redact_argument(argument: str) -> str:
    """A command-line argument without its value, where it sets something that is named like a secret, and redacted otherwise."""
    return redact(_NAMED.sub(rf"\1{HIDDEN}", _NAMED_IN_DICT.sub(rf"\1{HIDDEN}", argument)))


def redact_settings(settings: Any) -> Any:
    """Settings, nested in any way, with every text redacted, and every value hidden whose own name is that of a secret."""
    if isinstance(settings, Mapping):
        return {key: HIDDEN if _is_secret(str(key), value) else redact_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [redact_settings(value) for value in settings]
    return redact(settings) if isinstance(settings, str) else settings


def _is_secret(name: str, value: object) -> bool:
    return isinstance(value, str) and value != "" and _NAME.search(name) is not None


def _values_of_environment() -> set[str]:
    return {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE}
