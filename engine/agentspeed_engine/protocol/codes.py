"""Refusals as codes that travel; `agentspeed.transport.error_map` makes a public class of each."""

from __future__ import annotations

from typing import Literal

# fmt: off
Code = Literal[
    # your input
    "unsupported_model", "bad_config", "bad_options", "bad_weights", "bad_tokenizer", "invalid_request",
    "context_overflow", "invalid_sampling", "schema_unsupported", "branch_unknown", "branch_busy", "branch_closed",
    "trunk_moved", "child_unrelated", "position_unknown", "bad_frame", "protocol_mismatch", "bad_credential",
    # the world
    "overloaded", "too_many_links", "too_many_sessions", "too_many_branches", "quota_exceeded", "out_of_memory",
    "engine_stopping", "rank_lost", "device_lost",
    # our bug
    "internal",
]
# fmt: on

RETRYABLE: frozenset[str] = frozenset(
    {
        "overloaded",
        "too_many_links",
        "too_many_sessions",
        "too_many_branches",
        "quota_exceeded",
        "engine_stopping",
        "rank_lost",
        "device_lost",
    }
)
"""The same command may succeed later."""


class EngineFault(Exception):
    """A refusal with its reason and its remedy. Nothing changed when it is raised."""

    def __init__(self, code: Code, message: str, remedy: str = "") -> None:
        super().__init__(code, message, remedy)  # what pickle makes it from again
        self.code: Code = code
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE
