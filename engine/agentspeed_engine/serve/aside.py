"""Runs what computes in parallel beside the loop's thread, which must never do so itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def aside(call: Callable[[], T]) -> T:
    """Runs `call` in a thread that ends with it. Whatever thread computes in parallel keeps a team of its own as long
    as it lives, and OpenMP stops spinning once there are more of them than cores: a step of one row takes half as long
    again. So the loop's thread must never have had a team; only the worker's has one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
