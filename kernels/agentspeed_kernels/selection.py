"""Chooses a kernel for a need: pure, and able to say why every other candidate was passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar, final, overload

import torch
from torch import Tensor

from agentspeed_kernels.cpu.native_kernels import moves
from agentspeed_kernels.fp8_blocks import Stored
from agentspeed_kernels.ops import (
    BYTE_OPS,
    CACHE_OPS,
    OPS,
    WEIGHT_OPS,
    AddNormLinear,
    AddNormRoute,
    AddRmsNorm,
    CopyRows,
    Experts,
    ExpertsAndShared,
    GqaRows,
    HeadsLinear,
    IndexAppend,
    IndexSelect,
    LatentAppend,
    Linear,
    MlaExtend,
    MlaQueries,
    MlaRows,
    MlaSelected,
    MovePages,
    QkvAppend,
    RmsNorm,
    Route,
    TurnRope,
)
from agentspeed_kernels.packing import Weight, gathered, in_bytes, in_bytes_each, pack, pack_each
from agentspeed_kernels.platform import Platform
from agentspeed_kernels.registry import Registry
from agentspeed_kernels.signature import OWN, ByteFormat, CacheFormat, Dtype, KernelSpec, Layout, Need, WeightFormat
from agentspeed_kernels.workspace import Workspace

log = logging.getLogger("agentspeed.kernels")


class NoKernel(LookupError):
    """Nothing registered can serve a need; the message lists every candidate with its reason."""


@final
class WrongPreference(ValueError):
    """Text that asks for no choice of kernels."""

    def __init__(self, part: str) -> None:
        self.message = f"{part!r} names no choice of kernels."
        self.remedy = (
            "Write op=name to force one and -name or -op/name to exclude one, with commas between; "
            f"ops are {', '.join(sorted(OPS))}."
        )
        super().__init__(f"{self.message} {self.remedy}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    kernel: KernelSpec
    rejected: tuple[tuple[KernelSpec, str], ...]

    def explain(self) -> str:
        others = "; ".join(f"not {spec.name}: {why}" for spec, why in self.rejected)
        return f"{self.kernel.op}: {self.kernel.name}" + (f" ({others})" if others else "")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What a user asked of the choice: kernels to use, kernels never to use."""

    forced: Mapping[str, str] = field(default_factory=dict)
    """Op -> name of its kernel, wherever that fits."""
    excluded: frozenset[str] = frozenset()
    """Names, or `op/name`."""

    @staticmethod
    def parse(text: str) -> Preferences:
        """`mla_rows=torch,-native,-linear/triton`: commas between; `op=name` forces, `-name` and `-op/name` exclude.

        Raises `WrongPreference` for anything else."""
        forced: dict[str, str] = {}
        excluded: set[str] = set()
        for part in (piece.strip() for piece in text.split(",")):
            op, equals, name = part.partition("=")
            if part.startswith("-") and len(part) > 1:
                excluded.add(part[1:])
            elif equals and op in OPS and name:
                forced[op] = name
            elif part:
                raise WrongPreference(part)
        return Preferences(forced=forced, excluded=frozenset(excluded))

    @staticmethod
    def from_environment() -> Preferences:
        """What the variable `SWITCH` asks for; nothing when it is not set. Raises `WrongPreference`."""
        return Preferences.parse(os.environ.get(SWITCH, ""))

    @property
    def joins(self) -> bool:
        """Whether steps may call ops that join others."""
        return JOINED not in self.excluded

    def objection(self, spec: KernelSpec) -> str | None:
        if spec.name in self.excluded or f"{spec.op}/{spec.name}" in self.excluded:
            return "excluded by option"
        return None


SWITCH = "AGENTSPEED_KERNELS"
"""The option `Preferences.parse` reads, as an environment variable of the engine's process."""
HEAD = "head"
"""Stands for the op of `Kernels.head` where its weight is laid out."""
JOINED = "joined"
"""The name by which a user excludes the ops that join others, all together (`-joined`)."""


def select(
    need: Need, candidates: tuple[KernelSpec, ...], platform: Platform, preferences: Preferences | None = None
) -> Choice:
    """The fitting candidate of highest priority, or the fitting one that is forced."""
    preferences = preferences or Preferences()
    reasons_of = [
        (spec, why)
        for spec in candidates
        if (why := preferences.objection(spec) or misfit(spec, need, platform)) is not None
    ]
    unfit = {id(spec) for spec, _ in reasons_of}
    fitting = sorted((spec for spec in candidates if id(spec) not in unfit), key=lambda spec: -spec.priority)
    if not fitting:
        raise NoKernel(_nothing_fits(need, reasons_of, platform))
    wanted = preferences.forced.get(need.op)
    best = next((spec for spec in fitting if spec.name == wanted), fitting[0])
    forced = best.name == wanted
    others = [spec for spec in fitting if spec is not best]
    reasons_of += [
        (spec, f"{best.name} is forced" if forced else f"priority {spec.priority} is below {best.priority}")
        for spec in others
    ]
    return Choice(kernel=best, rejected=tuple(reasons_of))


def _nothing_fits(need: Need, reasons_of: Iterable[tuple[KernelSpec, str]], platform: Platform) -> str:
    """What was looked for, and why each candidate is none: those of one reason together, for there are many."""
    names: dict[str, list[str]] = {}
    for spec, why in reasons_of:
        names.setdefault(why, []).append(spec.name)
    kept = [f"{role} in {held}" for role, held in (("weights", need.weights), ("cache", need.cache)) if held]
    rows = "any number of rows" if need.rows == UNBOUNDED else _rows(need.rows)
    return (
        f"no {'batch-invariant ' if need.invariant else ''}kernel for {need.op} in {', '.join((need.dtype, *kept))} "
        f"with {rows} on {platform.device}: "
        + ("; ".join(f"{', '.join(those)}: {why}" for why, those in names.items()) or "none is registered")
    )


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def misfit(spec: KernelSpec, need: Need, platform: Platform) -> str | None:
    """Why a kernel cannot serve a need there; None when it can."""
    if spec.device != platform.device:
        return f"runs on {spec.device}"
    if need.invariant and not spec.invariant:
        return "is not batch-invariant"
    if need.dtype not in spec.dtypes:
        return f"formats are {', '.join(sorted(spec.dtypes))}"
    for role, asked, taken in (("weights", need.weights, spec.weights), ("cache", need.cache, spec.cache)):
        asked = asked or need.dtype
        if asked not in (taken if taken is not None else {need.dtype}):
            return f"{role} in {asked} are not taken"
    for feature in sorted(spec.features - platform.features):
        why = platform.absent.get(feature) or platform.lacks.get(feature, "absent")
        return f"needs {feature}: {why}"
    if spec.most_rows is not None and need.rows > spec.most_rows:
        return f"up to {_rows(spec.most_rows)}"
    if need.layout is not None and spec.layout != need.layout:
        return f"takes weights in {spec.layout}, not {need.layout}"
    objections = (limit.objection(axis, need.sizes[axis]) for axis, limit in spec.sizes.items() if axis in need.sizes)
    return next((why for why in objections if why is not None), None)


C = TypeVar("C", bound=Callable[..., Any])


@final
class Ladder(Generic[C]):
    """The choices of one op over the number of rows, made once; a step only compares integers."""

    __slots__ = ("_bands", "_last")

    def __init__(self, bands: tuple[tuple[int, Choice], ...], last: Choice) -> None:
        self._bands = bands
        self._last = last

    def at(self, rows: int) -> C:
        call: C = self.choice(rows).kernel.call  # type: ignore[assignment]
        return call

    def choice(self, rows: int) -> Choice:
        """What runs for so many rows, and why."""
        for most, choice in self._bands:
            if rows <= most:
                return choice
        return self._last

    def choices(self) -> tuple[tuple[int | None, Choice], ...]:
        """(most rows, what runs for up to so many); None: for any number above the band before."""
        return (*self._bands, (None, self._last))

    def explain(self) -> tuple[str, ...]:
        """One line a band of rows."""
        lines = [f"up to {_rows(most)}: {choice.explain()}" for most, choice in self._bands]
        return (*lines, f"{'above' if lines else 'any rows'}: {self._last.explain()}")


UNBOUNDED = 1 << 62
_TORCH: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
Check = Callable[[KernelSpec], str | None]
"""Says what is wrong with a kernel from outside, or None; `conformance.objection` is one."""


@final
class Kernels:
    """All ops for one format on one platform.

    A kernel from outside is checked when it would be chosen for the first time; one that fails, or raises, is left out
    with a warning that names it, and the next best is taken."""

    __slots__ = ("_head", "_ladders", "_laying", "_moves", "_skips", "cache", "dtype", "invariant", "layout", "weights")

    def __init__(
        self,
        registry: Registry,
        platform: Platform,
        dtype: Dtype,
        ops: tuple[str, ...],
        *,
        sizes: Mapping[str, int] | None = None,
        preferences: Preferences | None = None,
        check: Check | None = None,
        weights: WeightFormat | None = None,
        cache: CacheFormat | None = None,
        invariant: bool = False,
        optional: Collection[str] = (),
    ) -> None:
        """`sizes`: what is known of the model's axes and its page size, for kernels that do not take any. `weights`:
        of the ops in `BYTE_OPS`, or bfloat16 of those in `WEIGHT_OPS`; `cache`: of the pools of those in `CACHE_OPS`;
        None: `dtype`. `invariant`: batch-invariant kernels alone. Raises `NoKernel` where an op has no kernel for that;
        one of the `optional` is left out then."""
        self.dtype: Dtype = dtype
        self.weights: WeightFormat | None = weights
        self.cache: CacheFormat | None = cache
        self.invariant = invariant
        chooser = _Chooser(registry, platform, dtype, dict(sizes or {}), preferences or Preferences(), check, weights,
                           cache, invariant)  # fmt: skip
        self.layout: Layout = chooser.layout
        """Of weights in `dtype`: that of the best kernel for single rows, where weights are what a step waits for."""
        self._ladders: dict[str, Ladder[Any]] = {}
        for op in ops:
            try:
                self._ladders[op] = chooser.ladder(op)
            except NoKernel as missing:
                if op not in optional:
                    raise
                log.info("%s is done by the ops that it joins: %s", op, missing)
        apart = weights == "fp8" and "linear" in ops
        self._head: Ladder[Linear] | None = chooser.ladder("linear", wide=True) if apart else None
        self._moves = moves(platform.features, dtype)
        self._laying = Workspace(platform.device)
        visit = [self._ladders[op] for op in ("experts", "experts_and_shared") if op in self._ladders]
        self._skips = bool(visit) and all(choice.kernel.nobody for ladder in visit for _, choice in ladder.choices())
        for feature, why in platform.absent.items():
            log.warning("slower kernels run because %s is absent: %s", feature, why)

    @overload
    def __getitem__(self, op: Literal["linear"]) -> Ladder[Linear]: ...
    @overload
    def __getitem__(self, op: Literal["heads_linear"]) -> Ladder[HeadsLinear]: ...
    @overload
    def __getitem__(self, op: Literal["rms_norm"]) -> Ladder[RmsNorm]: ...
    @overload
    def __getitem__(self, op: Literal["add_rms_norm"]) -> Ladder[AddRmsNorm]: ...
    @overload
    def __getitem__(self, op: Literal["add_norm_linear"]) -> Ladder[AddNormLinear]: ...
    @overload
    def __getitem__(self, op: Literal["rope"]) -> Ladder[TurnRope]: ...
    @overload
    def __getitem__(self, op: Literal["latent_append"]) -> Ladder[LatentAppend]: ...
    @overload
    def __getitem__(self, op: Literal["mla_rows"]) -> Ladder[MlaRows]: ...
    @overload
    def __getitem__(self, op: Literal["mla_extend"]) -> Ladder[MlaExtend]: ...
    @overload
    def __getitem__(self, op: Literal["qkv_append"]) -> Ladder[QkvAppend]: ...
    @overload
    def __getitem__(self, op: Literal["gqa_rows", "gqa_extend"]) -> Ladder[GqaRows]: ...
    @overload
    def __getitem__(self, op: Literal["index_append"]) -> Ladder[IndexAppend]: ...
    @overload
    def __getitem__(self, op: Literal["index_select"]) -> Ladder[IndexSelect]: ...
    @overload
    def __getitem__(self, op: Literal["mla_selected"]) -> Ladder[MlaSelected]: ...
    @overload
    def __getitem__(self, op: Literal["route"]) -> Ladder[Route]: ...
    @overload
    def __getitem__(self, op: Literal["experts"]) -> Ladder[Experts]: ...
    @overload
    def __getitem__(self, op: Literal["mla_queries"]) -> Ladder[MlaQueries]: ...
    @overload
    def __getitem__(self, op: Literal["add_norm_route"]) -> Ladder[AddNormRoute]: ...
    @overload
    def __getitem__(self, op: Literal["experts_and_shared"]) -> Ladder[ExpertsAndShared]: ...
    @overload
    def __getitem__(self, op: Literal["copy_rows"]) -> Ladder[CopyRows]: ...
    @overload
    def __getitem__(self, op: Literal["gather_pages", "scatter_pages"]) -> Ladder[MovePages]: ...
    @overload
    def __getitem__(self, op: str) -> Ladder[Any]: ...
    def __getitem__(self, op: str) -> Ladder[Any]:
        return self._ladders[op]

    @property
    def head(self) -> Ladder[Linear]:
        """`linear` for the model's head, which those who publish in fp8 leave as it is."""
        return self["linear"] if self._head is None else self._head

    @property
    def kept(self) -> torch.dtype:
        """The format of weights that are not in 8 bits: what `weight` and `experts` are given where those are kept as
        they are, and a table of embeddings is looked up in."""
        return _TORCH["bfloat16" if self.weights == "bfloat16" else self.dtype]

    @property
    def _bytes(self) -> ByteFormat | None:
        return None if self.weights == "bfloat16" else self.weights

    def has(self, op: str) -> bool:
        """Whether it was asked for, and not left out."""
        return op in self._ladders

    def weight(self, held: Stored, parts: int = 1, op: str = "linear") -> Weight:
        """`held` [..., N, K] as the kernels of `op` want it (`parts` as in `pack`); `HEAD` for those of `head`. Keep
        the result and drop `held`: then there is no second copy."""
        bytes_of = self._bytes
        if bytes_of is not None and (op in BYTE_OPS or (op == HEAD and self._head is None)):
            return in_bytes(held, bytes_of, parts, self._laying)
        assert isinstance(held, Tensor) and held.dtype == self.kept
        return held if self.layout == "rows" else pack(held, parts)

    def experts(self, count: int, *parts: Callable[[int], Stored]) -> Weight:
        """What each part gives of the experts 0 to `count`, as `weight` gives [count, N of all parts, K]. One matrix at
        a time is in memory beside what is made of them."""
        if self._bytes is not None:
            return in_bytes_each(count, parts, self._bytes, self._laying)
        return gathered(count, parts) if self.layout == "rows" else pack_each(count, parts)

    def laid_out(self) -> None:
        """No weight is asked for any more: what their making took is given back."""
        self._laying = Workspace(self._laying.device)

    def copy(self, x: Tensor, out: Tensor) -> None:
        """out[T, H, N] = x; both may be strided. Like `add`, what lies between ops: part of a recorded step."""
        if self._moves is None:
            out.copy_(x)
        else:
            self._moves.copy(x, out)

    def add(self, x: Tensor, total: Tensor) -> None:
        """total += x, both contiguous."""
        if self._moves is None:
            total.add_(x)
        else:
            self._moves.add(x, total)

    def own(self, ids: Tensor, weights: Tensor, first: int, held: int) -> None:
        """Of choices [T, top] of experts, int64 ids and their weights as `route` gives them: those from `first` on, of
        which there are `held`, are numbered from 0, and all others weigh nothing and are visited by no kernel that
        can leave them out. In place."""
        if self._skips and ids.is_cuda:
            # Imported late: only a GPU's kernels need it.
            from agentspeed_kernels.triton.kernels import own

            own(ids, weights, first, held)
        elif self._moves is None or weights.dtype != torch.float32:
            local = ids - first
            mine = (local >= 0) & (local < held)
            ids.copy_(local.where(mine, 0))
            weights.mul_(mine)
        else:
            self._moves.own(ids, weights, first, held)

    def recordable(self, ops: Iterable[str], rows: int) -> bool:
        """A step of these ops and `rows` tokens is nothing but calls of the C library."""
        ladders = [self._ladders[op] for op in ops] + ([] if self._head is None else [self._head])
        return all(ladder.choice(rows).kernel.recordable for ladder in ladders)


@final
class _Chooser:
    """Makes the ladders of one `Kernels`, and keeps which kernels from outside were found wanting."""

    def __init__(
        self,
        registry: Registry,
        platform: Platform,
        dtype: Dtype,
        sizes: dict[str, int],
        preferences: Preferences,
        check: Check | None,
        weights: WeightFormat | None = None,
        cache: CacheFormat | None = None,
        invariant: bool = False,
    ) -> None:
        self._registry, self._platform, self._invariant = registry, platform, invariant
        self._dtype: Dtype = dtype
        self._weights: WeightFormat | None = weights
        self._cache: CacheFormat | None = cache
        self._sizes, self._preferences, self._check = sizes, preferences, check
        self._sound: set[str] = set()
        self.layout: Layout = self._select("linear", 1, self._candidates("linear"), None).kernel.layout

    def ladder(self, op: str, *, wide: bool = False) -> Ladder[Any]:
        """`wide`: for weights in `dtype` whatever the engine's are in."""
        candidates = self._candidates(op)
        kept_so = WEIGHT_OPS if self._weights == "bfloat16" else BYTE_OPS
        weights = self._weights if op in kept_so and not wide else None
        layout = self.layout if op in WEIGHT_OPS and weights is None else None
        while True:
            edges = sorted({spec.most_rows for spec in candidates if spec.most_rows is not None})
            bands = tuple((edge, self._select(op, edge, candidates, layout, weights)) for edge in edges)
            last = self._select(op, UNBOUNDED, candidates, layout, weights)
            unsound = self._unsound({choice.kernel.name: choice.kernel for _, choice in (*bands, (0, last))})
            if unsound is None:
                break
            candidates = tuple(spec for spec in candidates if spec is not unsound)
        # An edge of kernels that do not fit the need is none.
        steps = pairwise((*bands, (UNBOUNDED, last)))
        bands = tuple(band for band, (_, above) in steps if band[1].kernel is not above.kernel)
        for edge, choice in bands:
            log.info("%s up to %d rows: %s", self._dtype, edge, choice.explain())
        log.info("%s: %s", self._dtype, last.explain())
        return Ladder(bands, last)

    def _candidates(self, op: str) -> tuple[KernelSpec, ...]:
        """Kernels of other devices say nothing worth reading, unless there is none for this one."""
        everywhere = self._registry.candidates(op)
        return tuple(spec for spec in everywhere if spec.device == self._platform.device) or everywhere

    def _select(
        self,
        op: str,
        rows: int,
        candidates: tuple[KernelSpec, ...],
        layout: Layout | None,
        weights: WeightFormat | None = None,
    ) -> Choice:
        need = Need(
            op=op,
            dtype=self._dtype,
            rows=rows,
            layout=layout,
            weights=weights,
            cache=self._cache if op in CACHE_OPS else None,
            invariant=self._invariant,
            sizes=self._sizes,
        )
        return select(need, candidates, self._platform, self._preferences)

    def _unsound(self, chosen: dict[str, KernelSpec]) -> KernelSpec | None:
        """The first of the chosen kernels that comes from outside and fails its check."""
        for spec in chosen.values():
            if self._check is None or spec.origin == OWN or repr(spec) in self._sound:
                continue
            try:
                why = self._check(spec)
            except Exception as error:  # noqa: BLE001 - foreign code may raise anything; the warning below names it
                why = f"it raised {type(error).__name__}: {error}"
            if why is not None:
                log.warning("%r is left out: %s", spec, why)
                return spec
            self._sound.add(repr(spec))
        return None
