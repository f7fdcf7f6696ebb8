"""What a wrong configuration says: one error with one line for every problem."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration:", *self.problems]))


def problem(path: str, value: object, rule: str, fix: str) -> str:
    """One line of a ConfigError: which setting, its value, the rule that it breaks, and what to change."""
    return f"{path} = {shown(value)}: {rule}; {fix}"


def shown(value: object) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    return str(value)
