"""A length of time as people read it, the same in every command."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
