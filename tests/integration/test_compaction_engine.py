"""Compaction on a real engine: what stands above the conversation is shared, and nothing else of the past is seen."""

from __future__ import annotations

import pytest

from agentspeed import Engine

pytestmark = pytest.mark.anyio
SYSTEM = "You are brief, you answer in one sentence, and you never say what you do not know. " * 3


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_it_draws_what_a_new_session_with_the_same_messages_draws_and_shares_the_root() -> None:
    async with Engine() as engine:
        async with engine.session(system=SYSTEM) as s:
            root = s.tokens
            for question in ("What is red?", "What is blue?", "What is green?"):
                _ = await s.generate(question, max_tokens=8)
            done = await s.compact(keep=2, summary="We spoke of red and blue.")
            assert done.dropped == 4
            ids, said = s.ids, s.messages
            reply = await s.generate("And yellow?", max_tokens=8)
            shared = reply.usage.resumed + reply.usage.shared
            assert 0 < root - shared <= 16 or shared >= root, "the root was computed again"
        async with engine.session(system=SYSTEM, private=True) as other:  # computes all of it anew
            _ = await other.add(*said)
            fresh = await other.generate("And yellow?", max_tokens=8)
            assert other.ids[: len(ids)] == ids
            assert fresh.ids == reply.ids
