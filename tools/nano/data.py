"""Conversations as rows of ids with the places of the model's replies, and batches of rows of similar length."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.nano.format import ASSISTANT, END, render
from tools.nano.tasks import Task, training_task

MULTIPLE = 16
"""Positions of a batch, which a model reads to write the next ones: matrix units like even numbers of them."""


@dataclass(frozen=True)
class Row:
    """`replies`: from the first id of each reply to behind its end."""

    ids: list[int]
    replies: list[tuple[int, int]]


def row_of(task: Task, tokenizer: Tokenizer) -> Row:
    """All in one call of the tokenizer: control tokens part the text, so it gives what the pieces alone would."""
    ids: list[int] = tokenizer.encode(
        "".join(text for text, _ in render(task.messages, task.tools)), add_special_tokens=False
    ).ids
    replies = []
    for start, number in enumerate(ids, 1):
        if number == ASSISTANT:
            replies.append((start, ids.index(END, start) + 1))
    return Row(ids, replies)


def collate(rows: Sequence[Row], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Ids padded at the right, and which of them the model writes. All but the last id are a multiple of `multiple`."""
    length = -(-max(len(row.ids) - 1 for row in rows) // multiple) * multiple + 1
    ids, made = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        for start, end in row.replies:
            made[index, start:end] = True
    return ids, made


Batch = tuple[Tensor, Tensor]


def batches(
    tokenizer: Tokenizer, seed: int, progress: float, *, rows: int, budget: int, longest: int = 640
) -> list[Batch]:
    """One round of training data: `rows` conversations in batches of at most `budget` ids."""
    rng = Random(f"training {seed}")
    made = (row_of(training_task(rng, progress), tokenizer) for _ in range(rows))
    kept = sorted((row for row in made if len(row.ids) <= longest), key=lambda row: len(row.ids))
    groups: list[list[Row]] = [[]]
    for row in kept:
        if (len(groups[-1]) + 1) * (len(row.ids) + MULTIPLE) > budget:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return [collate(group, MULTIPLE) for group in groups]


class Rounds:
    """Rounds of training data, each of the next number; made here, or ahead of time by worker processes.

    A learner faster than its workers sees one of the last rounds again instead of waiting."""

    REMEMBERED = 64

    def __init__(self, tokenizer: Tokenizer, *, first: int, rows: int, budget: int, workers: int = 0) -> None:
        self.number, self.replayed = first, 0
        self._tokenizer, self._rows, self._budget, self._most_ahead = tokenizer, rows, budget, 2 * workers
        self._workers = None
        if workers:
            self._workers = ProcessPoolExecutor(
                workers, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.to_str(),)
            )
        self._ahead: deque[Future[list[_Plain]]] = deque()
        self._recent: deque[list[Batch]] = deque(maxlen=self.REMEMBERED)
        self._rng = Random("replay")

    def next(self, progress: float) -> list[Batch]:
        """The batches of one round."""
        if self._workers is None:
            self.number += 1
            return batches(self._tokenizer, self.number, progress, rows=self._rows, budget=self._budget)
        while len(self._ahead) < self._most_ahead:
            self.number += 1
            self._ahead.append(self._workers.submit(_work, self.number, progress, self._rows, self._budget))
        if self._recent and not self._ahead[0].done():
            self.replayed += 1
            return self._rng.choice(self._recent)
        fresh = [(torch.from_numpy(ids), torch.from_numpy(made)) for ids, made in self._ahead.popleft().result()]
        self._recent.append(fresh)
        return fresh

    def close(self) -> None:
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)


_Plain = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
_tokenizer_here: list[Tokenizer] = []


def _start_worker(tokenizer: str) -> None:
    os.nice(10)  # the learner goes first
    torch.set_num_threads(1)
    _tokenizer_here.append(Tokenizer.from_str(tokenizer))


def _work(number: int, progress: float, rows: int, budget: int) -> list[_Plain]:
    """Arrays, in as few bytes as they need: tensors would travel by open files, which are few."""
    made = batches(_tokenizer_here[0], number, progress, rows=rows, budget=budget)
    return [(ids.to(torch.int16).numpy(), replies.numpy()) for ids, replies in made]
