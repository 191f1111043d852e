"""What becomes of earlier reasoning in a session: left out as the template does, or kept, to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentspeed import Assistant, ToolCall, ToolMessage, User, errors
from agentspeed.chat.environment import load_template
from agentspeed.chat.rehearsal import as_dicts
from agentspeed.testing import ScriptedEngine
from tests.support.chat_templates import FAMILIES
from tests.support.conversations import folder_of, log_of

pytestmark = pytest.mark.anyio
THOUGHT = "<think>\nFirst this.\n</think>\n\nOne."


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES["qwen 3"]
    return folder_of(tmp_path_factory.mktemp("qwen") / "m", family.template, family.controls, plain=family.plain,
                     end="<|im_end|>")  # fmt: skip


async def test_the_log_goes_back_to_before_an_answer_and_on_without_its_reasoning(qwen: Path) -> None:
    async with ScriptedEngine([THOUGHT, "Two."], model=qwen) as engine, engine.session(reasoning=True) as s:
        first = await s.generate("Go.")
        assert (first.text, first.reasoning.strip()) == ("One.", "First this.")
        assert s.ids and "First this." in s._core.codec.tokenizer.text(list(s.ids))
        _ = await s.generate("On.")
        text = s._core.codec.tokenizer.text(list(s.ids))
        assert "First this." not in text and text.count("One.") == 1
        messages = as_dicts(s._core.codec, s.messages[:-1])
        whole = load_template(qwen)(messages, generate=True, variables=s._core.codec.variables)
        assert text.startswith(whole)
        assert [type(message).__name__ for message in s.messages] == ["User", "Assistant"] * 2
        assert s.messages[1].text == "One."


async def test_reasoning_that_is_kept_stays_token_by_token(qwen: Path) -> None:
    options: dict[str, Any] = {"reasoning": True, "history_reasoning": "keep"}
    async with ScriptedEngine([THOUGHT, "Two."], model=qwen) as engine, engine.session(**options) as s:
        _ = await s.generate("Go.")
        before = s.ids
        _ = await s.generate("On.")
        assert s.ids[: len(before)] == before and "First this." in s._core.codec.tokenizer.text(list(s.ids))


async def test_a_mark_behind_reasoning_that_was_left_out_is_no_mark_any_more(qwen: Path) -> None:
    async with ScriptedEngine([THOUGHT, "Two."], model=qwen) as engine, engine.session(reasoning=True) as s:
        start = await s.mark("start")
        _ = await s.generate("Go.")
        behind = await s.mark("behind")
        _ = await s.generate("On.")
        with pytest.raises(errors.MarkNotFound):
            await s.rewind(behind)
        with pytest.raises(errors.MarkNotFound):
            await s.rewind("behind")
        await s.rewind(start)
        assert s.messages == ()


async def test_template_variables_reach_the_template_and_no_other_value_does(qwen: Path) -> None:
    async with ScriptedEngine(["One."], model=qwen) as engine:
        async with engine.session(reasoning=True, template_variables={"enable_thinking": False}) as s:
            _ = await s.generate("Go.")
            assert "<think>\n\n</think>" in s._core.codec.tokenizer.text(list(s.ids))
        with pytest.raises(errors.InvalidRequest, match="values of JSON"):
            async with engine.session(template_variables={"enable_thinking": object()}) as s:
                pass
        with pytest.raises(errors.InvalidRequest, match="cannot be called bos_token, messages"):
            async with engine.session(template_variables={"messages": [], "bos_token": ""}) as s:
                pass


async def test_a_choice_that_is_none_is_refused_where_it_is_made(qwen: Path) -> None:
    async with ScriptedEngine(["One."], model=qwen) as engine:
        with pytest.raises(errors.InvalidRequest, match="history_reasoning"):
            _ = engine.session(history_reasoning="drop")  # type: ignore[arg-type]


async def test_reasoning_that_was_given_goes_when_an_answer_that_was_drawn_ends_its_use(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    family = FAMILIES["kimi k2 thinking"]
    root = tmp_path_factory.mktemp("kimi") / "m"
    log = log_of(
        folder_of(root, family.template, family.controls, plain=family.plain), reasoning=True, system=None, tools=True
    )
    call = ToolCall(id="c", name="look_up", arguments='{"word": "a"}')
    log.add(User("Go."), Assistant("", (call,), "Hm: look."), ToolMessage(call_id="c", name="look_up", text="1"))
    log.ask()
    log.drawn(Assistant("One."), log.codec.stop_ids[0])
    log.ask(User("On."))
    log.check()
    assert "Hm: look." not in log.codec.tokenizer.text(list(log.mirror.ids))
