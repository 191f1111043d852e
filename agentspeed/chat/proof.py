"""Proves at load that a codec writes what its template writes, on conversations made up for it.

What holds is found by trying: how a template wants calls without a text, and which space around contents it cuts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from agentspeed.chat.calls import CallFormat
from agentspeed.chat.frames import ANSWER, RESULT, THOUGHT, TRIMS, USER, Frames, Place, Trim, open_calls
from agentspeed.chat.parser import CallReady, TurnParser
from agentspeed.chat.skeleton import Empty, Part, Script, Shape, Skeletons, arguments_skeleton
from agentspeed.chat.tags import Tags
from agentspeed.errors import TemplateUnstable
from agentspeed.tools.schema import Schema

_SPACED: Final = ("\n x \n", " x\n", "\n\nx", "x  ", " x")
"""Contents by which it is seen what a template does to the space around them."""
_WORDS: Final = ("Some words.", "é 😀, and more", "two\nlines", "a <b> {c} | d", "1", "")
_ARGUMENTS: Final[tuple[dict[str, object], ...]] = (
    {"word": "a"},
    {},
    {"word": 'quo"ted\\', "count": 2, "list": ["x", {"y": None}]},
)
_CONVERSATIONS: Final = 12
_LONGEST: Final = 8


def ways_of_calls(make: Callable[[Empty, bool], Skeletons]) -> Skeletons | None:
    """Skeletons under which the template writes calls, with the least text around a message that has nothing else."""
    best: tuple[int, Skeletons] | None = None
    for as_text in (True, False):
        for empty in ("text", "none", "absent"):
            skeletons = make(empty, as_text)
            try:
                script = skeletons.script([USER, _call(skeletons, as_text), RESULT])
            except ValueError:
                continue
            written = [part.text for region in script.regions for part in region]
            twice = as_text and any(part.depth for part in script.regions[1] if part.slot == (1, "arguments0"))
            size = sum(map(len, written)) + (10_000 if any("None" in text for text in written) else 0)
            if not twice and (best is None or size < best[0]):
                best = (size, skeletons)
    return None if best is None else best[1]


def check_base(frames: Frames, think: tuple[str, str]) -> None:
    """Raises `TemplateUnstable` for a template under which plain conversations cannot be appended."""
    prompt = frames.prompt([USER])
    answer = frames.before([USER], ANSWER).removeprefix(frames.closing([USER]))
    if not prompt and answer.strip():
        raise TemplateUnstable(
            "The template has no generation prompt that only appends.", remedy="It must honour add_generation_prompt."
        )
    if _bare(prompt, think) != _bare(answer, think):
        raise TemplateUnstable(
            f"The template opens an assistant message with {answer!r} but asks for one with {prompt!r}.",
            remedy="Generated ids could not stay in the log as they are; fix the template.",
        )
    for shapes in ([USER, ANSWER] * 3, [USER, USER, ANSWER, USER]):
        for length in range(1, len(shapes)):
            try:
                old = frames.skeletons.script(shapes[:length])
                new = frames.skeletons.script(shapes[: length + 1])
                _ = frames.parts(shapes[: length + 1], length)
            except ValueError as error:
                raise _refused(f"{shapes[length].role} after {shapes[length - 1].role}", error) from error
            if _told(old, think) != _told(new, think)[:length]:
                raise TemplateUnstable(
                    f"The template writes {length} earlier messages differently once a {shapes[length].role} message "
                    "follows.",
                    remedy="Use a template that neither cuts nor rewrites what was said.",
                )


def trims(frames: Frames, form: CallFormat | None) -> dict[Place, Trim]:
    """What the template does to the space around each kind of content."""
    found: dict[Place, Trim] = {}
    conversations: list[tuple[list[Shape], int, str]] = [
        ([USER], 0, "text"),
        ([USER, ANSWER], 1, "text"),
        ([USER, ANSWER, USER], 1, "text"),
        ([USER, THOUGHT], 1, "text"),
        ([USER, THOUGHT], 1, "reasoning"),
    ]
    if form is not None:
        call = _call(frames.skeletons, frames.skeletons.as_text)
        conversations.append(([USER, call, RESULT], 2, "text"))
        if form.text_beside:
            conversations.append(([USER, Shape("assistant", True, False, call.calls, 1)], 1, "text"))
    for shapes, place, field in conversations:
        try:
            key = _place_of(frames, shapes, place, field)
            if key is not None and key not in found and (trim := _trim(frames, shapes, place, field, key)) is not None:
                found[key] = trim
        except ValueError:
            continue
    return found


def problem(frames: Frames, form: CallFormat | None, think: tuple[str, str], *, reasoning: bool) -> str | None:
    """What is not as the template writes it, on conversations made up at random (the same at every load)."""
    chance = random.Random(20)
    made = [conversation(chance, frames, form, reasoning=reasoning, most=_LONGEST) for _ in range(_CONVERSATIONS)]
    if form is not None:
        call = _call(frames.skeletons, frames.skeletons.as_text)
        ends, others = frames.tail([USER, call]), frames.tail([USER, ANSWER])
        if not ends.endswith(others):
            return f"it ends a message with calls with {ends!r}, and others with {others!r}"
        steps = [USER, call, RESULT, call, RESULT, ANSWER, USER]
        made.append((steps, [_neutral(shape) for shape in steps]))
    for shapes, contents in made:
        try:
            script = frames.skeletons.script(shapes)
            _ = frames.parts(shapes, 0)
            for length in range(1, len(shapes)):
                _ = frames.parts(shapes, length)
            if not open_calls(shapes):
                _ = frames.prompt(shapes)
            _check_prompts(frames, shapes, think)
            if form is not None:
                _check_calls(form, script, shapes)
            slots = _filled(frames, script, shapes, contents)
            whole = frames.skeletons.rendered(shapes, contents)
        except ValueError as error:
            return str(error)
        if slots != whole:
            at = next((n for n, (a, b) in enumerate(zip(slots, whole, strict=False)) if a != b), len(slots))
            return f"it rewrites what is said: {whole[max(0, at - 20) : at + 20]!r}"
    return None


def unread(frames: Frames, tags: Tags, count: int) -> str | None:
    """What the template writes of `count` calls in one message, where a turn that writes it is not read as these."""
    arguments: dict[str, object] = {"word": 'two\nlines, "é"', "count": 2}
    skeleton, strings = arguments_skeleton(arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    said: dict[str, str] = {}
    for number in range(count):
        said |= {f"name{number}": f"tool{number}", f"id{number}": f"functions.tool{number}:{number}"}
        said |= {f"arguments{number}": text} | {f"string{number}.{at}": word for at, word in enumerate(strings)}
    call = Shape("assistant", False, False, ("" if frames.skeletons.as_text else skeleton,) * count, count)
    script = frames.skeletons.script([USER, call])
    whole = _filled(frames, script, [USER, call], [{"text": ""}, said])
    raw = whole[whole.rfind(tags.calls.opening, 0, whole.find("tool0")) :]
    raw = raw.removesuffix(frames.tail([USER, ANSWER]))
    schema: Schema = {"type": "object", "properties": {"word": {"type": "string"}, "count": {"type": "integer"}}}
    parser = TurnParser(replace(tags, lead="", thinking=False), tools={f"tool{n}": schema for n in range(count)})
    read = [piece for piece in [*parser.feed(raw), *parser.finish()] if isinstance(piece, CallReady)]
    told = [(piece.name, json.loads(piece.arguments)) for piece in read]
    return None if told == [(f"tool{number}", arguments) for number in range(count)] else raw


def _check_prompts(frames: Frames, shapes: Sequence[Shape], think: tuple[str, str]) -> None:
    """Raises ValueError where the model would be asked to speak with another text than stands before what it says."""
    for place, shape in enumerate(shapes):
        before = shapes[:place]
        if shape.role != "assistant" or not before or before[-1].role == "assistant":
            continue
        asked = frames.closing(before) + frames.prompt(before)
        written = frames.before(before, shape)
        if not _bare(written, think).startswith(_bare(asked, think)):
            raise ValueError(
                f"it asks for an answer after {_told_roles(before)} with {asked!r}, and writes {written!r}"
            )


def _check_calls(form: CallFormat, script: Script, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where a call does not begin as the first one of a conversation does."""
    for place, shape in enumerate(shapes):
        region = script.regions[place]
        for number in range(len(shape.calls)):
            named = ((place, f"name{number}"), (place, f"id{number}"))
            at = next(n for n, part in enumerate(region) if part.slot in named)
            before = region[at - 1].text if at and region[at - 1].slot is None else ""
            wanted = form.joint + form.call_open if number else form.opening
            if not before.removesuffix("functions." if form.numbered else "").endswith(wanted):
                raise ValueError(f"a call after {_told_roles(shapes[:place])} begins with {before!r}, not {wanted!r}")


def _told_roles(shapes: Sequence[Shape]) -> str:
    return ", ".join("a call" if shape.calls else "a result" if shape == RESULT else shape.role for shape in shapes)


def conversation(
    chance: random.Random, frames: Frames, form: CallFormat | None, *, reasoning: bool, most: int
) -> tuple[list[Shape], list[dict[str, str]]]:
    """Shapes and contents of a conversation in any order that a session can have."""
    shapes: list[Shape] = []
    contents: list[dict[str, str]] = []
    waiting: list[dict[str, str]] = []
    as_text = frames.skeletons.as_text
    for _ in range(chance.randint(1, most)):
        if waiting:
            shapes.append(RESULT)
            contents.append({"text": chance.choice(_WORDS), **waiting.pop(0)})
            continue
        if not shapes or chance.random() < 0.4:
            shapes.append(USER)
            contents.append({"text": chance.choice(_WORDS)})
            continue
        said: dict[str, str] = {"text": chance.choice(_WORDS[:-1]), "reasoning": chance.choice(_WORDS[:-1])}
        count = chance.randint(0, min(3, form.most)) if form is not None else 0
        skeletons: list[str] = []
        for number in range(count):
            arguments = chance.choice(_ARGUMENTS)
            skeleton, strings = arguments_skeleton(arguments)
            skeletons.append("" if as_text else skeleton)
            said |= {f"name{number}": f"tool{number}", f"id{number}": f"functions.tool{number}:{number}"}
            said |= {f"arguments{number}": '{"word": "a"}'}
            said |= {f"string{number}.{at}": text for at, text in enumerate(strings)}
            waiting.append({"name": f"tool{number}", "id": said[f"id{number}"]})
        text = not count or (form is not None and form.text_beside and chance.random() < 0.5)
        thought = reasoning and chance.random() < 0.5
        shapes.append(Shape("assistant", text, thought, tuple(skeletons), count))
        contents.append(said)
    return shapes, contents


def _call(skeletons: Skeletons, as_text: bool) -> Shape:
    del skeletons
    return Shape("assistant", False, False, ("" if as_text else arguments_skeleton({"word": "a"})[0],), 1)


def _place_of(frames: Frames, shapes: Sequence[Shape], place: int, field: str) -> Place | None:
    region = frames.skeletons.script(shapes).regions[place]
    for number, part in enumerate(region):
        if part.slot == (place, field):
            before = region[number - 1].text if number else ""
            return (shapes[place].role, field, frames.thought(before))
    return None


def _trim(frames: Frames, shapes: Sequence[Shape], place: int, field: str, key: Place) -> Trim | None:
    script = frames.skeletons.script(shapes)
    contents = [_neutral(shape) for shape in shapes]
    for trim in TRIMS:
        frames.trims[key] = trim
        told = True
        for text in _SPACED:
            contents[place][field] = text
            if _filled(frames, script, shapes, contents) != frames.skeletons.rendered(shapes, contents):
                told = False
                break
        del frames.trims[key]
        if told:
            return trim
    return None


def _neutral(shape: Shape) -> dict[str, str]:
    said = {"text": "x", "reasoning": "y", "name": "t", "id": "c"}
    for number in range(len(shape.calls)):
        said |= {f"name{number}": "t", f"id{number}": "c", f"arguments{number}": '{"word": "a"}'}
        said |= {f"string{number}.0": "word", f"string{number}.1": "a"}
    return said


def _filled(frames: Frames, script: Script, shapes: Sequence[Shape], contents: Sequence[Mapping[str, str]]) -> str:
    """A script with its slots filled, as text."""
    roles = [shape.role for shape in shapes]
    text, before = "", ""
    parts = [part for region in script.regions for part in region] + [Part(script.tail)]
    for part in parts:
        text += part.text if part.slot is None else frames.filled(part, contents, roles, before)
        before = part.text
    return text


def _bare(text: str, think: tuple[str, str]) -> str:
    """A text without marks of reasoning and space."""
    for mark in think:
        text = text.replace(mark, "")
    return "".join(text.split())


def _told(script: Script, think: tuple[str, str]) -> list[list[str]]:
    """What the template writes around each message, but for marks of reasoning and space."""
    return [[_bare(part.text, think) for part in region] for region in script.regions]


def _refused(where: str, error: ValueError) -> TemplateUnstable:
    """For a template that raises, with its own words, where others append."""
    return TemplateUnstable(
        f"The chat template refuses a message ({where}): {error}.",
        remedy="A session appends any message to any other; use a template that writes them all.",
    )
