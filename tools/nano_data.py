"""Conversations as rows of ids with the places of the model's replies, and batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from nano_format import render
from nano_tasks import Task, training_task
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """`replies`: from the first id of each reply to behind its end."""

    ids: list[int]
    replies: list[tuple[int, int]]


def row_of(task: Task, tokenizer: Tokenizer) -> Row:
    ids: list[int] = []
    replies = []
    for text, made in render(task.messages, task.tools):
        start = len(ids)
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if made:
            replies.append((start, len(ids)))
    return Row(ids, replies)


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Ids padded at the right, and which of them the model writes."""
    length = max(len(row.ids) for row in rows)
    ids, made = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        for start, end in row.replies:
            made[index, start:end] = True
    return ids, made


def batches(
    tokenizer: Tokenizer, seed: int, progress: float, *, rows: int = 1024, budget: int = 6144, longest: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """One round of training data: `rows` conversations in batches of at most `budget` ids."""
    rng = Random(f"training {seed}")
    made = (row_of(training_task(rng, progress), tokenizer) for _ in range(rows))
    kept = sorted((row for row in made if len(row.ids) <= longest), key=lambda row: len(row.ids))
    groups: list[list[Row]] = [[]]
    for row in kept:
        if (len(groups[-1]) + 1) * len(row.ids) > budget:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        yield collate(group)
