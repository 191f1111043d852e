"""What a template writes around and between messages, and the ids of it: only ever what every continuation agrees on.

After a message only that text is certain which all that may follow share: results of tools may be grouped, a prompt may
be asked for or not. It is written at once (`closing`); the rest is written when it is known what follows (`parts`,
`prompt`). Texts are put together between control tokens before they are tokenised, so ids are those of the whole text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import Final, Literal, TypeAlias, final

from agentspeed.chat.skeleton import Part, Script, Shape, Skeletons, TextMissing
from agentspeed.chat.tokenizer import TextTokenizer
from agentspeed.errors import TemplateUnstable

Trim: TypeAlias = Literal["", "strip", "lstrip", "rstrip", "strip lines", "lstrip lines", "rstrip lines"]
"""What a template does to the space around a content."""
TRIMS: Final[Mapping[Trim, Callable[[str], str]]] = {
    "": lambda text: text,
    "strip": lambda text: text.strip(),
    "lstrip": lambda text: text.lstrip(),
    "rstrip": lambda text: text.rstrip(),
    "strip lines": lambda text: text.strip("\n"),
    "lstrip lines": lambda text: text.lstrip("\n"),
    "rstrip lines": lambda text: text.rstrip("\n"),
}
Place: TypeAlias = tuple[str, str, bool]
"""Of a content that is trimmed: who speaks, which content, whether it follows the end of reasoning."""
USER: Final = Shape("user")
ANSWER: Final = Shape("assistant")
THOUGHT: Final = Shape("assistant", reasoning=True)
RESULT: Final = Shape("tool")
_KEPT: Final = 4096


def open_calls(shapes: Sequence[Shape]) -> int:
    """How many calls of the last assistant's message have no result yet."""
    results = 0
    for shape in reversed(shapes):
        if shape.role == "tool":
            results += 1
        else:
            return max(0, shape.awaits - results) if shape.role == "assistant" else 0
    return 0


@final
class Frames:
    """Of one template under one set of variables. Shapes are those of whole conversations, without system messages."""

    def __init__(self, skeletons: Skeletons, tokenizer: TextTokenizer, think_close: str) -> None:
        self.skeletons = skeletons
        self.trims: dict[Place, Trim] = {}
        self._tokenizer = tokenizer
        self._think_close = think_close
        self._cached_closing = lru_cache(maxsize=_KEPT)(self._closing)
        self._pieces = lru_cache(maxsize=_KEPT)(self._split)
        self.head = self._head()

    # ---- texts ----------------------------------------------------------------------------------------------------
    def closing(self, shapes: Sequence[Shape]) -> str:
        """What is certain to follow the last content, whatever comes next; empty before the first message."""
        return self._cached_closing(tuple(shapes)) if shapes else ""

    def prompt(self, shapes: Sequence[Shape]) -> str:
        """What follows `closing` when the model speaks next."""
        asking, silent = self.tail(shapes, generate=True), self.tail(shapes)
        if asking != silent and asking.startswith(silent):
            try:
                opened = self.before(shapes, ANSWER)
            except ValueError:
                opened = ""
            if opened == silent and silent != self.closing(shapes):
                asking = silent  # the template has asked already, and would ask twice
        closing = self.closing(shapes)
        if not asking.startswith(closing):
            raise TemplateUnstable(
                "The template has no generation prompt that only appends.",
                remedy="It must honour add_generation_prompt.",
            )
        return asking[len(closing) :]

    def tail(self, shapes: Sequence[Shape], *, generate: bool = False) -> str:
        """What the template writes after the last content when nothing follows."""
        return self.skeletons.script(shapes, generate=generate).tail

    def before(self, shapes: Sequence[Shape], following: Shape) -> str:
        """What the template writes between the last content and the first one of a message that follows."""
        script = self.skeletons.script([*shapes, following])
        return _leading(script.regions[-1])

    def parts(self, shapes: Sequence[Shape], start: int, *, generate: bool = False) -> list[tuple[Part, ...]]:
        """Parts of each message from `start` on, without what `closing` has written of them already."""
        script = self.skeletons.script(shapes, generate=generate)
        done = self.closing(shapes[:start]) if start else self.head
        regions = list(script.regions[start:])
        if regions:
            regions[0] = _without(regions[0], done)
        return regions

    def changed(self, before: Sequence[Shape], after: Sequence[Shape], *, generate: bool) -> int | None:
        """The first message that the template writes differently once the later ones are there."""
        old: Script = self.skeletons.script(before)
        new: Script = self.skeletons.script(after, generate=generate)
        return next((n for n, region in enumerate(old.regions) if region != new.regions[n]), None)

    def _head(self) -> str:
        first = _leading(self.skeletons.script([USER]).regions[0])
        later = self.before([USER, ANSWER], USER)
        silent = self.tail([USER, ANSWER])
        frame = later[len(silent) :] if later.startswith(silent) else later
        if not first.endswith(frame):
            raise TemplateUnstable(
                "The template writes the first message differently from later ones.",
                remedy="Give the system text in the first user message, or fix the template.",
            )
        return first[: len(first) - len(frame)]

    def _closing(self, shapes: tuple[Shape, ...]) -> str:
        following = [RESULT] if open_calls(shapes) else [USER, ANSWER]
        candidates: list[str] = []
        for shape in following:
            try:
                candidates.append(self.before(shapes, shape))
            except TextMissing:
                raise
            except ValueError:
                continue
        silent = self.tail(shapes)
        if not open_calls(shapes):
            candidates.append(self.tail(shapes, generate=True))
        shared = commonprefix(candidates) if candidates else silent  # noqa: RUF071
        if shared.startswith(silent):
            shared = silent
        return shared[: self._seam(shared, candidates)]

    def _seam(self, shared: str, candidates: Sequence[str]) -> int:
        """Where in `shared` the log may end for now: at a control token, so that what follows cannot change its ids."""
        ends: set[int] = set()
        inside: set[int] = set()
        starts = [{len(text)} for text in candidates]
        for number, text in enumerate(candidates):
            for start, end, _ in self._tokenizer.read_template(text)[1]:
                starts[number].add(start)
                inside.update(range(start + 1, end))
                if end <= len(shared):
                    ends.add(end)
        hard = ends | (set.intersection(*starts) if starts else set())
        for place in range(len(shared), -1, -1):
            if place not in inside and place in hard:
                return place
        soft = [place for place in range(len(shared), -1, -1) if place not in inside]
        # Without a control token: after a line's end rather than in the middle of a word.
        return next((place for place in soft if not place or shared[place - 1].isspace()), 0)

    # ---- ids ------------------------------------------------------------------------------------------------------
    def ids(self, parts: Sequence[Part], contents: Sequence[Mapping[str, str]], roles: Sequence[str]) -> list[int]:
        """The ids of parts whose slots are filled with `contents`, by message and field."""
        ids: list[int] = []
        spelt = ""
        before = ""
        for part in parts:
            if part.slot is None:
                for piece in self._pieces(part.text):
                    if isinstance(piece, str):
                        spelt += piece
                    else:
                        ids += [*self._tokenizer.content_ids(spelt), piece]
                        spelt = ""
                before = part.text
                continue
            spelt += self.filled(part, contents, roles, before)
            before = ""
        return [*ids, *self._tokenizer.content_ids(spelt)]

    def filled(self, part: Part, contents: Sequence[Mapping[str, str]], roles: Sequence[str], before: str) -> str:
        """A slot's content as the template writes it: trimmed, and made a JSON string where it is in one."""
        place, field = part.slot or (0, "")
        text = TRIMS[self.trims.get((roles[place], field, self.thought(before)), "")](contents[place][field])
        for _ in range(part.depth):
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return text

    def thought(self, before: str) -> bool:
        """Whether a content follows the end of reasoning, of the template's text before it."""
        return before.rstrip().endswith(self._think_close)

    def text_ids(self, text: str) -> list[int]:
        """Ids of the template's own text."""
        return self.ids([Part(text)], (), ())

    def _split(self, text: str) -> tuple[str | int, ...]:
        """A text of the template cut at its control tokens."""
        pieces: list[str | int] = []
        done = 0
        for start, end, number in self._tokenizer.read_template(text)[1]:
            if start > done:
                pieces.append(text[done:start])
            pieces.append(number)
            done = end
        if done < len(text):
            pieces.append(text[done:])
        return tuple(pieces)


def _leading(region: Sequence[Part]) -> str:
    return region[0].text if region[0].slot is None else ""


def _without(region: tuple[Part, ...], done: str) -> tuple[Part, ...]:
    """A region without the text that was written before it was known what follows."""
    if not done:
        return region
    if not _leading(region).startswith(done):
        raise ValueError(f"it writes {_leading(region)!r} where {done!r} was certain")
    rest = region[0].text[len(done) :]
    return (Part(rest), *region[1:]) if rest else region[1:]
