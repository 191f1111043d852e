"""Products of float32 rows with weights in bfloat16 as entries of the registry, a form for each class of processors.

A number of bfloat16 is the upper half of a float: a weight that is stored so is read in half of the bytes and becomes
the same floats in registers: every sum has the bits that it has with the weight in float32 (torch: torch_widened).
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from agentspeed_kernels.cpu import native
from agentspeed_kernels.cpu.invariant_kernels import BELOW, in_blocks
from agentspeed_kernels.cpu.native import WIDENED
from agentspeed_kernels.cpu.native_kernels import (
    FORM_PRIORITY,
    MOST_PRODUCT_ROWS,
    NativeKernels,
    OpenedFunctions,
)
from agentspeed_kernels.cpu.product_calls import call_experts, call_heads_linear, call_linear
from agentspeed_kernels.cpu.torch_widened import WEIGHTS, extending
from agentspeed_kernels.signature import KernelSpec
from agentspeed_kernels.workspace import Workspace


@final
class WidenedKernels(OpenedFunctions):
    """The products of one form."""

    __slots__ = ()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        assert weight.is_contiguous()
        call_linear(self.functions, x, weight, bias, out, "linear" + WIDENED)

    def heads_linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        assert weight.is_contiguous()
        call_heads_linear(self.functions, x, weight, out, "heads_linear" + WIDENED)

    def experts(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, workspace: Workspace, out: Tensor
    ) -> None:
        call_experts(self.functions, x, gate_up, down, ids, weights, workspace, out, "experts" + WIDENED)


def _specs(form: native.Form, priority: int) -> tuple[KernelSpec, ...]:
    few = WidenedKernels(form, "f32")

    def spec(op: str, most_rows: int | None, *, blocks: bool = False) -> KernelSpec:
        name = f"{form.name}-f32-bf16"
        calls = in_blocks(few) if blocks else {op: getattr(few, op)}
        return KernelSpec(
            op=op,
            name=name + "-blocks" if blocks else name,
            dtypes=frozenset({"float32"}),
            device="cpu",
            call=calls[op],
            priority=priority - BELOW if blocks else priority,
            features=frozenset({form.feature}),
            most_rows=most_rows,
            recordable=True,
            weights=WEIGHTS,
            invariant=True,
        )

    products = ("linear", "heads_linear", "experts")
    extend = KernelSpec(
        op="mla_extend",
        name=f"{form.name}-f32-bf16",
        dtypes=frozenset({"float32"}),
        device="cpu",
        call=extending(NativeKernels(form, "f32").mla_extend),
        priority=priority,
        features=frozenset({form.feature}),
        weights=WEIGHTS,
    )
    return (
        *(spec(op, MOST_PRODUCT_ROWS) for op in products),
        *(spec(op, None, blocks=True) for op in products),
        extend,
    )


SPECS: tuple[KernelSpec, ...] = tuple(
    spec for form, priority in FORM_PRIORITY.items() if form in native.forms_here() for spec in _specs(form, priority)
)
