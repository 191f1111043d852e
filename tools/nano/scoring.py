"""Scores of nano on the held-out set, by greedy decoding: whole replies have to be exact.

A reply is exact under greedy decoding when, at each of its positions, the likeliest id is the expected one. So one pass
over the expected text scores calls, answers and JSON; only puzzles, which have many solutions, are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.nano.data import Row, collate, row_of
from tools.nano.format import END
from tools.nano.model import Nano
from tools.nano.tasks import Task, check_puzzle, held_out

SELECTING, UNSEEN = 2, 11
"""Seeds of held-out tasks: training keeps its best state by the first; no weights were ever chosen by the second, so it
is reported. The weights that are shipped were kept and averaged by seed 1."""
Scores = dict[str, float]


class HeldOut:
    """The held-out set of a seed, encoded once."""

    def __init__(self, tokenizer: Tokenizer, count: int, seed: int = SELECTING) -> None:
        self.tokenizer = tokenizer
        kinds = ("tool", "refuse", "json", "structured", "chain", "follow")
        self.rows: dict[str, list[Row]] = {
            kind: [row_of(task, tokenizer) for task in held_out(kind, count, seed)] for kind in kinds
        }
        self.puzzles = {kind: held_out(kind, count, seed) for kind in ("puzzle", "hard puzzle")}

    def scores(self, model: Nano) -> Scores:
        """Shares from 0 to 1."""
        model.eval()
        found: Scores = {}
        for kind, rows in self.rows.items():
            exact = exact_replies(model, rows)
            if kind == "tool":
                found["tool_call"] = _share([replies[0] for replies in exact])
                found["tool_answer"] = _share([replies[1] for replies in exact])
            else:
                found[kind] = _share([all(replies) for replies in exact])
        for kind, tasks in self.puzzles.items():
            replies = decode(model, self.tokenizer, tasks, longest=48)
            hits = [solved(task, text) for task, text in zip(tasks, replies, strict=True)]
            found[f"{kind.replace(' ', '_')}_greedy"] = _share(hits)
        return found


def solved(task: Task, text: str) -> bool:
    if task.puzzle is None:
        raise ValueError(f"a {task.kind} task has no puzzle")
    return check_puzzle(text, task.puzzle.numbers, task.puzzle.target)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


@torch.no_grad()
def exact_replies(model: Nano, rows: Sequence[Row], at_once: int = 25) -> list[list[bool]]:
    """For each conversation, whether each of the model's replies would come out exactly."""
    found = []
    for start in range(0, len(rows), at_once):
        ids, _ = collate(rows[start : start + at_once])
        ids = ids.to(model.device)
        right = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
        for row, hits in zip(rows[start : start + at_once], right.tolist(), strict=True):
            found.append([all(hits[position - 1] for position in range(*span)) for span in row.replies])
    return found


@torch.no_grad()
def decode(
    model: Nano,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    longest: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The first reply to each task, without a KV cache; for short conversations."""
    prompts = [row_of(task, tokenizer) for task in tasks]
    starts = [row.replies[0][0] for row in prompts]
    ids = torch.zeros(len(prompts), max(starts) + longest, dtype=torch.long)
    for index, (row, start) in enumerate(zip(prompts, starts, strict=True)):
        ids[index, :start] = torch.tensor(row.ids[:start])
    ends, generator = torch.tensor(starts), torch.Generator().manual_seed(seed)
    alive, rows = torch.ones(len(prompts), dtype=torch.bool), torch.arange(len(prompts))
    for _ in range(longest):
        features = model.features(ids[:, : int(ends.max())].to(model.device))[rows, ends - 1]
        drawn = _draw((features @ model.embed_tokens.weight.T).cpu(), temperature, generator)
        ids[rows[alive], ends[alive]] = drawn[alive]
        ends[alive] += 1
        alive &= drawn != END
        if not alive.any():
            break
    return [
        tokenizer.decode(row[start:end].tolist()) for row, start, end in zip(ids, starts, ends.tolist(), strict=True)
    ]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
