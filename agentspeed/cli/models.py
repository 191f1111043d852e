"""What `agentspeed models` prints: what runs, what a model needs here, and how its chat template is spoken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.chat.calls import CallFormat
from agentspeed.chat.codec import ChatCodec
from agentspeed.chat.rehearsal import Rehearsed, rehearse
from agentspeed.engine import NANO
from agentspeed.transport.hub import resolve
from agentspeed.transport.model_descriptions import ModelDescription, description, families


def listed(*, as_json: bool) -> str:
    """The families that run."""
    lines = families()
    if as_json:
        return json.dumps([dataclasses.asdict(line) for line in lines])
    return "\n".join(f"{line.name:50} {', '.join(line.model_types):24} {line.attention}" for line in lines)


class Shown:
    """One model; `text` and `fields` say the same. No weights are read, or fetched."""

    def __init__(self, model: str | None, *, revision: str | None, conversations: int) -> None:
        """`conversations` of each kind of session are played against the template; 0 for none.

        Raises what a session on the model would raise, as far as its configuration tells."""
        self.folder = NANO if model is None else resolve(model, revision, weights=False)
        self.model = description(self.folder)
        self.rehearsed: list[Rehearsed] = []
        self.sound = True
        """Whether the template can be spoken, and no conversation differed from what it writes."""
        try:
            self.template = spoken(self.folder)
            if conversations:
                self.rehearsed = list(rehearse(self.folder, conversations))
                self.sound = not any(one.differs for one in self.rehearsed)
        except (errors.ModelBroken, errors.TemplateUnstable) as error:
            self.template, self.sound = {"chat": f"refused: {error}"}, False

    def fields(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            **dataclasses.asdict(self.model),
            "template": self.template,
            **({"rehearsed": [dataclasses.asdict(one) for one in self.rehearsed]} if self.rehearsed else {}),
        }

    def text(self) -> str:
        lines = [*_numbers(self.folder, self.model), *(f"{name:15}{value}" for name, value in self.template.items())]
        return "\n".join([*lines, *(["", "conversations"] if self.rehearsed else []), *_told(self.rehearsed)])


def spoken(folder: Path) -> dict[str, str]:
    """How the folder's template is spoken, and what it refuses. Raises what opening any session raises."""
    codec = ChatCodec(folder)
    told = {"reasoning": _reasoning(codec)}
    for what, given in (("system text", {"system": True}), ("tools", {"tools": True})):
        try:
            view = codec.view(
                reasoning=None, history="template", variables=None, **({"system": False, "tools": False} | given)
            )
            if "tools" in given:
                told |= {what: _tools(view), "a call": _call(view.tags.calls)}
                continue
            _ = view.opening("Be brief.", [])
            told[what] = "yes"
        except errors.InvalidRequest as error:
            told[what] = f"refused: {error}"
    return told


def _reasoning(codec: ChatCodec) -> str:
    if not codec.thinks:
        return "none that the template knows"
    if codec.switch is not None:
        return f"between {codec.tags.think_open} and {codec.tags.think_close}, turned on and off by {codec.switch}"
    begins = "opened by every prompt" if codec.tags.thinking else "as the model likes"
    return f"between {codec.tags.think_open} and {codec.tags.think_close}, {begins}"


def _tools(codec: ChatCodec) -> str:
    if not codec.has_calls:
        return "shown by the template, which writes no calls: they have a form of our own"
    most = codec.tags.calls.most
    beside = "beside a text" if codec.tags.calls.text_beside else "without a text"
    return f"up to {most} call{'s' if most > 1 else ''} in a message, {beside}"


def _call(form: CallFormat) -> str:
    name = "functions.NAME:0" if form.numbered else "NAME"
    if form.keys is None:
        arguments = "ARGUMENTS"
    else:
        arguments = f"{form.keys.key_open}KEY{form.keys.text_open}VALUE{form.keys.value_close}"
    whole = f"{form.section_open}{form.call_open}{name}{form.name_end}{arguments}{form.call_close}{form.section_close}"
    return json.dumps(whole, ensure_ascii=False)[1:-1].replace('\\"', '"')


def _numbers(folder: Path, model: ModelDescription) -> Iterator[str]:
    yield f"model          {folder}"
    yield f"family         {model.family} ({model.model_type}), {model.attention}"
    if model.notice:
        yield f"               {model.notice}"
    yield f"parameters     {_count(model.parameters)} in {counted(model.layers, 'layer')}, stored as {model.stored}"
    yield f"vocabulary     {model.vocab_size:,} ids"
    here = f"{model.memory_owner} has {_size(model.memory_bytes)}"
    yield f"context        {model.context_limit:,} tokens by the model; {here}"
    beside = {f"weights={kind}": held for kind, held in model.in_bytes.items()}
    for dtype, held in {**model.in_dtype, **beside, "kv_cache_dtype=fp8": model.fp8_cache}.items():
        kept = " (matrices in bfloat16, as they are stored)" if held.matrices == "bfloat16" else ""
        yield (
            f"  {dtype:19}{_size(held.weight_bytes)} of weights{kept}"
            f", {held.cache_bytes_per_token:,} B of cache a token"
            + (f", contexts of {held.context:,} in a pool of {held.pool_tokens:,} tokens" if held.context else "")
        )
        if held.refused:
            yield f"{'':21}does not start: {held.refused}"


def _told(rehearsed: list[Rehearsed]) -> Iterator[str]:
    for one in rehearsed:
        if one.refused:
            yield f"  {one.kind}: refused. {one.refused}"
            continue
        again = f", {one.recomputed} with a part written again" if one.recomputed else ""
        yield f"  {one.kind}: {one.equal} of {one.conversations} as the template writes them{again}"
        if one.differs:
            yield f"    {one.differs}"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
