"""Kinds of errors, for callers that answer each in another way (a server: 400, 422, 503, ...).

A RuntimeError of none of these kinds is about the environment, and says what to do.
"""

from __future__ import annotations


class BadRequest(ValueError):
    """An argument that cannot be taken: `<what>: <argument> must be <rule>, got <value>`."""


class BadMedia(BadRequest):
    """A video or image that cannot be opened, or that exceeds its MediaLimits."""


class Overloaded(RuntimeError):
    """No room for another request now. retry_after_seconds: when to ask again, an estimate."""

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Aborted(RuntimeError):
    """The request was ended before its answer: by `close`, `sleep` or an update of the weights."""
