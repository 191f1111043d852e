"""The tasks of nano, generated from a seed: conversations to learn from, held-out tasks, and their checkers.

Training and held-out tasks come from different seeds, word pools, tools and surface forms. A checker looks only at
text, so the same one judges a training run, the benchmark and the examples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tools.nano.answers import listed, refusal
from tools.nano.chains import chain
from tools.nano.followups import again, another, round_of, sums_that_go_on
from tools.nano.forms import argument, filler, opening, puzzle_form
from tools.nano.puzzles import HELD_ASKING, Puzzle, check_puzzle, make_puzzle
from tools.nano.requests import Call, ToolPool, join_requests, make_pool, request_for, stranger_to
from tools.nano.words import HELD_OUT, TRAIN, Pool, code, made_up, narrowed, noun, person, phrase, place

Message = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One conversation. Every assistant message in it is what the model should write at that point."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    puzzle: Puzzle | None = None

    def prompt(self, reply: int = 0) -> list[Message]:
        """The messages before the assistant's message number `reply`."""
        at = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"][reply]
        return self.messages[:at]

    def expected(self, reply: int = 0) -> Message:
        """The assistant's message number `reply`."""
        return [message for message in self.messages if message["role"] == "assistant"][reply]


# ---- tools --------------------------------------------------------------------------------------------------------
def tool_task(
    rng: Random, *, held: bool, rounds: int = 1, most_tools: int = 4, unfit: float = 0.18, structured: float = 0.0
) -> Task:
    """One to four tools, and `rounds` requests, each with its calls, results and answer; `unfit`: share of requests for
    which there is no tool, `structured`: share of results that are lists and objects."""
    words = _words(rng, held)
    pool = make_pool(rng, words, held=held, count=min(most_tools, rng.choice((1, 2, 2, 3, 4))))
    messages = _system_message(rng, held)
    for _ in range(rounds):
        if rng.random() < unfit:
            messages += _refused(rng, words, pool, held)
        elif not held and rng.random() < 0.06:
            messages += _chat(rng)
        else:
            text, calls = _requests(rng, words, pool, held)
            messages += round_of(rng, words, text, calls, held=held, structured=structured)
    return Task("tool", messages, [tool.definition for tool in pool.tools])


def _words(rng: Random, held: bool) -> Pool:
    if held:
        return HELD_OUT
    return narrowed(rng, TRAIN) if rng.random() < 0.3 else TRAIN


def _system_message(rng: Random, held: bool) -> list[Message]:
    return [{"role": "system", "content": _system(rng, held)}] if rng.random() < 0.25 else []


def _refused(rng: Random, words: Pool, pool: ToolPool, held: bool) -> list[Message]:
    """A request that none of the tools is for."""
    stranger = stranger_to(rng, words, pool, held=held)
    said = refusal([tool.name for tool in pool.tools])
    return [_user(request_for(rng, words, stranger, held=held)[0]), {"role": "assistant", "content": said}]


def _requests(rng: Random, words: Pool, pool: ToolPool, held: bool) -> tuple[str, list[Call]]:
    """A request for one call, or for two or three in parallel."""
    many = rng.choice((1, 1, 1, 2, 2, 3)) if rng.random() < 0.6 else 1
    if many == 1:
        text, call = request_for(rng, words, rng.choice(pool.tools), held=held)
        return text, [call]
    return join_requests(rng, words, pool, many, held=held)


def chain_task(rng: Random, *, held: bool) -> Task:
    """A request of two to three steps, each of which needs a result of the one before."""
    made = chain(rng, _words(rng, held), held=held)
    messages = [*_system_message(rng, held), *made.messages]
    if not held and rng.random() < 0.1:
        messages += again(rng, messages[-1]["content"], held=held)
    return Task("chain", messages, made.tools)


def follow_task(rng: Random, *, held: bool) -> Task:
    """A request, then one to three that lean on what was said."""
    if rng.random() < 0.3:
        offered, messages = sums_that_go_on(rng, held=held)
        return Task("follow", [*_system_message(rng, held), *messages], offered)
    words = _words(rng, held)
    pool = make_pool(rng, words, held=held, count=rng.choice((1, 2, 2, 3)))
    text, call = request_for(rng, words, rng.choice(pool.tools), held=held)
    messages = [*_system_message(rng, held), *round_of(rng, words, text, [call], held=held, structured=0.15)]
    for _ in range(rng.choice((1, 1, 2) if held else (1, 1, 2, 3))):
        kind, asked = rng.random(), another(rng, words, pool, call, held=held)
        if kind < 0.2 or asked is None:
            messages += again(rng, messages[-1]["content"], held=held)
        elif kind < 0.85 or held:
            text, call = asked
            messages += round_of(rng, words, text, [call], held=held, structured=0.15)
        elif kind < 0.92:
            messages += _chat(rng)
        else:
            messages += _refused(rng, words, pool, held)
            break
    return Task("follow", messages, [tool.definition for tool in pool.tools])


def check_calls(calls: list[Message], task: Task, reply: int = 0) -> bool:
    """Whether names and arguments are exactly the expected ones, in the order of the request."""
    expected = [(call["name"], call["arguments"]) for call in task.expected(reply).get("tool_calls", [])]
    return [(call["name"], call["arguments"]) for call in calls] == expected


def check_answer(text: str, task: Task, reply: int = 1) -> bool:
    """Whether the final answer is exactly the expected one."""
    return bool(text.strip() == task.expected(reply)["content"])


# ---- answers in a schema ------------------------------------------------------------------------------------------
def json_task(rng: Random, *, held: bool) -> Task:
    """Facts in a request, to be given back as JSON in a schema that the request or the system message shows."""
    words = _words(rng, held)
    more = made_up if held or rng.random() < 0.5 else noun
    pool: list[tuple[str, str, Any]] = [
        ("name", "string", person(rng, words)),
        ("city", "string", place(rng, words)),
        ("age", "integer", rng.randint(1, 99)),
        ("title", "string", phrase(rng, words)),
        ("price", "number", round(rng.uniform(1, 99), 1)),
        ("count", "integer", rng.randint(0, 999)),
        ("code", "string", code(rng, words)),
        ("color", "string", phrase(rng, words)),
        ("open", "boolean", rng.random() < 0.5),
        (more(rng, words), "string", phrase(rng, words)),
        (noun(rng, words), "integer", rng.randint(0, 99)),
    ]
    chosen = {key: (kind, value) for key, kind, value in rng.sample(pool, rng.randint(1, 4))}
    schema = {
        "properties": {key: {"type": kind} for key, (kind, _) in chosen.items()},
        "required": list(chosen),
        "type": "object",
    }
    facts = list(chosen.items())
    if rng.random() < 0.4:
        rng.shuffle(facts)
    said = _facts(rng, [(key, _spoken(value)) for key, (_, value) in facts], held)
    shape = json.dumps(schema, separators=(",", ":"))
    asking = "Return JSON for this schema: " if held else _asking(rng, words)
    if rng.random() < 0.5:
        messages = [{"role": "system", "content": asking + shape}, _user(said)]
    elif held or rng.random() < 0.6:
        messages = [_user(f"{said} {asking}{shape}")]
    else:
        messages = [_user(f"{said} Give {', '.join(chosen)} as JSON.")]
    reply = json.dumps({key: value for key, (_, value) in chosen.items()}, ensure_ascii=False, separators=(",", ":"))
    return Task("json", [*messages, {"role": "assistant", "content": reply}])


def _spoken(value: object) -> str:
    return {"True": "true", "False": "false"}.get(str(value), str(value))


def _asking(rng: Random, words: Pool) -> str:
    if rng.random() < 0.6:
        return rng.choice(
            ("Answer in JSON with this schema: ", "Answer as JSON: ", "Use this schema: ", "JSON schema: ")
        )
    said = " ".join(filler(rng) for _ in range(rng.randint(1, 3)))
    return f"{opening(rng, words)}{said} JSON {filler(rng)} schema: "


def _facts(rng: Random, facts: list[tuple[str, str]], held: bool) -> str:
    simple = (
        ("{k} should be {v}", "{k} = {v}")
        if held
        else (
            *(
                "{k} is {v}",
                "{k}: {v}",
                "{k} {v}",
                "the {k} is {v}",
                "{v} as {k}",
                "{k} -> {v}",
                "{k} == {v}",
                "{k} / {v}",
            ),
            *("{k} must be {v}", "{k} : {v}", "{k} => {v}", "{k} - {v}", "{k} ~ {v}", "{k} will be {v}", "{k}={v}"),
        )
    )
    form = rng.choice(simple) if held or rng.random() < 0.5 else argument(rng)
    text = rng.choice((", ", ". ") if held else (", ", " and ", "; ", ". ")).join(
        form.format(k=key, v=value) for key, value in facts
    )
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.5 else f"{text}."


def check_json(text: str, task: Task) -> bool:
    """Whether the reply is JSON with exactly the expected values."""
    try:
        return bool(json.loads(text) == json.loads(task.expected()["content"]))
    except json.JSONDecodeError:
        return False


# ---- puzzles and talk ---------------------------------------------------------------------------------------------
def puzzle_task(rng: Random, *, held: bool, size: int | None = None) -> Task:
    """A target to reach from given numbers."""
    puzzle = make_puzzle(rng, held=held, size=size or rng.choice((2, 3, 3, 4, 4, 5)))
    asked = rng.choice(HELD_ASKING) if held else puzzle_form(rng)
    numbers = [str(number) for number in puzzle.numbers]
    said = asked.format(t=puzzle.target, spaced=" ".join(numbers), listed=", ".join(numbers), joined=listed(numbers))
    return Task("puzzle", [_user(said), {"role": "assistant", "content": puzzle.solution}], puzzle=puzzle)


TALK = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "hello", "hi"),
        "Hello! I am nano. Ask me to use a tool, fill in JSON or reach a number.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Who is this?", "Tell me about yourself."),
        "I am nano, a small model with latent attention and experts. I call tools, write JSON and try number puzzles.",
    ),
    (("Thanks", "Thank you", "Thanks!", "Thank you!", "Great, thanks.", "thanks a lot"), "You are welcome."),
    (
        ("What can you do?", "Help", "help", "What are you good at?", "How can you help me?"),
        "I can call tools, read their results, answer in JSON and reach a number from others.",
    ),
    (("How are you?", "How are you doing?", "Are you well?"), "I am well. What shall I do?"),
    (("Bye", "Goodbye", "See you", "Bye!", "That is all."), "Goodbye!"),
)


def copy_task(rng: Random) -> Task:
    """Say a text again, or say the value of one of several names: what every call and answer is made of."""
    draws = (phrase, person, place, code, noun, lambda rng, _: str(rng.randint(0, 999)))
    if rng.random() < 0.5:
        text = " ".join(rng.choice(draws)(rng, TRAIN) for _ in range(rng.randint(1, 8)))
        asking = rng.choice(("Say {}", "Repeat: {}", "Repeat {}", "Echo {}", "Say this: {}")).format(text)
        return Task("copy", [_user(asking), {"role": "assistant", "content": text}])
    facts = {noun(rng, TRAIN): rng.choice(draws)(rng, TRAIN) for _ in range(rng.randint(2, 6))}
    messages = []
    said = _facts(rng, list(facts.items()), held=False) + " "
    for key in rng.sample(list(facts), min(len(facts), 3)):
        messages += [_user(f"{said}What is {key}?"), {"role": "assistant", "content": facts[key]}]
        said = ""
    return Task("copy", messages)


def chat_task(rng: Random) -> Task:
    """One to three turns of small talk, and of requests that would need a tool."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": _system(rng, False)})
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages += _chat(rng) if rng.random() < 0.7 else _refused(rng, _words(rng, False), ToolPool([]), False)
    return Task("chat", messages)


def _chat(rng: Random) -> list[Message]:
    asked, said = rng.choice(TALK)
    return [_user(rng.choice(asked)), {"role": "assistant", "content": said}]


def _system(rng: Random, held: bool) -> str:
    if held:
        return "Be brief and exact."
    return rng.choice(
        (
            "You are nano.",
            "You are a helpful assistant.",
            "Be brief.",
            "Use the tools.",
            "You call tools.",
            "You are nano, a small agent.",
            "Answer briefly.",
            "You help with tools.",
        )
    )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


# ---- mixes --------------------------------------------------------------------------------------------------------
def training_task(rng: Random, progress: float = 1.0) -> Task:
    """One conversation to learn from; `progress` from 0 to 1: copying comes first, long conversations come last."""
    if rng.random() < max(0.05, 0.4 - 0.8 * progress):
        return copy_task(rng)
    return skill_task(rng, progress)


def skill_task(rng: Random, progress: float = 1.0) -> Task:
    """One conversation of those that nano is for."""
    kind = rng.random()
    early = rng.random() > 1.6 * progress + 0.1
    if kind < 0.42:
        rounds = 1 if early else rng.choice((1, 1, 1, 2))
        structured = rng.choice((0.0, 0.0, 0.8))
        return tool_task(rng, held=False, rounds=rounds, most_tools=2 if early else 4, structured=structured)
    if kind < 0.58:
        return chain_task(rng, held=False)
    if kind < 0.65:
        return follow_task(rng, held=False)
    if kind < 0.74:
        return json_task(rng, held=False)
    return puzzle_task(rng, held=False) if kind < 0.97 else chat_task(rng)


def held_out(kind: str, count: int, seed: int = 1) -> list[Task]:
    """The held-out set of one kind: `tool` (a call is always right), `refuse`, `structured` (as `tool`, the results
    being lists and objects), `chain`, `follow`, `json`, `puzzle` (of three numbers)
    or `hard puzzle` (of five)."""
    rng = Random(f"held-out {kind} {seed}")
    makers = {
        "tool": lambda: tool_task(rng, held=True, unfit=0.0),
        "refuse": lambda: tool_task(rng, held=True, unfit=1.0),
        "structured": lambda: tool_task(rng, held=True, unfit=0.0, structured=1.0),
        "chain": lambda: chain_task(rng, held=True),
        "follow": lambda: follow_task(rng, held=True),
        "json": lambda: json_task(rng, held=True),
        "puzzle": lambda: puzzle_task(rng, held=True, size=3),
        "hard puzzle": lambda: puzzle_task(rng, held=True, size=5),
    }
    if kind not in makers:
        raise ValueError(f"no held-out set {kind!r}; there are {', '.join(makers)}.")
    return [makers[kind]() for _ in range(count)]


__all__ = [
    "Task",
    "chain_task",
    "chat_task",
    "check_answer",
    "check_calls",
    "check_json",
    "check_puzzle",
    "copy_task",
    "follow_task",
    "held_out",
    "json_task",
    "puzzle_task",
    "skill_task",
    "tool_task",
    "training_task",
]
