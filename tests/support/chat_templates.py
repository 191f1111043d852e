# ruff: noqa: E501 (templates have lines of their own)
"""Chat templates with the traits of published families, in our own writing: what each does that others do not.

A trait is what decides which ids follow which: how results are grouped, when a prompt opens the reasoning, what becomes of
it later, how calls are written, what stands in for a missing system text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Family:
    """A template and the control tokens of its vocabulary; `tools`: whether it can hold calls."""

    template: str
    controls: tuple[str, ...]
    plain: tuple[str, ...] = ()
    end: str = ""
    tools: bool = True


_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_CALLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in (
        "calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end", "output▁begin",
        "output▁end",
    )
)  # fmt: skip
_THINK = ("<think>", "</think>")
_SYSTEM_FIRST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}"
)

# Roles in plain words; the prompt ends without the space that answers begin with; no tools.
_V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# A question already asks for its answer; results are grouped, and nothing is asked for after them.
_V3 = (
    _SYSTEM_FIRST
    + """{%- set s = namespace(results=false) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content + '<｜Assistant｜>' }}{% set s.results = false %}
{%- elif m.role == 'tool' -%}
{{- '\n' if s.results else '<｜tool▁outputs▁begin｜>' -}}{% set s.results = true -%}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
{%- else -%}
{%- if s.results %}{{ '<｜tool▁outputs▁end｜>' }}{% set s.results = false %}{% endif -%}
{{- m.content or '' -}}
{%- for c in m.tool_calls or [] -%}
{{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' -}}
{{- '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments -}}
{{- '\n```<｜tool▁call▁end｜>' -}}
{{- '<｜tool▁calls▁end｜>' if loop.last -}}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if s.results %}{{ '<｜tool▁outputs▁end｜>' }}{% endif -%}
{%- if add_generation_prompt and messages[-1].role == 'assistant' %}{{ '<｜Assistant｜>' }}{% endif -%}"""
)
# The prompt always opens the reasoning, which no later message shows.
_R1 = (
    _SYSTEM_FIRST
    + """{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' -%}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif -%}"""
)
# Reasoning is a variable; every answer of the past has only the end of it; each result stands alone.
_V31 = (
    _SYSTEM_FIRST
    + """{%- set s = namespace(asked=false) -%}
{%- set thinks = thinking is defined and thinking -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}{% set s.asked = true %}
{%- elif m.role == 'tool' -%}
{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% set s.asked = false %}
{%- else -%}
{%- if s.asked %}{{ '<｜Assistant｜></think>' }}{% set s.asked = false %}{% endif -%}
{{- m.content or '' -}}
{%- for c in m.tool_calls or [] -%}
{{- '<｜tool▁calls▁begin｜>' if loop.first -}}
{{- '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' -}}
{{- '<｜tool▁calls▁end｜>' if loop.last -}}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and s.asked %}{{ '<｜Assistant｜>' + ('<think>' if thinks else '</think>') }}{% endif -%}"""
)
# Arguments one by one, with a mark that tells text from JSON; results in one block of which the last one asks.
_V32 = """{{- bos_token -}}
{%- set thinks = thinking is defined and thinking -%}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif -%}
{%- if tools -%}
{{- '\n\n## Functions\n' -}}
{%- for t in tools %}{{ t.function | tojson + '\n' }}{% endfor -%}
{%- endif -%}
{%- set s = namespace(last=-1, next='') -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set s.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content }}{% set s.next = '<｜Assistant｜>' %}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '\n\n<results>' }}{% endif -%}
{{- '\n<result>' + m.content + '</result>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
{{- '\n</results>' -}}{% set s.next = '\n\n' -%}
{%- endif -%}
{%- else -%}
{%- if s.next -%}
{{- s.next -}}
{%- if loop.index0 > s.last and thinks %}{{ '<think>' + (m.reasoning_content or '') }}{% endif -%}
{{- '</think>' -}}{% set s.next = '' -%}
{%- endif -%}
{{- m.content or '' -}}
{%- for c in m.tool_calls or [] -%}
{{- '\n\n<｜DSML｜function_calls>\n' if loop.first -}}
{{- '<｜DSML｜invoke name="' + c.function.name + '">\n' -}}
{%- for k, v in c.function.arguments.items() -%}
{%- if v is string -%}{{ '<｜DSML｜parameter name="' + k + '" string="true">' + v }}
{%- else -%}{{ '<｜DSML｜parameter name="' + k + '" string="false">' + v | tojson }}{%- endif -%}
{{- '</｜DSML｜parameter>\n' -}}
{%- endfor -%}
{{- '</｜DSML｜invoke>\n' -}}
{{- '</｜DSML｜function_calls>' if loop.last -}}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and s.next %}{{ s.next + ('<think>' if thinks else '<think></think>') }}{% endif -%}"""
# A system text of its own where none is given; a call shows its id, and so does its result; the role of a result is the
# tool's name. Reasoning stays in steps with calls until an answer comes.
_KIMI_THINKING = """{%- set s = namespace(last=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and not m.tool_calls %}{% set s.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' + tools | tojson + '<|im_end|>' }}{% endif -%}
{%- if messages[0].role != 'system' %}{{ '<|im_system|>system<|im_middle|>You help.<|im_end|>' }}{% endif -%}
{%- for m in messages -%}
{%- set who = '<|im_' + (m.role if m.role in ['user', 'assistant'] else 'system') + '|>' -%}
{{- who + (m.name or m.role) + '<|im_middle|>' -}}
{%- if m.role == 'assistant' -%}
{{- '<think>' + (m.reasoning_content or '' if loop.index0 > s.last else '') + '</think>' + (m.content or '') -}}
{%- for c in m.tool_calls or [] -%}
{{- '<|tool_calls_section_begin|>' if loop.first -}}
{{- '<|tool_call_begin|>' + c.id + '<|tool_call_argument_begin|>' + c.function.arguments + '<|tool_call_end|>' -}}
{{- '<|tool_calls_section_end|>' if loop.last -}}
{%- endfor -%}
{%- elif m.role == 'tool' -%}{{ '## Return of ' + m.tool_call_id + '\n' + m.content }}
{%- else -%}{{ m.content }}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif -%}"""
_KIMI = (
    _KIMI_THINKING.replace(
        "'<think>' + (m.reasoning_content or '' if loop.index0 > s.last else '') + '</think>' + ", ""
    )
    .replace("You help.", "You are of use.")
    .replace("(m.name or m.role)", "m.role")
)
# Messages end where the next one begins; the space around texts is the template's; results in one block.
_GLM = """[gMASK]<sop>
{%- if tools -%}
{{- '<|system|>\n# Tools\n' -}}
{%- for t in tools %}{{ t | tojson + '\n' }}{% endfor -%}
{%- endif -%}
{%- set s = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set s.last = loop.index0 %}{% endif %}{% endfor -%}
{%- set off = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|user|>\n' + m.content + ('/nothink' if off else '') }}
{%- elif m.role == 'system' -%}{{ '<|system|>\n' + m.content }}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- else -%}
{%- set thought = m.reasoning_content if loop.index0 > s.last and m.reasoning_content else '' -%}
{{- '<|assistant|>\n<think>' + thought.strip() + '</think>' -}}
{%- if m.content and m.content.strip() %}{{ '\n' + m.content.strip() }}{% endif -%}
{%- for c in m.tool_calls or [] -%}
{{- '\n<tool_call>' + c.function.name + '\n' -}}
{%- for k, v in c.function.arguments.items() -%}
{{- '<arg_key>' + k + '</arg_key>\n<arg_value>' + (v if v is string else v | tojson) + '</arg_value>\n' -}}
{%- endfor -%}
{{- '</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' + ('\n<think></think>' if off else '') }}{% endif -%}"""
_GLM_CLOSE = (
    _GLM.replace("\\n<think></think>' if off else ''", "</think>' if off else '<think>'")
    .replace("'<|assistant|>\\n<think>' + thought.strip() + '</think>'", "'<|assistant|>' + "
             "('<think>' + thought.strip() if thought else '') + '</think>'")
    .replace("('/nothink' if off else '')", "''")
)  # fmt: skip
# A call is a message of its own that follows the answer's; one call at most.
_GIGACHAT = """{{- bos_token + 'developer system<|role_sep|>\nRules.<|message_sep|>\n\n' -}}
{%- macro said(role, text) %}{{ role + '<|role_sep|>\n' + text + '<|message_sep|>\n\n' }}{% endmacro -%}
{%- if messages[0].role == 'system' %}{{ said('system', messages[0].content) }}{% set messages = messages[1:] %}{% endif -%}
{%- if tools -%}
{%- set s = namespace(text='') -%}
{%- for t in tools -%}
{%- set s.text = s.text + '// ' + t.function.description + '\ntype ' + t.function.name + ' = (_: ' +
  t.function.parameters | tojson + ') => any;\n' -%}
{%- endfor -%}
{{- said('function descriptions', s.text) -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ said('function result', m.content) }}
{%- else -%}
{{- said(m.role, m.content or '') -}}
{%- if m.tool_calls -%}
{%- set c = m.tool_calls[0].function -%}
{{- said('function call', '{"name": "' + c.name + '", "arguments": ' + c.arguments + '}') -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}{{ 'assistant<|role_sep|>\n' }}{% endif -%}"""
# No marks around a user's or a system's text but one token each; results are a user's.
_YOUTU = """{{- bos_token -}}
{%- set s = namespace(text='') -%}
{%- if messages[0].role == 'system' %}{% set s.text = messages[0].content %}{% set messages = messages[1:] %}{% endif -%}
{%- if tools -%}
{%- set s.text = s.text + '\n\n' + '<|begin_of_tool_description|>' -%}
{%- for t in tools %}{% set s.text = s.text + '\n```json\n' + t | tojson + '\n```' %}{% endfor -%}
{%- set s.text = s.text + '<|end_of_tool_description|>' -%}
{%- endif -%}
{{- s.text -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|User|>' }}{% endif -%}
{{- '<tool_response>' + m.content + '</tool_response>' -}}
{%- elif m.role == 'user' -%}{{ '<|User|>' + m.content }}
{%- else -%}
{{- '<|Assistant|>' + (m.content or '') -}}
{%- for c in m.tool_calls or [] -%}
{{- '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|end_of_text|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif -%}"""
# Texts lose the space around them; one call, without a text and without a mark; a result is JSON.
_LLAMA = """{{- bos_token -}}
{%- macro said(role, text) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text + '<|eot_id|>' }}{% endmacro -%}
{%- set s = namespace(text='') -%}
{%- if messages[0].role == 'system' %}{% set s.text = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif -%}
{%- if tools -%}
{%- for t in tools %}{% set s.text = t | tojson(indent=4) + '\n\n' + s.text %}{% endfor -%}
{%- endif -%}
{{- said('system', 'Today: ' + strftime_now('%d %b %Y') + '\n\n' + s.text) -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ said('ipython', m.content | tojson) }}
{%- elif 'tool_calls' in m -%}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('One call at a time.') }}{% endif -%}
{%- set c = m.tool_calls[0].function -%}
{{- said('assistant', '{"name": "' + c.name + '", "parameters": ' + c.arguments | tojson + '}') -}}
{%- else -%}{{ said(m.role, m.content | trim) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}"""
# Reasoning is shown after the last question, also an empty one in the last answer; without it the prompt closes it.
_QWEN = """{%- macro opened(role) %}{{ '<|im_start|>' + role + '\n' }}{% endmacro -%}
{%- set s = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set s.last = loop.index0 %}{% endif %}{% endfor -%}
{%- set first = messages[0] if messages[0].role == 'system' -%}
{%- if tools -%}
{{- opened('system') + (first.content + '\n\n' if first else '') + '# Tools\n<tools>' -}}
{%- for t in tools %}{{ '\n' + t | tojson }}{% endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif first -%}{{ opened('system') + first.content + '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ opened('user') + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or '' -%}
{{- opened('assistant') -}}
{%- if loop.index0 > s.last and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + (m.content or '').lstrip('\n') -}}
{%- else -%}{{ m.content or '' }}
{%- endif -%}
{%- for c in m.tool_calls or [] -%}
{{- '\n' if m.content or not loop.first -}}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- opened('assistant') + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '') -}}
{%- endif -%}"""
# Arguments one by one without a mark that tells text from other values, which are written as Python writes them.
_QWEN_CODER = """{%- macro opened(role) %}{{ '<|im_start|>' + role + '\n' }}{% endmacro -%}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}{% endif -%}
{%- if tools -%}
{{- opened('system') + (first or 'You may call tools.') + '\n\n<tools>' -}}
{%- for t in tools %}{{ '\n<function>\n<name>' + t.function.name + '</name>\n' + t.function.parameters | tojson + '\n</function>' }}{% endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif first -%}{{ opened('system') + first + '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ opened('user') }}{% endif -%}
{{- '<tool_response>\n' + m.content + '\n</tool_response>\n' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- elif m.tool_calls -%}
{{- '<|im_start|>' + m.role + ('\n' + m.content | trim + '\n' if m.content | trim else '') -}}
{%- for c in m.tool_calls -%}
{{- '\n<tool_call>\n<function=' + c.function.name + '>\n' -}}
{%- for key, value in c.function.arguments | items -%}
{%- set plain = value is string or not (value is mapping or value is sequence) -%}
{{- '<parameter=' + key + '>\n' + (value | string if plain else value | tojson) + '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}{{ opened(m.role) + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ opened('assistant') }}{% endif -%}"""
_KIMI_CONTROLS = tuple(
    f"<|{name}|>"
    for name in (
        "im_system", "im_user", "im_assistant", "im_middle", "im_end", "tool_calls_section_begin",
        "tool_calls_section_end", "tool_call_begin", "tool_call_end", "tool_call_argument_begin",
    )
)  # fmt: skip
_GLM_CONTROLS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
_GLM_PLAIN = (
    *_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>",
)  # fmt: skip
_TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FAMILIES: Final[dict[str, Family]] = {
    "deepseek v2": Family(_V2, (), tools=False),
    "deepseek v3": Family(_V3, (*_DEEPSEEK, *_DEEPSEEK_CALLS)),
    "deepseek r1": Family(_R1, _DEEPSEEK, _THINK, tools=False),
    "deepseek v3.1": Family(_V31, (*_DEEPSEEK, *_DEEPSEEK_CALLS), _THINK),
    "deepseek v3.2": Family(_V32, (*_DEEPSEEK, "｜DSML｜"), _THINK),
    "kimi k2": Family(_KIMI, _KIMI_CONTROLS),
    "kimi k2 thinking": Family(_KIMI_THINKING, _KIMI_CONTROLS, _THINK),
    "glm 4.6": Family(_GLM, _GLM_CONTROLS, _GLM_PLAIN, end="<|endoftext|>"),
    "glm 4.7": Family(_GLM_CLOSE, _GLM_CONTROLS, _GLM_PLAIN, end="<|endoftext|>"),
    "gigachat 3": Family(_GIGACHAT, ("<|role_sep|>", "<|message_sep|>")),
    "youtu": Family(_YOUTU, ("<|User|>", "<|Assistant|>", "<|end_of_text|>", "<|begin_of_tool_description|>",
                             "<|end_of_tool_description|>"), _TOOL_MARKS),
    "llama 3": Family(_LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen 3 coder": Family(_QWEN_CODER, ("<|im_start|>", "<|im_end|>"), _TOOL_MARKS),
    "qwen 3": Family(_QWEN, ("<|im_start|>", "<|im_end|>"), (*_THINK, *_TOOL_MARKS)),
}  # fmt: skip
