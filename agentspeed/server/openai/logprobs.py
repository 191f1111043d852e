"""Log-probabilities of a reply in OpenAI's form: of the model's own distribution, before temperature and truncation."""

from __future__ import annotations

from typing import Any

from agentspeed.chat.codec import ChatCodec
from agentspeed.turn import Reply


def token_logprobs(reply: Reply[Any], codec: ChatCodec) -> list[dict[str, Any]]:
    """One entry for each drawn token but the one that ends the message."""
    found = []
    tops = reply.top_logprobs or ((),) * len(reply.ids)
    for number, logprob, top in zip(reply.ids, reply.logprobs, tops, strict=False):
        if number in codec.stop_ids:
            continue
        found.append(
            {**_entry(number, logprob, codec), "top_logprobs": [_entry(other, value, codec) for other, value in top]}
        )
    return found


def _entry(number: int, logprob: float, codec: ChatCodec) -> dict[str, Any]:
    text = codec.tokenizer.text([number])
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
