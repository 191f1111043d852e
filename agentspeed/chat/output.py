"""What `output=` may be: a shape the model's text must have, and how that text becomes a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast, final

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from agentspeed._base.validate import check_text
from agentspeed.errors import InvalidRequest, OutputError, SchemaUnsupported
from agentspeed.tools.bounds import DEFAULT_BOUNDS, Bounds, Json, bounded
from agentspeed.tools.bounds import Schema as JsonSchema
from agentspeed.tools.signature import strip_titles

T_co = TypeVar("T_co", covariant=True)
MAX_REGEX_CHARS: Final = 4096
_CUT: Final = "Raise max_tokens if it was cut short."


@final
class Schema(Generic[T_co]):
    """Any type that pydantic knows, as JSON: `Schema(list[int])`, `Schema(MyDataclass)`; a class needs no wrapper.

    `Schema.json({...})` takes a JSON schema as it is and gives plain Python values. Both raise `SchemaUnsupported` at
    once for a shape under which output might never end."""

    __slots__ = ("_adapter", "_shown", "bounds", "raw")

    def __init__(self, kind: type[T_co] | Any, *, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        try:
            self._adapter: TypeAdapter[Any] | None = TypeAdapter(kind)
            raw = strip_titles(cast("Json", self._adapter.json_schema()))
        except (PydanticUserError, PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
            raise SchemaUnsupported(
                f"output={kind!r} has no JSON schema: {str(error).splitlines()[0]}",
                remedy="Use a pydantic model, a dataclass or a JSON type.",
            ) from error
        self.raw: JsonSchema = cast("JsonSchema", raw)
        self.bounds = bounds
        self._shown = getattr(kind, "__name__", str(kind))
        _ = self.closed()

    @classmethod
    def json(cls, schema: Mapping[str, Json], *, bounds: Bounds = DEFAULT_BOUNDS) -> Schema[Any]:
        """A JSON schema as it is; decoded to plain Python values, which the grammar has already checked."""
        made: Schema[Any] = object.__new__(Schema)
        made._adapter = None
        made.raw = dict(schema)
        made.bounds = bounds
        made._shown = "JSON"
        _ = made.closed()
        return made

    def __repr__(self) -> str:
        return f"<Schema {self._shown}>"

    def closed(self) -> JsonSchema:
        """The schema with every open end bounded."""
        return bounded(self.raw, self.bounds)

    def decode(self, text: str) -> T_co:
        """Raises `OutputError` when the text is not such a value: cut short, or a check the grammar cannot express."""
        try:
            value = json.loads(text) if self._adapter is None else self._adapter.validate_json(text)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors()
            )
            raise OutputError(
                f"The output is not a {self._shown}: {problems}", text=text, remedy="" if self.is_whole(text) else _CUT
            ) from error
        except json.JSONDecodeError as error:
            raise OutputError(f"The output is not whole JSON: {error}", text=text, remedy=_CUT) from error
        return cast("T_co", value)

    def is_whole(self, text: str) -> bool:
        """Whether a turn that was cut had written all of it; `decode` may refuse what it says nevertheless."""
        try:
            json.loads(text)
        except json.JSONDecodeError:
            return False
        return True


@final
@dataclass(frozen=True, slots=True)
class Regex:
    """Text that matches a regular expression from end to end, at most `max_chars` long. No look-around."""

    pattern: str
    max_chars: int = MAX_REGEX_CHARS

    def __post_init__(self) -> None:
        try:
            check_text("Regex pattern", self.pattern)
        except InvalidRequest as error:
            raise SchemaUnsupported(error.message, remedy=error.remedy) from error
        if not 1 <= self.max_chars <= MAX_REGEX_CHARS:
            raise SchemaUnsupported(f"Regex max_chars is {self.max_chars}; it must be 1 to {MAX_REGEX_CHARS}.")

    def decode(self, text: str) -> str:
        """Raises `OutputError` when the turn was cut, by `max_tokens` or `stop`, before the text matched."""
        if not self.is_whole(text):
            raise OutputError(f"The output {text!r} does not match {self.pattern!r}.", text=text, remedy=_CUT)
        return text

    def is_whole(self, text: str) -> bool:
        """Whether a turn that was cut had written all of it."""
        from agentspeed.chat.grammar import matches

        return matches(self, text)


@final
class Choice:
    """One of some texts, word for word: `Choice("yes", "no")`."""

    __slots__ = ("options",)

    def __init__(self, *options: str) -> None:
        if not options or not all(isinstance(option, str) and option for option in options):
            raise SchemaUnsupported(
                "Choice needs at least one option, each a non-empty text.", remedy='Write Choice("yes", "no").'
            )
        if len(set(options)) != len(options):
            raise SchemaUnsupported(f"Choice names an option twice: {list(options)}.")
        self.options = options

    def __repr__(self) -> str:
        return f"Choice{self.options!r}"

    def decode(self, text: str) -> str:
        """Raises `OutputError` when the turn was cut before the option was whole."""
        if not self.is_whole(text):
            raise OutputError(f"The output {text!r} is none of {list(self.options)}.", text=text, remedy=_CUT)
        return text

    def is_whole(self, text: str) -> bool:
        """Whether a turn that was cut had written all of it."""
        return text in self.options


OutputSpec: TypeAlias = "Schema[Any] | Regex | Choice"


def output_spec(given: object, *, bounds: Bounds = DEFAULT_BOUNDS) -> OutputSpec | None:
    """What the user passed as `output=`; None means free text. Raises `SchemaUnsupported` for what has no shape."""
    if given is None or given is str:
        return None
    if isinstance(given, (Schema, Regex, Choice)):
        return given
    if isinstance(given, Mapping):
        return Schema.json(cast("Mapping[str, Json]", given), bounds=bounds)
    if isinstance(given, (str, bytes, int, float, list, tuple)):
        raise SchemaUnsupported(
            f"output={given!r} is a value, not a shape.",
            remedy="Pass a type, a JSON schema, Regex(...) or Choice(...).",
        )
    return Schema(given, bounds=bounds)
