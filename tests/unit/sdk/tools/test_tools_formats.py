"""Formats end: whatever a grammar lets through for a type of Python's own is short, and is a value of that type."""

from __future__ import annotations

import datetime
import ipaddress
import json
import pathlib
import random
import re
import uuid
import zoneinfo
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import (
    UUID1,
    UUID4,
    UUID5,
    UUID7,
    AnyUrl,
    Base64Bytes,
    Base64UrlBytes,
    FilePath,
    IPvAnyAddress,
    PostgresDsn,
    SecretStr,
    TypeAdapter,
)

from agentspeed.chat.grammar import turn_grammar
from agentspeed.chat.output import Schema
from agentspeed.tools import Bounds, tool
from agentspeed.tools.schema.formats import ENDING, PATTERNS

TOKENIZER = LLTokenizer("byte")
LONGEST = 80
"""Bytes of a date, a time, a duration, an address or an identifier, and its quotes."""


def written(spec: Schema[Any], seed: int) -> str:
    """What a writer makes of a grammar who never chooses to end: of the allowed bytes always the last (0), always the
    first (1), or any."""
    draw = random.Random(seed)
    matcher = LLMatcher(TOKENIZER, turn_grammar(output=spec))
    text = bytearray()
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(256) if mask[token // 8] >> (token % 8) & 1]
        if not allowed:
            break
        token = allowed[-1] if seed == 0 else allowed[0] if seed == 1 else draw.choice(allowed)
        assert matcher.consume_token(token)
        text.append(token)
        assert len(text) < 5000
    assert matcher.is_accepting()
    return text.decode()


def accepts(schema: dict[str, Any], text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, turn_grammar(output=Schema.json(schema)), log_level=0)
    return all(matcher.try_consume_tokens([byte]) == 1 for byte in text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    "kind",
    [
        datetime.date,
        datetime.time,
        datetime.datetime,
        datetime.timedelta,
        ipaddress.IPv4Address,
        ipaddress.IPv6Address,
        uuid.UUID,
        UUID1,
        UUID4,
        UUID5,
        UUID7,
    ],
)
def test_a_value_of_a_fixed_form_ends_soon_and_pydantic_accepts_it(kind: Any) -> None:
    spec = Schema(kind)
    for seed in range(40):
        text = written(spec, seed)
        assert len(text) < LONGEST
        _ = spec.decode(text)


@pytest.mark.parametrize("kind", [Base64Bytes, Base64UrlBytes, AnyUrl])
def test_a_value_of_an_open_form_ends_at_the_bound_and_pydantic_accepts_it(kind: Any) -> None:
    spec = Schema(kind, bounds=Bounds(string_chars=60))
    for seed in range(40):
        text = written(spec, seed)
        assert len(text) <= 62
        _ = spec.decode(text)


@pytest.mark.parametrize("name", sorted({*PATTERNS, "regex", "no-such-format"}))
def test_every_format_that_is_known_comes_to_an_end(name: str) -> None:
    spec = Schema.json({"type": "string", "format": name}, bounds=Bounds(string_chars=40))
    for seed in range(3):
        text = written(spec, seed)
        assert len(json.loads(text)) <= (LONGEST if name in ENDING else 40)


@pytest.mark.parametrize(
    "kind",
    [
        pathlib.Path,
        FilePath,
        bytes,
        SecretStr,
        re.Pattern,
        zoneinfo.ZoneInfo,
        IPvAnyAddress,
        ipaddress.IPv4Network,
        PostgresDsn,
    ],
)
def test_a_type_whose_form_no_grammar_knows_is_a_text_of_a_bounded_length(kind: Any) -> None:
    def take(value: Any) -> None: ...

    take.__annotations__["value"] = kind
    assert "value" in repr(tool(take))
    assert len(json.loads(written(Schema(kind, bounds=Bounds(string_chars=9)), 2))) <= 9


def days_written() -> Iterator[tuple[str, bool]]:
    for year in (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 9996, 9999):
        for month in range(14):
            for day in range(33):
                text = f"{year:04}-{month:02}-{day:02}"
                try:
                    _ = datetime.date.fromisoformat(text)
                except ValueError:
                    yield text, False
                else:
                    yield text, True


def test_the_days_that_are_allowed_are_the_days_there_are() -> None:
    for text, there_is in days_written():
        assert bool(re.fullmatch(PATTERNS["date"], text)) == there_is, text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("time", "00:13:60-13:55"),
        ("time", "24:00:00Z"),
        ("time", "00:00:00+24:00"),
        ("time", "00:00:00.1234567Z"),
        ("date-time", "6666-11-30T00:33:60-13:55"),
        ("date-time", "0000-01-01T00:00:00Z"),
        ("duration", "P"),
        ("duration", "P1DT"),
        ("duration", "P1234567D"),
        ("uuid4", "12345678-1234-1234-8234-123456789012"),
    ],
)
def test_what_pydantic_would_refuse_is_not_written(name: str, text: str) -> None:
    assert not accepts({"type": "string", "format": name}, json.dumps(text))


@pytest.mark.parametrize(
    "length",
    [
        datetime.timedelta(days=3, hours=4, minutes=5, seconds=6),
        datetime.timedelta(0),
        datetime.timedelta(weeks=3),
    ],
)
def test_a_duration_as_pydantic_writes_it_can_be_written(length: datetime.timedelta) -> None:
    text = TypeAdapter(datetime.timedelta).dump_json(length).decode()
    assert accepts({"type": "string", "format": "duration"}, text)


def test_a_pattern_beside_a_format_holds_as_well() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^2"}
    assert accepts(schema, '"2024-02-29"')
    assert not accepts(schema, '"1999-01-01"')
    assert not accepts(schema, '"2024-02-30"')


@pytest.mark.parametrize("named", ["credit-card", "", 3, None])
def test_a_format_that_is_not_known_is_for_people(named: Any) -> None:
    assert accepts({"type": "object", "properties": {"a": {"type": "string", "format": named}}}, '{"a":"any text"}')


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("ipv4", ["0.0.0.0", "192.168.10.255"], ["256.1.1.1", "01.1.1.1", "1.1.1"]),
        ("ipv6", ["::", "::1", "1:2:3:4:5:6:7:8", "fe80::1:2", "1::", "::ffff:1.2.3.4"], ["1:2", ":::", "1::2::3"]),
        ("email", ["a.b@c.de", "x@y"], ["a", "@b", "a b@c.de", "a@-b"]),
        ("uri", ["http://a.b/c?d=e#f", "urn:x:y", "mailto:a@b", "http://[::1]:80/"], ["a", "/b", "http://a{b"]),
        ("uri-reference", ["a", "/b", "?c", "#d", "http://a.b", ""], ["a b", "{x}"]),
        ("uri-template", ["http://a/{x}", "{?q,r*}"], ["{", "{x"]),
        ("hostname", ["a-b.c", "x"], ["-a", "a_b", "."]),
        ("json-pointer", ["", "/a~1b"], ["a", "/~2"]),
        ("uuid", ["12345678-1234-1234-8234-123456789012"], ["12345678"]),
    ],
)  # fmt: skip
def test_a_format_is_what_its_standard_says(name: str, good: list[str], bad: list[str]) -> None:
    schema = {"type": "string", "format": name}
    assert [text for text in good if not accepts(schema, json.dumps(text))] == []
    assert [text for text in bad if accepts(schema, json.dumps(text))] == []
