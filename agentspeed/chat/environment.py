"""A model folder's chat template, ready to be run: which one it is, in a sandbox, with what templates may expect there.

A template is the model's, not ours: whatever it raises leaves here as a `ValueError` with its own words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Final, final

from agentspeed.errors import ExtraMissing, ModelBroken

_CONSTANTS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEFAULT: Final = "default"
_WITH_TOOLS: Final = "tool_use"
"""Names that published folders give their templates when they have several."""


@final
@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template of one folder, or its several: the one called `tool_use` is run when there are tools."""

    RESERVED: ClassVar[frozenset[str]] = frozenset(
        {"messages", "tools", "add_generation_prompt", "strftime_now", *_CONSTANTS}
    )
    """Names of what every template is given."""

    plain: Any
    with_tools: Any
    constants: Mapping[str, str]
    loaded: datetime
    """What `strftime_now` tells unless it is asked with another time: renders that are compared must agree."""
    source: str

    @property
    def tells_time(self) -> bool:
        """Whether what it writes may depend on when it is run."""
        return "strftime_now" in self.source

    def __call__(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        generate: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Raises ValueError, with the template's own words, for whatever goes wrong inside of it."""
        template = self.with_tools if tools else self.plain
        clock = now or self.loaded
        try:
            return str(
                template.render(  # of copies: a template may keep lists of its own, and write into what it is given
                    messages=_copied(messages),
                    tools=_copied(tools),
                    add_generation_prompt=generate,
                    strftime_now=clock.strftime,
                    **self.constants,
                    **(variables or {}),
                )
            )
        except Exception as error:  # a template is a program of somebody else
            raise ValueError(str(error).rstrip(".") or type(error).__name__) from error


def _copied(value: Any) -> Any:
    """Of JSON's dicts and lists. A tenth of `copy.deepcopy`, which asks for objects that are met twice."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def load_template(folder: Path) -> ChatTemplate:
    """The folder's chat template in a sandbox. Raises `ModelBroken` when there is none or it does not parse."""
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise ExtraMissing("Local models need the jinja2 package.", remedy="Install agentspeed[engine].") from error

    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    sources = _sources(folder, settings)
    environment = _environment()
    compiled: dict[str, Any] = {}
    for name, source in sources.items():
        try:
            compiled[name] = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            called = f" {name!r}" if len(sources) > 1 else ""
            raise ModelBroken(
                f"The chat template{called} of {folder} does not parse: {str(error).rstrip('.')}.",
                remedy="Correct it; it is a Jinja template.",
            ) from error
    plain = compiled[_DEFAULT]
    constants = {name: token_text(settings.get(name)) for name in _CONSTANTS}
    return ChatTemplate(
        plain, compiled.get(_WITH_TOOLS, plain), constants, datetime.now().astimezone(), "\n".join(sources.values())
    )


def read_text(path: Path) -> str:
    """A file of a model folder; they are UTF-8 whatever the machine's own encoding is."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelBroken(f"{path} cannot be read: {error}.", remedy="Download it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a model folder. Raises `ModelBroken`."""
    text = read_text(path)
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelBroken(f"{path} cannot be read: {error}.", remedy="Download it again.") from error
    if not isinstance(data, dict):
        raise ModelBroken(f"{path} holds a {type(data).__name__}, not an object.", remedy="Download it again.")
    return data


def _sources(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; one of them is called default."""
    file, further = folder / "chat_template.jinja", folder / "additional_chat_templates"
    given = read_text(file) if file.is_file() else settings.get("chat_template")
    if given is None and (folder / "chat_template.json").is_file():
        given = read_json(folder / "chat_template.json").get("chat_template")
    sources: dict[str, str] = {}
    match given:
        case str():
            sources[_DEFAULT] = given
        case list():
            for item in given:
                match item:
                    case {"name": str(name), "template": str(source)}:
                        sources[name] = source
                    case _:
                        raise ModelBroken(
                            f"A chat template of {folder} has no name or no text.",
                            remedy='A list of templates holds {"name": ..., "template": ...}.',
                        )
        case _:
            pass
    if further.is_dir():
        sources.update({path.stem: read_text(path) for path in sorted(further.glob("*.jinja"))})
    if len(sources) == 1:
        return {_DEFAULT: next(iter(sources.values()))}
    if not sources:
        raise ModelBroken(
            f"{folder} has no chat template.", remedy="Put one into chat_template.jinja or tokenizer_config.json."
        )
    if _DEFAULT not in sources:
        raise ModelBroken(
            f"{folder} has the chat templates {', '.join(sorted(sources))}, and none is called default.",
            remedy="Put the one to be used into chat_template.jinja.",
        )
    return {name: source for name, source in sources.items() if name in (_DEFAULT, _WITH_TOOLS)}


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import SandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` tells trainers what the model says; for rendering it is what stands inside."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            _ = next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = _tojson
    environment.filters["from_json"] = json.loads
    environment.globals["raise_exception"] = refuse
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates expect it: plain JSON, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def token_text(value: object) -> str:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return value if isinstance(value, str) else ""
