"""Random conversations of a model folder made for the test: see `agentspeed.chat.rehearsal`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from agentspeed.chat.codec import ChatCodec, History
from agentspeed.chat.environment import ChatTemplate, load_template
from agentspeed.chat.rehearsal import TOOLS as TOOLS
from agentspeed.chat.rehearsal import Log
from agentspeed.chat.rehearsal import converse as converse
from agentspeed.chat.rehearsal import written as written
from agentspeed.engine import NANO


def folder_of(
    folder: Path, template: str, controls: Sequence[str], *, end: str = "", plain: Sequence[str] = ()
) -> Path:
    """A model folder without weights: the shipped model's vocabulary with a family's control tokens. `plain` ones are
    added tokens that are not special."""
    raw = json.loads((NANO / "tokenizer.json").read_text())
    known = raw["model"]["vocab"]
    free = itertools.count(len(known))
    raw["added_tokens"] = []
    for token in ("<BOS>", "<EOS>", *controls, *plain):
        if any(token == other["content"] for other in raw["added_tokens"]):
            continue
        raw["added_tokens"].append(
            {
                "id": known[token] if token in known else next(free),
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token not in plain,
            }
        )
    numbers = {token["content"]: token["id"] for token in raw["added_tokens"]}
    folder.mkdir(parents=True, exist_ok=True)
    _ = (folder / "tokenizer.json").write_text(json.dumps(raw))
    _ = (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _ = (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<BOS>", "eos_token": "<EOS>"}))
    _ = (folder / "config.json").write_text(json.dumps({"eos_token_id": numbers[end or "<EOS>"]}))
    return folder


@lru_cache(maxsize=4)
def _of(folder: Path) -> tuple[ChatCodec, ChatTemplate]:
    return ChatCodec(folder), load_template(folder)


def log_of(folder: Path, *, reasoning: bool, system: str | None, tools: bool, history: History = "template") -> Log:
    """A log of one kind of session of a folder."""
    return Log(*_of(folder), reasoning=reasoning, system=system, tools=tools, history=history)
