"""`POST /tokenize` and `/detokenize`: texts to token ids and back."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import anyio.to_thread
import msgspec

from agentspeed._base.validate import ID_END
from agentspeed.engine import Engine

TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=ID_END)]


class TextBody(msgspec.Struct, kw_only=True):
    """What to tokenize: `prompt`, or `text`."""

    prompt: str | None = None
    text: str | None = None


class IdsBody(msgspec.Struct, kw_only=True):
    """What to read as a text. Ids that the vocabulary does not have stand for nothing."""

    tokens: list[TokenId]


async def tokenized(engine: Engine, body: TextBody) -> dict[str, Any]:
    """Raises `InvalidRequest` for what the vocabulary has no token for."""
    text = body.prompt if body.prompt is not None else body.text or ""
    ids = await anyio.to_thread.run_sync(engine.codec.tokenizer.content_ids, text)
    return {"tokens": ids, "count": len(ids)}


def detokenized(engine: Engine, body: IdsBody) -> dict[str, Any]:
    """Control tokens are shown."""
    return {"prompt": engine.codec.tokenizer.text(body.tokens)}
