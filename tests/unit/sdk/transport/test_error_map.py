"""Engine codes as public errors: what the engine calls retryable is so for who catches it, and nothing else is."""

from __future__ import annotations

from typing import get_args

import pytest

from agentspeed import errors
from agentspeed.transport.error_map import public_error
from agentspeed_engine.protocol.codes import RETRYABLE, Code


@pytest.mark.parametrize("code", get_args(Code))
def test_an_error_is_retryable_in_public_if_the_engine_says_so(code: str) -> None:
    """Another protocol is a failed connection; a try after an upgrade may well succeed."""
    error = public_error(code, "It is so.", "Do this.")
    assert error.retryable == (code in RETRYABLE or code == "protocol_mismatch")
    assert isinstance(error, errors.InternalError) == (code in ("internal", "bad_frame"))
    assert str(error) == "It is so. Do this."
