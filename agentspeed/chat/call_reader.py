"""Reads one tool call after the mark that opened it, in whichever of the three ways its family writes calls.

Space is read as it comes: what is between marks is told by the marks. A mark inside a JSON string is part of it.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Final, final

from agentspeed.chat.calls import CallFormat, finite
from agentspeed.chat.key_values import NO_TEXT, TEXT, ArgumentKinds, closing, end_of, read_value
from agentspeed.chat.pieces import CallBroken, CallDelta, CallOpened, CallReady, Piece, mark_started

_STRING: Final = r'("(?:[^"\\]|\\.)*")'


@final
class CallReader:
    """One call. `mark` is what opened it and was taken already; `kinds` are what arguments may be."""

    def __init__(self, index: int, form: CallFormat, mark: str, kinds: ArgumentKinds) -> None:
        self._index = index
        self._form = form
        self._kinds = kinds
        self._close = form.close_mark
        first = mark == form.trigger.lstrip()
        self._begun = form.opening[len(form.trigger) :] if first else form.call_open[len(form.next_trigger) :]
        """What of the opening was not taken: it stands before the name."""
        whole = mark + self._begun
        brace = max(whole.find("{"), 0) if form.kind == "object" else len(mark)
        self._around = whole[len(mark) : brace].strip()
        """What of the opening stands before a call that is a JSON object."""
        self._raw = mark[brace:]
        self._unread = len(self._raw)
        self._name: str | None = None
        self._id: str | None = None
        self._sent = 0
        self._place = 0
        """Where the next key stands, of a call whose arguments are written one by one."""
        self._told = ""
        """The arguments so far, of such a call."""
        self._arguments_at = 0
        self._arguments_end: int | None = None
        self._json = JsonDepth()
        for character in self._raw:
            _ = self._json.take(character)

    def read(self, text: str, pieces: list[Piece]) -> str | None:
        """Takes what belongs to the call; gives what follows its end, or None while it is open."""
        self._raw += text
        if self._form.kind == "keys":
            return self._read_keys(pieces)
        if self._form.kind == "framed":
            return self._read_framed(pieces)
        return self._read_object(pieces)

    def cut_short(self) -> list[Piece]:
        """The turn ended inside the call."""
        self._raw = self._raw[: len(self._raw) - mark_started(self._raw, (self._close,))] if self._close else self._raw
        if self._form.kind == "object":
            return [self._object(cut=True)]
        if self._name is not None and self._arguments_end is not None:
            return [self._ready()]
        return [CallBroken(self._index, self._raw, "it was cut short", cut=True)]

    # ---- one JSON object with a name and arguments ----------------------------------------------------------------
    def _read_object(self, pieces: list[Piece]) -> str | None:
        if self._around:
            bare = self._raw.lstrip()
            if len(bare) < len(self._around) and self._around.startswith(bare):
                return None
            self._raw, self._around = bare.removeprefix(self._around), ""
        for place in range(self._unread, len(self._raw)):
            depth = self._json.take(self._raw[place])
            if depth == 1 and self._arguments_end is None:
                self._arguments_end = place + 1
            ends = depth == 0 if not self._close else self._ends_here(place)
            if not ends:
                continue
            rest = self._raw[place + 1 :]
            self._raw = self._raw[: place + 1 - len(self._close)]
            self._progress_object(pieces)
            pieces.append(self._object(cut=False))
            return rest
        self._unread = len(self._raw)
        self._progress_object(pieces)
        return None

    def _ends_here(self, place: int) -> bool:
        return not self._json.in_string and self._raw.endswith(self._close, 0, place + 1)

    def _progress_object(self, pieces: list[Piece]) -> None:
        """Announces the name once it is certain, and arguments as far as they go."""
        if self._name is None:
            head = _object_head(self._form).match(self._raw)
            if head is None:
                return
            name = _value(head[1])
            if not isinstance(name, str):
                return
            self._opened(name, pieces)
            self._arguments_at = self._sent = head.end()
        self._send(pieces)

    def _send(self, pieces: list[Piece]) -> None:
        end = self._arguments_end
        if end is None:
            held = mark_started(self._raw, (self._close,)) if self._close and not self._json.in_string else 0
            end = len(self._raw) - held
        if end > self._sent:
            pieces.append(CallDelta(self._index, self._raw[self._sent : end]))
            self._sent = end

    def _object(self, *, cut: bool) -> Piece:
        name_key, arguments_key = self._form.fields
        try:
            call = json.loads(self._raw, parse_int=_Digits, parse_float=_Digits, parse_constant=finite)
            loose = written_as_read(call.get(arguments_key, {})) if isinstance(call, dict) else ""
        except (ValueError, RecursionError) as error:
            why = f"it {'was cut short' if cut else 'is not a call'}: {str(error) or type(error).__name__}"
            return CallBroken(self._index, self._raw, why, cut)
        if not isinstance(call, dict) or type(call.get(name_key)) is not str:
            return CallBroken(self._index, self._raw, f'it has no "{name_key}"', cut)
        arguments = call.get(arguments_key, {})
        if not isinstance(arguments, dict):
            return CallBroken(self._index, self._raw, f'its "{arguments_key}" are not an object', cut)
        exact = self._raw[self._arguments_at : self._arguments_end] if self._name is not None else ""
        return CallReady(self._index, call[name_key], exact or loose)

    # ---- a name and a JSON object in frames of their own ----------------------------------------------------------
    def _read_framed(self, pieces: list[Piece]) -> str | None:
        if self._name is None:
            head = _framed_head(self._form, self._begun).match(self._raw)
            if head is None:
                return self._given_up(pieces)
            self._opened(head[1], pieces)
            self._arguments_at = self._sent = self._unread = head.end()
        if self._arguments_end is None:
            for place in range(self._unread, len(self._raw)):
                depth = self._json.take(self._raw[place])
                if depth == 0:
                    self._arguments_end = place + 1
                    break
                if self._close and self._ends_here(place):
                    return self._broken(place + 1, "its arguments are not whole", pieces)
            self._unread = len(self._raw)
        self._send(pieces)
        if self._arguments_end is None:
            return None
        return self._closed(self._arguments_end, pieces)

    def _closed(self, end: int, pieces: list[Piece]) -> str | None:
        """What follows the close of a call whose arguments are whole; None until it is there."""
        if not self._close:
            pieces.append(self._ready())
            return self._raw[end:]
        place = self._raw.find(self._close, end)
        if place < 0:
            return None
        pieces.append(self._ready())
        return self._raw[place + len(self._close) :]

    def _ready(self) -> Piece:
        text = self._told or self._raw[self._arguments_at : self._arguments_end]
        try:
            value = json.loads(text, parse_int=_Digits, parse_float=_Digits, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            why = f"its arguments are not an object: {str(error) or type(error).__name__}"
            return CallBroken(self._index, self._raw, why)
        if not isinstance(value, dict) or self._name is None:
            return CallBroken(self._index, self._raw, "its arguments are not an object")
        return CallReady(self._index, self._name, text, self._id)

    def _given_up(self, pieces: list[Piece]) -> str | None:
        """A call that closes before it has a name is none."""
        place = self._raw.find(self._close) if self._close else -1
        return None if place < 0 else self._broken(place + len(self._close), "it has no name", pieces)

    def _broken(self, end: int, why: str, pieces: list[Piece]) -> str:
        rest = self._raw[end:]
        self._raw = self._raw[: end - len(self._close)]
        pieces.append(CallBroken(self._index, self._raw, why))
        return rest

    # ---- a name and arguments one by one --------------------------------------------------------------------------
    def _read_keys(self, pieces: list[Piece]) -> str | None:
        if self._name is None:
            head = _framed_head(self._form, self._begun).match(self._raw)
            if head is None:
                return self._given_up(pieces)
            if head.end() == len(self._raw):
                return None  # the name may go on
            self._opened(head[1], pieces)
            self._place = head.end()
        while (found := self._key()) is not None:
            key, value, self._place = found
            before = ("," + (" " if self._form.spaced else "")) if self._told else "{"
            fresh = f"{before}{json.dumps(key, ensure_ascii=False)}:{' ' if self._form.spaced else ''}{value}"
            self._told += fresh
            pieces.append(CallDelta(self._index, fresh))
        rest = self._raw[self._place :]
        if not rest.lstrip().startswith(self._close):
            known = self._key_begins(rest) or self._close.startswith(rest.lstrip())
            return None if known else self._given_up_at(pieces)
        end = "}" if self._told else "{}"
        self._told += end
        pieces.append(CallDelta(self._index, end))
        self._arguments_end = self._place
        return self._closed(self._place, pieces)

    def _given_up_at(self, pieces: list[Piece]) -> str | None:
        place = self._raw.find(self._close, self._place)
        return None if place < 0 else self._broken(place + len(self._close), "it has no arguments", pieces)

    def _key_begins(self, rest: str) -> bool:
        keys = self._form.keys
        bare = rest.lstrip()
        opened = keys.key_open.strip() if keys is not None else ""
        return bare.startswith(opened) or opened.startswith(bare)

    def _key(self) -> tuple[str, str, int] | None:
        """(key, value as JSON, end) of the next argument, once it is whole."""
        keys = self._form.keys
        found = _key_head(self._form).match(self._raw, self._place) if keys is not None else None
        if keys is None or found is None:
            return None
        close, start = closing(keys), found.end()
        marked = keys.text_open != keys.json_open
        if marked and found[2].strip() == keys.text_open.strip():
            kinds = TEXT
        else:
            kinds = NO_TEXT if marked else self._kinds.of(self._name or "", found[1])
        end = end_of(self._raw, start, kinds, close)
        return None if end < 0 else (found[1], read_value(self._raw[start:end], kinds, keys), end + len(close))

    def _opened(self, name: str, pieces: list[Piece]) -> None:
        self._name, self._id = self._form.called(name)
        pieces.append(CallOpened(self._index, self._name))


@final
class JsonDepth:
    """How deep inside JSON a character is, and whether it is inside a string."""

    __slots__ = ("_depth", "_escaped", "in_string")

    def __init__(self) -> None:
        self._depth = 0
        self._escaped = False
        self.in_string = False

    def take(self, character: str) -> int | None:
        """The depth that a closing bracket goes back to; None for any other character."""
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth
        return None


class _Digits(str):
    """A number as it was written: Python reads no whole number of more than some thousand digits."""

    __slots__ = ()


def written_as_read(value: object) -> str:
    """JSON in compact form, numbers digit by digit as they were read."""
    match value:
        case _Digits():
            return str(value)
        case dict():
            inside = ",".join(
                f"{json.dumps(key, ensure_ascii=False)}:{written_as_read(item)}" for key, item in value.items()
            )
            return f"{{{inside}}}"
        case list():
            return f"[{','.join(map(written_as_read, value))}]"
        case _:
            return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@lru_cache(maxsize=64)
def _object_head(form: CallFormat) -> re.Pattern[str]:
    name, arguments = (re.escape(json.dumps(field)) for field in form.fields)
    return re.compile(rf"\s*\{{\s*{name}\s*:\s*{_STRING}\s*,\s*{arguments}\s*:\s*(?=\{{)")


@lru_cache(maxsize=64)
def _framed_head(form: CallFormat, begun: str) -> re.Pattern[str]:
    """The name: after what of the opening is no tag, before what ends it."""
    before = _lenient(begun)
    after = _lenient(form.name_end)
    if form.kind == "keys":
        ends = [_lenient(form.keys.key_open) if form.keys is not None else "", re.escape(form.close_mark)]
        after = rf"{after}(?=\s*(?:{'|'.join(end for end in ends if end)}))"
        return re.compile(rf"{before}\s*([^\s<>\"]+?){after}")
    return re.compile(rf"{before}\s*(\S+?){after}\s*(?=\{{)")


@lru_cache(maxsize=64)
def _key_head(form: CallFormat) -> re.Pattern[str]:
    keys = form.keys
    if keys is None:
        return re.compile(r"(?!)")
    opens = "|".join(sorted({re.escape(keys.text_open), re.escape(keys.json_open)}, key=len, reverse=True))
    return re.compile(rf"\s*{_lenient(keys.key_open)}(.+?)({opens})")


def _lenient(literal: str) -> str:
    """A pattern of a literal in which space may be any, or missing at its ends."""
    words = [re.escape(word) for word in literal.split()]
    if not words:
        return r"\s*" if literal else ""
    return r"\s*" + r"\s+".join(words) + (r"\s*" if literal[-1].isspace() else "")
