"""What the libraries behind the hub are told: a time limit for every request, and no retries of their own, which nobody could count.

Left alone they retry a read up to 20 times in `datasets` and each of those 6 times in `huggingface_hub`, and wait for ever for a server
that accepts a question and never answers.
"""

from __future__ import annotations

import functools
import re
from typing import Any

_SILENCE_SECONDS = 30.0  # where a request has no limit of its own; of a read: between two pieces of the answer
_LONGEST_WAIT_ASKED_SECONDS = 600.0


class HubUnreachable(ConnectionError):
    """No connection, no answer in time, or one that broke off."""


class HubBusy(OSError):
    """An answer that says to try again later. `status_code` is HTTP's; `wait_seconds` what the hub asks for, 0 if it does not say."""

    def __init__(self, status_code: int, reason: str, url: str, wait_seconds: float) -> None:
        super().__init__(f"{status_code} {reason} from {url}")
        self.status = status_code
        self.wait_seconds = wait_seconds


@functools.cache
def prepare_libraries() -> None:
    """Let `datasets` and `huggingface_hub` fail at once and in time. For this process, whoever uses them."""
    import datasets
    import huggingface_hub

    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        setattr(datasets.config, name, 1)
    for name in ("READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY", "OPEN_RETRY"):
        setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0)
    session = huggingface_hub.get_session()
    if not hasattr(session, "event_hooks"):
        return  # before version 1, whose sessions have time limits already
    kind, hooks = type(session), session.event_hooks

    def client() -> Any:
        made = kind(event_hooks=hooks, follow_redirects=True, timeout=None)
        made.send = functools.partial(_send, made.send)
        return made

    huggingface_hub.set_client_factory(client)


def _send(send: Any, request: Any, **options: Any) -> Any:
    """The answer to `request`, unless it says to try again. What the library would retry itself becomes an error that it does not know."""
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {part: limits.get(part) or _SILENCE_SECONDS for part in ("connect", "read", "write", "pool")}
    try:
        response = send(request, **options)
    except Exception as error:
        if is_of_network_package(error):
            raise HubUnreachable(f"{type(error).__name__} at {_shown(request.url)}: {error}") from error
        raise
    if is_passing_status(response.status_code):
        wait_seconds = seconds_asked(response.status_code, response.headers)
        response.close()
        raise HubBusy(response.status_code, response.reason_phrase, _shown(request.url), wait_seconds)
    return response


def _shown(url: Any) -> str:
    """Without the query, in which the addresses of large files have signatures."""
    return str(url).partition("?")[0]


def is_passing_status(status_code: int) -> bool:
    """Whether an answer of this status may be another one a little later."""
    return status_code in (408, 425, 429) or status_code >= 500


def is_of_network_package(error: BaseException) -> bool:
    """Whether an exception is of one of the packages that may be talking to the hub; none of them must be installed."""
    package = type(error).__module__.split(".")[0]
    return re.fullmatch(r"(aiohttp|asyncio|http|httpcore\d*|httpx\d*|requests|urllib3)", package) is not None


def seconds_asked(status_code: int, headers: Any) -> float:
    """How long an answer asks to wait: `Retry-After` in seconds, or the hub's own `ratelimit: ...;t=SECONDS`; 0 if it does not."""
    asked = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", ""))
    if asked is None and status_code == 429:
        asked = re.search(r"\bt=(\d+)", headers.get("ratelimit", ""))
    return min(float(asked[1]), _LONGEST_WAIT_ASKED_SECONDS) if asked else 0.0
