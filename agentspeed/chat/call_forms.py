"""What a codec reads off its template at load: how calls are written, what is trimmed, and whether it all holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import final

from agentspeed.chat.calls import MAX_CALLS, CallFormat, Keys, Kind
from agentspeed.chat.frames import ANSWER, USER, Frames
from agentspeed.chat.skeleton import Part, Script, Shape, arguments_skeleton


def call_format(frames: Frames, opened: Callable[[str], str]) -> CallFormat | None:
    """The format in which the template writes calls; None when it writes none, or none that could be read back.

    `opened` is what of a text before an answer belongs to the message's own beginning."""
    word = _skeleton(frames, {"\0k": "\0v"})
    try:
        one = frames.skeletons.script([USER, Shape("assistant", text=False, calls=(word,))])
    except ValueError:
        return None
    plain = opened(frames.before([USER], ANSWER))
    region = one.regions[1]
    before = _literal(region, 0)
    base = _shared_start(before, plain)
    start = before[len(base) :]
    numbered = any(part.slot == (1, "id0") for part in region)
    name_at = next((n for n, part in enumerate(region) if part.slot in ((1, "name0"), (1, "id0"))), None)
    if name_at is None:
        return None
    shown = frames.skeletons.script([USER, ANSWER]).tail
    most = _most(frames, word, one.tail)
    two = _several(frames, word, 2) if most > 1 else None
    beside = _beside(frames, word)
    rest = list(region[name_at + 1 :])
    lead = beside[: -len(start)] if beside is not None and start and beside.endswith(start) else ""
    space = start[: len(start) - len(start.lstrip())]
    made = _Parts(rest, one.tail, shown)
    if frames.skeletons.as_text or _is_json(rest):
        form = _with_json(frames, made, start.lstrip(), two)
    else:
        form = _with_keys(frames, made, start.lstrip(), two)
    if form is None:
        return None
    spread = {name: getattr(form, name) for name in CallFormat.__slots__}
    return CallFormat(
        **{
            **spread,
            "lead": lead + space,
            "numbered": numbered or form.numbered,
            "text_beside": beside is not None,
            "restarts": form.numbered and not numbered,
            "most": most,
        }
    )


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    rest: list[Part]
    """After the name of the only call, to its last content."""
    tail: str
    shown: str
    """What follows the last content of a message without calls."""


def _several(frames: Frames, word: str, count: int) -> Script | None:
    try:
        return frames.skeletons.script([USER, Shape("assistant", text=False, calls=(word,) * count)])
    except ValueError:
        return None


def _most(frames: Frames, word: str, tail: str) -> int:
    """How many calls a message may have: templates end one of several otherwise, by mistake, than they end one."""
    for count in (2, 3):
        script = _several(frames, word, count)
        if script is None or script.tail != tail:
            return count - 1
    return MAX_CALLS


def _beside(frames: Frames, word: str) -> str | None:
    """What stands between a text and the name of the call after it."""
    try:
        region = frames.skeletons.script([USER, Shape("assistant", calls=(word,))]).regions[1]
    except ValueError:
        return None
    at = next(n for n, part in enumerate(region) if part.slot == (1, "text"))
    return _literal(region, at + 1)


def _with_json(frames: Frames, made: _Parts, start: str, two: Script | None) -> CallFormat | None:
    """A name, then its arguments as JSON."""
    name_end, end, spaced = _around_json(frames, made.rest, made.tail)
    numbered = re.fullmatch(r"(:)0(.*)", name_end, re.DOTALL)
    if numbered is not None:
        start, name_end = start.removesuffix("functions."), numbered[2]
    call_close, joint, call_open, section_open, section_close = _cut(
        frames, made, start, end, two, numbered=bool(numbered)
    )
    kind: Kind = "object" if re.search(r'\{\s*"name"\s*:\s*"$', call_open) else "framed"
    return CallFormat(
        kind=kind,
        section_open=section_open,
        call_open=call_open,
        name_end=name_end,
        call_close=call_close,
        joint=joint,
        section_close=section_close,
        spaced=spaced,
        numbered=numbered is not None,
    )


def _around_json(frames: Frames, rest: Sequence[Part], tail: str) -> tuple[str, str, bool]:
    """What stands before and after the arguments, and whether they are spaced."""
    if frames.skeletons.as_text:
        return _literal(rest, 0), tail, _is_spaced(frames)
    text = "".join("\0" if part.slot is not None else part.text for part in rest) + tail
    before, _, after = text.partition('{"\0"')
    spaced = after.startswith(": ")
    end = after.lstrip(": ").removeprefix('"\0"').lstrip().removeprefix("}")
    return before, end, spaced


def _is_spaced(frames: Frames) -> bool:
    """Whether the template, given an object, puts space into its JSON; most do, and their models learnt it so."""
    call = Shape("assistant", text=False, calls=(arguments_skeleton({"\0k": "\0v"})[0],))
    try:
        region = frames.skeletons.with_objects().script([USER, call]).regions[1]
    except ValueError:
        return True
    return '"\0":"\0' not in "".join("\0" if part.slot is not None else part.text for part in region)


def _is_json(rest: Sequence[Part]) -> bool:
    text = "".join("\0" if part.slot is not None else part.text for part in rest)
    return re.search(r'\{\s*"\0"\s*:\s*"\0$', text) is not None


def _cut(
    frames: Frames,
    made: _Parts,
    start: str,
    end: str,
    two: Script | None,
    *,
    value_close: str = "",
    numbered: bool = False,
) -> tuple[str, str, str, str, str]:
    """(call_close, joint, call_open, section_open, section_close) of what stands around calls."""
    close = end.removesuffix(made.shown) if end.endswith(made.shown) else end
    if two is None:
        return close, "", start, "", ""
    between = _between(frames, two).removeprefix(value_close)
    if numbered:
        between = between.removesuffix("functions.")
    call_close = _shared_start(between, close)
    rest = between[len(call_close) :]
    shared = _shared_end(rest, start)
    # The next call begins with a tag or an object, not in the middle of the text before it.
    call_open = start[len(start) - shared :]
    skipped = len(call_open) - len(call_open.lstrip())
    call_open = call_open[skipped:]
    joint = rest[: len(rest) - len(call_open)]
    return call_close, joint, call_open, start[: len(start) - len(call_open)], close[len(call_close) :]


def _between(frames: Frames, two: Script) -> str:
    """What stands between the arguments of one call and the name of the next."""
    region = two.regions[1]
    names = ((1, "name1"), (1, "id1"))
    at = next(n for n, part in enumerate(region) if part.slot in names)
    first = next(n for n in range(at - 1, -1, -1) if region[n].slot is not None)
    text = "".join(part.text for part in region[first + 1 : at])
    if frames.skeletons.as_text or not _is_json(region[: first + 1]):
        return text
    return text.removeprefix('"').lstrip().removeprefix("}")


def _with_keys(frames: Frames, made: _Parts, start: str, two: Script | None) -> CallFormat | None:
    """A name, then keys and values one by one."""
    literals = [part.text for part in made.rest if part.slot is None]
    none = _only(frames, {})
    number = _only(frames, {"\0k": 0})
    more = _only(frames, {"\0a": "\0b", "\0c": "\0d"})
    if len(literals) != 2 or none is None or number is None or more is None:
        return None
    before_key, text_open = literals
    after_name = none.tail
    value_then_end = made.tail
    between = [part.text for part in more.regions[1] if part.slot is None][-2]
    value_close = _shared_start(between, value_then_end)
    # What a call without arguments has after its name is what one with arguments has after its last value.
    end = value_then_end[len(value_close) :]
    key_open = _shared_text(before_key, between[len(value_close) :])
    name_end = before_key[: len(before_key) - len(key_open)]
    joint = between[len(value_close) : len(between) - len(key_open)]
    if after_name != name_end + end:
        shared = _shared_end(value_then_end, after_name)
        end = value_then_end[len(value_then_end) - shared :]
        value_close = value_then_end[: len(value_then_end) - shared]
        if after_name.removesuffix(end).strip() != name_end.strip():
            return None
        name_end = after_name.removesuffix(end)
        key_open = before_key[len(name_end) :] if before_key.startswith(name_end) else before_key
        joint = between[len(value_close) : len(between) - len(key_open)]
    number_region = [part.text for part in number.regions[1] if part.slot is None]
    json_open, _, json_close = number.tail.partition("0")
    if not number_region:
        return None
    call_close, call_joint, call_open, section_open, section_close = _cut(
        frames, made, start, end, two, value_close=value_close
    )
    return CallFormat(
        kind="keys",
        section_open=section_open,
        call_open=call_open,
        name_end=name_end,
        call_close=call_close,
        joint=call_joint,
        section_close=section_close,
        spaced=True,
        keys=Keys(
            key_open=key_open,
            text_open=text_open,
            json_open=json_open,
            value_close=value_close,
            joint=joint,
            words=_words(frames, json_open, json_close),
        ),
    )


def _words(frames: Frames, before: str, after: str) -> tuple[tuple[str, str], ...]:
    """How the template spells values that are no text, number, array or object, where that is not JSON."""
    found: list[tuple[str, str]] = []
    for word in ("true", "false", "null"):
        script = _only(frames, {"\0k": json.loads(word)})
        tail = "" if script is None else script.tail
        if not tail.startswith(before) or not tail.endswith(after):
            continue
        spelling = tail[len(before) : len(tail) - len(after)]
        if spelling and spelling != word:
            found.append((word, spelling))
    return tuple(found)


def _only(frames: Frames, arguments: dict[str, object]) -> Script | None:
    try:
        return frames.skeletons.script([USER, Shape("assistant", text=False, calls=(_skeleton(frames, arguments),))])
    except ValueError:
        return None


def _skeleton(frames: Frames, arguments: dict[str, object]) -> str:
    return "" if frames.skeletons.as_text else arguments_skeleton(arguments)[0]


def _literal(region: Sequence[Part], at: int) -> str:
    return region[at].text if at < len(region) and region[at].slot is None else ""


def _shared_start(one: str, other: str) -> str:
    """What both begin with, without a tag that only begins there."""
    shared = commonprefix([one, other])  # noqa: RUF071
    opened = shared.rfind("<")
    return shared if opened < 0 or ">" in shared[opened:] else shared[:opened]


def _shared_end(one: str, other: str) -> int:
    return len(commonprefix([one[::-1], other[::-1]]))  # noqa: RUF071


def _shared_text(one: str, other: str) -> str:
    shared = _shared_end(one, other)
    return one[len(one) - shared :]
