"""The tasks of nano, generated from a seed: conversations to learn from, held-out tasks, and their checkers.

Training and held-out tasks come from different seeds, word pools, tools and surface forms. A checker looks only at
text, so the same one judges a training run, the benchmark and the examples.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tools.nano.forms import argument, filler, opening
from tools.nano.puzzles import Puzzle, check_puzzle, make_puzzle
from tools.nano.requests import ToolPool, join_requests, make_pool, request_for, stranger_to
from tools.nano.words import HELD_OUT, TRAIN, Pool, code, made_up, narrowed, noun, person, phrase, place

NO_TOOL = "I have no tool for that."
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
def tool_task(rng: Random, *, held: bool, rounds: int = 1, most_tools: int = 4, unfit: float = 0.18) -> Task:
    """One to four tools, and `rounds` requests, each with its calls, results and answer."""
    words = _words(rng, held)
    pool = make_pool(rng, words, held=held, count=min(most_tools, rng.choice((1, 2, 2, 3, 4))))
    messages: list[Message] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": _system(rng, held)})
    for _ in range(rounds):
        if rng.random() < unfit:
            stranger = stranger_to(rng, words, pool, held=held)
            messages += [
                _user(request_for(rng, words, stranger, held=held)[0]),
                {"role": "assistant", "content": NO_TOOL},
            ]
        elif not held and rng.random() < 0.06:
            messages += _chat(rng)
        else:
            messages += _tool_round(rng, words, pool, held)
    return Task("tool", messages, [tool.definition for tool in pool.tools])


def _words(rng: Random, held: bool) -> Pool:
    if held:
        return HELD_OUT
    return narrowed(rng, TRAIN) if rng.random() < 0.3 else TRAIN


def _tool_round(rng: Random, words: Pool, pool: ToolPool, held: bool) -> list[Message]:
    text, calls = _requests(rng, words, pool, held)
    messages = [_user(text), {"role": "assistant", "content": "", "tool_calls": calls}]
    results = [_result(rng, words, call, held) for call in calls]
    messages += [{"role": "tool", "content": result} for result in results]
    messages.append({"role": "assistant", "content": answer(calls, results)})
    return messages


def _requests(rng: Random, words: Pool, pool: ToolPool, held: bool) -> tuple[str, list[Message]]:
    """A request for one call, or for two or three in parallel."""
    many = rng.choice((1, 1, 1, 2, 2, 3)) if rng.random() < 0.6 else 1
    if many == 1:
        text, call = request_for(rng, words, rng.choice(pool.tools), held=held)
        return text, [{"name": call.name, "arguments": call.values}]
    return join_requests(rng, words, pool, many, held=held)


def answer(calls: list[Message], results: list[str]) -> str:
    """The final answer: each result under the first argument of its call, in call order."""
    parts = []
    for call, result in zip(calls, results, strict=True):
        first = next(iter(call["arguments"].values()), None)
        label = "Result" if first is None else f"For {first}"
        parts.append(f"{label}: {_flat(result)}.")
    return " ".join(parts)


def _flat(result: str) -> str:
    """A JSON object as "key value, key value"; other text as it is, without its last full stop."""
    if result.startswith("{"):
        return ", ".join(f"{key} {value}" for key, value in json.loads(result).items())
    return result.rstrip(".")


def _result(rng: Random, words: Pool, call: Message, held: bool) -> str:
    kind = rng.random()
    unusual = 1.0 if held else rng.random()
    if unusual < 0.12:
        return f"error: {call['name']}: {_complaint(rng, words)}"
    if unusual < 0.2:
        return _answer_of_an_agent(rng, words, call)
    if kind < 0.2:
        return str(rng.randint(0, 10 ** rng.randint(1, 4)))
    if kind < 0.4:
        keys = rng.sample(
            ("status", "count", "temp", "sky", "price", "code", "id", "time", "seats", "name"), rng.choice((1, 2, 2, 3))
        )
        return json.dumps(
            {key: rng.choice((rng.randint(0, 500), phrase(rng, words))) for key in keys},
            ensure_ascii=False,
            separators=(",", ":"),
        )
    if kind < 0.5:
        return "error: " + rng.choice(
            ("not found", "no result after 5 s", f"unknown {noun(rng, words)}", "out of stock")
        )
    if kind < 0.6:
        return rng.choice(("done", "ok", "saved", "booked", "sent", code(rng, words)))
    if kind < 0.8:
        return f"{rng.randint(-9, 40)} {noun(rng, words)}s and {phrase(rng, words)}"
    return " ".join(phrase(rng, words) for _ in range(rng.choice((1, 2, 3)))) + rng.choice(("", "", "."))


def _answer_of_an_agent(rng: Random, words: Pool, call: Message) -> str:
    """What a tool gives back that is an agent itself: an answer inside the answer."""
    values = list(call["arguments"].values())
    about = rng.choice(values) if values and rng.random() < 0.7 else place(rng, words)
    said = f"{rng.randint(0, 99)} {noun(rng, words)}s" if rng.random() < 0.5 else phrase(rng, words)
    return f"For {about}: {said}."


def _complaint(rng: Random, words: Pool) -> str:
    """What the runtime says of a tool that failed, in its own forms."""
    kind = rng.random()
    if kind < 0.55:
        error = rng.choice(("Value", "Lookup", "Key", "Type", "Runtime", "Connection", "Permission", "Timeout", "OS"))
        said = " ".join(
            f"{rng.choice(('no', 'bad', 'unknown', 'not'))} {phrase(rng, words)}" for _ in range(rng.randint(1, 2))
        )
        return f"{error}Error: {said}"
    if kind < 0.75:
        return f"no result after {rng.choice((0.05, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0))} s"
    return rng.choice(("not approved by the user", "not approved: the approver failed", "cancelled before it finished"))


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
    said = _facts(rng, words, [(key, _spoken(value)) for key, (_, value) in facts], held)
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


def _facts(rng: Random, words: Pool, facts: list[tuple[str, str]], held: bool) -> str:
    simple = (
        ("{k} should be {v}", "{k} = {v}")
        if held
        else ("{k} is {v}", "{k}: {v}", "{k} {v}", "the {k} is {v}", "{v} as {k}")
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
    puzzle = make_puzzle(rng, held=held, size=size or rng.choice((2, 3, 3, 3, 4, 4)))
    numbers = [str(number) for number in puzzle.numbers]
    spaced, listed = " ".join(numbers), ", ".join(numbers)
    forms = (
        (f"Get to {puzzle.target} from {spaced}.", f"The numbers are {spaced}. Reach {puzzle.target}.")
        if held
        else (
            f"Reach {puzzle.target} from {spaced}.",
            f"Make {puzzle.target} with {listed}.",
            f"Reach {puzzle.target} from {spaced} using + - *.",
            f"Use {listed} to get {puzzle.target}.",
            f"Numbers: {spaced}. Target: {puzzle.target}.",
        )
    )
    return Task("puzzle", [_user(rng.choice(forms)), {"role": "assistant", "content": puzzle.solution}], puzzle=puzzle)


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
    said = _facts(rng, TRAIN, list(facts.items()), held=False) + " "
    for key in rng.sample(list(facts), min(len(facts), 3)):
        messages += [_user(f"{said}What is {key}?"), {"role": "assistant", "content": facts[key]}]
        said = ""
    return Task("copy", messages)


def chat_task(rng: Random) -> Task:
    """One to three turns of small talk."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": _system(rng, False)})
    for _ in range(rng.choice((1, 1, 2, 3))):
        messages += _chat(rng)
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
    if kind < 0.55:
        early = rng.random() > 1.6 * progress + 0.1
        return tool_task(rng, held=False, rounds=1 if early else rng.choice((1, 1, 1, 2)), most_tools=2 if early else 4)
    if kind < 0.66:
        return json_task(rng, held=False)
    return puzzle_task(rng, held=False) if kind < 0.97 else chat_task(rng)


def held_out(kind: str, count: int, seed: int = 1) -> list[Task]:
    """The held-out set of one kind: `tool` (a call is always right), `refuse`, `json` or `puzzle`."""
    rng = Random(f"held-out {kind} {seed}")
    makers = {
        "tool": lambda: tool_task(rng, held=True, unfit=0.0),
        "refuse": lambda: tool_task(rng, held=True, unfit=1.0),
        "json": lambda: json_task(rng, held=True),
        "puzzle": lambda: puzzle_task(rng, held=True, size=3),
    }
    if kind not in makers:
        raise ValueError(f"no held-out set {kind!r}; there are {', '.join(makers)}.")
    return [makers[kind]() for _ in range(count)]


__all__ = [
    "NO_TOOL",
    "Task",
    "answer",
    "chat_task",
    "check_answer",
    "check_calls",
    "check_json",
    "check_puzzle",
    "copy_task",
    "held_out",
    "json_task",
    "puzzle_task",
    "skill_task",
    "tool_task",
    "training_task",
]
