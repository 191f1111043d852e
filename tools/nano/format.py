"""The chat format of nano: control tokens, the template, the same rendering in Python, and the tokenizer's training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
CONTEXT = 4096
SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)
"""Ids 0, 1, 2, ...: padding is 0, bos is 1, the end of a message (and of a turn) is 2."""
END, ASSISTANT = SPECIALS.index("<|end|>"), SPECIALS.index("<|assistant|>")

CHAT_TEMPLATE = """{%- set ns = namespace(system='', rest=messages) -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set ns.system = messages[0].content -%}{%- set ns.rest = messages[1:] -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- if ns.system or tools -%}
{{- '<|system|>' + ns.system -}}
{%- for tool in tools or [] -%}
{%- set it = tool.function if tool.function is defined else tool -%}
{{- '\\n' + {'name': it.name, 'description': it.description, 'parameters': it.parameters}
    | tojson(separators=(',', ':')) -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in ns.rest -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set it = call.function if call.function is defined else call -%}
{{- '<tool_call>{"name":' + it.name | tojson + ',"arguments":' -}}
{{- it.arguments if it.arguments is string else it.arguments | tojson(separators=(',', ':')) -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

_SCHEMA_PIECES = (
    r"""\{"name":\"""",
    r"""","description":\"""",
    r"""","parameters":\{"properties":\{\"?""",
    r"""","arguments":\{\"?""",
    r"""":\{"type":"(?:string|integer|number|boolean)"\}""",
    r"""\},"required":\[\"?""",
    r""""?\],"type":"object"\}+""",
    r"""","type":"(?:string|integer|number|boolean)"\}""",
)
"""What every tool definition and call repeats: one piece each, so that conversations are short."""

_PIECES = "|".join((*_SCHEMA_PIECES, r"""\p{L}+|\p{N}|[{}\[\]":,]+|[^\p{L}\p{N}]"""))
"""Words come without their space, so that a word has the same ids in a request and inside JSON; digits one by one."""


def compact(value: object) -> str:
    """JSON without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """One tool call as the model writes it."""
    return f'<tool_call>{{"name":{compact(name)},"arguments":{compact(arguments)}}}</tool_call>'


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Pieces of text, each with whether the model wrote it. Joined they are what `CHAT_TEMPLATE` writes."""
    first = messages[0]["role"] == "system"
    system = messages[0]["content"] if first else ""
    pieces = [("<|bos|>", False)]
    if system or tools:
        lines = "".join(
            "\n" + compact({key: tool[key] for key in ("name", "description", "parameters")}) for tool in tools
        )
        pieces.append((f"<|system|>{system}{lines}<|end|>", False))
    for message in messages[1 if first else 0 :]:
        calls = "".join(call_text(call["name"], call["arguments"]) for call in message.get("tool_calls", ()))
        made = message["role"] == "assistant"
        pieces.append((f"<|{message['role']}|>", False))
        pieces.append((message.get("content", "") + calls + "<|end|>", made))
    return pieces


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of exactly `VOCAB_SIZE` tokens; every string encodes and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}; give more text.")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the template."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
