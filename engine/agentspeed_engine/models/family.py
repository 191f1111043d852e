"""What a family of models is to the engine: a record of functions. Importing it loads no tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, final

from agentspeed_engine.models.fields import Fields
from agentspeed_engine.models.kv_layout import KvLayout
from agentspeed_engine.models.rope_config import RopeConfig
from agentspeed_engine.models.tensor_shapes import Cut, Shape
from agentspeed_engine.spmd.placement import Mesh, Rank

if TYPE_CHECKING:
    from agentspeed_engine.models.kv_pools import KvPools
    from agentspeed_engine.models.moe_config import MoeConfig
    from agentspeed_engine.models.state import StepState
    from agentspeed_engine.models.weights import WeightSource
    from agentspeed_engine.spmd.lower import Module
    from agentspeed_kernels.selection import Kernels
    from agentspeed_kernels.signature import Device

LONG_OPS = frozenset({"mla_extend", "gqa_extend"})
"""Of long extends alone."""
Capability = Literal["rewind_to_any_token"]
"""`rewind_to_any_token`: a cut at any token leaves rows that need no computing again. Families with recurrent state or
sliding windows lack it, and the engine, which promises it, refuses them."""


class ModelConfig(Protocol):
    """What the engine reads of any family's configuration; families add their own."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def draft_layers(self) -> int:
        """Layers for drafting that the checkpoint has behind its own; they are left unread."""
        ...

    @property
    def context_limit(self) -> int: ...
    @property
    def rope(self) -> RopeConfig: ...
    @property
    def moe(self) -> MoeConfig | None:
        """None for a model without routed experts."""
        ...


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


def _itself(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[ConfigT]):
    """One architecture under all the names it is published by. `models.registry` lists them."""

    name: str
    """As its makers write it, for messages and lists."""
    attention: str
    """Its kind of attention, for messages and lists."""
    model_types: tuple[str, ...]
    """Values of config.json's `model_type`."""
    parse: Callable[[Fields], ConfigT]
    """Checks a configuration. Raises `EngineFault` (bad_config)."""
    shapes: Callable[[ConfigT], Iterator[tuple[str, Shape]]]
    """Every tensor that a checkpoint must hold, without `prefix`, in a fixed order."""
    cuts: Callable[[ConfigT, Mesh], list[Cut]]
    """What a mesh must divide evenly."""
    kv_layout: Callable[[ConfigT, str, Mesh], KvLayout]
    """The pools of one rank of a mesh, in a dtype or in a `CacheFormat` of the kernels. Raises `EngineFault`
    (bad_options) for one that nothing serves."""
    ops: tuple[str, ...]
    """The ops of the kernels that its chain calls."""
    joined_ops: tuple[str, ...] = ()
    """Those that its chain calls beside them where steps of few rows are graphs: they join several of the others."""
    sizes: Callable[[ConfigT, Mesh], dict[str, int]]
    """The axes of its attention on one rank, by the names of the kernels' ops."""
    build: Callable[[ConfigT, WeightSource, KvPools, Rank, Kernels], list[Module[StepState]]]
    """The chain of local modules of one rank. Raises `EngineFault` (bad_config) for a mesh that does not divide it."""
    text_part: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _itself
    """The part of config.json that describes the language model, `model_type` of the whole kept."""
    prefix: str = ""
    """Stands before the name of every tensor of the language model in the checkpoint."""
    unread: re.Pattern[str] | None = None
    """Tensors that are left alone."""
    notice: str = ""
    """What of the model does not run, as a sentence for the user who loads one; mostly empty."""
    capabilities: frozenset[Capability] = frozenset({"rewind_to_any_token"})

    def ops_on(self, device: Device, *, joins: bool = True, invariant: bool = False) -> tuple[str, ...]:
        """The ops that it calls there; `joins`: those that join others among them; `invariant`: without those of long
        extends, which have other sums than those of rows."""
        ops = tuple(op for op in self.ops if op not in LONG_OPS) if invariant else self.ops
        return (*ops, *self.joined_ops) if device == "cuda" and joins else ops
