"""Takes out of Triton's interpreter what it computes again for each operation and what nobody reads.

Types of blocks, their shapes and the type of a result are functions of few values, of which a run meets some hundred.
The language is patched once for a kernel, not once more for each function that it calls. Overflow is not looked for,
since without `debug` the interpreter drops the finding. The numbers are computed by what computed them before, and
what is met for the first time goes through Triton's own code: what that refuses stays refused.
tests/triton_interpreter.py imports it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from triton import language
from triton.language import core, semantic
from triton.runtime import interpreter

assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)


# Blocks.

_block_type: Any = core.block_type.__init__
_tensor: Any = core.tensor.__init__
_blocks: dict[Any, Any] = {}
_scalars = core.constexpr(1), core.tuple([])


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    values = tuple(one.value if type(one) is core.constexpr else one for one in shape)
    key = element_ty.name, values
    found = _blocks.get(key)
    if found is None:
        _block_type(self, element_ty, shape)
        sizes = core.tuple([core.constexpr(size) for size in self.shape])
        _blocks[key] = self.shape, self.numel, self.name, core.constexpr(self.numel), sizes
    else:
        self.element_ty = element_ty
        self.shape, self.numel, self.name = found[:3]
    self.key_of_block = key


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    if type.is_block():
        self.dtype = type.element_ty
        self.numel, self.shape = _blocks[type.key_of_block][3:]
    else:
        self.dtype = type.scalar
        self.numel, self.shape = _scalars


core.block_type.__init__ = _init_block_type  # type: ignore[method-assign]
core.tensor.__init__ = _init_tensor  # type: ignore[method-assign]


# Types.

_same: Any = core.dtype.__eq__
_same_block: Any = core.block_type.__eq__
core.dtype.__eq__ = lambda self, other: self is other or _same(self, other)  # type: ignore[method-assign]


def _same_blocks(self: Any, other: Any) -> bool:
    if type(other) is not core.block_type:
        return bool(_same_block(self, other))
    return self.key_of_block[1] == other.key_of_block[1] and bool(self.element_ty == other.element_ty)


core.block_type.__eq__ = _same_blocks  # type: ignore[method-assign]

result_type_of_triton: Any = semantic.TritonSemantic.computation_type_impl
_result_types: dict[Any, Any] = {}


def _computation_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
    key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
    found = _result_types.get(key)
    if found is None:
        found = _result_types[key] = result_type_of_triton(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
    return found


semantic.TritonSemantic.computation_type_impl = _computation_type  # type: ignore[method-assign]

_broadcast: Any = semantic.TritonSemantic.broadcast_impl_value
_joint: dict[Any, Any] = {}


def _broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
    """The shape of two blocks together is known once they have met."""
    a, b = lhs.type, rhs.type
    if not (a.is_block() and b.is_block()):
        if a.is_block():
            return lhs, _splat(self, rhs, a)
        return (_splat(self, lhs, b) if b.is_block() else lhs), rhs
    ours, theirs = a.key_of_block[1], b.key_of_block[1]
    if ours == theirs:
        return lhs, rhs
    joint = _joint.get((ours, theirs))
    if joint is None:
        lhs, rhs = _broadcast(self, lhs, rhs)
        if len(ours) == len(theirs):
            _joint[ours, theirs] = list(lhs.type.key_of_block[1])
        return lhs, rhs
    return tuple(
        one
        if shape == tuple(joint)
        else self.tensor(self.builder.create_broadcast(one.handle, joint), core.block_type(one.dtype, joint))
        for one, shape in ((lhs, ours), (rhs, theirs))
    )


def _splat(self: Any, one: Any, block: Any) -> Any:
    kind = core.block_type(one.type, block.shape)
    return self.tensor(self.builder.create_splat(kind, one.handle), kind)


semantic.TritonSemantic.broadcast_impl_value = _broadcast_values  # type: ignore[method-assign]

_array_type: Any = interpreter._get_np_dtype
_array_types: dict[str, Any] = {}


def _get_np_dtype(kind: Any) -> Any:
    scalar = kind.scalar
    found = _array_types.get(scalar.name)
    if found is None:
        found = _array_types[scalar.name] = _array_type(scalar)
    return found


interpreter._get_np_dtype = _get_np_dtype  # type: ignore[attr-defined]


# The language.

_patch: Any = interpreter._patch_lang
_scopes: list[Any] = []
_patched: set[int] = set()


class _Patches:
    """What a kernel and the functions that it calls have patched, undone at the end of the kernel."""

    def restore(self) -> None:
        while _scopes:
            _scopes.pop().restore()
        _patched.clear()


class _Nothing:
    def restore(self) -> None: ...


@functools.cache
def _languages(function: Any) -> frozenset[int]:
    return frozenset(id(value) for value in function.__globals__.values() if value is language or value is core)


def _patch_once(function: Any) -> Any:
    wanted = _languages(function)
    if wanted and wanted <= _patched:
        return _Nothing()
    _scopes.append(_patch(function))
    _patched.update(wanted)
    return _Patches()


interpreter._patch_lang = _patch_once  # type: ignore[attr-defined]
