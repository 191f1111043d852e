"""Output that a bound of the turn cut short is never passed off as an output, and a wrong pattern is explained."""

from __future__ import annotations

from typing import Any

import pytest

from agentspeed import Choice, Regex
from agentspeed.errors import OutputError, SchemaUnsupported
from agentspeed.testing import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


CODE = Regex(r"[A-Z]{2}-\d{2}")


async def test_a_text_that_was_cut_before_it_matched_is_no_output() -> None:
    async with ScriptedEngine(["AB-12", "AB-12"]) as engine, engine.session() as s:
        with pytest.raises(OutputError, match="cut inside its output, by max_tokens"):
            _ = await s.generate("A code.", output=CODE, max_tokens=1)
        with pytest.raises(OutputError, match="cut inside its output, by a stop text"):
            _ = await s.generate("A code.", output=CODE, stop="-")


async def test_a_text_that_was_cut_where_it_matches_is_an_output() -> None:
    async with ScriptedEngine(["aaaaaaaaaaaaaaaa", "AB-12"]) as engine, engine.session() as s:
        cut = await s.generate("Many.", output=Regex("a+"), max_tokens=2)
        assert cut.finish_reason == "max_tokens" and set(cut.output) == {"a"}
        assert (await s.generate("A code.", output=CODE)).output == "AB-12"


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (Regex("("), "unclosed group"),
        (Regex("a(?=b)"), "look-around"),
        ({"type": "string", "pattern": "("}, r"a \( of it is not closed"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "bounds that no number is within"),
    ],
)
async def test_a_wrong_pattern_is_refused_with_the_reason(output: Any, told: str) -> None:
    async with ScriptedEngine([]) as engine, engine.session() as s:
        with pytest.raises(SchemaUnsupported, match=told):
            _ = await s.generate("Hi", output=output)


@pytest.mark.parametrize("pattern", [5, None, "\ud800"])
def test_a_pattern_is_a_text(pattern: Any) -> None:
    with pytest.raises(SchemaUnsupported, match="Regex pattern"):
        _ = Regex(pattern)


def test_options_of_a_choice_given_as_a_list_are_explained() -> None:
    with pytest.raises(SchemaUnsupported, match=r"Choice\(\"yes\", \"no\"\)"):
        _ = Choice(["yes", "no"])  # type: ignore[arg-type]
