"""A missing reference is a skip for a developer, and an error where everything must be checked."""

from __future__ import annotations

import pytest

from tests.support.needs import needed


def test_what_is_missing_is_skipped_and_names_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "AGENTSPEED_CHECK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no_such_reference is not installed: install agentspeed\[dev\]"):
        needed("no_such_reference", "it is the reference")


@pytest.mark.parametrize("name", ["CI", "AGENTSPEED_CHECK"])
def test_what_is_missing_is_an_error_where_nothing_may_be_skipped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(AssertionError, match="nothing may be skipped here: it is the reference; no_such_reference"):
        needed("no_such_reference", "it is the reference")
