"""Plain completions over a scripted engine: one time limit for the whole request, and scores are counted."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from agentspeed import errors
from agentspeed.server.openai.completions import Completion, CompletionRequest
from agentspeed.server.options import ServerOptions
from agentspeed.server.turns import Service
from agentspeed.testing import ScriptedEngine, say

pytestmark = pytest.mark.anyio
TEXT, REST = "Go on and on and on", "o on and on and on"
"""What is scored is all but the first token."""
SCORED: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("asked", [{"prompt": TEXT, **SCORED}, {"prompt": ["One"] * 8}])
async def test_scores_and_prompts_one_after_the_other_have_the_time_of_one_turn(asked: dict[str, Any]) -> None:
    def model(turn: object) -> Any:
        return say(REST if "logprobs" in asked else " and", seconds=0.12)

    async with ScriptedEngine(model) as engine:
        service = Service(engine.engine, ServerOptions(turn_seconds=0.3))
        with anyio.fail_after(10), pytest.raises(errors.TurnTimeout, match=r"longer than 0\.3 s"):
            _ = await Completion(CompletionRequest(**asked), service, "").complete()
        assert (service.running, engine.live_branches) == (0, 0)


async def test_what_is_scored_counts_as_read_and_not_as_drawn() -> None:
    async with ScriptedEngine([REST]) as engine:
        service = Service(engine.engine, ServerOptions())
        found = await Completion(CompletionRequest(prompt=TEXT, **SCORED), service, "").complete()
        told = found["choices"][0]["logprobs"]["tokens"]
        assert found["usage"] == {
            "prompt_tokens": found["usage"]["prompt_tokens"],
            "completion_tokens": 0,
            "total_tokens": found["usage"]["prompt_tokens"],
        }
        counted = service.metrics.page({}).decode()
        assert 'agentspeed:request_success_total{finished_reason="scored"} 1.0' in counted
        assert "agentspeed:generation_tokens_total 0.0" in counted
        (read,) = [
            line.split()[1] for line in counted.splitlines() if line.startswith("agentspeed:prompt_tokens_total")
        ]
        assert float(read) >= len(told)
