"""What `output=` may be: a shape the model's text must have, and how that text becomes a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast, final

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from agentspeed._base.validate import check_text
from agentspeed.chat.regex_rule import matches
from agentspeed.errors import InvalidRequest, OutputError, SchemaUnsupported
from agentspeed.tools.grammars import check_expressible
from agentspeed.tools.schema import DEFAULT_BOUNDS, Bounds, Compiled, Json
from agentspeed.tools.schema import Schema as JsonSchema
from agentspeed.tools.schema.checking import check_available, problem_of
from agentspeed.tools.signature import strip_titles

T_co = TypeVar("T_co", covariant=True)
MAX_REGEX_CHARS: Final = 4096
_CUT: Final = "Raise max_tokens if it was cut short."


@final
class Schema(Generic[T_co]):
    """Any type that pydantic knows, as JSON: `Schema(list[int])`, `Schema(MyDataclass)`; a class needs no wrapper.

    `Schema.json({...})` takes a JSON schema as it is and gives plain Python values. What the model writes is an
    instance of the schema. Both raise `SchemaUnsupported` at once for a shape that a grammar cannot hold; with
    `check_after=True` what the grammar leaves open is checked when the text is whole: a text that fails is an
    `OutputError`, and `run` asks again as often as `output_retries` says."""

    __slots__ = ("_adapter", "_compiled", "_shown", "bounds", "check_after", "raw")

    def __init__(self, kind: type[T_co] | Any, *, bounds: Bounds = DEFAULT_BOUNDS, check_after: bool = False) -> None:
        try:
            self._adapter: TypeAdapter[Any] | None = TypeAdapter(kind)
            raw = strip_titles(cast("Json", self._adapter.json_schema()))
        except (PydanticUserError, PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
            raise SchemaUnsupported(
                f"output={kind!r} has no JSON schema: {str(error).splitlines()[0]}",
                remedy="Use a pydantic model, a dataclass or a JSON type.",
            ) from error
        self._take(raw, bounds, getattr(kind, "__name__", str(kind)), check_after)

    @classmethod
    def json(
        cls, schema: Mapping[str, Json], *, bounds: Bounds = DEFAULT_BOUNDS, check_after: bool = False
    ) -> Schema[Any]:
        """A JSON schema as it is; decoded to plain Python values, of which the schema holds."""
        made: Schema[Any] = object.__new__(Schema)
        made._adapter = None
        made._take(schema, bounds, "JSON", check_after)
        return made

    def _take(self, schema: Json | Mapping[str, Json], bounds: Bounds, shown: str, check_after: bool) -> None:
        self.raw: JsonSchema = cast("JsonSchema", dict(schema) if isinstance(schema, Mapping) else schema)
        self.bounds = bounds
        self.check_after = check_after
        self._shown = shown
        # A set is read by pydantic, which drops what is named twice.
        self._compiled = check_expressible(self.raw, bounds, lenient=check_after, sets=self._adapter is not None)
        if self._compiled.unchecked:
            check_available()

    def __repr__(self) -> str:
        return f"<Schema {self._shown}>"

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What the grammar leaves to the check afterwards, with its places; empty unless `check_after` is set."""
        return self._compiled.unchecked

    def compiled(self) -> Compiled:
        """The schema as rules of a grammar."""
        return self._compiled

    def decode(self, text: str) -> T_co:
        """Raises `OutputError` when the text is not such a value: cut short, or a check the grammar cannot express."""
        try:
            value = json.loads(text) if self._adapter is None else self._adapter.validate_json(text)
            if self._compiled.unchecked and (problem := problem_of(self.raw, json.loads(text))):
                raise OutputError(f"The output is not a {self._shown}: {problem}", text=text)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors()
            )
            raise OutputError(f"The output is not a {self._shown}: {problems}", text=text,
                              remedy="" if self.is_whole(text) else _CUT) from error  # fmt: skip
        except json.JSONDecodeError as error:
            raise OutputError(f"The output is not whole JSON: {error}", text=text, remedy=_CUT) from error
        except (ValueError, RecursionError) as error:  # digits beyond Python's limit, or brackets beyond its stack
            raise OutputError(f"The output cannot be read: {error}", text=text) from error
        return cast("T_co", value)

    def is_whole(self, text: str) -> bool:
        """Whether a turn that was cut had written all of it; `decode` may refuse what it says nevertheless."""
        try:
            json.loads(text)
        except (ValueError, RecursionError):
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
        return matches(self.pattern, self.max_chars, text)


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
