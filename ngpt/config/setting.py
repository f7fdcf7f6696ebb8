"""A field of the schema: its default, what it means, and the rule that its value must obey."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that carries its meaning (with the unit) and the rule for its value as metadata."""
    rules = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"meaning": meaning} | {name: bound for name, bound in rules.items() if bound is not None}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
