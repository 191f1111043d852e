"""Which products with weights in 8 bits are entered for which class of processors, and for how many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.amx_kernels import PRIORITY as TILE_PRIORITY
from agentspeed_kernels.cpu.native_kernels import DTYPES, FORM_PRIORITY, MOST_PRODUCT_ROWS
from agentspeed_kernels.signature import ByteFormat, KernelSpec, Layout

FEW_ROWS = 4
"""Up to so many rows of bfloat16 floats in registers are faster than tiles on vectors."""


class Products(Protocol):
    """Of one form and kind."""

    @property
    def linear(self) -> Callable[..., Any]: ...
    @property
    def experts(self) -> Callable[..., Any]: ...


def byte_specs(
    products: Callable[[native.Form, native.Kind], Products],
    name: str,
    weights: frozenset[ByteFormat],
    layout: Layout,
    few: int,
) -> tuple[KernelSpec, ...]:
    """Every form's, named after it and `name`. Where there are tiles on vectors, a few rows are the plain form's, with
    the priority `few`."""
    found: list[KernelSpec] = []
    for form in native.forms_here():
        for kind in form.kinds:
            made, tiles = products(form, kind), form in TILE_PRIORITY
            for op, run in (("linear", made.linear), ("experts", made.experts)):
                spec = KernelSpec(
                    op=op,
                    name=f"{form.name}-{kind}-{name}",
                    dtypes=frozenset({DTYPES[kind]}),
                    device="cpu",
                    call=run,
                    priority=TILE_PRIORITY[form] if tiles else FORM_PRIORITY[form],
                    features=frozenset({form.feature}),
                    most_rows=None if tiles else MOST_PRODUCT_ROWS,
                    recordable=True,
                    weights=weights,
                    layout=layout,
                )
                found.append(spec)
                if form is native.AVX512 and kind == "bf16":
                    both = spec.features | {native.AVX512BF16.feature}
                    found.append(
                        replace(spec, name=f"few-{spec.name}", priority=few, features=both, most_rows=FEW_ROWS)
                    )
    return tuple(found)
