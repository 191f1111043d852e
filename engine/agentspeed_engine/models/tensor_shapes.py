"""The words for what a checkpoint holds and a mesh cuts, below every description of a model."""

from __future__ import annotations

Shape = tuple[int, ...]
Cut = tuple[str, int, int]
"""(what is cut, its extent, into how many)."""
